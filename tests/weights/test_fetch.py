"""The server's side: tensors put together from the pieces of several ranks, near and far."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import ClientSession, web
from msgspec.structs import replace
from torch import Tensor

from outrider.contract.manifest import DTypeName, Manifest
from outrider.weights import fetch
from outrider.weights.checksums import FetchError
from outrider.weights.fetch import fetch_tensors
from outrider.weights.publish import Publisher
from outrider.weights.segment_server import SegmentServer

KEY = "key"


@pytest.fixture
async def segment_url() -> AsyncIterator[str]:
    """Serves the segments of run ``sharded``."""
    server = SegmentServer("127.0.0.1", KEY, "sharded")
    yield await server.start()
    await server.stop()


def full_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"wide": torch.randn(7, 33), "norm": torch.randn(5), "tall": torch.randn(64, 3), "few": torch.randn(2, 9)}


@contextmanager
def sharded(
    tensors: dict[str, Tensor], ranks: int, segment_url: str | None, dtype: DTypeName = "float32"
) -> Iterator[Manifest]:
    """The manifest of a version that ``ranks`` ranks published, each its own rows of every tensor, as FSDP2 cuts
    them: the first ranks hold equally many, a later one fewer, the last ones of a small tensor none."""
    publishers = []
    for rank in range(ranks):
        rows = {name: -(-len(tensor) // ranks) for name, tensor in tensors.items()}
        own = {name: tensor[rank * rows[name] : (rank + 1) * rows[name]] for name, tensor in tensors.items()}
        publishers.append(Publisher(own, dtype, f"sharded-{rank}", "f", segment_url))
    try:
        parts = [publisher.publish(1).result() for publisher in publishers]
        entries = []
        for index, (name, tensor) in enumerate(tensors.items()):
            pieces = [
                replace(piece, segment=rank) for rank, part in enumerate(parts) for piece in part.tensors[index].pieces
            ]
            entries.append(replace(parts[0].tensors[index], shape=tuple(tensor.shape), pieces=tuple(pieces)))
            assert entries[-1].name == name
        segments = tuple(part.segments[0] for part in parts)
        yield replace(parts[0], segments=segments, tensors=tuple(entries))
    finally:
        for publisher in publishers:
            publisher.close()


def elsewhere(manifest: Manifest, *ranks: int) -> Manifest:
    """The manifest as it looks from a host that does not share the memory of ``ranks``."""
    return replace(
        manifest,
        segments=tuple(
            replace(segment, host="another host") if rank in ranks else segment
            for rank, segment in enumerate(manifest.segments)
        ),
    )


async def fetched(manifest: Manifest, key: str = KEY, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    targets = {entry.name: torch.full(entry.shape, torch.nan, dtype=dtype) for entry in manifest.tensors}
    await asyncio.to_thread(fetch_tensors, manifest, targets, key)
    return targets


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("remote", ["none", "all", "some"])
async def test_the_rows_of_all_ranks_make_up_the_tensors(segment_url: str, ranks: int, remote: str) -> None:
    tensors = full_tensors()
    with sharded(tensors, ranks, segment_url) as manifest:
        far = {"none": range(0), "all": range(ranks), "some": range(0, ranks, 2)}[remote]
        got = await fetched(elsewhere(manifest, *far))
    for name, tensor in tensors.items():
        assert torch.equal(got[name], tensor), name


async def test_another_precision_on_the_way_and_in_use(segment_url: str) -> None:
    tensors = full_tensors()
    with sharded(tensors, 3, segment_url, "bfloat16") as manifest:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = await fetched(elsewhere(manifest, 1), dtype=dtype)
            for name, tensor in tensors.items():
                assert torch.equal(got[name], tensor.bfloat16().to(dtype)), name


async def test_many_connections_read_as_one(segment_url: str) -> None:
    tensors = {f"layer.{i}": torch.randn(11, 13) for i in range(60)}
    with sharded(tensors, 2, segment_url) as manifest:
        got = await fetched(elsewhere(manifest, 0, 1))
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


async def test_one_bad_piece_among_many_is_found(segment_url: str) -> None:
    with sharded(full_tensors(), 3, segment_url) as manifest:
        for index, tensor in enumerate(manifest.tensors):
            for number, piece in enumerate(tensor.pieces):
                if piece.length == 0:
                    continue
                pieces = list(tensor.pieces)
                pieces[number] = replace(piece, checksum=piece.checksum ^ 1)
                entries = list(manifest.tensors)
                entries[index] = replace(tensor, pieces=tuple(pieces))
                wrong = replace(manifest, tensors=tuple(entries))
                with pytest.raises(FetchError, match=f"{tensor.name!r}.*segment {piece.segment} .*checksum"):
                    await fetched(elsewhere(wrong, *range(number)))


async def test_the_node_wants_the_key(segment_url: str) -> None:
    with sharded(full_tensors(), 2, segment_url) as manifest:
        for key in ("", "wrong"):
            with pytest.raises(FetchError, match="Unauthorized"):
                await fetched(elsewhere(manifest, 1), key)


@pytest.mark.parametrize(
    "url", ["nonsense", "http://", "http://127.0.0.1:1/x", "http://[::1/x", "http://127.0.0.1:99999/"]
)
async def test_a_url_that_leads_nowhere(url: str) -> None:
    with sharded(full_tensors(), 1, None) as manifest:
        segment = replace(manifest.segments[0], host="another host", url=url)
        with pytest.raises(FetchError):
            await fetched(replace(manifest, segments=(segment,)))


async def test_no_url_at_all() -> None:
    with sharded(full_tensors(), 1, None) as manifest, pytest.raises(FetchError, match="gives no URL"):
        await fetched(elsewhere(manifest, 0))
    with pytest.raises(FetchError, match="not on this host"):
        await fetched(manifest)


async def test_a_node_serves_the_segments_of_its_run_and_nothing_else(segment_url: str) -> None:
    with sharded({"w": torch.ones(4)}, 1, segment_url) as manifest:
        path = manifest.segments[0].path
        [inside] = [part for part in path.split("/") if part.startswith("outrider-")]
        async with ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
            for name, status in [
                (inside, 200),
                ("outrider-another-1-0", 404),
                ("outrider-sharded-none", 404),
                ("%2e%2e%2fetc%2fpasswd", 404),
                (f"outrider-sharded-%2f..%2f{inside}", 404),
                ("outrider-sharded-%00", 404),
            ]:
                async with session.get(f"{segment_url}/{name}") as answer:
                    assert answer.status == status, name
            async with session.get(f"{segment_url}/{inside}", headers={"Range": "bytes=4-11"}) as answer:
                assert answer.status == 206
                assert await answer.read() == torch.ones(2).numpy().tobytes()


async def test_a_connection_that_breaks_off_is_taken_up_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than a range come in several; no byte is sent twice."""
    monkeypatch.setattr(fetch, "RANGE", 1000)
    tensors = full_tensors() | {"large": torch.randn(40, 50)}
    asked: list[tuple[int, int]] = []
    with sharded(tensors, 1, "http://unused") as manifest:
        content = await asyncio.to_thread(Path(manifest.segments[0].path).read_bytes)

        async def segment(request: web.Request) -> web.StreamResponse:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"])
            assert found is not None
            start, end = int(found[1]), int(found[2]) + 1
            answer = web.StreamResponse(status=206, headers={"Content-Length": str(end - start)})
            await answer.prepare(request)
            whole = end - start < 400  # others break off in the middle
            sent = content[start : end if whole else start + (end - start) // 2]
            asked.append((start, start + len(sent)))
            await answer.write(sent)
            if not whole:
                assert request.transport is not None
                await asyncio.sleep(0.01)
                request.transport.close()
            return answer

        app = web.Application()
        app.router.add_get("/segment", segment)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/segment"
            away = elsewhere(replace(manifest, segments=(replace(manifest.segments[0], url=url),)), 0)
            found = await fetched(away)
        finally:
            await runner.cleanup()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    asked.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(asked))
    assert len(asked) > 2 * 8


async def test_a_host_that_says_nothing_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SILENCE", 0.2)
    connections = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/segment"
    async with server:
        with sharded({"w": torch.ones(4)}, 1, None) as manifest:
            away = replace(manifest.segments[0], host="another host", url=url)
            with pytest.raises(FetchError, match=r"nothing came for 0\.2 s"):
                await fetched(replace(manifest, segments=(away,)))
    assert connections == 1
