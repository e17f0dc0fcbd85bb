"""A server that generates while its weights are changed: load on it, an update, and who waits how long."""

import asyncio
import contextlib
import json
import multiprocessing
import queue
import random
import statistics
import time
import urllib.request
from typing import Any

import aiohttp
import msgspec
import numpy as np

from outrider.contract import routes
from outrider.contract.control import CommitRequest, Inflight, StageRequest, WeightStatus
from outrider.contract.manifest import Manifest

KEY = "bench"
PROMPT_TOKENS = 64
#: Of a stream, after which it is under way.
FIRST_TOKENS = 20

#: When something began and had ended, of ``time.monotonic``.
Window = tuple[float, float]


def call(url: str, path: str, body: bytes | None = None) -> bytes:
    """Ask a server; what it answers. Raises HTTPError."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, data=body, headers=headers, method="GET" if body is None else "POST")
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read()


class Load:
    """``running`` sequences in flight on a server, from a process of its own, as long as a block lasts, which begins
    when all streams have tokens. When those of ``streams`` of them came is in ``arrivals`` afterwards."""

    def __init__(self, url: str, model: str, running: int, streams: int, new_tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._started, self._stop, self._queue = context.Event(), context.Event(), context.Queue()
        arguments = (url, model, running, streams, new_tokens, self._started, self._stop, self._queue)
        self._process = context.Process(target=_keep_busy, args=arguments, daemon=True)
        self.arrivals: list[list[float]] = []

    def __enter__(self) -> "Load":
        self._process.start()
        if not self._started.wait(120):
            raise SystemExit("the load on the server did not begin within 120 s")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self.arrivals.append(self._queue.get(timeout=4))
        self._process.kill()


def _keep_busy(
    url: str, model: str, running: int, streams: int, new_tokens: int, started: Any, stop: Any, arrivals: Any
) -> None:
    async def run() -> None:
        waited_for = {*range(streams)}
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(None)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:

            async def one(number: int) -> None:
                source = random.Random(number)
                while not stop.is_set():
                    prompt = [source.randrange(3, 99) for _ in range(PROMPT_TOKENS)]
                    stream = number < streams
                    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "ignore_eos": True,
                            "logprobs": 0, "return_token_ids": True, "stream": stream}  # fmt: skip
                    async with session.post(f"{url}/v1/completions", data=json.dumps(body)) as answer:
                        if not stream:
                            await answer.read()
                            continue
                        times = []
                        async for _ in answer.content.iter_any():
                            times.append(time.monotonic())
                            if len(times) == FIRST_TOKENS:
                                waited_for.discard(number)
                                if not waited_for:
                                    started.set()
                            if stop.is_set():
                                break
                        arrivals.put(times)

            tasks = [asyncio.create_task(one(number)) for number in range(running)]
            while not stop.is_set():
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()

    asyncio.run(run())


def staged_update(url: str, manifest: Manifest, inflight: Inflight = "keep") -> tuple[WeightStatus, Window]:
    """Stage and commit; the status, and when the commit began and had ended."""
    call(url, routes.STAGE, msgspec.json.encode(StageRequest(manifest=manifest)))
    began = time.monotonic()
    body = msgspec.json.encode(CommitRequest(run_id=manifest.run_id, version=manifest.version, inflight=inflight))
    status = msgspec.json.decode(call(url, routes.COMMIT, body), type=WeightStatus)
    return status, (began, time.monotonic())


#: Seconds around the beginning of a stream. The load's sequences end together, and so many new prompts are read then.
BEGINNING = 0.5


def longest_gaps(arrivals: list[list[float]], windows: list[Window]) -> list[float]:
    """The longest gap between two tokens within each window, less the usual one there, ms: medians over the streams.
    Not while new sequences begin, when all others wait longer than for anything else."""
    begins = np.array([times[0] for times in arrivals if times])
    found = []
    for start, end in windows:
        gaps = []
        for times in map(np.asarray, arrivals):
            first, last = np.searchsorted(times, (start, end))
            if last - first > 2 and last < len(times):
                chosen = times[first - 1 if first else 0 : last + 1]
                around = np.diff(chosen)
                undisturbed = np.abs(chosen[1:, None] - begins).min(1) > BEGINNING
                if undisturbed.any():
                    gaps.append(around[undisturbed].max() - float(np.median(around)))
        if gaps:
            found.append(1000 * statistics.median(gaps))
    return found


def stalls(arrivals: list[list[float]], windows: list[Window]) -> tuple[list[float], list[float], float]:
    """What a client sees of each window, ms, medians over the streams: the longest gap between two tokens, less the
    usual one of the seconds around; and by how much all later tokens are late. Last, the usual gap."""
    usual = statistics.median(gap for times in arrivals for gap in np.diff(times))
    gaps, late = [], []
    for start, end in windows:
        longest, lost = [], []
        for times in map(np.asarray, arrivals):
            first, last = np.searchsorted(times, (start - 0.1, end + 0.5))
            around = np.diff(times[max(first - 50, 0) : last + 50])
            if first < 10 or last + 10 > len(times):
                continue
            step = float(np.median(around))
            longest.append(np.diff(times[first:last]).max() - step)
            lost.append(times[last] - times[first] - (last - first) * step)
        if longest:  # no stream was cut off beside it
            gaps.append(1000 * statistics.median(longest))
            late.append(1000 * statistics.median(lost))
    return gaps, late, 1000 * usual
