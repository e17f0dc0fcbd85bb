"""What a request must keep to, whichever engine answers it."""

from outrider.contract.control import ServerInfo
from outrider.contract.sampling import SamplingParams
from outrider.server.engine import InvalidRequest

#: Tokens that end a sequence, those of the model included.
MAX_STOP_TOKENS = 16


def check_request(prompt: list[int], sampling: SamplingParams, info: ServerInfo, allowed_stops: int) -> None:
    """Raises InvalidRequest for what the server of ``info`` cannot serve, naming field and allowed range.
    allowed_stops: stop tokens that a request may bring."""
    limit, vocabulary = info.max_model_len, info.vocab_size
    if not prompt:
        raise InvalidRequest("prompt: it is empty; it needs at least one token", "prompt")
    if len(prompt) + sampling.max_tokens > limit:
        raise InvalidRequest(
            f"prompt of {len(prompt)} tokens + max_tokens {sampling.max_tokens} = "
            f"{len(prompt) + sampling.max_tokens} exceed this server's limit of {limit} (--max_model_len)",
            "max_tokens",
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens: must be between 0 and max_tokens, {sampling.max_tokens}; got {sampling.min_tokens}",
            "min_tokens",
        )
    biased = [token for token, _ in sampling.logit_bias]
    for field, ids in (("prompt", prompt), ("stop_token_ids", sampling.stop_token_ids), ("logit_bias", biased)):
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= vocabulary:
            raise InvalidRequest(
                f"{field}: token id {low if low < 0 else high} is outside the vocabulary, 0 to {vocabulary - 1}",
                field,
            )
    if len(sampling.stop_token_ids) > allowed_stops:
        raise InvalidRequest(
            f"stop_token_ids: {len(sampling.stop_token_ids)} given, at most {allowed_stops} are possible",
            "stop_token_ids",
        )
