"""Stop texts are found wherever they are, and nothing of them goes out before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.server.stops import StopSearch, StopTexts

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By trying every end: the text before the stop text that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS, include=st.booleans())
def test_what_goes_out_is_what_comes_before_the_first(pieces: list[str], stops: list[str], include: bool) -> None:
    text, found = expected("".join(pieces), stops, include)
    search = StopSearch(StopTexts(stops), include)
    out = ""
    for piece in pieces:
        out += search.push(piece)
        assert text.startswith(out), "nothing is taken back"
        if search.found:
            break
    assert (out + search.rest(), search.found) == (text, found)


@given(text=TEXT, stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_text(text: str, stops: list[str]) -> None:
    search = StopSearch(StopTexts(stops), False)
    for end, character in enumerate(text, 1):
        search.push(character)
        if search.found:
            return
        held = max(size for size in range(end + 1) for stop in stops if stop.startswith(text[end - size : end]))
        assert search._held == text[end - held : end]


def test_a_stop_text_that_came_too_early_is_passed_over() -> None:
    search = StopSearch(StopTexts(["abcd", "bc"]), False)
    assert search.push("abc", armed=False) == ""
    assert search.push("x", armed=True) == "abcx"
    assert search.push("ab") == ""
    assert search.push("cd") == "a"
    assert search.found == "bc"


@pytest.mark.parametrize("stop", ["a" * 4000, "ab" * 2000])
def test_long_stop_texts_take_no_longer_by_the_character(stop: str) -> None:
    search = StopSearch(StopTexts([stop]), False)
    assert search.push(stop[:-1] + "x" + stop) == stop[:-1] + "x"
    assert search.found == stop


def test_without_stop_texts_all_goes_out_at_once() -> None:
    search = StopSearch(StopTexts([]), False)
    assert search.push("abc") == "abc"
    assert search.rest() == ""
