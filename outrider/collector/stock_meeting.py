"""Who a vLLM server is that was started without us, and whether it can be trained against."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from outrider.collector.client import INFO_TIMEOUT, Refused
from outrider.contract import routes
from outrider.contract.control import ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.identity import host_identity

log = logging.getLogger(__name__)

#: Sequences that vLLM decodes at once by default. It does not say how many it was told.
MAX_NUM_SEQS = 256
HOW = (
    'start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend":"nccl"}\' '
    "--logprobs-mode processed_logprobs"
)

#: ``ask(verb, path, body, timeout)``: what a server answers. Raises ServerLost, Refused.
Ask = Callable[[str, str, bytes | None, float], Awaitable[bytes]]
Answer = TypeVar("Answer", bound=msgspec.Struct)


@dataclass(frozen=True)
class TrainerFacts:
    """What such a server cannot be asked, and the trainer knows.

    plain_sampling: temperature 1 and nothing that truncates or shifts the distribution. probe: a text and its token
    ids by the trainer's tokenizer.
    """

    model_fingerprint: str
    tokenizer_hash: str
    torch_dtype: str
    vocab_size: int
    plain_sampling: bool
    probe: tuple[str, list[int]]


async def meet(url: str, ask: Ask, facts: TrainerFacts, resume: Callable[[], Awaitable[object]]) -> ServerInfo:
    """Find out whom we have to do with; once in a server's life. resume: ends the pause of a server that was left in
    it. Raises UserError where it cannot be trained against."""

    async def get(path: str) -> bytes:
        try:
            return await ask("GET", path, None, INFO_TIMEOUT)
        except Refused as error:
            if error.status != 404:
                raise
            raise UserError(
                f"server {url} has no {path}, which vLLM has when its weights may be changed: {HOW}"
            ) from error

    models = decoded(await get(routes.MODELS), _Models)
    version = decoded(await get("/version"), _Version)
    await get("/get_world_size")
    if decoded(await get("/is_paused"), Paused).is_paused:
        log.warning("%s is paused, by somebody who has not come to resume it; it is resumed", url)
        await resume()
    await _check_tokenizer(url, ask, facts)
    if not facts.plain_sampling and not await _logprobs_are_processed(ask, facts):
        raise UserError(
            f"server {url} reports log-probabilities from before temperature and truncation, which are not those its "
            "tokens were drawn with: start it with --logprobs-mode processed_logprobs, or sample with --temperature 1 "
            "and nothing else"
        )
    return ServerInfo(
        engine="vllm", engine_version=version.version, model=models.data[0].id,
        model_fingerprint=facts.model_fingerprint, tokenizer_hash=facts.tokenizer_hash,
        torch_dtype=facts.torch_dtype, max_model_len=models.data[0].max_model_len, max_num_seqs=MAX_NUM_SEQS,
        vocab_size=facts.vocab_size, version=0, run_id="",
        host=host_identity(),  # its weights come from a process on this host
        capabilities=("inflight_recompute", "inflight_wait"),
    )  # fmt: skip


async def _check_tokenizer(url: str, ask: Ask, facts: TrainerFacts) -> None:
    text, expected = facts.probe
    body = msgspec.json.encode({"prompt": text, "add_special_tokens": False})
    answer = decoded(await ask("POST", "/tokenize", body, INFO_TIMEOUT), _Tokens)
    if answer.tokens != expected:
        raise UserError(
            f"server {url}: its tokenizer makes {answer.tokens} of {text!r}, the trainer's makes {expected}: start "
            "both with the same model"
        )


async def _logprobs_are_processed(ask: Ask, facts: TrainerFacts) -> bool:
    """Whether truncation shows in the log-probabilities: where only one token is left, it has all probability."""
    body = {"prompt": facts.probe[1], "max_tokens": 1, "top_k": 1, "temperature": 1.0, "logprobs": 2,
            "return_tokens_as_token_ids": True}  # fmt: skip
    content = await ask("POST", routes.COMPLETIONS, msgspec.json.encode(body), 60.0)
    first, *others = sorted(decoded(content, _Probed).choices[0].logprobs.top_logprobs[0].values(), reverse=True)
    return abs(first) < 1e-3 and all(other < -1000 for other in others)


def decoded(content: bytes, kind: type[Answer]) -> Answer:
    """Raises Refused for what is not of this kind."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        raise Refused(502, f"it answered what vLLM does not: {error}") from error


class _Model(msgspec.Struct):
    id: str
    max_model_len: int


class _Models(msgspec.Struct):
    data: list[_Model]


class _Version(msgspec.Struct):
    version: str


class Paused(msgspec.Struct):
    is_paused: bool


class WeightInfo(msgspec.Struct):
    weight_version: str


class WorldSize(msgspec.Struct):
    world_size: int


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _ProbedLogprobs(msgspec.Struct):
    top_logprobs: list[dict[str, float]]


class _ProbedChoice(msgspec.Struct):
    logprobs: _ProbedLogprobs


class _Probed(msgspec.Struct):
    choices: list[_ProbedChoice]
