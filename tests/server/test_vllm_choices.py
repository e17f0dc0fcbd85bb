"""Which version sampled which token of a choice, through commits, beginnings anew and streams. Needs no vLLM."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from outrider.contract.generation import VersionSpan, append_version
from outrider.contract.sampling import SamplingParams
from outrider.server.vllm_engine.generation import Choice
from outrider.server.vllm_engine.tokens import Tokens

#: What happens to a choice: tokens come, a commit finds some of them sampled, it is begun anew, or a stream is read.
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("tokens"), st.integers(1, 5)),
        st.tuples(st.just("commit"), st.integers(0, 3)),
        st.tuples(st.just("anew"), st.integers(0, 8)),
        st.just(("read", 0)),
    ),
    max_size=40,
)


@given(EVENTS, st.booleans())
def test_every_token_has_the_version_that_sampled_it(events: list[tuple[str, int]], stream: bool) -> None:
    """Against a plain list: tokens are numbers, and each one's version is known when it is sampled.

    A commit's report may be ahead of what has come by some tokens, which then come with the old version.
    """
    choice = Choice([7], SamplingParams(max_tokens=1000), 0, "request", None)
    version = 0
    choice.submitted(version)
    truth: dict[int, int] = {}  # token → version
    current, late, sent = Tokens(), 0, 0
    given_out: list[int] = []
    spans: list[VersionSpan] = []
    numbers = iter(range(10_000))

    def sample(count: int, of: int) -> None:
        for _ in range(count):
            token = next(numbers)
            truth[token] = of
            current.add(Tokens([token], [-1.0]))

    def read() -> None:
        nonlocal sent
        news = choice.unsent.ids + current.ids[sent:]
        for before, count in choice.spans + choice.versions(sent, len(current.ids)):
            append_version(spans, before, count)
        choice.unsent, choice.spans = Tokens(), []
        given_out.extend(news)
        sent = len(current.ids)

    for event, count in events:
        if event == "tokens":
            sample(count, version)
        elif event == "commit":
            late = count
            choice.marks.append((len(current.ids) + late, version + 1))
            sample(late, version)
            version += 1
        elif event == "anew":
            choice.restart = count
            kept = max(min(count, len(current.ids)), sent)
            choice.begin_anew(current, sent)
            assert choice.attempt > 0
            for token in current.ids[kept:]:
                del truth[token]
            current, sent = Tokens(), 0
            choice.submitted(version)
        elif stream:
            read()
    read()
    assert given_out == sorted(truth)
    assert [truth[token] for token in given_out] == [v for v, count in spans for _ in range(count)]
    assert all(left != right for (left, _), (right, _) in itertools.pairwise(spans))
    assert choice.done == given_out[: len(choice.done)]


def test_alternatives_go_along() -> None:
    tokens = Tokens([1, 2], [-1.0, -2.0], [1, 9, 2, 8], [-1.0, -3.0, -2.0, -4.0])
    assert tokens.slice(1, 2, 2) == Tokens([2], [-2.0], [2, 8], [-2.0, -4.0])
    tokens.add(tokens.slice(0, 1, 2))
    assert (tokens.ids, tokens.top_ids) == ([1, 2, 1], [1, 9, 2, 8, 1, 9])
