"""vLLM servers that were started without us, and take weights by vLLM's own routes: ``--weight_transport nccl``.

Everything here is vLLM's and ours but for NCCL itself, which needs GPUs: see ``tcp_broadcast``.
"""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import msgspec
import pytest
from transformers import AutoTokenizer

from outrider.collector import stock_client
from outrider.collector.client import ServerLost
from outrider.collector.setup import PROBE
from outrider.collector.stock_client import StockClient
from outrider.collector.stock_meeting import TrainerFacts
from outrider.contract.control import Inflight, ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.generation import CompletionRequest
from outrider.demo.task import problems, write_jsonl
from outrider.environments.base import Completion
from outrider.trainer.summary import Summary
from tests.collector.servers import Rig, expected, rig, until
from tests.contract.publishing import publishing
from tests.server.cores import Choice, reference
from tests.server.models import DEMO_MODEL
from tests.server.test_inflight import replay
from tests.vllm import plugins, tcp_broadcast
from tests.vllm.conftest import KEY

pytestmark = pytest.mark.real_vllm

READY_DEADLINE = 300.0


@dataclass
class Stock:
    """A running ``vllm serve``. sender_fails, workers_stall: files, see ``tcp_broadcast``."""

    url: str
    process: "subprocess.Popen[bytes]"
    sender_fails: Path
    workers_stall: Path


@contextmanager
def serving(model: Path, directory: Path, *flags: str, **environment: str) -> Iterator[Stock]:
    """vLLM's own server on a free loopback port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-num-seqs", "8", "--kv-cache-memory-bytes", "200000000", "--api-key", KEY, *flags),
    ]
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "1",
        **environment,
    }  # fmt: skip
    log = directory / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **variables}, process_group=0
        )
    stock = Stock(f"http://127.0.0.1:{port}", process, directory / "sender_fails", directory / "workers_stall")
    try:
        deadline = time.monotonic() + READY_DEADLINE
        while True:
            try:
                with urlopen(stock.url + "/health", timeout=5):
                    break
            except (URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vLLM is not ready: {log.read_text()[-4000:]}") from None
            time.sleep(0.2)
        yield stock
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def takes_weights(model: Path, directory: Path) -> Iterator[Stock]:
    """One that weights can be sent to."""
    variables = plugins.install(directory / "plugin", "tcp_broadcast")
    variables[tcp_broadcast.SENDER_FAILS] = str(directory / "sender_fails")
    variables[tcp_broadcast.WORKERS_STALL] = str(directory / "workers_stall")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)  # for the process that sends, too
        with serving(
            model, directory, "--weight-transfer-config", '{"backend":"nccl"}',
            "--logprobs-mode", "processed_logprobs", VLLM_SERVER_DEV_MODE="1",
        ) as started:  # fmt: skip
            yield started


@pytest.fixture(scope="module")
def stock(endless: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with takes_weights(endless(0), tmp_path_factory.mktemp("stock")) as started:
        yield started


def connect(url: str, key: str, *, plain_sampling: bool = True, probe: list[int] | None = None) -> StockClient:
    """As the collector does."""
    tokens = AutoTokenizer.from_pretrained(DEMO_MODEL).encode(PROBE, add_special_tokens=False)
    facts = TrainerFacts(
        model_fingerprint=expected().model_fingerprint, tokenizer_hash=expected().tokenizer_hash,
        torch_dtype="float32", vocab_size=99, plain_sampling=plain_sampling, probe=(PROBE, probe or tokens),
    )  # fmt: skip
    return StockClient(url, key, facts, "127.0.0.1")


def info_of(made: Rig) -> ServerInfo:
    [server] = made.servers
    assert server.info is not None
    return server.info


async def brought(made: Rig, model: Path, run_id: str, version: int) -> None:
    """Have the keeper bring these weights, and wait until it has."""
    with publishing(model, info_of(made), run_id) as publisher:
        made.announce(await asyncio.wrap_future(publisher.publish(version)))
        await made.ready(version)


def ask(stock: Stock, path: str, body: dict[str, object] | None = None) -> Any:
    """One of vLLM's own routes; with a body, even an empty one, by POST."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(stock.url + path, data, {"Content-Type": "application/json"}), timeout=30) as answer:
        return json.load(answer)


def is_paused(stock: Stock) -> bool:
    return bool(ask(stock, "/is_paused")["is_paused"])


@pytest.mark.parametrize("policy", ["recompute", "wait"])
async def test_every_logprob_is_of_the_version_that_is_said(
    stock: Stock, endless: Callable[[int], Path], policy: Inflight
) -> None:
    """More requests than run at once, over several commits: each token is replayed with the weights of its version."""
    models, run_id, source = [reference(endless(0)), reference(endless(1))], uuid.uuid4().hex[:12], random.Random(3)
    asked: list[tuple[CompletionRequest, asyncio.Task[list[Completion]]]] = []
    async with rig([stock.url], run_id, key=KEY, inflight=policy, connect=connect) as made:
        await brought(made, endless(0), run_id, 0)

        def ask(count: int) -> None:
            for _ in range(count):
                request = CompletionRequest(
                    prompt=[source.randrange(3, 99) for _ in range(12)], n=2, max_tokens=source.randrange(50, 300),
                    ignore_eos=True, logprobs=0, return_token_ids=True, temperature=1.0,
                )  # fmt: skip
                asked.append((request, asyncio.create_task(made.pool.complete(None, request))))

        for version in range(1, 4):
            ask(5)
            await asyncio.sleep(0.3)
            await brought(made, endless(version % 2), run_id, version)
        done = [(request, completion) for request, task in asked for completion in await task]
    assert not is_paused(stock)
    mixed = 0
    for request, completion in done:
        assert (len(completion.tokens), completion.finish_reason) == (request.max_tokens, "length")
        choice = Choice()
        choice.tokens, choice.logprobs = completion.tokens.tolist(), completion.logprobs.tolist()
        choice.versions = completion.versions
        assert isinstance(request.prompt, list)
        assert replay([models[version % 2] for version in range(4)], request.prompt, choice, "recompute") == 0
        mixed += len(completion.versions) > 1
    assert (mixed == 0) == (policy == "wait")


async def test_a_sender_that_fails_leaves_nothing_paused(stock: Stock, endless: Callable[[int], Path]) -> None:
    """The server is lost for the moment, for its weights are half old, half new; and is brought back."""
    run_id = uuid.uuid4().hex[:12]
    async with rig([stock.url], run_id, key=KEY, inflight="recompute", connect=connect) as made:
        await brought(made, endless(0), run_id, 0)
        stock.sender_fails.touch()
        with publishing(endless(1), info_of(made), run_id) as publisher:
            made.announce(await asyncio.wrap_future(publisher.publish(1)))
            await until(lambda: any("the network is down" in notice for notice in made.notices))
            stock.sender_fails.unlink()
            await made.ready(1)
        assert not is_paused(stock)
        [completion] = await made.pool.complete(None, request := plain_request())
        check_version(endless(1), request, completion, 1)


async def test_workers_that_do_not_answer_end_at_the_deadline(
    stock: Stock, endless: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock_client, "UPDATE", 3.0)
    monkeypatch.setattr(stock_client, "ABANDON", 1.0)
    monkeypatch.setattr(stock_client, "RESUME", 1.0)
    run_id = uuid.uuid4().hex[:12]
    async with rig([stock.url], run_id, key=KEY, inflight="recompute", connect=connect) as made:
        await brought(made, endless(0), run_id, 0)
        stock.workers_stall.touch()
        with publishing(endless(1), info_of(made), run_id) as publisher:
            made.announce(await asyncio.wrap_future(publisher.publish(1)))
            await until(lambda: any("within 3 s" in notice for notice in made.notices))
            assert any("did not resume" in notice and "restart it" in notice for notice in made.notices)
            stock.workers_stall.unlink()
            await made.ready(1)
        assert not is_paused(stock)


@pytest.mark.parametrize("place", [0, 11])
async def test_an_error_of_the_server_is_shown(stock: Stock, endless: Callable[[int], Path], place: int) -> None:
    """Weights of another model, which vLLM's own code refuses, at once or when it has taken some; and the right ones
    are taken after that."""
    run_id = uuid.uuid4().hex[:12]
    async with rig([stock.url], run_id, key=KEY, keep=False, inflight="recompute", connect=connect) as made:
        client = made.servers[0].client
        with publishing(endless(1), info_of(made), run_id) as publisher:
            manifest = await asyncio.wrap_future(publisher.publish(1))
            strange = list(manifest.tensors)
            strange[place] = msgspec.structs.replace(strange[place], name="model.layers.99.what")
            await client.stage(msgspec.structs.replace(manifest, tensors=tuple(strange)))
            with pytest.raises(ServerLost, match=r"/update_weights: .*layers\.99") as caught:
                await client.commit(run_id, 1, "recompute")
            assert "resume" not in str(caught.value)
            assert not is_paused(stock)
            await client.stage(manifest)
            await client.commit(run_id, 1, "recompute")
        [completion] = await client.complete(request := plain_request(), run_id)
        check_version(endless(1), request, completion, 1)


@pytest.mark.parametrize("seconds", [0, 0.03, 0.1])
async def test_an_update_that_is_cancelled_is_brought_to_its_end(
    stock: Stock, endless: Callable[[int], Path], seconds: float
) -> None:
    """As when the collector stops in the middle of it."""
    run_id = uuid.uuid4().hex[:12]
    async with rig([stock.url], run_id, key=KEY, keep=False, connect=connect) as made:
        client = made.servers[0].client
        with publishing(endless(1), info_of(made), run_id) as publisher:
            await client.stage(await asyncio.wrap_future(publisher.publish(1)))
            committing = asyncio.create_task(client.commit(run_id, 1, "recompute"))
            await asyncio.sleep(seconds)
            committing.cancel()
            await asyncio.wait({committing})
            await client.close()
    assert not is_paused(stock)
    assert ask(stock, "/weight_info")["weight_version"] == f"{run_id}:1"


async def test_a_server_that_was_left_paused_is_resumed(stock: Stock) -> None:
    ask(stock, "/pause?mode=keep", {})
    assert is_paused(stock)
    async with closing(connect(stock.url, KEY, plain_sampling=False)) as client:
        assert (await client.info()).engine == "vllm"
    assert not is_paused(stock)


async def test_a_server_that_has_other_weights_now_is_noticed(stock: Stock, endless: Callable[[int], Path]) -> None:
    """Another trainer has given it some: it gets ours again."""
    run_id = uuid.uuid4().hex[:12]
    async with rig([stock.url], run_id, key=KEY, inflight="recompute", connect=connect) as made:
        with publishing(endless(1), info_of(made), run_id) as publisher:
            made.announce(await asyncio.wrap_future(publisher.publish(1)))
            await made.ready(1)
            ask(stock, "/update_weight_version", {"new_version": "of another run"})
            await until(lambda: any("server lost" in notice for notice in made.notices))
            await made.ready(1)


async def test_what_is_not_as_it_must_be_is_named(stock: Stock, endless: Callable[[int], Path], tmp_path: Path) -> None:
    """Another tokenizer; and a server with its defaults."""
    async with closing(connect(stock.url, KEY, probe=[5, 6])) as client:
        with pytest.raises(UserError, match=r"its tokenizer makes .* the trainer's makes \[5, 6\]"):
            await client.info()
    async with closing(connect(stock.url, KEY, plain_sampling=False)) as client:
        assert (await client.info()).engine == "vllm"
    with serving(endless(0), tmp_path, VLLM_SERVER_DEV_MODE="1") as other:
        async with closing(connect(other.url, KEY, plain_sampling=False)) as client:
            with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
                await client.info()
        async with closing(connect(other.url, KEY)) as client:
            info = await client.info()
            with (
                publishing(endless(1), info, "run") as publisher,
                pytest.raises(Exception, match="Weight transfer not configured"),
            ):
                await client.stage(await asyncio.wrap_future(publisher.publish(1)))


def test_a_trainer_learns_with_it(tmp_path: Path) -> None:
    """The whole loop, by the command that a user would type."""
    write_jsonl(tmp_path / "train.jsonl", problems("train", 4000, 0))
    write_jsonl(tmp_path / "heldout.jsonl", problems("heldout", 200, 0))
    flags: dict[str, object] = {
        "model": DEMO_MODEL, "weight_transport": "nccl", "vllm_server_host": "127.0.0.1",
        "vllm_server_api_key": KEY, "dataset": tmp_path / "train.jsonl", "val_dataset": tmp_path / "heldout.jsonl",
        "reward_funcs": "accuracy", "num_generations": 8, "per_device_train_batch_size": 128,
        "max_completion_length": 8, "temperature": 0.9, "max_staleness": 1, "learning_rate": 5e-4, "beta": 0,
        "lr_scheduler_type": "constant", "max_steps": 25, "save_steps": 0, "threads": 1, "output_dir": tmp_path,
    }  # fmt: skip
    with takes_weights(DEMO_MODEL, tmp_path) as server:
        flags["vllm_server_port"] = server.url.rpartition(":")[2]
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        ended = subprocess.run(
            [sys.executable, "-m", "outrider.cli.main", "train", *words],
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert not is_paused(server)
    summary = msgspec.json.decode((tmp_path / "summary.json").read_bytes(), type=Summary)
    assert summary.steps == 25
    assert summary.max_staleness_seen <= 1
    assert (summary.reward_after or 0) >= (summary.reward_before or 0) + 0.1


class closing:
    def __init__(self, client: StockClient) -> None:
        self.client = client

    async def __aenter__(self) -> StockClient:
        return self.client

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()


def plain_request() -> CompletionRequest:
    return CompletionRequest(
        prompt=[5, 6, 7], max_tokens=20, ignore_eos=True, logprobs=0, return_token_ids=True, temperature=1.0
    )


def check_version(model: Path, request: CompletionRequest, completion: Completion, version: int) -> None:
    """Every log-probability is that of ``model``."""
    choice = Choice()
    choice.tokens, choice.logprobs = completion.tokens.tolist(), completion.logprobs.tolist()
    choice.versions = [(0, len(choice.tokens))]
    assert completion.versions == [(version, len(choice.tokens))]
    assert isinstance(request.prompt, list)
    assert replay([reference(model)], request.prompt, choice, "keep") == 0
