"""A request in vLLM's terms, and its outputs in ours."""

from typing import Any

from vllm import SamplingParams as VllmParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from outrider.contract.sampling import SamplingParams
from outrider.server.vllm_engine.hot import KEY, LIMIT
from outrider.server.vllm_engine.tokens import Tokens

#: Below this temperature vLLM would raise it; the most likely token is drawn there all the same.
_COLDEST = 0.01


def vllm_params(
    sampling: SamplingParams, *, seed: int | None, stops: frozenset[int], kept: int, stream: bool
) -> VllmParams:
    """stops: the model's end-of-text tokens. kept: tokens of the completion that are part of the prompt already.
    stream: outputs with every step."""
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else stops)
    temperature = sampling.temperature if sampling.temperature >= _COLDEST else 0.0
    hot = temperature > LIMIT
    greedy = temperature == 0.0
    return VllmParams(
        max_tokens=sampling.max_tokens - kept,
        # vLLM would keep the end-of-text token from being drawn even where it ends nothing.
        min_tokens=max(sampling.min_tokens - kept, 0) if ends else 0,
        temperature=min(temperature, LIMIT),
        top_p=1.0 if greedy else sampling.top_p,
        top_k=0 if greedy else max(sampling.top_k, 0),
        min_p=0.0 if greedy or hot else sampling.min_p,
        extra_args={KEY: [temperature / LIMIT, sampling.min_p]} if hot else None,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        # The end-of-text tokens are those that every engine of this project uses, not those that vLLM finds.
        stop_token_ids=sorted(ends),
        ignore_eos=True,
        seed=seed,
        logprobs=sampling.alternatives,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def tokens_of(output: CompletionOutput, alternatives: int) -> Tokens:
    """The tokens of an output. vLLM lists the sampled token first, then the most likely ones."""
    ids = list(output.token_ids)
    flat: Any = output.logprobs  # FlatLogprobs, since that is what is asked for
    if not ids or flat is None:
        return Tokens(ids, [])
    tokens = Tokens(ids)
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        tokens.logprobs.append(min(flat.logprobs[start], 0.0))
        if alternatives:
            # The sampled token comes first, and once more among the others if it is one of them; outputs that vLLM has
            # put together list it once, with its rank.
            places = range(start + 1, end) if end - start > alternatives else range(start, end)
            likely = sorted(places, key=lambda place: flat.ranks[place])[:alternatives]
            tokens.top_ids += [flat.token_ids[place] for place in likely]
            tokens.top_logprobs += [flat.logprobs[place] for place in likely]
    return tokens
