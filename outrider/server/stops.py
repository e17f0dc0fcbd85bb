"""Stop texts: found in a text that arrives in pieces, nothing of them let out before it is sure to stay."""

from collections.abc import Sequence


class StopTexts:
    """The stop texts of one request, prepared for :class:`StopSearch`."""

    def __init__(self, texts: Sequence[str]) -> None:
        # Longest first: of several that end at one place, the one that began first is found.
        self.texts = sorted(set(texts), key=len, reverse=True)
        self.borders = [_borders(text) for text in self.texts]


class StopSearch:
    """Reads one choice's text and lets out what comes before a stop text (Knuth, Morris & Pratt 1977).

    found: the stop text that ended the choice. Which one is found, and where, does not depend on how the text is cut
    into pieces: it is the one that is complete first.
    """

    def __init__(self, stops: StopTexts, include: bool) -> None:
        """include: the stop text itself is part of the choice's text."""
        self.stops, self.include = stops, include
        self.found: str | None = None
        self._matched = [0] * len(stops.texts)
        self._held = ""

    def push(self, piece: str, armed: bool = True) -> str:
        """The text that may go out now that ``piece`` has come. armed: a stop text that ends in this piece counts."""
        if not self.stops.texts:
            return piece
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None and armed:
                self.found, self._held = stop, ""
                return text[: end if self.include else end - len(stop)]
        sure = len(text) - max(self._matched)
        self._held = text[sure:]
        return text[:sure]

    def rest(self) -> str:
        """The text that was held back; nothing more comes."""
        rest, self._held = self._held, ""
        return rest

    def _advance(self, character: str) -> str | None:
        """Take one character; the longest stop text that it completes."""
        complete = None
        for number, (text, borders) in enumerate(zip(self.stops.texts, self.stops.borders, strict=True)):
            matched = self._matched[number]
            while matched and text[matched] != character:
                matched = borders[matched - 1]
            matched += text[matched] == character
            if matched == len(text):
                complete = complete or text
                matched = borders[matched - 1]
            self._matched[number] = matched
        return complete


def _borders(text: str) -> list[int]:
    """For each prefix of ``text``, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for end in range(1, len(text)):
        while length and text[end] != text[length]:
            length = borders[length - 1]
        length += text[end] == text[length]
        borders[end] = length
    return borders
