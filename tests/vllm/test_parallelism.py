"""Tensor parallel, data parallel, both, and several engines on one device: they start, generate and take new weights,
and every one of them has them."""

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.contract import routes
from outrider.contract.control import ServerInfo
from outrider.contract.generation import CompletionChoice
from tests.contract.client import Client
from tests.contract.publishing import publishing
from tests.contract.servers import Server
from tests.server.test_orphans import children
from tests.vllm.conftest import KEY, StartEndless

pytestmark = pytest.mark.real_vllm

PROMPTS = [[5, 6 + i % 3, 7 + i] for i in range(12)]


async def answers(client: Client) -> list[list[int]]:
    """Greedy tokens of all prompts, asked at once, so that every engine has to answer some of them."""
    return list(await asyncio.gather(*(client.greedy(prompt, 24) for prompt in PROMPTS)))


async def answered(server: Server) -> Counter[tuple[int, str]]:
    """Requests that each engine has answered, by the port of its vLLM server and its label in vLLM's own metrics.
    A router in front adds up what its servers say: they are asked themselves."""
    counts: Counter[tuple[int, str]] = Counter()
    for port in server_ports(server):
        async with Client(f"http://127.0.0.1:{port}", KEY) as client:
            _, body = await client.ask("GET", routes.METRICS)
        counter = r'^vllm:e2e_request_latency_seconds_count\{.*engine="(\d+)".*\} ([\d.e+]+)'
        for engine, count in re.findall(counter, body.decode(), re.M):
            counts[port, engine] += int(float(count))
    return counts


def server_ports(server: Server) -> list[int]:
    """Of vLLM's own servers, from their command lines."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children(server.process.pid)]
    return sorted({int(line[line.index(b"--port") + 1]) for line in lines if b"--worker-extension-cls" in line})


@pytest.mark.parametrize(
    ("flags", "engines"),
    [
        (("--tensor_parallel_size", "2"), 1),
        (("--data_parallel_size", "2"), 2),
        (("--tensor_parallel_size", "2", "--data_parallel_size", "2"), 2),
        (("--engines_per_device", "2"), 2),
    ],
    ids=["tp", "dp", "tp and dp", "two on a device"],
)
async def test_new_weights_are_those_of_a_fresh_server_everywhere(
    start_endless: StartEndless, endless: Callable[[int], Path], tmp_path: Path, flags: tuple[str, ...], engines: int
) -> None:
    """Token for token, on every engine, and the old ones come back as exactly."""
    async with Client(start_endless(*flags, seed=1).url, KEY) as fresh:
        expected = await answers(fresh)
    server = start_endless(*flags, seed=0)
    async with Client(server.url, KEY) as client:
        info = await client.get(routes.INFO, ServerInfo)
        assert info.max_num_seqs == 16
        before = await answers(client)
        assert before != expected
        running: list[asyncio.Task[list[CompletionChoice]]] = []
        for seed, version, tokens in ((1, 3, expected), (0, 4, before)):
            with publishing(endless(seed), info, uuid.uuid4().hex[:12]) as publisher:
                manifest = await asyncio.wrap_future(publisher.publish(version))
                if not running:
                    # Two requests, of two prompts: where there are two engines each takes one. Half of the places of
                    # both stay free, for the answers below.
                    long = {"n": 4, "max_tokens": 900}
                    running = [asyncio.create_task(client.choices(prompt=[9 + i], **long)) for i in range(2)]
                    await client.until_running(8)
                assert (await client.stage(manifest)).state == "staged"
                committed = await client.commit(manifest)
                assert (committed.version, committed.run_id) == (version, manifest.run_id)
            earlier = await answered(server)
            assert await answers(client) == tokens
            # Since the commit: what an engine answered before says nothing of its new weights.
            assert len((await answered(server)) - earlier) == len(earlier) == engines, "an engine had nothing to answer"
        choices = [choice for request in running for choice in await request]
        assert all(len(choice.token_ids or []) == 900 for choice in choices)
        versions = [[version for version, _ in choice.weight_versions or []] for choice in choices]
        assert all(seen == sorted({*seen} & {0, 3, 4}) for seen in versions), versions
        assert any(seen[0] == 0 and len(seen) > 1 for seen in versions), "none was in flight during a commit"
    log = (tmp_path / "server1" / "server.log").read_text()
    assert all(f"version {version} staged: copied" in log for version in (3, 4)), "vLLM had to load them"
