"""Keepers and pool over servers that misbehave in ways a real one cannot be made to on demand."""

import asyncio

import msgspec
import pytest

from outrider.collector import keeper as keeper_module
from outrider.collector.evaluation import with_prompt
from outrider.collector.keeper import watch_pool
from outrider.collector.pool import RolloutFailed
from outrider.contract.control import Inflight
from outrider.contract.errors import UserError
from outrider.contract.generation import CompletionRequest
from outrider.contract.manifest import Manifest
from tests.collector.servers import PATIENCE, rig, until
from tests.collector.stub import Stub, choice, serving

TEMPLATE = CompletionRequest(prompt=[], max_tokens=8)
PROMPT = [21, 15]


def manifest(version: int) -> Manifest:
    return Manifest(run_id="run", version=version, model_fingerprint="", segments=(), tensors=())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rules at another pace."""
    for name in ("HEARTBEAT", "REVIVAL"):
        monkeypatch.setattr(keeper_module, name, 0.05)


async def test_a_server_whose_engine_has_stopped_gets_no_work() -> None:
    """It still answers who it is. As the least loaded of all it would otherwise swallow every request of the run."""
    async with serving(Stub()) as broken, serving(Stub()) as sound, rig([broken.url, sound.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        broken.health = broken.completions = 503
        answers = await asyncio.gather(
            *(made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 1, i)) for i in range(6))
        )
        assert {completion.server for [completion] in answers} == {sound.url}
        await until(lambda: not made.servers[0].alive)
        assert any("is not healthy: HTTP 503: the engine stopped: out of luck" in notice for notice in made.notices)
        broken.health = broken.completions = 200
        await made.ready(0)


async def test_a_draining_server_is_left_alone_until_it_is_not() -> None:
    """One refusal is enough to look, and the look tells that it drains: nothing is lost, and no work goes there."""
    async with serving(Stub()) as first, serving(Stub()) as second, rig([first.url, second.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        first.draining, first.completions = True, 503
        for seed in range(3):
            [completion] = await made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 1, seed))
            assert completion.server == second.url
        await until(lambda: made.servers[0].draining)
        asked = first.asked
        for seed in range(5):
            await made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 1, seed))
        assert first.asked == asked
        assert made.servers[0].alive
        first.draining, first.completions = False, 200
        await made.ready(0)
        assert [notice.rpartition("is ")[2] for notice in made.notices if "draining" in notice] == ["draining"]
        assert any("takes requests again" in notice for notice in made.notices)


async def test_a_pool_that_only_drains_ends_the_run() -> None:
    """Otherwise the run would wait, without a word, for requests that no server takes."""
    async with serving(Stub(draining=True)) as stub, rig([stub.url], "run") as made:
        await until(lambda: made.servers[0].draining)
        with pytest.raises(UserError, match=r"no rollout server has been up for --vllm_server_timeout 0\.2 s"):
            await watch_pool(made.servers, 0.2)


async def test_a_version_that_is_refused_again_and_again_ends_the_run() -> None:
    async with serving(Stub(stage=409)) as stub, rig([stub.url], "run") as made:
        made.announce(manifest(3))
        await until(lambda: made.failures)
        assert f"server {stub.url} refused version 3 of the weights 5 times: no room" in made.failures[0]
        stub.stage = 200
        await made.ready(3)


async def test_another_trainer_on_our_server_is_noticed() -> None:
    """Its weights are not ours, even where the versions are equal."""
    async with serving(Stub()) as stub, rig([stub.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        stub.info.run_id = "theirs"
        await until(lambda: made.notices)
        assert "holds version 0 of run 'theirs' instead of version 0 of 'run'" in made.notices[0]


async def test_a_returned_server_with_another_model_is_not_taken() -> None:
    async with serving(Stub()) as stub, rig([stub.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        stub.health, fingerprint = 503, stub.info.model_fingerprint
        await until(lambda: not made.servers[0].alive)
        stub.health, stub.info.model_fingerprint = 200, "other"
        await until(lambda: any("is back but cannot be used" in notice for notice in made.notices))
        assert not made.servers[0].alive
        stub.info.model_fingerprint = fingerprint
        await made.ready(0)


async def test_a_server_that_has_forgotten_its_requests_loses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is up and healthy, and nothing runs there: the answer that is waited for will never come."""
    monkeypatch.setattr(keeper_module, "SILENCE", 0.3)
    async with serving(Stub(forget=True)) as odd, serving(Stub()) as sound, rig([odd.url, sound.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        made.servers[0].occupy(1)
        [completion] = await made.pool.complete(made.servers[0], with_prompt(TEMPLATE, PROMPT, 1, 0))
        assert completion.server == sound.url
        assert any("says that no request runs or waits there, while 1 rollouts have" in text for text in made.notices)
        odd.forget = False
        await made.ready(0)


@pytest.mark.parametrize("stub", [Stub(forget=True, load=1), Stub(forget=True, metrics=404)])
async def test_a_long_rollout_is_waited_for(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the server says that something runs there, or says nothing."""
    monkeypatch.setattr(keeper_module, "SILENCE", 0.1)
    async with serving(stub) as slow, rig([slow.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        asked = asyncio.create_task(made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 1, 0)))
        await asyncio.sleep(1.0)
        assert slow.asked == 1
        assert made.servers[0].alive
        assert not made.notices
        asked.cancel()


async def test_answers_are_proof_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers this run's requests is not probed; one that does not is."""
    monkeypatch.setattr(keeper_module, "HEARTBEAT", 1.0)
    async with serving(Stub()) as working, serving(Stub()) as quiet, rig([working.url, quiet.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        working.info.max_model_len = quiet.info.max_model_len = 7  # to be seen by whoever looks
        until_seen = asyncio.create_task(
            until(lambda: made.servers[1].info and made.servers[1].info.max_model_len == 7)
        )
        while not until_seen.done():
            made.servers[0].occupy(1)
            await made.pool.complete(made.servers[0], with_prompt(TEMPLATE, PROMPT, 1, 0))
        assert made.servers[0].info is not None
        assert made.servers[0].info.max_model_len == 256
        await until(lambda: made.servers[0].info and made.servers[0].info.max_model_len == 7)


@pytest.mark.parametrize("inflight", ["keep", "recompute", "wait"])
async def test_a_commit_says_what_becomes_of_requests_in_flight(inflight: Inflight) -> None:
    stub = Stub()
    async with serving(stub), rig([stub.url], "run", inflight=inflight) as made:
        made.announce(manifest(0))
        await made.ready(0)
        assert [commit.inflight for commit in stub.commits] == [inflight]


@pytest.mark.parametrize("packs", [True, False])
async def test_answers_packed_or_not(packs: bool) -> None:
    async with serving(Stub(packs=packs)) as stub, rig([stub.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        completions = await made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 2, 0))
    assert [completion.tokens.tolist() for completion in completions] == [[21, 22]] * 2
    assert [completion.versions for completion in completions] == [[(0, 2)]] * 2


async def test_thousands_wait_for_a_server_and_all_go_there_when_it_comes() -> None:
    stub = Stub()
    async with serving(stub), rig([stub.url], "run") as made:
        asked = [
            asyncio.create_task(made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 1, i))) for i in range(2000)
        ]
        await asyncio.sleep(0.1)
        assert stub.asked == 0
        made.announce(manifest(0))
        await asyncio.wait_for(asyncio.gather(*asked), PATIENCE)
        assert stub.asked == 2000


async def test_a_server_that_hangs_loses_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing: probes find out, and what it holds goes to another one."""
    monkeypatch.setattr("outrider.collector.client.INFO_TIMEOUT", 0.2)
    async with serving(Stub()) as stuck, serving(Stub()) as sound, rig([stuck.url, sound.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        stuck.hang = True
        made.servers[0].occupy(1)
        [completion] = await made.pool.complete(made.servers[0], with_prompt(TEMPLATE, PROMPT, 1, 0))
        assert completion.server == sound.url
        assert stuck.asked == 1
        assert made.servers[0].running == 0


BAD_ANSWERS = [
    (lambda request: [], "sent 0 completions where 2 were asked"),
    (lambda request: [choice([3])], "sent 1 completions where 2 were asked"),
    (lambda request: [choice([3]), choice([3, 4], logprobs=1)], "2 tokens with 1 log-probabilities and 2 versions"),
]


@pytest.mark.parametrize(("choices", "reason"), BAD_ANSWERS)
async def test_answers_that_do_not_fit_cost_their_group(choices: object, reason: str) -> None:
    async with serving(Stub(choices=choices)) as stub, rig([stub.url], "run") as made:  # type: ignore[arg-type]
        made.announce(manifest(0))
        await made.ready(0)
        with pytest.raises(RolloutFailed, match=reason):
            await made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 2, 0))
        assert made.servers[0].running == 0


async def test_cut_off_completions_go_on_together() -> None:
    """One after the other they would take as many times as long. The stub answers only when all have asked."""

    def cut_off(request: CompletionRequest) -> list[object]:
        if request.n == 4:
            return [choice([21] * (index + 1), "abort", index=index) for index in range(4)]
        return [choice([22], "stop")]

    stub = Stub(choices=cut_off, meeting=asyncio.Barrier(4))  # type: ignore[arg-type]
    async with serving(stub), rig([stub.url], "run") as made:
        made.announce(manifest(0))
        await made.ready(0)
        async with asyncio.timeout(PATIENCE):
            answers = await made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 4, 0))
        tokens = [list(completion.tokens) for completion in answers]
        assert tokens == [[21] * (index + 1) + [22] for index in range(4)]
        assert [completion.versions for completion in answers] == [[(0, index + 2)] for index in range(4)]
        assert all(completion.text == made.pool._decode(completion.tokens) for completion in answers)


async def test_the_rest_is_sampled_as_the_beginning_was() -> None:
    """All parameters of the request stay, less what has been done; and the text ends where a stop text is."""

    def cut_off(request: CompletionRequest) -> list[object]:
        first = request.n == 2
        return [choice([21, 22] if first else [23, 24], "abort" if first else "stop") for _ in range(request.n)]

    template = CompletionRequest(
        prompt=[], max_tokens=8, min_tokens=5, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=0.3, stop=["ab", "c"], stop_token_ids=(9,), logit_bias={"3": 1.0},
    )  # fmt: skip
    stub = Stub(choices=cut_off)  # type: ignore[arg-type]
    async with serving(stub), rig([stub.url], "run") as made:
        made.pool._decode = lambda tokens: "x" * len(tokens) + "cab"
        made.announce(manifest(0))
        await made.ready(0)
        completions = await made.pool.complete(None, with_prompt(template, PROMPT, 2, 5))
    first, *rests = stub.requests
    assert [completion.tokens.tolist() for completion in completions] == [[21, 22, 23, 24]] * 2
    assert [completion.text for completion in completions] == ["xxxx"] * 2
    assert len({request.seed for request in stub.requests}) == 3
    for rest in rests:
        assert (rest.prompt, rest.n, rest.max_tokens, rest.min_tokens) == ([*PROMPT, 21, 22], 1, 6, 3)
        done = {"prompt": first.prompt, "n": 2, "max_tokens": 8, "min_tokens": 5, "seed": 5}
        assert msgspec.structs.replace(rest, **done) == first


async def test_a_completion_that_is_always_cut_off_is_given_up() -> None:
    """Also when nothing of it ever comes; and one that is full is not asked for more."""

    def cut_off(request: CompletionRequest) -> list[object]:
        return [choice([21] * request.max_tokens if request.seed == 7 else [], "abort") for _ in range(request.n)]

    async with serving(Stub(choices=cut_off)) as stub, rig([stub.url], "run", tries=2) as made:  # type: ignore[arg-type]
        made.announce(manifest(0))
        await made.ready(0)
        with pytest.raises(RolloutFailed, match="cut off 3 times in a row"):
            await made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 2, 0))
        [full] = await made.pool.complete(None, with_prompt(TEMPLATE, PROMPT, 1, 7))
        assert (len(full.tokens), full.finish_reason) == (8, "length")
