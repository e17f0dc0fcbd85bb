"""A version on its way from a publisher to a server on the same host, and everything that can be wrong with it."""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from outrider.contract import routes
from outrider.contract.control import ServerInfo, WeightStatus
from outrider.contract.generation import version_spans_total
from outrider.contract.manifest import Manifest, Piece, TensorEntry
from outrider.weights.publish import Publisher
from tests.contract.client import Client
from tests.contract.conftest import KEY, EndlessModel
from tests.contract.publishing import publishing
from tests.contract.servers import Server

PROMPT = [5, 6, 7]


@pytest.fixture
async def info(weights_client: Client) -> ServerInfo:
    return await weights_client.get(routes.INFO, ServerInfo)


@pytest.fixture
async def publisher(info: ServerInfo, endless_model: EndlessModel) -> AsyncIterator[Publisher]:
    """Publishes the weights of seed 1 in a run of the test's own."""
    with publishing(endless_model(1), info, uuid.uuid4().hex[:12]) as publisher:
        yield publisher


async def test_a_version_is_staged_and_committed_under_running_requests(
    weights_client: Client, publisher: Publisher
) -> None:
    """Generation goes on through both; every token is tagged with the version that sampled it."""
    client = weights_client
    before = (await client.get(routes.STATUS, WeightStatus)).version
    running = [
        asyncio.create_task(client.choices(prompt=[5, 6 + i], n=2, max_tokens=900, temperature=1.0)) for i in range(6)
    ]
    await client.until_running(12)
    manifest = publisher.publish(41).result()
    staged = await client.stage(manifest)
    assert (staged.state, staged.staged_version, staged.version) == ("staged", 41, before)
    assert (await client.get(routes.INFO, ServerInfo)).version == before
    committed = await client.commit(manifest)
    assert (committed.state, committed.version, committed.run_id) == ("idle", 41, publisher.run_id)
    assert committed.staged_version is None
    info = await client.get(routes.INFO, ServerInfo)
    assert (info.version, info.run_id) == (41, publisher.run_id)
    assert await client.metric("outrider:weight_version") == 41
    for choices in await asyncio.gather(*running):
        for choice in choices:
            assert choice.finish_reason == "length"
            assert version_spans_total(choice.weight_versions or []) == len(choice.token_ids or []) == 900
            assert [version for version, _ in choice.weight_versions or []] == [before, 41]


async def test_the_new_weights_are_those_published(
    weights_client: Client, publisher: Publisher, start_endless: Callable[..., Server]
) -> None:
    """The same tokens as from a server that was started from them, and other ones than before."""
    manifest = publisher.publish(1).result()
    await weights_client.stage(manifest)
    await weights_client.commit(manifest)
    fresh = start_endless("--max_num_seqs", "16", seed=1)
    async with Client(fresh.url, KEY) as reference:
        assert await weights_client.greedy(PROMPT, 64) == await reference.greedy(PROMPT, 64)
        seeded = {"prompt": PROMPT, "max_tokens": 64, "n": 4, "seed": 3, "temperature": 0.8}
        ours, theirs = await weights_client.choices(**seeded), await reference.choices(**seeded)
        assert [choice.token_ids for choice in ours] == [choice.token_ids for choice in theirs]
        assert {version for choice in ours for version, _ in choice.weight_versions or []} == {1}


async def test_versions_follow_one_another(weights_client: Client, publisher: Publisher) -> None:
    """Also with gaps, as for a server that is too slow for some."""
    for version in (1, 2, 5):
        manifest = publisher.publish(version).result()
        await weights_client.stage(manifest)
        assert (await weights_client.commit(manifest)).version == version


async def test_requests_of_the_run_are_served_after_its_first_commit(
    weights_client: Client, publisher: Publisher
) -> None:
    headers, body = {routes.RUN_HEADER: publisher.run_id}, b'{"prompt": [5], "max_tokens": 1}'
    assert (await weights_client.refusal(body, headers=headers))[0] == 409
    manifest = publisher.publish(0).result()
    await weights_client.stage(manifest)
    assert (await weights_client.refusal(body, headers=headers))[0] == 409
    await weights_client.commit(manifest)
    assert (await weights_client.ask("POST", routes.COMPLETIONS, body, headers))[0] == 200


async def test_only_what_is_staged_can_be_committed(weights_client: Client, publisher: Publisher) -> None:
    manifest = publisher.publish(7).result()
    status, error = await weights_client.commit_refusal(manifest)
    assert (status, error.type) == (409, "conflict_error")
    assert "version 7" in error.message
    await weights_client.stage(manifest)
    for other in (replace(manifest, version=8), replace(manifest, run_id="another-run")):
        status, error = await weights_client.commit_refusal(other)
        assert status == 409
        assert "version 7 of run" in error.message
    assert (await weights_client.commit(manifest)).version == 7
    assert (await weights_client.commit_refusal(manifest))[0] == 409, "a version is committed once"


async def test_a_torn_version_is_refused_and_the_next_one_taken(weights_client: Client, publisher: Publisher) -> None:
    """Version 3 is written over version 1, as happens to a server that is two versions behind."""
    torn = publisher.publish(1).result()
    for tensor in publisher.tensors.values():
        tensor.add_(0.5)
    whole = publisher.publish(3).result()
    await _refused(weights_client, torn, "checksum")
    await weights_client.stage(whole)
    assert (await weights_client.commit(whole)).version == 3


async def test_a_corrupt_version_is_refused(weights_client: Client, publisher: Publisher) -> None:
    manifest = publisher.publish(1).result()
    piece = manifest.tensors[-1].pieces[0]
    _flip_bit(Path(manifest.segments[0].path), piece.offset + piece.length - 1)
    await _refused(weights_client, manifest, repr(manifest.tensors[-1].name))


def _flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def _first(manifest: Manifest, **changes: object) -> Manifest:
    """The manifest with its first tensor changed."""
    return replace(manifest, tensors=(replace(manifest.tensors[0], **changes), *manifest.tensors[1:]))


def _split(manifest: Manifest, *lengths: int) -> Manifest:
    """The manifest with its first tensor in pieces of these lengths."""
    return _first(manifest, pieces=tuple(Piece(segment=0, offset=0, length=n, checksum=0) for n in lengths))


def _bytes(manifest: Manifest) -> int:
    return manifest.tensors[0].nbytes


_STRANGER = TensorEntry(name="stranger", dtype="float32", shape=(0,), pieces=())

WRONG: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "of another model": (lambda m: replace(m, model_fingerprint="f00"), "fingerprint f00"),
    "a tensor missing": (lambda m: replace(m, tensors=m.tensors[1:]), "is missing"),
    "no tensors": (lambda m: replace(m, tensors=()), "is missing"),
    "a tensor unknown": (lambda m: replace(m, tensors=(*m.tensors, _STRANGER)), "'stranger' is unknown"),
    "a tensor twice": (lambda m: replace(m, tensors=(*m.tensors, m.tensors[0])), "twice"),
    "another shape": (lambda m: _first(m, shape=m.tensors[0].shape[::-1]), "has shape"),
    "a flat shape": (lambda m: _first(m, shape=(math.prod(m.tensors[0].shape),)), "has shape"),
    "another dtype": (lambda m: _first(m, dtype="float16"), "its shape needs"),
    "too few bytes": (lambda m: _split(m, _bytes(m) - 4), "its shape needs"),
    "no pieces": (lambda m: _split(m), "its shape needs"),
    "a negative piece": (lambda m: _split(m, _bytes(m) + 8, -8), "a piece of -8 bytes"),
    "a piece beyond its segment": (
        lambda m: _first(m, pieces=(replace(m.tensors[0].pieces[0], offset=m.segments[0].length - 1),)),
        "ends beyond its segment",
    ),
    "a segment that is not listed": (lambda m: replace(m, segments=()), "segment 0 does not exist"),
    "a segment that is gone": (
        lambda m: replace(m, segments=(replace(m.segments[0], path="/dev/shm/outrider-gone"),)),
        "/dev/shm/outrider-gone",
    ),
    "a segment that is shorter": (
        lambda m: replace(m, segments=(replace(m.segments[0], length=m.segments[0].length + 2**20),)),
        "segment",
    ),
    "a segment of absurd length": (
        lambda m: replace(m, segments=(replace(m.segments[0], length=2**80),)),
        "segment",
    ),
    "no URL": (
        lambda m: replace(m, segments=(replace(m.segments[0], host="another", url="not a URL"),)),
        "not a URL",
    ),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_manifest_is_refused(
    weights_client: Client, publisher: Publisher, change: Callable[[Manifest], Manifest], complaint: str
) -> None:
    await _refused(weights_client, change(publisher.publish(1).result()), complaint)


async def _refused(client: Client, manifest: Manifest, complaint: str) -> None:
    """The manifest is refused with 409, cannot be committed, and the weights in use are as before."""
    before, tokens = await client.get(routes.STATUS, WeightStatus), await client.greedy(PROMPT)
    status, error = await client.stage_refusal(manifest)
    assert (status, error.type) == (409, "conflict_error")
    assert complaint in error.message
    after = await client.get(routes.STATUS, WeightStatus)
    assert (after.version, after.run_id, after.state) == (before.version, before.run_id, "failed")
    assert complaint in (after.error or "")
    status, error = await client.commit_refusal(manifest)
    assert status == 409
    assert "nothing is staged" in error.message
    assert await client.greedy(PROMPT) == tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{}", "manifest"),
        (b'{"manifest": {"run_id": "r"}}', "manifest.version"),
        (b'{"manifest": 3}', "manifest"),
        (b"\xff", None),
    ],
)
async def test_what_is_no_manifest_is_a_bad_request(weights_client: Client, body: bytes, param: str | None) -> None:
    status, error = await weights_client.refusal(body, routes.STAGE)
    assert (status, error.param) == (400, param)


async def test_an_unknown_dtype_is_a_bad_request(weights_client: Client, publisher: Publisher) -> None:
    manifest = msgspec.to_builtins(publisher.publish(1).result())
    manifest["tensors"][0]["dtype"] = "int8"
    status, error = await weights_client.refusal(msgspec.json.encode({"manifest": manifest}), routes.STAGE)
    assert status == 400
    assert error.param == "manifest.tensors[0].dtype"


async def test_weights_of_a_diverged_training_do_not_end_the_server(
    weights_client: Client, publisher: Publisher
) -> None:
    """Requests are refused with the reason for as long as such weights are in use."""
    originals = {name: tensor.clone() for name, tensor in publisher.tensors.items()}
    for tensor in publisher.tensors.values():
        tensor.fill_(math.nan)
    diverged = publisher.publish(8).result()
    await weights_client.stage(diverged)
    await weights_client.commit(diverged)
    for max_tokens in (1, 500):
        body = b'{"prompt": [5, 6], "n": 8, "max_tokens": %d}' % max_tokens
        status, error = await weights_client.refusal(body)
        assert status == 503
        assert "version 8" in error.message
    assert (await weights_client.ask("GET", routes.HEALTH))[0] == 200
    for name, tensor in publisher.tensors.items():
        tensor.copy_(originals[name])
    mended = publisher.publish(9).result()
    await weights_client.stage(mended)
    await weights_client.commit(mended)
    assert len(await weights_client.greedy(PROMPT)) == 8


async def test_a_version_staged_again_and_again_while_requests_run(
    weights_client: Client, publisher: Publisher
) -> None:
    """Staging writes beside the weights in use: what they sample is what they sample undisturbed."""
    manifest = publisher.publish(1).result()
    await weights_client.stage(manifest)
    await weights_client.commit(manifest)
    seeded = {"prompt": PROMPT, "max_tokens": 300, "n": 4, "seed": 3}
    alone = await weights_client.choices(**seeded)
    for tensor in publisher.tensors.values():
        tensor.mul_(1.5)
    task = asyncio.create_task(weights_client.choices(**seeded))
    for version in (2, 3, 4, 5):
        await weights_client.stage(publisher.publish(version).result())
    assert await task == alone


def test_the_segments_are_in_memory(publisher: Publisher) -> None:
    """And only their owner may read them."""
    [segment] = publisher.publish(1).result().segments
    assert Path(segment.path).stat().st_mode & 0o077 == 0
