"""Servers of the contract that generate nothing: many ports of one process, whose answers are made beforehand.

    python bench/stub_servers.py PLAN

PLAN is a file with a ``Plan`` in MessagePack. Prints the ports, one JSON list, and serves until it is killed. An answer
goes out when more rollouts are held than the plan says, the oldest first: the load on the client is always as many in
flight, and as many a second as the client can take.
"""

import asyncio
import functools
import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from outrider.contract import routes
from outrider.contract.control import ServerInfo, WeightStatus
from outrider.contract.generation import (
    PACKED_MEDIA_TYPE,
    ChoiceLogprobs,
    CompletionChoice,
    CompletionResponse,
    PackedChoice,
    PackedCompletion,
    Usage,
)

#: Seconds after which an answer goes out however few are held: the client may have nothing more to ask.
PATIENCE = 30.0


class Rollout(msgspec.Struct):
    """One completion that is sent again and again. token_ids, logprobs: as in ``PackedChoice``."""

    text: str
    token_ids: bytes
    logprobs: bytes


class Plan(msgspec.Struct):
    """What the servers are and do. answers: the choices of one request each; hold: rollouts kept in flight; packs:
    whether clients that take packed answers get them."""

    info: ServerInfo
    servers: int
    answers: list[list[Rollout]]
    hold: int
    packs: bool = True


class Hold:
    """The requests of all servers that wait for their answers."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.held = 0
        self._waiting: deque[tuple[Server, int, bool, float, int]] = deque()
        self._turn = 0

    def ask(self, server: "Server", rollouts: int, packed: bool) -> None:
        """A request has come; answer the oldest ones while too many are held."""
        self._waiting.append((server, rollouts, packed, asyncio.get_running_loop().time(), server.port.version))
        self.held += rollouts
        while self.held > self.plan.hold:
            self._answer_oldest()

    async def run(self) -> None:
        """Let nobody wait for ever."""
        while True:
            await asyncio.sleep(PATIENCE / 10)
            too_old = asyncio.get_running_loop().time() - PATIENCE
            while self._waiting and self._waiting[0][3] < too_old:
                self._answer_oldest()

    def _answer_oldest(self) -> None:
        server, rollouts, packed, _, version = self._waiting.popleft()
        self.held -= rollouts
        self._turn = (self._turn + 1) % len(self.plan.answers)
        server.answer(self.body(self._turn, rollouts, packed, version))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - it lives as long as the process
    def body(self, turn: int, rollouts: int, packed: bool, version: int) -> bytes:
        """A whole HTTP answer: the same tokens again, tagged with the version in use."""
        chosen = self.plan.answers[turn]
        chosen = (chosen * (rollouts // len(chosen) + 1))[:rollouts]
        tokens = sum(len(rollout.token_ids) // 4 for rollout in chosen)
        usage = Usage(prompt_tokens=0, completion_tokens=tokens, total_tokens=tokens)
        if packed:
            choices = [
                PackedChoice(
                    index=index, text=rollout.text, finish_reason="length", token_ids=rollout.token_ids,
                    logprobs=rollout.logprobs, weight_versions=[(version, len(rollout.token_ids) // 4)],
                )
                for index, rollout in enumerate(chosen)
            ]  # fmt: skip
            body = msgspec.msgpack.encode(PackedCompletion(id="stub", choices=choices, usage=usage))
            return http(body, PACKED_MEDIA_TYPE)
        listed = [
            CompletionChoice(
                index=index, text=rollout.text, finish_reason="length",
                token_ids=memoryview(rollout.token_ids).cast("i").tolist(),
                logprobs=ChoiceLogprobs(token_logprobs=memoryview(rollout.logprobs).cast("f").tolist()),
                weight_versions=[(version, len(rollout.token_ids) // 4)],
            )
            for index, rollout in enumerate(chosen)
        ]  # fmt: skip
        answer = CompletionResponse(id="stub", created=0, model="stub", choices=listed, usage=usage)
        return http(msgspec.json.encode(answer), "application/json")


class Port:
    """What one server is: its weights."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.version, self.run_id = plan, 0, ""

    def control(self, path: str, body: bytes) -> msgspec.Struct:
        """The answer of a control route."""
        if path == routes.COMMIT:
            commit = msgspec.json.decode(body)
            self.version, self.run_id = commit["version"], commit["run_id"]
        if path == routes.INFO:
            return msgspec.structs.replace(self.plan.info, version=self.version, run_id=self.run_id)
        return WeightStatus(version=self.version, run_id=self.run_id, state="idle")


class Server(asyncio.Protocol):
    """One connection. A request that is being answered is the only one on it, as HTTP clients have it."""

    def __init__(self, port: Port, hold: Hold) -> None:
        self.port, self.hold = port, hold
        self._received = bytearray()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end])
        lower = head.lower()
        at = lower.find(b"\r\ncontent-length:")
        length = int(lower[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._received) < end + 4 + length:
            return
        body = bytes(self._received[end + 4 : end + 4 + length])
        del self._received[: end + 4 + length]
        path = head.split(b" ", 2)[1].decode()
        if path == routes.COMPLETIONS:
            packed = self.hold.plan.packs and PACKED_MEDIA_TYPE.encode() in head
            self.hold.ask(self, _count(body), packed)
        elif path == routes.HEALTH:
            self.answer(http(b"", "text/plain"))
        else:
            self.answer(http(msgspec.json.encode(self.port.control(path, body)), "application/json"))

    def answer(self, whole: bytes) -> None:
        """Send, if the client is still there."""
        if not self._transport.is_closing():
            self._transport.write(whole)


class _Wanted(msgspec.Struct):
    n: int = 1


_decode_wanted = msgspec.json.Decoder(_Wanted).decode


def _count(body: bytes) -> int:
    return _decode_wanted(body).n


def http(body: bytes, media_type: str) -> bytes:
    """An answer with status 200."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def serve(plan: Plan) -> None:
    """Serve until killed."""
    loop, hold = asyncio.get_running_loop(), Hold(plan)
    ports = []
    for _ in range(plan.servers):
        port = Port(plan)
        listening = await loop.create_server(functools.partial(Server, port, hold), "127.0.0.1", 0, backlog=4096)
        ports.append(listening.sockets[0].getsockname()[1])
    print(json.dumps(ports), flush=True)
    await hold.run()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(msgspec.msgpack.decode(Path(sys.argv[1]).read_bytes(), type=Plan)))
