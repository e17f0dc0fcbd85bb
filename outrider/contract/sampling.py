"""How tokens are chosen: the part of a request that an engine reads."""

from typing import Annotated

import msgspec
from msgspec import Meta

#: Types of the fields of the sampling surface, with the bounds that the server names when it refuses a value.
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0.0, le=1.0)]
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=100.0)]
AdditivePenalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]

#: Most alternatives listed beside a sampled token.
MAX_ALTERNATIVES = 20


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_p`` 1, ``top_k`` 0 or -1 and ``min_p`` 0 are off.

    max_tokens, min_tokens: of the completion; before min_tokens nothing that would end it can be drawn.
    repetition_penalty: divides the positive and multiplies the negative logits of tokens of prompt and completion
    (Keskar et al. 2019, arXiv:1909.05858, eq. 4). presence_penalty, frequency_penalty: taken from the logits of the
    completion's tokens once, and once for each occurrence (OpenAI's API). logit_bias: ``(token, added to its logit)``.
    ignore_eos: the model's end-of-text tokens end nothing; stop_token_ids still do. alternatives: most likely tokens
    reported beside each sampled one. Order: bias, penalties, temperature, top-k, min-p, top-p.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    alternatives: int = 0
