"""Tokens a second over HTTP of a small model on one GPU: stock vLLM, our layer over it, and what our launcher starts.

    python bench/gpu/serving.py OUT.json [--shape 0.6B] [--engines N] [--without_stock]
                                [--stock_with=FLAGS ...] [--profile] [--after PID]

The 0.6B shape, or another one, in bfloat16, 512 sequences at once, log-probabilities on. With two GPUs, stock vLLM
and one engine of ours share the first, and another stock vLLM and our launcher's own choice the second, so that each
ratio is of one GPU; with one of 140 GB all are on it, and one stock server is enough. --engines: of ours on the second,
in place of the launcher's choice. Our one engine is asked for the packed form of answers, and for JSON as stock vLLM
is, which is what http_overhead compares. --stock_with: further flags of a stock server on the second GPU, once each
(--stock_with='--api-server-count 2'). All run from the beginning and are loaded one after the other, in turns. With
--profile, where the processes of each server spend their time, by py-spy, in a last turn that does not count, into
files beside OUT.json. With --after, servers start at once, and are loaded when that process has ended.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from vllm_servers import SHAPES, Side, load, save_shape, server, until_ended

sys.path.insert(0, str(Path(__file__).parents[1]))
from about import about

RUNNING, REQUESTS, NEW_TOKENS, TURNS = 512, 1024, 256, 3
#: Of a server that is to hold all sequences, for a layer: tokens of 8 heads of 128, keys and values, 2 bytes.
CACHE = (RUNNING + 16) * (64 + NEW_TOKENS + 16) * 8 * 128 * 2 * 2


def main(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        model = save_shape(directory / "model", given.shape)
        cache = CACHE * SHAPES[given.shape][2]
        second = str(torch.cuda.device_count() - 1)

        def stock(name: str, gpus: str, *flags: str) -> Side:
            return stack.enter_context(
                server(name, model, directory, "--load-format", "dummy", "--kv-cache-memory-bytes", str(cache),
                       "--gpu-memory-utilization", "0.05",
                       "--max-num-seqs", str(RUNNING), "--max-model-len", "1024", *flags, ours=False,
                       gpus=gpus)
            )  # fmt: skip

        def ours(name: str, gpus: str, room: int, *flags: str) -> Side:
            kwargs = json.dumps({"load_format": "dummy", "kv_cache_memory_bytes": room, "gpu_memory_utilization": 0.05})
            return stack.enter_context(
                server(name, model, directory, "--engine_kwargs", kwargs, "--max_num_seqs", str(RUNNING),
                       "--max_model_len", "1024", *flags, ours=True, gpus=gpus)
            )  # fmt: skip

        sides = {} if given.without_stock else {"stock": stock("stock", "0")}
        sides["ours_one_engine"] = ours("one", "0", cache, "--engines_per_device", "1")
        if not given.without_stock and second != "0":
            sides["stock_again"] = stock("stock_again", second)
        chosen = ["--engines_per_device", str(given.engines)] if given.engines else []
        engines = given.engines or (2 if given.shape == "0.6B" else 1)
        sides["ours"] = ours("ours", second, cache // engines, *chosen)
        for number, more in enumerate(given.stock_with):
            sides[f"stock {more}"] = stock(f"stock_with{number}", second, *more.split())
        sides["ours_one_engine_json"] = dataclasses.replace(sides["ours_one_engine"], ours=False)
        for side in sides.values():
            side.wait()
            print(side.name, "ready", flush=True)
        until_ended(given.after)
        speeds: dict[str, list[float]] = {label: [] for label in sides}
        for turn in range(TURNS + 1):
            for label, side in sides.items():
                speed = load([side], REQUESTS, RUNNING, NEW_TOKENS)
                print(label, turn, f"{speed:.0f}", flush=True)
                if turn:  # the first warms up
                    speeds[label].append(speed)
            if turn:
                write(given, speeds)
        if given.profile:
            for label, side in sides.items():
                watching = watch(side.process.pid, given.out.with_name(f"profile_{label.replace(' ', '_')}.txt"))
                load([side], REQUESTS, RUNNING, NEW_TOKENS)
                watching.join(40)
    print(given.out.read_text())


def write(given: argparse.Namespace, speeds: dict[str, list[float]]) -> None:
    """What is known so far."""
    medians = {label: round(statistics.median(values)) for label, values in speeds.items()}
    result = {
        **about(), "model": f"Qwen3 {given.shape} shape, bfloat16", "running": RUNNING,
        "new_tokens": NEW_TOKENS, "engines": given.engines or "the launcher's choice", "tokens_per_second": medians,
        "all": {label: [round(value) for value in values] for label, values in speeds.items()},
        "ratio_to_one_engine": round(medians["ours"] / medians["ours_one_engine"], 3),
    }  # fmt: skip
    if not given.without_stock:
        result["http_overhead"] = round(1 - medians["ours_one_engine_json"] / medians["stock"], 4)
        result["ratio_to_stock"] = round(medians["ours"] / medians.get("stock_again", medians["stock"]), 3)
    given.out.write_text(json.dumps(result))


def watch(root: int, out: Path) -> threading.Thread:
    """Stacks of a server's processes, a few seconds into the load, for five seconds; the thread that takes them."""

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

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


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
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="0.6B", choices=SHAPES)
    parser.add_argument("--engines", type=int)
    parser.add_argument("--without_stock", action="store_true")
    parser.add_argument("--stock_with", action="append", default=[], metavar="FLAGS")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--after", type=int)
    main(parser.parse_args())
