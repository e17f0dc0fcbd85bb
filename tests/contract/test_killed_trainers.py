"""A trainer that is killed while a version is on its way: the old weights go on, and a new trainer has the same server
take its own, without a restart."""

import asyncio
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from outrider.contract import routes
from outrider.contract.control import ServerInfo, StageRequest, WeightStatus
from outrider.contract.generation import CompletionChoice
from outrider.contract.manifest import Manifest
from outrider.weights.segments import remove_stale_segments
from tests.contract.client import PATIENCE, Client
from tests.contract.conftest import EndlessModel
from tests.contract.doomed_trainer import VERSION
from tests.contract.publishing import publishing
from tests.contract.servers import Server

PROMPT = [5, 6, 7]


class Doomed:
    """A trainer in a process of its own, see ``doomed_trainer``."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def line(self) -> str:
        """The next one that it prints."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return (await self.process.stdout.readline()).decode().strip()

    def tell(self, order: str) -> None:
        """One line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n".encode())

    async def published(self, *elsewhere: str) -> Manifest:
        """What it asks servers to stage."""
        self.tell(" ".join(("publish", *elsewhere)))
        return msgspec.json.decode(await self.line(), type=StageRequest).manifest

    async def kill(self) -> None:
        """And have its segments cleaned up, as the next trainer does."""
        self.process.kill()
        await self.process.wait()
        assert remove_stale_segments() >= 1


@asynccontextmanager
async def doomed(client: Client, model: Path) -> AsyncIterator[Doomed]:
    info = msgspec.json.encode(await client.get(routes.INFO, ServerInfo)).decode()
    arguments = ("-m", "tests.contract.doomed_trainer", str(model), info, uuid.uuid4().hex[:12])
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=PIPE, stdout=PIPE, limit=2**20)
    try:
        yield Doomed(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def use(client: Client, model: Path, version: int) -> list[int]:
    """A trainer that lives gives the server these weights; returns what they answer."""
    info = await client.get(routes.INFO, ServerInfo)
    with publishing(model, info, uuid.uuid4().hex[:12]) as publisher:
        manifest = await asyncio.wrap_future(publisher.publish(version))
        assert (await client.stage(manifest)).state == "staged"
        committed = await client.commit(manifest)
    assert (committed.version, committed.run_id, committed.state) == (version, manifest.run_id, "idle")
    return await client.greedy(PROMPT, 32)


@pytest.fixture
async def expected(weights_client: Client, endless_model: EndlessModel) -> dict[int, list[int]]:
    """What weights answer, by their seed; those of seed 0 are in use, as version 1."""
    answers = {seed: await use(weights_client, endless_model(seed), 1) for seed in (2, 1, 0)}
    assert len({*map(tuple, answers.values())}) == 3
    return answers


async def test_while_a_server_stages(
    weights_client: Client, endless_model: EndlessModel, expected: dict[int, list[int]]
) -> None:
    client = weights_client
    async with doomed(client, endless_model(1)) as trainer:
        staging = asyncio.create_task(client.stage_refusal(await trainer.published("elsewhere")))
        assert await trainer.line() == "serving"
        assert (await client.get(routes.STATUS, WeightStatus)).state == "staging"
        assert await client.greedy(PROMPT, 32) == expected[0]
        assert not staging.done()
        await trainer.kill()
        status, error = await staging
    assert (status, error.type) == (409, "conflict_error")
    after = await client.get(routes.STATUS, WeightStatus)
    assert (after.version, after.state) == (1, "failed")
    assert await client.greedy(PROMPT, 32) == expected[0]
    assert await use(client, endless_model(2), 2) == expected[2]


async def test_between_stage_and_commit(
    weights_client: Client, endless_model: EndlessModel, expected: dict[int, list[int]]
) -> None:
    """What was staged for it is forgotten when the next trainer stages."""
    client = weights_client
    async with doomed(client, endless_model(1)) as trainer:
        manifest = await trainer.published()
        await client.stage(manifest)
        await trainer.kill()
    status = await client.get(routes.STATUS, WeightStatus)
    assert (status.version, status.state, status.staged_version) == (1, "staged", VERSION)
    assert await client.greedy(PROMPT, 32) == expected[0]
    assert await use(client, endless_model(2), 2) == expected[2]
    assert (await client.commit_refusal(manifest))[0] == 409
    assert await client.greedy(PROMPT, 32) == expected[2]


async def held_by_a_commit(client: Client) -> "asyncio.Task[list[CompletionChoice]]":
    """A request that waits although there are places left: which it does for a commit alone."""
    async with asyncio.timeout(PATIENCE):
        while True:
            request = asyncio.create_task(client.choices(prompt=[9], max_tokens=1))
            while not request.done():
                await asyncio.wait({request}, timeout=0.1)
                if not request.done() and await client.metric("vllm:num_requests_waiting") >= 1:
                    return request


async def test_during_a_commit(
    weights_server: Server, weights_client: Client, endless_model: EndlessModel, expected: dict[int, list[int]]
) -> None:
    """One that waits for running requests, so that it is under way when whoever has asked for it is killed. The
    requests end as they would have, and the commit is made, or not, as a whole."""
    client = weights_client
    async with doomed(client, endless_model(1)) as trainer:
        await client.stage(await trainer.published())
        # A thousand tokens take the embedded engine a second: as long as all that follows, on a busy machine.
        running = [asyncio.create_task(client.choices(prompt=[5, 6 + i], n=2, max_tokens=3000)) for i in range(4)]
        await client.until_running(8)
        trainer.tell(f"commit {weights_server.url} {client.headers['Authorization'].removeprefix('Bearer ')}")
        held = await held_by_a_commit(client)
        assert (await client.get(routes.STATUS, WeightStatus)).version == 1
        await trainer.kill()
        assert not any(task.done() for task in running), "the commit was not under way any more"
    for choices in await asyncio.gather(*running):
        assert [choice.weight_versions for choice in choices] == [[(1, 3000)]] * 2
    await held
    # By what the answer itself says: of several engines some may have made the commit, and others not yet.
    [answer] = await client.choices(prompt=PROMPT, max_tokens=32, temperature=0.0)
    [(version, _)] = answer.weight_versions or []
    assert answer.token_ids == expected[{1: 0, VERSION: 1}[version]]
    assert await use(client, endless_model(2), 2) == expected[2]
