"""The router in front of several servers: with real ones behind it, which need not be vLLM's for that."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn

from outrider.contract import routes
from outrider.contract.control import ServerInfo, WeightStatus
from outrider.server.connections import http_settings
from outrider.server.launch import bind
from outrider.server.vllm_engine.router import Backend, Router, sum_metrics
from tests.contract.client import Client
from tests.contract.publishing import publishing
from tests.contract.servers import Server, start_torch
from tests.server.models import save_endless_model

KEY = "a key"


@contextlib.asynccontextmanager
async def routing(servers: list[Server]) -> AsyncIterator[tuple[Router, Client]]:
    """A router over ``servers``, and a client of it."""
    router = Router([Backend(server.port) for server in servers], KEY)
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(http_settings(router.asgi()))
    await router.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", KEY) as client:
            yield router, client
    finally:
        server.should_exit = True
        await serving
        await router.close()


@pytest.fixture
def servers(tmp_path: Path) -> list[Server]:
    started = []
    model = save_endless_model(tmp_path / "model")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        started.append(start_torch(model, tmp_path / name, "--max_num_seqs", "8", key=KEY))
    return started


async def test_requests_are_shared_out_and_orders_go_to_all(servers: list[Server], tmp_path: Path) -> None:
    try:
        async with routing(servers) as (router, client):
            info = await client.get(routes.INFO, ServerInfo)
            assert info.max_num_seqs == 16
            before = await client.greedy([5, 6], 16)
            with publishing(save_endless_model(tmp_path / "other", 1), info, uuid.uuid4().hex[:12]) as publisher:
                manifest = await asyncio.wrap_future(publisher.publish(4))
                running = [asyncio.create_task(client.choices(prompt=[5], n=8, max_tokens=1000)) for _ in range(2)]
                await client.until_running(16)
                assert [backend.in_flight for backend in router.backends] == [1, 1]
                assert (await client.stage(manifest)).staged_version == 4
                assert (await client.commit(manifest)).version == 4
                assert await client.metric("outrider:weight_version") == 4
                for choices in await asyncio.gather(*running):
                    assert [version for version, _ in choices[0].weight_versions or []] == [0, 4]
                answers = await asyncio.gather(*(client.greedy([5, 6], 16) for _ in range(6)))
                assert all(answer == answers[0] != before for answer in answers)
                # One of them is gone: what was asked of all is refused, and a commit leaves the others serving.
                servers[1].kill()
                manifest = await asyncio.wrap_future(publisher.publish(5))
                status, error = await client.stage_refusal(manifest)
                assert (status, error.type) == (503, "server_error")
                assert (await client.ask("GET", routes.HEALTH))[0] == 503
                async with Client(servers[0].url, KEY) as first:
                    await first.stage(manifest)
                assert (await client.commit_refusal(manifest))[0] == 503
                assert [backend.serving for backend in router.backends] == [True, False]
                assert len(await client.greedy([5, 6], 16)) == 16
                async with Client(servers[0].url, KEY) as first:
                    assert (await first.get(routes.STATUS, WeightStatus)).version == 5
    finally:
        for server in servers:
            server.kill()


async def test_a_client_that_goes_away_ends_its_request_behind_the_router(servers: list[Server]) -> None:
    try:
        async with routing(servers) as (router, client):
            leaves = asyncio.create_task(client.choices(prompt=[5], n=8, max_tokens=1000))
            await client.until_running(8)
            leaves.cancel()
            await asyncio.gather(leaves, return_exceptions=True)
            await client.until_idle()
            async with asyncio.timeout(10):
                while any(backend.in_flight for backend in router.backends):
                    await asyncio.sleep(0.01)
    finally:
        for server in servers:
            server.kill()


def test_metrics_are_summed_or_averaged() -> None:
    text = """# HELP vllm:a_total A
# TYPE vllm:a_total counter
vllm:a_total{{model_name="m\\"x"}} {a}
# HELP vllm:kv_cache_usage_perc B
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc {b}
"""
    merged = sum_metrics([text.format(a=1, b=0.5), text.format(a=2, b=0.7)])
    assert 'vllm:a_total{model_name="m\\"x"} 3.0' in merged
    assert "vllm:kv_cache_usage_perc 0.6" in merged
    assert "# TYPE vllm:a_total counter" in merged
