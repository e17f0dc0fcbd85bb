"""A client for contract tests: it checks nothing that a test could want to be otherwise."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from outrider.contract import routes
from outrider.contract.chat import ChatChunk, ChatResponse
from outrider.contract.control import CommitRequest, Inflight, StageRequest, WeightStatus
from outrider.contract.errors import ErrorBody, ErrorDetail
from outrider.contract.generation import (
    PACKED_MEDIA_TYPE,
    ChoiceLogprobs,
    CompletionChoice,
    CompletionResponse,
    PackedCompletion,
)
from outrider.contract.manifest import Manifest

Answer = TypeVar("Answer")

#: Seconds after which a test gives up waiting for a state of the server.
PATIENCE = 60.0


class Client:
    """Speaks plain HTTP to one server, with whatever key it is given."""

    def __init__(self, url: str, key: str | None) -> None:
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.session = aiohttp.ClientSession(
            url, headers=self.headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(120)
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()

    async def ask(
        self, verb: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        async with self.session.request(verb, path, data=body, headers=headers) as answer:
            return answer.status, await answer.read()

    async def get(self, path: str, kind: type[Answer]) -> Answer:
        """The decoded answer of a route that is asked without a body."""
        status, body = await self.ask("GET", path)
        assert status == 200, body
        return msgspec.json.decode(body, type=kind)

    async def complete(self, **fields: Any) -> CompletionResponse:
        """A completion that is expected to succeed."""
        status, body = await self.ask("POST", routes.COMPLETIONS, json.dumps(fields).encode())
        assert status == 200, body
        return msgspec.json.decode(body, type=CompletionResponse)

    async def packed(self, **fields: Any) -> PackedCompletion:
        """A completion as the collector asks for it."""
        body = json.dumps({"logprobs": 0, "return_token_ids": True, **fields}).encode()
        headers = {"Accept": PACKED_MEDIA_TYPE}
        async with self.session.post(routes.COMPLETIONS, data=body, headers=headers) as answer:
            content = await answer.read()
            assert (answer.status, answer.content_type) == (200, PACKED_MEDIA_TYPE), content
            return msgspec.msgpack.decode(content, type=PackedCompletion)

    async def chat(self, **fields: Any) -> ChatResponse:
        """A chat completion that is expected to succeed."""
        status, body = await self.ask("POST", routes.CHAT, json.dumps(fields).encode())
        assert status == 200, body
        return msgspec.json.decode(body, type=ChatResponse)

    async def events(self, path: str, **fields: Any) -> AsyncIterator[bytes]:
        """The data of the events of a stream, as they come."""
        body = json.dumps({**fields, "stream": True}).encode()
        async with self.session.post(path, data=body) as answer:
            assert answer.status == 200, await answer.read()
            assert answer.content_type == "text/event-stream"
            pending = b""
            async for data in answer.content.iter_any():
                *whole, pending = (pending + data).split(b"\n\n")
                for event in whole:
                    assert event.startswith(b"data: ")
                    yield event.removeprefix(b"data: ")
            assert not pending

    async def chunks(self, **fields: Any) -> list[CompletionResponse]:
        """A streamed completion that is expected to succeed."""
        *events, last = [event async for event in self.events(routes.COMPLETIONS, **fields)]
        assert last == b"[DONE]"
        return [msgspec.json.decode(event, type=CompletionResponse) for event in events]

    async def chat_chunks(self, **fields: Any) -> list[ChatChunk]:
        """A streamed chat completion that is expected to succeed."""
        *events, last = [event async for event in self.events(routes.CHAT, **fields)]
        assert last == b"[DONE]"
        return [msgspec.json.decode(event, type=ChatChunk) for event in events]

    async def choices(self, **fields: Any) -> list[CompletionChoice]:
        """Its choices, with token ids, log-probabilities and versions."""
        return (await self.complete(logprobs=0, return_token_ids=True, **fields)).choices

    async def greedy(self, prompt: list[int], max_tokens: int = 8) -> list[int]:
        """The most likely tokens: a fingerprint of the weights in use."""
        [choice] = await self.choices(prompt=prompt, max_tokens=max_tokens, temperature=0.0)
        assert choice.token_ids is not None
        return choice.token_ids

    async def refusal(
        self, body: bytes, path: str = routes.COMPLETIONS, headers: dict[str, str] | None = None
    ) -> tuple[int, ErrorDetail]:
        """Status and error of a request that is expected to fail."""
        status, answer = await self.ask("POST", path, body, headers)
        assert status >= 400, answer
        return status, msgspec.json.decode(answer, type=ErrorBody).error

    async def stage(self, manifest: Manifest) -> WeightStatus:
        """A stage that is expected to succeed."""
        status, body = await self.ask("POST", routes.STAGE, msgspec.json.encode(StageRequest(manifest=manifest)))
        assert status == 200, body
        return msgspec.json.decode(body, type=WeightStatus)

    async def stage_refusal(self, manifest: Manifest) -> tuple[int, ErrorDetail]:
        """Status and error of one that is expected to fail."""
        return await self.refusal(msgspec.json.encode(StageRequest(manifest=manifest)), routes.STAGE)

    async def commit(self, manifest: Manifest, inflight: Inflight = "keep") -> WeightStatus:
        """A commit that is expected to succeed."""
        status, body = await self.ask("POST", routes.COMMIT, commit_body(manifest, inflight))
        assert status == 200, body
        return msgspec.json.decode(body, type=WeightStatus)

    async def commit_refusal(self, manifest: Manifest) -> tuple[int, ErrorDetail]:
        """Status and error of one that is expected to fail."""
        return await self.refusal(commit_body(manifest), routes.COMMIT)

    async def metric(self, name: str) -> float:
        """A figure of ``/metrics``, over all its labels."""
        status, body = await self.ask("GET", routes.METRICS)
        assert status == 200, body
        families = text_string_to_metric_families(body.decode())
        values = [sample.value for family in families for sample in family.samples if sample.name == name]
        assert values, f"no metric {name}"
        return sum(values)

    async def until_running(self, at_least: int = 1) -> None:
        """Wait for that many sequences in flight."""
        await self._until(lambda running: running >= at_least)

    async def until_idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._until(lambda running: running == 0)

    async def _until(self, reached: Any) -> None:
        async with asyncio.timeout(PATIENCE):
            while not reached(await self.metric("vllm:num_requests_running")):
                await asyncio.sleep(0.01)


def figures(choice: CompletionChoice) -> ChoiceLogprobs:
    """The log-probabilities of a choice that was asked for them."""
    assert choice.logprobs is not None
    return choice.logprobs


def commit_body(manifest: Manifest, inflight: Inflight = "keep") -> bytes:
    """The body of the commit that follows a stage of ``manifest``."""
    return msgspec.json.encode(CommitRequest(run_id=manifest.run_id, version=manifest.version, inflight=inflight))
