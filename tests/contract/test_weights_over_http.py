"""A version on its way to a server on another host: the same bytes, read by range from the trainer's node."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from msgspec.structs import replace

from outrider.contract import routes
from outrider.contract.control import ServerInfo, WeightStatus
from outrider.contract.manifest import Manifest
from outrider.weights.segment_server import SegmentServer
from tests.contract.client import Client
from tests.contract.conftest import KEY, EndlessModel
from tests.contract.publishing import publishing

PROMPT = [5, 6, 7]


@asynccontextmanager
async def published(client: Client, model: Path, key: str = KEY, version: int = 1) -> AsyncIterator[Manifest]:
    """A version of the weights in ``model``, whose manifest says that they lie on another host."""
    info, run_id = await client.get(routes.INFO, ServerInfo), uuid.uuid4().hex[:12]
    segments = SegmentServer("127.0.0.1", key, run_id)
    url = await segments.start()
    try:
        with publishing(model, info, run_id, url) as publisher:
            manifest = await asyncio.wrap_future(publisher.publish(version))
            yield replace(manifest, segments=tuple(replace(s, host="another host") for s in manifest.segments))
    finally:
        await segments.stop()


async def use(client: Client, manifest: Manifest) -> None:
    assert (await client.stage(manifest)).state == "staged"
    assert (await client.commit(manifest)).version == manifest.version


async def test_the_weights_are_those_of_the_shared_memory(weights_client: Client, endless_model: EndlessModel) -> None:
    info = await weights_client.get(routes.INFO, ServerInfo)
    with publishing(endless_model(2), info, uuid.uuid4().hex[:12]) as publisher:
        await use(weights_client, publisher.publish(1).result())
    expected = await weights_client.greedy(PROMPT, 32)
    async with published(weights_client, endless_model(1)) as manifest:
        await use(weights_client, manifest)
    assert await weights_client.greedy(PROMPT, 32) != expected
    async with published(weights_client, endless_model(2)) as manifest:
        await use(weights_client, manifest)
    assert await weights_client.greedy(PROMPT, 32) == expected


async def test_generation_goes_on_meanwhile(weights_client: Client, endless_model: EndlessModel) -> None:
    running = asyncio.create_task(weights_client.choices(prompt=PROMPT, n=4, max_tokens=700))
    await weights_client.until_running(4)
    async with published(weights_client, endless_model(1), version=5) as manifest:
        await use(weights_client, manifest)
    assert all(len(choice.token_ids or []) == 700 for choice in await running)


async def test_a_key_that_the_trainers_node_does_not_know(weights_client: Client, endless_model: EndlessModel) -> None:
    async with published(weights_client, endless_model(1), key="another key") as manifest:
        await _refused(weights_client, manifest, "Unauthorized")


async def test_a_segment_that_is_not_served(weights_client: Client, endless_model: EndlessModel) -> None:
    async with published(weights_client, endless_model(1)) as manifest:
        [segment] = manifest.segments
        elsewhere = replace(segment, url=(segment.url or "").replace(manifest.run_id, "another-run"))
        await _refused(weights_client, replace(manifest, segments=(elsewhere,)), "Not Found")
        nowhere = replace(segment, url=None)
        await _refused(weights_client, replace(manifest, segments=(nowhere,)), "no URL")


async def test_a_node_that_is_gone(weights_client: Client, endless_model: EndlessModel) -> None:
    async with published(weights_client, endless_model(1)) as manifest:
        pass
    await _refused(weights_client, manifest, "refused")


@pytest.mark.parametrize("fault", ["cut", "short", "whole file", "other bytes"])
async def test_a_node_that_goes_away_half_way(weights_client: Client, endless_model: EndlessModel, fault: str) -> None:
    """After half of the tensors it breaks off, or answers something that is not asked for."""
    async with published(weights_client, endless_model(1)) as manifest:
        content = await asyncio.to_thread(Path(manifest.segments[0].path).read_bytes)
        answered = 0

        async def segment(request: web.Request) -> web.StreamResponse:
            nonlocal answered
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"])
            assert asked is not None
            part = content[int(asked[1]) : int(asked[2]) + 1]
            answered += 1
            if answered <= len(manifest.tensors) // 2:
                return web.Response(status=206, body=part)
            match fault:
                case "whole file":
                    return web.Response(body=content)
                case "other bytes":
                    return web.Response(status=206, body=bytes(len(part)))
                case "short":
                    return web.Response(status=206, body=part[: len(part) // 2])
            answer = web.StreamResponse(status=206, headers={"Content-Length": str(len(part))})
            await answer.prepare(request)
            await answer.write(part[: len(part) // 2])
            assert request.transport is not None
            request.transport.abort()
            return answer

        app = web.Application()
        app.router.add_get("/segment", segment)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/segment"
            faulty = replace(manifest, segments=tuple(replace(s, url=url) for s in manifest.segments))
            await _refused(weights_client, faulty, "")
            assert answered > len(manifest.tensors) // 2
        finally:
            await runner.cleanup()
        await use(weights_client, manifest)


async def _refused(client: Client, manifest: Manifest, complaint: str) -> None:
    before, tokens = await client.get(routes.STATUS, WeightStatus), await client.greedy(PROMPT)
    status, error = await client.stage_refusal(manifest)
    assert status == 409
    assert complaint in error.message
    after = await client.get(routes.STATUS, WeightStatus)
    assert (after.version, after.run_id, after.state) == (before.version, before.run_id, "failed")
    assert (await client.commit_refusal(manifest))[0] == 409
    assert await client.greedy(PROMPT) == tokens
