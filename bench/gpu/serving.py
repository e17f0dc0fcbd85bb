"""Tokens a second over HTTP of a small model on one GPU: stock vLLM, our layer over it, and several engines at once.

    python bench/gpu/serving.py OUT.json [--profile]

The 0.6B shape in bfloat16, 512 sequences at once, log-probabilities on. All servers run from the beginning, each on
its share of the memory, and are loaded one after the other, twice. With --profile, where the processes of each server
spend their time, by py-spy, into files beside OUT.json.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from vllm_servers import load, save_shape, server

RUNNING, REQUESTS, NEW_TOKENS = 512, 1024, 256
ENGINES = 3


def main(out: Path, profile: bool) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        model = save_shape(directory / "model", "0.6B")
        cache = str(19 * 10**9)
        stock = stack.enter_context(
            server("stock", model, directory, "--load-format", "dummy", "--kv-cache-memory-bytes", cache,
                   "--max-num-seqs", str(RUNNING), "--max-model-len", "1024", ours=False)
        )  # fmt: skip
        ours = [
            stack.enter_context(
                server(f"ours{index}", model, directory, "--engine_kwargs",
                       json.dumps({"load_format": "dummy", "kv_cache_memory_bytes": int(cache)}),
                       "--max_num_seqs", str(RUNNING), "--max_model_len", "1024",
                       ours=True)
            )
            for index in range(ENGINES)
        ]  # fmt: skip
        for side in (stock, *ours):
            side.wait()
            print(side.name, "ready", flush=True)
        sides = {"stock": [stock], **{f"ours_{count}": ours[:count] for count in range(1, ENGINES + 1)}}
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for round in range(3):
            for label, servers in sides.items():
                if profile and round == 2:
                    watch(servers[0].process.pid, out.with_name(f"profile_{label}.txt"))
                speed = load(servers, REQUESTS, RUNNING, NEW_TOKENS)
                print(label, round, f"{speed:.0f}", flush=True)
                if round:  # the first warms up
                    speeds[label].append(speed)
        medians = {label: round(statistics.median(values)) for label, values in speeds.items()}
        result = {
            "device": torch.cuda.get_device_name(), "model": "Qwen3 0.6B shape, bfloat16", "running": RUNNING,
            "new_tokens": NEW_TOKENS, "tokens_per_second": medians,
            "http_overhead": round(1 - medians["ours_1"] / medians["stock"], 4),
        }  # fmt: skip
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def watch(root: int, out: Path) -> None:
    """Stacks of a server's processes, a few seconds into the load, for ten seconds."""

    def run() -> None:
        time.sleep(2)
        pids = [int(pid) for pid in descendants(root)]
        jobs = []
        for pid in pids:
            raw = out.with_suffix(f".{pid}.raw")
            jobs.append(
                subprocess.Popen(
                    ["py-spy", "record", "-p", str(pid), "-d", "5", "-r", "200", "-f", "raw", "-t", "-o", str(raw)]
                )
            )
        for job in jobs:
            job.wait(30)
        lines = []
        for pid in pids:
            raw = out.with_suffix(f".{pid}.raw")
            if raw.exists():
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:60]
                lines += [f"== {pid} {command}", *summary(raw.read_text())]
                raw.unlink()
        out.write_text("\n".join(lines))

    threading.Thread(target=run, daemon=True).start()


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def summary(raw: str) -> list[str]:
    """Shares of samples by thread and by function, itself and with what it calls."""
    total: dict[str, int] = {}
    own: dict[str, int] = {}
    within: dict[str, int] = {}
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        total[thread] = total.get(thread, 0) + int(count)
        if frames:
            own[frames[-1]] = own.get(frames[-1], 0) + int(count)
        for frame in set(frames):
            within[frame] = within.get(frame, 0) + int(count)
    lines = [f"  thread {name}: {count}" for name, count in sorted(total.items(), key=lambda item: -item[1])[:6]]
    for title, counts in (("self", own), ("total", within)):
        top = sorted(counts.items(), key=lambda item: -item[1])[:25]
        lines += [f"  {title} {count:5d} {frame}" for frame, count in top]
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--profile" in sys.argv)
