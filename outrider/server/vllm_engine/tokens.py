"""Tokens of one choice, on their way from vLLM to an answer."""

import msgspec


class Tokens(msgspec.Struct):
    """Tokens of one choice. top_ids, top_logprobs: the alternatives, flat, a fixed number for each token."""

    ids: list[int] = []
    logprobs: list[float] = []
    top_ids: list[int] = []
    top_logprobs: list[float] = []

    def add(self, more: "Tokens") -> None:
        """Append ``more``."""
        self.ids += more.ids
        self.logprobs += more.logprobs
        self.top_ids += more.top_ids
        self.top_logprobs += more.top_logprobs

    def slice(self, start: int, end: int, alternatives: int) -> "Tokens":
        """Tokens ``start`` to ``end``."""
        top = slice(start * alternatives, end * alternatives)
        return Tokens(self.ids[start:end], self.logprobs[start:end], self.top_ids[top], self.top_logprobs[top])
