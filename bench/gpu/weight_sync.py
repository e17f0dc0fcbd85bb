"""A weight update from a trainer on one GPU to a vLLM server on another that generates 256 sequences: who waits, and
for how long; beside it vLLM's own transfer over NCCL, to the same server, in the same run.

    python bench/gpu/weight_sync.py OUT.json [--shapes 8B 0.6B] [--updates 4] [--after PID]

generation_stall_ms: longest gap between two tokens of a stream around a commit, less the usual gap;
without_a_commit_ms: the same where nothing happened, before the first update; staging_longest_ms and
publishing_longest_ms: the same of each update while a server stages, and while the trainer publishes;
update_longest_ms: of all of an update, from the beginning of publishing on, the median;
generation_late_ms: by how much all tokens after a commit are late; commit_gpu_ms: what the copy takes on the GPU.
trainer_stall_ms: what publishing costs a training loop whose step takes a second.
native_*: the same with pause, start, update, finish and resume. stage_share_of_link: of the speed of one pinned copy.
With a shape of up to 2B also the gap between the sampler's log-probabilities and those of Transformers on the other
GPU, with the same weights: mean, 99th percentile, largest.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from gap import gap
from transformers import AutoConfig, AutoModelForCausalLM

from outrider.contract import routes
from outrider.contract.control import ServerInfo, WeightStatus
from outrider.contract.manifest import Manifest
from outrider.server.vllm_engine.weights import tensor_shapes
from outrider.weights.publish import Publisher

sys.path.insert(0, str(Path(__file__).parents[1]))
from about import about
from updates import Load, Window, call, longest_gaps, staged_update, stalls
from vllm_servers import Side, free_port, prompts, save_shape, server, until_ended

RUNNING, STREAMS = 256, 8


class Training(threading.Thread):
    """A training loop on the GPU whose step takes about a second. It publishes after each step when it is told to."""

    def __init__(self, publisher: Publisher) -> None:
        super().__init__(daemon=True)
        self.publisher = publisher
        self.version, self.ended = 0, False
        self.wanted, self.manifests = threading.Semaphore(0), list[Manifest]()
        self.stalls: list[float] = []
        self.published: list[float] = []

    def run(self) -> None:
        matrix = torch.randn(8192, 8192, device="cuda:0", dtype=torch.bfloat16)
        while self.wanted.acquire() and not self.ended:
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
            time.sleep(0.02)
        return self.manifests[-1]

    def end(self) -> None:
        """Let go of the GPU."""
        self.ended = True
        self.wanted.release()
        self.join(10)


class Native:
    """vLLM's own transfer, packed NCCL broadcasts."""

    def __init__(self, side: Side, tensors: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.side, self.tensors, self.engine = side, tensors, NCCLWeightTransferEngine
        info = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 2}
        thread = self._aside("/init_weight_transfer_engine", {"init_info": info})
        torch.cuda.set_device(0)
        self.group = self.engine.trainer_init(info)
        thread.join()

    def update(self) -> Window:
        """When it began and had ended."""
        began = time.monotonic()
        call(self.side.url, "/pause?mode=keep", b"")
        call(self.side.url, "/start_weight_update", b'{"is_checkpoint_format": true}')
        info = {
            "names": list(self.tensors), "dtype_names": ["bfloat16"] * len(self.tensors),
            "shapes": [list(tensor.shape) for tensor in self.tensors.values()], "packed": True,
        }  # fmt: skip
        thread = self._aside("/update_weights", {"update_info": info})
        self.engine.trainer_send_weights(iter(self.tensors.items()), {"group": self.group, "packed": True})
        torch.cuda.synchronize(0)
        thread.join()
        call(self.side.url, "/finish_weight_update", b"{}")
        call(self.side.url, "/resume", b"")
        return began, time.monotonic()

    def _aside(self, path: str, body: Any) -> threading.Thread:
        thread = threading.Thread(target=call, args=(self.side.url, path, json.dumps(body).encode()))
        thread.start()
        return thread


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


def gap_to_trainer(side: Side, model: Path, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from those of Transformers with the same weights."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("cuda:0"):
        trainer = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    own = dict(trainer.named_parameters())
    with torch.inference_mode():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return gap(side, trainer, prompts(64, 77), 256)


#: Bytes of a token in the cache by shape: keys and values, 8 heads of 128, 2 bytes, of 36 or 28 layers.
CACHED = {"8B": 2 * 8 * 128 * 2 * 36, "0.6B": 2 * 8 * 128 * 2 * 28}
#: Tokens of a request, as many as the GPU holds of them, up to so many. None ends, so that none begins, while updates
#: are measured: a step that also reads a prompt takes twice as long, and would be taken for a stall.
NEW_TOKENS = 2600
#: Bytes of a GPU that are neither weights, which are there twice, nor cache.
BESIDE = 9 * 2**30


def new_tokens(model: Path, shape: str) -> int:
    """Of a request."""
    weights = 2 * sum(torch.Size(size).numel() for size in tensor_shapes(AutoConfig.from_pretrained(model)).values())
    room = torch.cuda.get_device_properties(0).total_memory - 2 * weights - BESIDE
    return min(NEW_TOKENS, room // (RUNNING * CACHED[shape]) - 80)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["8B", "0.6B"])
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--after", type=int, help="process that is to end before anything is measured")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        models = {shape: save_shape(directory / shape, shape) for shape in arguments.shapes}
        for shape, model in models.items():
            cache = RUNNING * (new_tokens(model, shape) + 80) * CACHED[shape]
            kwargs = {"load_format": "dummy", "weight_transfer_config": {"backend": "nccl"},
                      "kv_cache_memory_bytes": cache, "gpu_memory_utilization": 0.05}  # fmt: skip
            flags = ["--engine_kwargs", json.dumps(kwargs), "--max_num_seqs", str(RUNNING), "--max_model_len", "4096",
                     "--engines_per_device", "1"]  # fmt: skip
            with server(f"ours {shape}", model, directory, *flags, ours=True, gpus="1",
                        environment={"VLLM_SERVER_DEV_MODE": "1"}) as side:  # fmt: skip
                side.wait()
                until_ended(arguments.after)
                results[shape] = measure(side, model, shape, arguments)
            arguments.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results))


def measure(side: Side, model: Path, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one server."""
    torch.manual_seed(0)
    shapes = tensor_shapes(AutoConfig.from_pretrained(model))
    tensors = {
        name: torch.ones(shape, device="cuda:0", dtype=torch.bfloat16) if len(shape) == 1
        else torch.randn(shape, device="cuda:0", dtype=torch.bfloat16) * 0.02
        for name, shape in shapes.items()
    }  # fmt: skip
    link = link_speed()
    info = msgspec.json.decode(call(side.url, routes.INFO), type=ServerInfo)
    publisher = Publisher(tensors, "bfloat16", uuid.uuid4().hex[:12], info.model_fingerprint, None)
    training = Training(publisher)
    training.start()
    figures = Figures([], [], [], [], [])
    tokens = new_tokens(model, shape)
    with Load(side.url, str(side.model), RUNNING, STREAMS, tokens) as load:
        began = time.monotonic() + 1
        time.sleep(4)
        quiet = [(began + number, began + number + 0.02) for number in range(3)]
        update(side, training, arguments.updates, figures)
        time.sleep(1)  # of tokens after the last update
    with Load(side.url, str(side.model), RUNNING, STREAMS, tokens) as native_load:
        time.sleep(1)
        native_update(side, tensors, figures)
        time.sleep(2)
    raw = {"arrivals": load.arrivals, "native_arrivals": native_load.arrivals, "quiet": quiet,
           **{name: getattr(figures, name) for name in ("ours", "staging", "publishing", "native")}}  # fmt: skip
    arguments.out.with_name(f"raw_{shape}.json").write_text(json.dumps(raw))
    whole = [(begin, end + 0.5) for (begin, _), (_, end) in zip(figures.publishing, figures.ours, strict=True)]
    ours_ms, ours_late, usual = stalls(load.arrivals, figures.ours)
    result = {
        **about(), "shape": shape, "bytes": publisher.nbytes, "running": RUNNING,
        "token_gap_ms": round(usual, 2),
        "generation_stall_ms": middle(ours_ms), "generation_stalls_ms": [round(value, 2) for value in ours_ms],
        "generation_late_ms": middle(ours_late),
        "without_a_commit_ms": middle(stalls(load.arrivals, quiet)[0]),
        "staging_longest_ms": [round(value, 2) for value in longest_gaps(load.arrivals, figures.staging)],
        "publishing_longest_ms": [round(value, 2) for value in longest_gaps(load.arrivals, figures.publishing)],
        "update_longest_ms": middle(longest_gaps(load.arrivals, whole)),
        "commit_gpu_ms": middle([1000 * status.commit_seconds for status in figures.statuses]),
        "commit_http_ms": middle([1000 * (end - begin) for begin, end in figures.ours]),
        "trainer_stall_ms": middle([1000 * stall for stall in training.stalls]),
        "trainer_stalls_ms": [round(1000 * stall, 2) for stall in training.stalls],
        "publish_seconds": middle(training.published),
        "stage_seconds": (stage_seconds := middle([status.stage_seconds for status in figures.statuses])),
        "stage_share_of_link": round(publisher.nbytes / stage_seconds / link, 3),
        "link_gb_per_s": round(link / 1e9, 1),
    }  # fmt: skip
    if figures.native:
        native_ms, native_late, _ = stalls(native_load.arrivals, figures.native)
        result |= {
            "native_stall_ms": middle(native_ms),
            "native_late_ms": middle(native_late),
            "native_trainer_ms": middle([1000 * (end - begin) for begin, end in figures.native]),
        }
    print(shape, json.dumps(result), flush=True)
    print(
        "log of the server:",
        *[line for line in side.log.read_text(errors="replace").splitlines() if " staged: " in line],
        sep="\n",
    )
    if publisher.nbytes < 5e9:
        result |= gap_to_trainer(side, model, tensors)
    training.end()
    publisher.close()
    return result


class Figures(NamedTuple):
    """When each update began and had ended, by either way, and the status after each of ours, and when it was published
    and staged before."""

    ours: list[Window]
    native: list[Window]
    statuses: list[WeightStatus]
    staging: list[Window]
    publishing: list[Window]


def update(side: Side, training: Training, count: int, figures: Figures) -> None:
    """Updates in our way."""
    for _ in range(count):
        began = time.monotonic()
        manifest = training.next()
        published = time.monotonic()
        status, window = staged_update(side.url, manifest)
        figures.publishing.append((began, published))
        figures.staging.append((published, window[0]))
        figures.ours.append(window)
        figures.statuses.append(status)
        http, gpu = 1000 * (window[1] - window[0]), 1000 * status.commit_seconds
        print(f"version {status.version}: stage {status.stage_seconds:.3f} s, commit {gpu:.1f} ms on the GPU, "
              f"{http:.1f} ms over HTTP", flush=True)  # fmt: skip
        time.sleep(0.6)


def native_update(side: Side, tensors: dict[str, torch.Tensor], figures: Figures) -> None:
    """Updates in vLLM's own."""
    try:
        native = Native(side, tensors)
        for _ in range(3):
            figures.native.append(native.update())
            print(f"native: {1000 * (figures.native[-1][1] - figures.native[-1][0]):.1f} ms", flush=True)
            time.sleep(1)
    except Exception as error:  # noqa: BLE001 - the other figures are worth having
        print(f"native transfer failed: {type(error).__name__}: {error}", flush=True)
        call(side.url, "/resume", b"")  # what is measured next needs a server that generates


def middle(values: list[float]) -> float:
    """The median, in three places."""
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
