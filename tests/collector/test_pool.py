"""The pool and its keepers over real servers that are killed, drained and started again."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from outrider.collector.client import Refused, ServerClient, ServerLost
from outrider.collector.evaluation import with_prompt
from outrider.collector.pool import RolloutFailed
from outrider.collector.server import Server
from outrider.contract.generation import CompletionRequest, version_spans_total
from outrider.environments.base import Completion
from tests.collector.servers import KEY, Rig, RolloutProcess, Weights, generated, rig, until, until_generated
from tests.collector.stub import fitting_info

TEMPLATE = CompletionRequest(prompt=[], max_tokens=200, temperature=1.5)
PROMPT = [21, 15, 21, 33]
_runs = itertools.count()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RolloutProcess]]:
    directory = tmp_path_factory.mktemp("servers")
    servers = [RolloutProcess(directory, "--drain_timeout", "0", "--max_num_seqs", "128") for _ in range(2)]
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def two(processes: list[RolloutProcess]) -> list[RolloutProcess]:
    """Two servers that run, whatever the test before did to them."""
    for process in processes:
        process.start()
    for process in processes:
        process.wait()
    return processes


@pytest.fixture
def run_id() -> str:
    return f"pool{next(_runs)}"


@pytest.fixture
def weights(run_id: str) -> Iterator[Weights]:
    made = Weights(run_id)
    yield made
    made.close()


@pytest.fixture
async def kept(two: list[RolloutProcess], run_id: str, weights: Weights) -> AsyncIterator[Rig]:
    """Both servers at version 0 of a run, with keepers."""
    async with rig([process.url for process in two], run_id) as made:
        made.announce(weights.publish(0))
        await made.ready(0)
        yield made


def check(completions: list[Completion], weights: Weights, prompt: list[int] = PROMPT, sample: int = 4) -> None:
    """Tokens, log-probabilities and versions are of one length, and the log-probabilities are those of the weights
    that the versions name, by plain forward passes."""
    for completion in completions:
        assert len(completion.tokens) == len(completion.logprobs) == version_spans_total(completion.versions)
        assert completion.finish_reason in ("stop", "length")
    longest = sorted(completions, key=lambda completion: -len(completion.tokens))
    stitched = [completion for completion in completions if len(completion.versions) > 1]
    for completion in longest[:sample] + stitched[:sample]:
        start = 0
        for version, count in completion.versions:
            plain = weights.logprobs(version, prompt, completion.tokens, TEMPLATE.temperature)
            part = slice(start, start + count)
            assert list(completion.logprobs[part]) == pytest.approx(plain[part], abs=1e-4)
            start += count


async def test_new_work_goes_to_the_least_loaded(kept: Rig, weights: Weights) -> None:
    first, second = kept.servers
    assert kept.pool.free_server(0) is not None
    first.occupy(3)
    assert kept.pool.free_server(0) is second
    answers = await asyncio.gather(*(kept.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 2, i)) for i in range(2)))
    assert {completion.server for answer in answers for completion in answer} == {second.url}
    assert (first.running, second.running) == (3, 0)
    second.occupy(second.limit)
    assert kept.pool.free_server(0) is first
    second.vacate(second.limit)
    check([completion for answer in answers for completion in answer], weights)


async def test_of_two_idle_servers_the_newer_one(kept: Rig) -> None:
    kept.servers[1].holds(3)
    assert kept.pool.free_server(0) is kept.servers[1]
    kept.servers[1].holds(0)


async def test_what_can_never_work_is_not_repeated(kept: Rig) -> None:
    """A request that is wrong in itself fails at once, and leaves the server in use."""
    with pytest.raises(RolloutFailed, match=r"HTTP 400: prompt of 300 tokens"):
        await kept.pool.complete(None, with_prompt(TEMPLATE, [21] * 300, 1, 0))
    assert all(server.ready and server.running == 0 for server in kept.servers)


async def test_versions_follow_what_is_published(kept: Rig, weights: Weights) -> None:
    """Servers may skip versions; rollouts bear the version that sampled them."""
    for version in (1, 2, 3):
        kept.announce(weights.publish(version))
    await kept.ready(3)
    check(await kept.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 4, 0)), weights)
    assert not kept.failures


async def test_a_killed_server_costs_nothing(kept: Rig, two: list[RolloutProcess], weights: Weights) -> None:
    """kill -9 amid requests: all are answered by the other one. When it is back, it gets the newest version, which was
    published while it was away, and takes work again."""
    victim, other = kept.servers
    before = await generated(victim)
    asked = [asyncio.create_task(kept.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 16, i))) for i in range(8)]
    await until_generated(victim, before + 500)
    two[0].kill()
    answers = [completion for answer in await asyncio.gather(*asked) for completion in answer]
    assert len(answers) == 8 * 16
    check(answers, weights)
    await until(lambda: not victim.alive)
    assert any(f"server lost: {victim.url}" in notice for notice in kept.notices)
    assert victim.running == other.running == 0
    kept.announce(weights.publish(1))
    await kept.ready(1, count=1)
    two[0].start()
    await kept.ready(1)
    assert any(f"server {victim.url} is back" in notice for notice in kept.notices)
    other.occupy(other.limit)
    answers = await kept.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 2, 0))
    other.vacate(other.limit)
    assert {completion.server for completion in answers} == {victim.url}
    check(answers, weights)
    assert not kept.failures


async def test_what_a_draining_server_cut_off_goes_on_elsewhere(
    two: list[RolloutProcess], run_id: str, weights: Weights
) -> None:
    """SIGTERM without any grace: the tokens there are are kept, and the rest is sampled by the other server, which
    holds a newer version. Every token has the log-probability of its own version."""
    async with rig([process.url for process in two], run_id, keep=False) as made:
        for version, server in enumerate(made.servers):
            await server.client.stage(weights.publish(version))
            await server.client.commit(run_id, version)
            server.holds(version)
        old, new = made.servers
        before = await generated(old)
        asked = []
        for seed in range(3):
            old.occupy(64)
            asked.append(asyncio.create_task(made.pool.complete(old, with_prompt(TEMPLATE, PROMPT, 64, seed))))
        await until_generated(old, before + 4000)
        two[0].terminate()
        answers = [completion for answer in await asyncio.gather(*asked) for completion in answer]
        assert len(answers) == 3 * 64
        stitched = [completion for completion in answers if len(completion.versions) == 2]
        assert stitched, "no completion was cut off in the middle"
        assert all([version for version, _ in completion.versions] == [0, 1] for completion in stitched)
        assert {completion.server for completion in stitched} == {new.url}
        check(answers, weights)
        for completion in stitched:
            assert completion.text == made.pool._decode(completion.tokens)
            assert len(completion.tokens) <= TEMPLATE.max_tokens
        assert len({tuple(completion.tokens) for completion in stitched}) > 1
        assert old.running == new.running == 0
        assert two[0].process is not None
        assert two[0].process.wait(30) == 0


async def test_a_repetition_is_never_sampled_with_older_weights(kept: Rig, weights: Weights) -> None:
    """The gate reckons with the version at the start: a server that lags may not take over what another one lost."""
    lagging, newer = kept.servers
    newest = weights.publish(1)
    await newer.client.stage(newest)
    await newer.client.commit(newest.run_id, 1)
    newer.holds(1)
    newer.occupy(5)  # so that the lagging one would be chosen
    away = Server(ServerClient("http://127.0.0.1:9", KEY))
    away.occupy(1)
    [completion] = await kept.pool.complete(away, with_prompt(TEMPLATE, PROMPT, 1, 0), at_least=1)
    assert completion.server == newer.url
    newer.occupy(1)
    waiting = asyncio.create_task(kept.pool.complete(newer, with_prompt(TEMPLATE, PROMPT, 1, 0), at_least=1))
    assert [version for version, _ in (await waiting)[0].versions] == [1]
    kept.announce(newest)
    await kept.ready(1)
    assert lagging.version == 1
    await away.client.close()


async def test_a_server_restarted_behind_our_back_samples_nothing(
    kept: Rig, two: list[RolloutProcess], run_id: str, weights: Weights
) -> None:
    """The same port, but the weights that it started with: it answers 409 to the run's requests, they go elsewhere,
    and it is given the run's weights before it is asked again."""
    restarted, other = kept.servers
    two[0].kill()
    two[0].start()
    two[0].wait()
    client = ServerClient(restarted.url, KEY)  # not the keeper's, which may notice at this moment
    with pytest.raises(Refused, match=r"409: weights of run 'pool\d+' are asked for") as caught:
        await client.complete(with_prompt(TEMPLATE, PROMPT, 1, 0), run_id)
    await client.close()
    assert caught.value.retryable
    answers, short = [], msgspec.structs.replace(TEMPLATE, max_tokens=16)
    for seed in range(30):
        [completion] = await kept.pool.complete(None, with_prompt(short, PROMPT, 1, seed))
        answers.append(completion)
    await kept.ready(0)
    other.occupy(100)
    answers += await kept.pool.complete(None, with_prompt(short, PROMPT, 4, 99))
    assert answers[-1].server == restarted.url
    check(answers, weights, sample=len(answers))


async def test_tries_are_limited(run_id: str) -> None:
    """Nobody there: the rollout is given up, with the last reason, and its group with it."""
    async with rig(["http://127.0.0.1:9"], run_id, keep=False, tries=1) as made:
        [server] = made.servers
        server.up(fitting_info())
        server.holds(0)
        server.occupy(1)
        asked = asyncio.create_task(made.pool.complete(server, with_prompt(TEMPLATE, PROMPT, 1, 0)))
        await until(server.lost.is_set)
        assert not server.ready, "nobody else is sent there until the keeper has looked"
        server.trust()
        with pytest.raises(RolloutFailed, match=r"given up after 2 tries; last: http://127.0.0.1:9: .*refused"):
            await asked
        assert server.running == 0


async def test_dropped_requests_are_lost_ones(kept: Rig) -> None:
    """A server that has vanished without a word (its host is down) does not keep requests for ever."""
    server = kept.servers[0]
    asked = [
        asyncio.create_task(server.client.complete(with_prompt(TEMPLATE, PROMPT, 64, i), kept.pool.run_id))
        for i in range(8)
    ]
    await asyncio.sleep(0)
    await until(lambda: server.client._data.connector is not None and server.client._data.connector._acquired)
    await server.client.drop_requests()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert any(isinstance(outcome, ServerLost) for outcome in outcomes)
    assert all(isinstance(outcome, ServerLost) or not isinstance(outcome, BaseException) for outcome in outcomes)
    assert await server.client.complete(with_prompt(TEMPLATE, PROMPT, 1, 0), kept.pool.run_id)
