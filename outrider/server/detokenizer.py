"""Tokens to text as they come: nothing is said that a later token could change."""

from collections.abc import Callable, Collection, Sequence

#: What a decoder writes where bytes are no character, and for now where they are not yet one.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

#: Tokens that are held back at most. A character has no more than four bytes, so that what is longer is no character
#: in the making: a model that babbles bytes, or one that writes the replacement character itself.
MOST_HELD = 16

#: ids -> their text, special tokens left out or not.
Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """The text of one choice, token by token.

    A token's text may depend on its neighbours (half a character, a space that only the first word lacks), but not on
    those far away: the tokens that were said last are decoded again together with those that are new.
    """

    def __init__(self, decode: Decode, silent: Collection[int]) -> None:
        """silent: tokens that ``decode`` leaves out."""
        self._decode, self._silent = decode, silent
        self._ids: list[int] = []
        self._context = 0  # so many of _ids have been said
        self._said = ""  # their text

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` has come."""
        if token in self._silent:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text == self._said and self._said:
            self._ids.pop()  # such as an id that the tokenizer does not know
            return ""
        if not text or not text.endswith(REPLACEMENT):
            return self._say(text, len(self._ids)) if text else ""
        if len(self._ids) - self._context < MOST_HELD:
            return ""
        return self._say_some(text)

    def rest(self) -> str:
        """The text that was held back; nothing more comes."""
        return self._say(self._decode(self._ids), len(self._ids))

    def _say(self, text: str, end: int) -> str:
        """``text`` is that of the first ``end`` tokens: what of it is new. They are the context from now on."""
        new = text[len(self._said) :]
        self._ids = self._ids[self._context :]
        self._context = end - self._context
        self._said = self._decode(self._ids[: self._context])
        return new

    def _say_some(self, text: str) -> str:
        """All but the last tokens, where the text may be parted, so that a character that begins in them is whole."""
        for end in range(len(self._ids) - 1, len(self._ids) - 4, -1):
            head = self._decode(self._ids[:end])
            if head + self._decode(self._ids[end:]) == text:
                return self._say(head, end)
        return self._say(text, len(self._ids))


def detokenize(ids: Sequence[int], decode: Decode, silent: Collection[int]) -> str:
    """The text that a :class:`Detokenizer` says of ``ids``.

    That is ``decode(ids)`` where every byte belongs to a character. Elsewhere decoders exist that take back what they
    have said, and the text is what a stream says.
    """
    text = decode(ids)
    if REPLACEMENT not in text:
        return text
    detokenizer = Detokenizer(decode, silent)
    return "".join([*map(detokenizer.push, ids), detokenizer.rest()])
