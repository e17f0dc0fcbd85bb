"""Before anything is sampled: are the servers there, are they ours, and do they fit the trainer's model?"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outrider.collector.client import Refused, ServerClient, ServerLost
from outrider.collector.server import Server
from outrider.contract.control import Inflight, ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.feed import WeightNode
from outrider.contract.keys import KEY_VARIABLE, key_file

#: How often a server is asked to try, where it fails.
REACH_ATTEMPTS = 3


@dataclass(frozen=True)
class Expected:
    """What the trainer's model is, and what servers must be able to do. inflight: see ``CommitRequest``."""

    model: str
    model_fingerprint: str
    tokenizer_hash: str
    max_completion_length: int
    inflight: Inflight = "keep"


def check_server(url: str, info: ServerInfo, expected: Expected) -> None:
    """Raises UserError, naming both sides, when a server serves something else than what is trained."""
    if info.model_fingerprint != expected.model_fingerprint:
        raise UserError(
            f"server {url} serves the model {info.model} (fingerprint {info.model_fingerprint}), the trainer has "
            f"--model {expected.model} (fingerprint {expected.model_fingerprint}): start both with the same model"
        )
    if info.tokenizer_hash != expected.tokenizer_hash:
        raise UserError(
            f"server {url}: the tokenizer of {info.model} (hash {info.tokenizer_hash}) differs from that of the "
            f"trainer's --model {expected.model} (hash {expected.tokenizer_hash}): start both with the same tokenizer"
        )
    if info.max_model_len <= expected.max_completion_length:
        raise UserError(
            f"--max_completion_length {expected.max_completion_length} leaves no room for a prompt on server {url}, "
            f"which takes {info.max_model_len} tokens in all: lower it, or give the server a larger --max_model_len"
        )
    able = [name.removeprefix("inflight_") for name in info.capabilities if name.startswith("inflight_")]
    if expected.inflight not in able:
        raise UserError(
            f"--inflight {expected.inflight}: server {url} ({info.engine} engine) can only "
            f"{' or '.join(able) or 'do none of it'}: choose what it can, or another server"
        )


async def wait_for_server(
    client: ServerClient, timeout: float, given_key: str | None, notice: Callable[[str], None]
) -> ServerInfo:
    """Wait until a server answers. Raises UserError when it does not within ``timeout`` seconds, or cannot be used."""
    started, announced = time.monotonic(), False
    while True:
        try:
            return await client.info()
        except ServerLost as error:
            waited = time.monotonic() - started
            if waited > timeout:
                raise UserError(_unreachable(client, timeout, str(error))) from error
            if not announced and waited > 2.0:
                notice(f"waiting for server {client.url} ({error}), up to {timeout:g} s")
                announced = True
        except Refused as error:
            raise UserError(_refusal(client.url, error, given_key)) from error
        await asyncio.sleep(0.3)


async def check_reach(servers: Sequence[Server], nodes: Sequence[WeightNode], run_id: str) -> None:
    """Whether every server can fetch weights from every node of the trainer that it shares no memory with. Raises
    UserError naming the first that cannot."""
    pairs = [(server, node) for server in servers for node in nodes if server.info and server.info.host != node.host]
    problems = await asyncio.gather(*(_problem(server.client, node.url, run_id) for server, node in pairs))
    for (server, node), problem in zip(pairs, problems, strict=True):
        if problem is not None:
            raise UserError(
                f"server {server.url} cannot fetch weights from node {node.node} of the trainer ({node.name}) at "
                f"{node.url}: {problem}. Servers on other hosts read weights from every node: let them connect to it "
                "(its port is another one in every run)"
                + (", or give the address under which they reach node 0 by --weight_host" if node.node == 0 else "")
            )


async def _problem(client: ServerClient, url: str, run_id: str) -> str | None:
    problem: str | None = None
    for attempt in range(REACH_ATTEMPTS):
        if attempt:
            await asyncio.sleep(1.0)
        try:
            problem = await client.reach(url, run_id)
        except ServerLost:  # which is its keeper's to find out
            continue
        except Refused as error:
            if error.status == 404:  # it is older than this question
                return None
            problem = error.message
        if problem is None:
            break
    return problem


def _unreachable(client: ServerClient, timeout: float, problem: str) -> str:
    return (
        f"rollout server {client.url}: not reachable within --vllm_server_timeout {timeout:g} s. "
        f"Tried GET {client.url}{client.probed} until then; the last answer: {problem}. "
        "Check that `outrider rollout` runs there and has printed 'ready', that "
        "--vllm_server_host and --vllm_server_port name it, and that no firewall lies between"
    )


def _refusal(url: str, error: Refused, given_key: str | None) -> str:
    if error.status == 401:
        source = "--vllm_server_api_key" if given_key else f"{KEY_VARIABLE} or {key_file()}"
        return (
            f"rollout server {url}: it refuses the API key taken from {source}. Give the server's key by "
            f"--vllm_server_api_key or {KEY_VARIABLE}; the server's owner has it in {key_file()}"
        )
    if error.status == 404:
        return (
            f"rollout server {url}: it answers, but has no /outrider/info, so it is not an Outrider server. "
            "Start one with `outrider rollout --model MODEL`, or train against a vLLM server as it is by "
            "--weight_transport nccl"
        )
    return f"rollout server {url}: {error}"
