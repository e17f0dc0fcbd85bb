"""A weight update from a trainer on one GPU to a vLLM server on another that generates 256 sequences: who waits, and
for how long; beside it vLLM's own transfer over NCCL, to the same server, in the same run.

    python bench/gpu/weight_sync.py OUT.json [--shape 8B] [--updates 6]

generation_stall_ms: longest gap between two tokens of a stream around a commit, less the usual gap;
generation_late_ms: by how much all tokens after it are late; commit_gpu_ms: what the copy takes on the GPU.
trainer_stall_ms: what publishing costs a training loop whose step takes a second.
native_*: the same with pause, start, update, finish and resume. stage_share_of_link: of the speed of one pinned copy.
With a shape of up to 2B also the gap between the sampler's log-probabilities and those of Transformers on the other
GPU, with the same weights: mean, 99th percentile, largest.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import queue
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_servers import KEY, Side, prompts, save_shape, server

from outrider.contract import routes
from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.control import CommitRequest, ServerInfo, StageRequest, WeightStatus
from outrider.contract.generation import PACKED_MEDIA_TYPE, PackedCompletion
from outrider.contract.manifest import Manifest
from outrider.server.vllm_engine.weights import tensor_shapes
from outrider.weights.publish import Publisher

RUNNING, STREAMS = 256, 8


def call(side: Side, path: str, body: bytes | None = None) -> bytes:
    """Ask a server; what it answers. Raises HTTPError."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        side.url + path, data=body, headers=headers, method="GET" if body is None else "POST"
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read()


def keep_busy(url: str, model: str, stop: Any, arrivals: Any) -> None:
    """RUNNING sequences in flight until ``stop``; when the tokens of some streams come goes to ``arrivals``."""

    async def run() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(None)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:

            async def one(number: int) -> None:
                while not stop.is_set():
                    stream = number < STREAMS
                    body = {"model": model, "prompt": prompts(1, number)[0], "max_tokens": 3000, "ignore_eos": True,
                            "logprobs": 0, "return_token_ids": True, "stream": stream}  # fmt: skip
                    async with session.post(f"{url}/v1/completions", data=json.dumps(body)) as answer:
                        if not stream:
                            await answer.read()
                            continue
                        times = []
                        async for _ in answer.content.iter_any():
                            times.append(time.monotonic())
                            if stop.is_set():
                                break
                        arrivals.put(times)

            tasks = [asyncio.create_task(one(number)) for number in range(RUNNING)]
            while not stop.is_set():
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()

    asyncio.run(run())


class Training(threading.Thread):
    """A training loop on the GPU whose step takes about a second. It publishes after each step when it is told to."""

    def __init__(self, publisher: Publisher) -> None:
        super().__init__(daemon=True)
        self.publisher = publisher
        self.version = 0
        self.wanted, self.manifests = threading.Semaphore(0), list[Manifest]()
        self.stalls: list[float] = []
        self.published: list[float] = []

    def run(self) -> None:
        matrix = torch.randn(8192, 8192, device="cuda:0", dtype=torch.bfloat16)
        while True:
            self.wanted.acquire()
            self.version += 1
            started = time.monotonic()
            future = self.publisher.publish(self.version)
            stall = time.monotonic() - started
            until = time.monotonic() + 1.0
            while time.monotonic() < until:  # forward and backward of the next step
                matrix @ matrix
                torch.cuda.synchronize(0)
            stall += self.publisher.wait()  # before the optimizer changes the weights
            self.stalls.append(stall)
            self.manifests.append(future.result())
            self.published.append(time.monotonic() - started)

    def next(self) -> Manifest:
        """Publish, and wait for the manifest."""
        count = len(self.manifests)
        self.wanted.release()
        while len(self.manifests) == count:
            time.sleep(0.005)
        return self.manifests[-1]


def staged_update(side: Side, manifest: Manifest) -> tuple[WeightStatus, tuple[float, float]]:
    """Stage and commit; the status, and when the commit began and had ended."""
    call(side, routes.STAGE, msgspec.json.encode(StageRequest(manifest=manifest)))
    began = time.monotonic()
    body = msgspec.json.encode(CommitRequest(run_id=manifest.run_id, version=manifest.version))
    status = msgspec.json.decode(call(side, routes.COMMIT, body), type=WeightStatus)
    return status, (began, time.monotonic())


class Native:
    """vLLM's own transfer, packed NCCL broadcasts."""

    def __init__(self, side: Side, tensors: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.side, self.tensors, self.engine = side, tensors, NCCLWeightTransferEngine
        info = {"master_address": "127.0.0.1", "master_port": 29611, "rank_offset": 1, "world_size": 2}
        thread = self._aside("/init_weight_transfer_engine", {"init_info": info})
        torch.cuda.set_device(0)
        self.group = self.engine.trainer_init(info)
        thread.join()

    def update(self) -> tuple[float, float]:
        """When it began and had ended."""
        began = time.monotonic()
        call(self.side, "/pause?mode=keep", b"")
        call(self.side, "/start_weight_update", b'{"is_checkpoint_format": true}')
        info = {
            "names": list(self.tensors), "dtype_names": ["bfloat16"] * len(self.tensors),
            "shapes": [list(tensor.shape) for tensor in self.tensors.values()], "packed": True,
        }  # fmt: skip
        thread = self._aside("/update_weights", {"update_info": info})
        self.engine.trainer_send_weights(iter(self.tensors.items()), {"group": self.group, "packed": True})
        torch.cuda.synchronize(0)
        thread.join()
        call(self.side, "/finish_weight_update", b"{}")
        call(self.side, "/resume", b"")
        return began, time.monotonic()

    def _aside(self, path: str, body: Any) -> threading.Thread:
        thread = threading.Thread(target=call, args=(self.side, path, json.dumps(body).encode()))
        thread.start()
        return thread


def stalls(arrivals: list[list[float]], windows: list[tuple[float, float]]) -> tuple[list[float], list[float], float]:
    """What a client sees of each window, ms, medians over the streams: the longest gap between two tokens, less the
    usual one of the seconds around; and by how much all later tokens are late. Last, the usual gap."""
    usual = statistics.median(gap for times in arrivals for gap in np.diff(times))
    gaps, late = [], []
    for start, end in windows:
        longest, lost = [], []
        for times in map(np.asarray, arrivals):
            first, last = np.searchsorted(times, (start - 0.1, end + 0.5))
            around = np.diff(times[max(first - 50, 0) : last + 50])
            if first < 10 or last + 10 > len(times):
                continue
            step = float(np.median(around))
            longest.append(np.diff(times[first:last]).max() - step)
            lost.append(times[last] - times[first] - (last - first) * step)
        gaps.append(1000 * statistics.median(longest))
        late.append(1000 * statistics.median(lost))
    return gaps, late, 1000 * usual


def link_speed() -> float:
    """Bytes a second of one pinned copy from host to GPU."""
    host, device = (
        torch.empty(2**30, dtype=torch.uint8).pin_memory(),
        torch.empty(2**30, dtype=torch.uint8, device="cuda:0"),
    )
    speeds = []
    for _ in range(4):
        torch.cuda.synchronize(0)
        started = time.monotonic()
        device.copy_(host)
        torch.cuda.synchronize(0)
        speeds.append(2**30 / (time.monotonic() - started))
    return max(speeds)


def gap(side: Side, model: Path, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from those of Transformers."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("cuda:0"):
        trainer = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    own = dict(trainer.named_parameters())
    differences = []
    with torch.inference_mode():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        for prompt in prompts(64, 77):
            body = {"model": str(side.model), "prompt": prompt, "max_tokens": 256, "ignore_eos": True, "logprobs": 0,
                    "return_token_ids": True}  # fmt: skip
            headers = {
                "Authorization": f"Bearer {KEY}",
                "Content-Type": "application/json",
                "Accept": PACKED_MEDIA_TYPE,
            }
            request = urllib.request.Request(side.url + routes.COMPLETIONS, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=120) as answer:
                [choice] = msgspec.msgpack.decode(answer.read(), type=PackedCompletion).choices
            ids = unpack_ints(choice.token_ids).tolist()
            logits = trainer(torch.tensor([prompt + ids], device="cuda:0")).logits[0, len(prompt) - 1 : -1].float()
            ours = (
                torch.log_softmax(logits, -1).gather(1, torch.tensor(ids, device="cuda:0")[:, None])[:, 0].cpu().numpy()
            )
            differences.append(np.abs(ours - unpack_floats(choice.logprobs)))
    all_of_them = np.concatenate(differences)
    return {
        "gap_mean": round(float(all_of_them.mean()), 5), "gap_p99": round(float(np.quantile(all_of_them, 0.99)), 5),
        "gap_max": round(float(all_of_them.max()), 5), "gap_tokens": len(all_of_them),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--updates", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = save_shape(directory / "model", arguments.shape)
        kwargs = {"load_format": "dummy", "weight_transfer_config": {"backend": "nccl"}}
        flags = ["--engine_kwargs", json.dumps(kwargs), "--max_num_seqs", str(RUNNING), "--max_model_len", "4096",
                 "--engines_per_device", "1"]  # fmt: skip
        with server("ours", model, directory, *flags, ours=True, gpus="1",
                    environment={"VLLM_SERVER_DEV_MODE": "1"}) as side:  # fmt: skip
            result = measure(side, model, arguments)
    arguments.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def measure(side: Side, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, against a server that is being started."""
    torch.manual_seed(0)
    shapes = tensor_shapes(AutoConfig.from_pretrained(model))
    tensors = {
        name: torch.ones(shape, device="cuda:0", dtype=torch.bfloat16) if len(shape) == 1
        else torch.randn(shape, device="cuda:0", dtype=torch.bfloat16) * 0.02
        for name, shape in shapes.items()
    }  # fmt: skip
    link = link_speed()
    side.wait()
    info = msgspec.json.decode(call(side, routes.INFO), type=ServerInfo)
    publisher = Publisher(tensors, "bfloat16", uuid.uuid4().hex[:12], info.model_fingerprint, None)
    training = Training(publisher)
    training.start()
    context = multiprocessing.get_context("spawn")
    stop, arrivals = context.Event(), context.Queue()
    load = context.Process(target=keep_busy, args=(side.url, str(side.model), stop, arrivals), daemon=True)
    load.start()
    time.sleep(12)
    ours, stage_seconds, commit_gpu, commit_rpc = [], [], [], []
    for _ in range(arguments.updates):
        manifest = training.next()
        status, window = staged_update(side, manifest)
        http, gpu = 1000 * (window[1] - window[0]), 1000 * status.commit_seconds
        print(f"version {status.version}: stage {status.stage_seconds:.3f} s, commit {gpu:.1f} ms on the GPU, "
              f"{http:.1f} ms over HTTP", flush=True)  # fmt: skip
        ours.append(window)
        stage_seconds.append(status.stage_seconds)
        commit_gpu.append(1000 * status.commit_seconds)
        commit_rpc.append(1000 * (window[1] - window[0]))
        time.sleep(1)
    native_windows = []
    try:
        native = Native(side, tensors)
        for _ in range(3):
            native_windows.append(native.update())
            print(f"native: {1000 * (native_windows[-1][1] - native_windows[-1][0]):.1f} ms", flush=True)
            time.sleep(1)
    except Exception as error:  # noqa: BLE001 - the other figures are worth having
        print(f"native transfer failed: {type(error).__name__}: {error}", flush=True)
    stop.set()
    times = []
    with contextlib.suppress(queue.Empty):
        while True:
            times.append(arrivals.get(timeout=4))
    load.kill()
    ours_ms, ours_late, usual = stalls(times, ours)
    native_ms, native_late, _ = stalls(times, native_windows) if native_windows else ([], [], 0.0)
    result = {
        "device": torch.cuda.get_device_name(), "shape": arguments.shape, "bytes": publisher.nbytes, "running": RUNNING,
        "vllm": info.engine_version, "torch": torch.__version__, "commit": commit(),
        "token_gap_ms": round(usual, 2),
        "generation_stall_ms": round(statistics.median(ours_ms), 2),
        "generation_stalls_ms": [round(value, 2) for value in ours_ms],
        "generation_late_ms": round(statistics.median(ours_late), 2),
        "commit_gpu_ms": round(statistics.median(commit_gpu), 2),
        "commit_http_ms": round(statistics.median(commit_rpc), 2),
        "trainer_stall_ms": round(1000 * statistics.median(training.stalls), 2),
        "trainer_stalls_ms": [round(1000 * stall, 2) for stall in training.stalls],
        "publish_seconds": round(statistics.median(training.published), 3),
        "stage_seconds": round(statistics.median(stage_seconds), 3),
        "stage_share_of_link": round(publisher.nbytes / statistics.median(stage_seconds) / link, 3),
        "link_gb_per_s": round(link / 1e9, 1),
        "native_stall_ms": round(statistics.median(native_ms), 2) if native_ms else None,
    }  # fmt: skip
    if native_windows:
        result["native_late_ms"] = round(statistics.median(native_late), 2)
        result["native_trainer_ms"] = round(1000 * statistics.median(end - begin for begin, end in native_windows), 2)
    print(
        "log of the server:",
        *[line for line in side.log.read_text(errors="replace").splitlines() if " staged: " in line],
        sep="\n",
    )
    if publisher.nbytes < 5e9:
        result |= gap(side, model, tensors)
    publisher.close()
    return result


def commit() -> str | None:
    """Of this checkout; None where there is no git."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
