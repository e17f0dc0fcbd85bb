"""Settings of the built-in reward functions, as they are named on the command line."""

import msgspec

from outrider.contract.errors import UserError


class RewardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths are in tokens. UserError where a value makes no sense.

    soft_max_length: L_max of soft_overlong; None means max_completion_length.
    soft_cache_length: L_cache of soft_overlong, which has no sensible default and asks for it.
    repetition_n_grams, repetition_max_penalty: n, in words, and the (negative) limit of repetition.
    """

    max_completion_length: int = 512
    soft_max_length: int | None = None
    soft_cache_length: int | None = None
    repetition_n_grams: int = 3
    repetition_max_penalty: float = -1.0

    def __post_init__(self) -> None:
        if self.repetition_n_grams < 1:
            raise UserError(f"--repetition_n_grams is {self.repetition_n_grams}: it must be at least 1")
        if self.repetition_max_penalty > 0:
            raise UserError(
                f"--repetition_max_penalty is {self.repetition_max_penalty}, which would reward repetition: "
                "make it negative"
            )

    def soft_lengths(self) -> tuple[int, int]:
        """(L_max, L_cache) of soft_overlong. UserError if L_cache is missing or does not fit into L_max."""
        longest = self.max_completion_length if self.soft_max_length is None else self.soft_max_length
        if self.soft_cache_length is None:
            raise UserError(
                "the reward 'soft_overlong' needs --soft_cache_length: over how many of the last tokens "
                f"before {longest} the penalty grows from 0 to -1"
            )
        if not 0 < self.soft_cache_length <= longest:
            raise UserError(
                f"--soft_cache_length is {self.soft_cache_length}: it must be at least 1 and at most "
                f"{longest}, the length where the penalty reaches -1"
            )
        return longest, self.soft_cache_length
