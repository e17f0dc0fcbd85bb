"""Real rollout servers as processes of their own, and weights to give them."""

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from outrider.collector.client import ServerClient
from outrider.collector.keeper import Keeper
from outrider.collector.pool import Pool
from outrider.collector.preflight import Expected
from outrider.collector.server import Server
from outrider.contract.control import Inflight
from outrider.contract.identity import SPECIAL_TOKENS, model_fingerprint, tokenizer_hash
from outrider.contract.manifest import Manifest
from outrider.weights.publish import Publisher
from tests.collector.build import DEMO_MODEL

KEY = "key-of-the-tests"

#: Nothing here takes nearly as long; it is there so that a defect ends the test instead of stopping it.
PATIENCE = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RolloutProcess:
    """``outrider rollout`` on one port of this host, which may be killed and started again."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.port, self.flags = free_port(), flags
        self.log = directory / f"server-{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it if it does not run; :meth:`wait` for it to be ready."""
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-m", "outrider.cli.main", "rollout", "--model", str(DEMO_MODEL), "--threads", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *self.flags]
        environment = {**os.environ, "OUTRIDER_API_KEY": KEY}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait(self) -> None:
        assert self.process is not None
        until = time.monotonic() + PATIENCE
        while "ready:" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, "the server does not come up"
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)


def expected(max_completion_length: int = 8) -> Expected:
    """What a trainer of the demo's model expects of servers."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL_TOKENS}
    return Expected(
        model=str(DEMO_MODEL),
        model_fingerprint=model_fingerprint(AutoConfig.from_pretrained(DEMO_MODEL).to_dict()),
        tokenizer_hash=tokenizer_hash(tokenizer.get_vocab(), special),
        max_completion_length=max_completion_length,
    )


class Weights:
    """Published versions of the demo's model, each with other weights, and these weights for comparison."""

    def __init__(self, run_id: str, noise: float = 0.2) -> None:
        """noise: standard deviation of what is added; enough of it makes completions long and arbitrary."""
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
        self.noise, self._held = noise, -1
        self._base = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self._tensors = {name: value.clone() for name, value in self._base.items()}
        self._publisher = Publisher(self._tensors, "float32", run_id, expected().model_fingerprint, None)

    def publish(self, version: int) -> Manifest:
        self._make(version, self._tensors)
        return self._publisher.publish(version).result()

    def logprobs(self, version: int, prompt: list[int], tokens: Sequence[int], temperature: float) -> list[float]:
        """Log-probabilities of ``tokens`` by one plain forward pass with the weights of ``version``."""
        if version != self._held:
            self._make(version, {name: value.data for name, value in self.model.named_parameters()})
            self._held = version
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
        taken = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(list(tokens))[:, None])
        return [float(value) for value in taken[:, 0]]

    def close(self) -> None:
        self._publisher.wait()
        self._publisher.close()

    def _make(self, version: int, targets: dict[str, torch.Tensor]) -> None:
        source = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(self._base[name])
                if self.noise:
                    target.add_(torch.randn(target.shape, generator=source) * self.noise)


@dataclass
class Rig:
    """The part of a collector that keeps servers: pool and keepers, with what they have told."""

    servers: list[Server]
    pool: Pool
    manifest: Manifest | None = None
    notices: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    keepers: list[Keeper] = field(default_factory=list)
    on_change: Callable[[], None] = lambda: None

    def announce(self, manifest: Manifest) -> None:
        """A version has been published."""
        self.manifest = manifest
        for keeper in self.keepers:
            keeper.wake.set()

    async def ready(self, version: int, count: int | None = None) -> None:
        """Wait for ``count`` servers, or all, to hold ``version``."""
        count = len(self.servers) if count is None else count
        await until(lambda: sum(server.ready and server.version == version for server in self.servers) == count)


@contextlib.asynccontextmanager
async def rig(
    urls: list[str],
    run_id: str,
    *,
    keep: bool = True,
    key: str = KEY,
    tries: int = 8,
    inflight: Inflight = "keep",
    connect: Callable[[str, str], ServerClient] = ServerClient,
) -> AsyncIterator[Rig]:
    """Pool and keepers over the servers at ``urls``. keep: let keepers run; otherwise the test does their work.
    connect: makes the client of a URL and a key."""
    servers = [Server(connect(url, key)) for url in urls]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    made = Rig(servers, Pool(servers, run_id, tries, lambda: made.on_change(), decode))
    wanted = dataclasses.replace(expected(), inflight=inflight)
    for server in servers:
        with contextlib.suppress(Exception):
            info = await server.client.info()
            server.limit = 2 * info.max_num_seqs
            server.up(info)
        made.keepers.append(
            Keeper(
                server,
                wanted,
                lambda: made.manifest,
                lambda: made.on_change(),
                made.notices.append,
                made.failures.append,
            )
        )
    tasks = [asyncio.create_task(keeper.run()) for keeper in made.keepers] if keep else []
    try:
        yield made
        for task in tasks:
            assert not task.done(), task.exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in servers:
            await server.client.close()


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that has to come."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def until_generated(server: Server, tokens: float) -> None:
    """Wait until a server has generated so many tokens since its start: then it is in the middle of something."""
    async with asyncio.timeout(PATIENCE):
        while await generated(server) < tokens:
            await asyncio.sleep(0.01)


async def generated(server: Server) -> float:
    """Tokens that a server has generated since its start, from its metrics."""
    text = (await server.client._bytes("GET", "/metrics", None, 5.0)).decode()
    found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])
