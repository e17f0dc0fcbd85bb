"""Deltas of an engine to pieces of an answer: texts, tokens, and where a stop text cuts them."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.contract.arrays import pack_floats, pack_ints, unpack_ints
from outrider.contract.generation import CompletionRequest, FinishReason, append_version, version_spans_total
from outrider.server.engine import ChoiceDelta
from outrider.server.pieces import Piece, PieceWriter, WholeWriter, join
from outrider.server.stops import StopTexts
from tests.server.vocabularies import KINDS, codec

IDS = st.lists(st.integers(0, 420), min_size=1, max_size=40)


def delta(ids: list[int], finish_reason: FinishReason | None = None, first: int = 0) -> ChoiceDelta:
    """With a new version every three tokens, and two alternatives a token that tell where they belong."""
    places = range(first, first + len(ids))
    versions: list[tuple[int, int]] = []
    for place in places:
        append_version(versions, place // 3)
    return ChoiceDelta(
        index=0,
        token_ids=pack_ints(ids),
        logprobs=pack_floats([-place for place in places]),
        versions=versions,
        top_ids=pack_ints([id + shift for id in ids for shift in (0, 1)]),
        top_logprobs=pack_floats([-place for place in places for _ in range(2)]),
        finish_reason=finish_reason,
    )


def cut(ids: list[int], sizes: list[int]) -> list[ChoiceDelta]:
    """``ids`` in deltas of these sizes, and the rest in the last one."""
    deltas, start = [], 0
    for size in sizes:
        deltas.append(delta(ids[start : start + size], first=start))
        start = min(start + size, len(ids))
    return [*deltas, delta(ids[start:], "length", start)]


def written(kind: str, body: CompletionRequest, deltas: list[ChoiceDelta]) -> tuple[list[Piece], Piece]:
    writer = PieceWriter(codec(kind), body, StopTexts(body.stops()))
    pieces = []
    for each in deltas:
        pieces.append(writer.write(each))
        if pieces[-1].finish_reason:
            break
    return pieces, join(pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(ids=IDS, sizes=st.lists(st.integers(0, 5), max_size=12), skip=st.booleans(), stops=st.data())
def test_a_choice_does_not_depend_on_how_it_comes(
    kind: str, ids: list[int], sizes: list[int], skip: bool, stops: st.DataObject
) -> None:
    """In one delta or in many: the same text, tokens, figures and end, whatever is to stop it."""
    text = codec(kind).decode(ids, skip)
    candidates = st.builds(lambda start, size: text[start : start + size], st.integers(0, 30), st.integers(1, 4))
    stop = stops.draw(st.lists(candidates.filter(bool), max_size=2) if text else st.just([]))
    body = CompletionRequest(
        prompt="", stop=stop, skip_special_tokens=skip, min_tokens=stops.draw(st.integers(0, 5)),
        include_stop_str_in_output=stops.draw(st.booleans()),
    )  # fmt: skip
    whole, parts = written(kind, body, [delta(ids, "length")])[1], written(kind, body, cut(ids, sizes))[1]
    assert parts == whole
    if not stop:
        assert whole == msgspec.structs.replace(
            WholeWriter(codec(kind), body).write(delta(ids, "length")), offsets=whole.offsets
        )


@given(ids=IDS, stop=st.text("0123456789", min_size=1, max_size=2), least=st.integers(0, 10))
def test_the_tokens_go_up_to_the_one_that_completes_the_stop_text(ids: list[int], stop: str, least: int) -> None:
    """Of the demo's tokenizer, where one can see it: a token is a character, or nothing."""
    text = codec("demo")
    shown = [text.decode([id], True) for id in ids]
    ends = [end for end in range(max(least, 1), len(ids) + 1) if "".join(shown[:end]).endswith(stop) and shown[end - 1]]
    body = CompletionRequest(prompt="", stop=stop, min_tokens=least)
    choice = written("demo", body, cut(ids, [1] * len(ids)))[1]
    if ends:
        assert choice.tokens == ends[0]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        assert choice.text == "".join(shown[: ends[0]]).removesuffix(stop)
    else:
        assert (choice.tokens, choice.finish_reason, choice.stop_reason) == (len(ids), "length", None)
        assert choice.text == "".join(shown)


@given(ids=IDS, kept=st.integers(1, 40))
def test_what_is_behind_a_stop_text_is_cut_off_everywhere(ids: list[int], kept: int) -> None:
    """From ids, log-probabilities, versions and alternatives alike."""
    ids = [id for id in ids if id != 60]
    body = CompletionRequest(prompt="", stop=codec("demo").token(60).text, skip_special_tokens=False)
    whole = delta([*ids[:kept], 60, *ids[kept:]], "length")
    piece = written("demo", body, [whole])[0][0]
    count = len(ids[:kept]) + 1
    assert unpack_ints(piece.token_ids).tolist() == [*ids[:kept], 60]
    assert piece.logprobs == whole.logprobs[: 4 * count]
    assert piece.top_ids == whole.top_ids[: 8 * count]
    assert piece.top_logprobs == whole.top_logprobs[: 8 * count]
    assert version_spans_total(piece.versions) == count
    assert len(piece.offsets) == count


def test_a_stop_text_that_is_complete_with_the_last_token_counts() -> None:
    """And one that is not is part of the text."""
    ids = codec("demo").tokenizer.encode("12")
    for stop, text, reason in (("2", "1", "stop"), ("23", "12", "length")):
        body = CompletionRequest(prompt="", stop=stop)
        choice = written("demo", body, [delta(ids[:1]), delta(ids[1:], "length", 1)])[1]
        assert (choice.text, choice.finish_reason) == (text, reason)


def test_offsets_are_those_of_the_text() -> None:
    tokenizer = codec("byte level").tokenizer
    ids = tokenizer.encode("the ☃!")
    [piece], _ = written("byte level", CompletionRequest(prompt=""), [delta(ids, "length")])
    said = [codec("byte level").decode(ids[:end], True).rstrip("\N{REPLACEMENT CHARACTER}") for end in range(len(ids))]
    assert piece.offsets == [len(text) for text in said]


def test_a_choice_that_is_aborted_before_its_first_token() -> None:
    choice = written("demo", CompletionRequest(prompt="", stop="x"), [delta([], "abort")])[1]
    assert (choice.text, choice.tokens, choice.finish_reason) == ("", 0, "abort")
