"""Weights change while vLLM runs: with the recorded versions and the weights of those versions, every recorded
log-probability is reproduced by plain forward passes of Transformers."""

import asyncio
import random
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider.contract import routes
from outrider.contract.control import Inflight, ServerInfo
from outrider.contract.generation import ChoiceLogprobs, CompletionChoice, append_version
from tests.contract.client import Client, figures
from tests.contract.publishing import publishing
from tests.server.cores import Choice, reference
from tests.server.test_inflight import replay
from tests.vllm.conftest import KEY, StartEndless

pytestmark = pytest.mark.real_vllm


async def streamed(client: Client, **fields: Any) -> list[CompletionChoice]:
    """The choices of a stream, put together."""
    chunks = await client.chunks(logprobs=0, return_token_ids=True, **fields)
    whole: dict[int, CompletionChoice] = {}
    for part in (choice for chunk in chunks for choice in chunk.choices):
        choice = whole.setdefault(
            part.index,
            CompletionChoice(
                index=part.index, text="", finish_reason=None, token_ids=[], weight_versions=[],
                logprobs=ChoiceLogprobs(token_logprobs=[]),
            ),
        )  # fmt: skip
        assert choice.token_ids is not None
        assert choice.weight_versions is not None
        choice.token_ids += part.token_ids or []
        figures(choice).token_logprobs += figures(part).token_logprobs
        for version, count in part.weight_versions or []:
            append_version(choice.weight_versions, version, count)
        choice.finish_reason = part.finish_reason
    return list(whole.values())


def recorded(choice: CompletionChoice) -> Choice:
    """A completion in the form that the replay reads."""
    made = Choice()
    made.tokens, made.logprobs = choice.token_ids or [], figures(choice).token_logprobs
    made.versions = list(choice.weight_versions or [])
    return made


@pytest.mark.parametrize("policy", ["keep", "recompute", "wait"])
async def test_every_logprob_is_reproduced(
    start_endless: StartEndless, endless: Callable[[int], Path], policy: Inflight
) -> None:
    """Requests of many lengths that share prefixes, some of them streams, more than run at once, over many commits."""
    models = [reference(endless(0)), reference(endless(1))]
    # Blocks of the prefix cache shorter than what prompts share; a CPU's are of 128 tokens otherwise.
    server = start_endless("--engine_kwargs", '{"block_size": 32}')
    source = random.Random(5)
    asked: list[tuple[dict[str, Any], asyncio.Task[list[CompletionChoice]]]] = []
    async with Client(server.url, KEY) as client:
        info = await client.get(routes.INFO, ServerInfo)
        roots = [[source.randrange(3, 99) for _ in range(80)] for _ in range(3)]

        def ask(count: int) -> None:
            for _ in range(count):
                prompt = [*source.choice(roots)[: source.randrange(20, 80)], source.randrange(3, 99)]
                fields = {"prompt": prompt, "n": 2, "max_tokens": source.randrange(20, 160), "ignore_eos": True}
                request = client.choices(**fields) if source.random() < 0.5 else streamed(client, **fields)
                asked.append((fields, asyncio.create_task(request)))

        with (
            publishing(endless(0), info, uuid.uuid4().hex[:12]) as even,
            publishing(endless(1), info, uuid.uuid4().hex[:12]) as odd,
        ):
            ask(6)
            for version in range(1, 9):
                await asyncio.sleep(0.05 * source.random())
                ask(4)
                manifest = await asyncio.wrap_future((odd if version % 2 else even).publish(version))
                await client.stage(manifest)
                await client.commit(manifest, policy)
            ask(2)
            done = [(fields, choice) for fields, task in asked for choice in await task]
        assert await client.metric("vllm:prefix_cache_hits_total") > 0  # within a version
    by_version = [models[version % 2] for version in range(9)]
    mixed = again = 0
    for fields, choice in done:
        assert (len(choice.token_ids or []), choice.finish_reason) == (fields["max_tokens"], "length")
        again += replay(by_version, fields["prompt"], recorded(choice), policy)
        mixed += len(choice.weight_versions or []) > 1
    # Where outputs come late, sequences have ended that are not yet known to have: these go on from what is known.
    anew = re.findall(r"version \d+: (\d+) sequences that no engine ran when it came", server.output.read_text())
    assert again <= sum(map(int, anew))
    assert (mixed == 0) == (policy == "wait")
