"""Random load on one server for minutes on end, and what is left of it: nothing may be.

    python bench/soak.py [--minutes 10] [--seed 0]

Requests of all kinds arrive at random (text and tokens, JSON, packed and streamed, one or several choices, with stop
texts and penalties), some are cancelled, some clients disconnect, some requests are too large or malformed; the
weights change every second, by one of three policies; now and then a replica is killed. Greedy completions of a single
version are compared with Transformers' own under those weights. At the end nothing may run or wait, every request must
have had its answer, and memory and file descriptors must be where they were after the first minute.

Prints a table and, last, one line of JSON; exits with 1 when something was wrong.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import msgspec
import torch
from about import about
from models import save_bench_model
from processes import KEY, rollout_server
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from outrider.contract.control import CommitRequest, ServerInfo, StageRequest
from outrider.contract.generation import PACKED_MEDIA_TYPE, PackedCompletion
from outrider.weights.publish import Publisher

#: Different sets of weights, greedy prompts and tokens of each.
SETS, PROMPTS, GREEDY_TOKENS = 3, 8, 48
#: A request that has no answer after so many seconds counts as unanswered.
ANSWER_DEADLINE = 120.0
CLIENTS = 48


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def resident(pid: int) -> float:
    """Resident memory of a process, MiB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    return 0.0


class Soak:
    """One run against one server."""

    def __init__(self, url: str, pid: int, model: Path, seed: int) -> None:
        self.url, self.pid, self.model = url, pid, model
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.outstanding = 0
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
        self.prompts = [
            [self.random.randrange(3, 99) for _ in range(self.random.randrange(4, 80))] for _ in range(PROMPTS)
        ]
        self.expected: dict[tuple[int, int], list[int]] = {}
        self.weights = []
        for number in range(SETS):
            torch.manual_seed(number)
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
            self.weights.append({name: parameter.clone() for name, parameter in base.named_parameters()})
            for index, prompt in enumerate(self.prompts):
                out = base.generate(torch.tensor([prompt]), max_new_tokens=GREEDY_TOKENS, do_sample=False)
                self.expected[number, index] = out[0, len(prompt) :].tolist()

    async def run(self, seconds: float) -> dict[str, object]:
        """Load for ``seconds``, then see what is left."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {KEY}"}) as self.http:
            end = time.monotonic() + seconds
            clients = [asyncio.create_task(self._client(end)) for _ in range(CLIENTS)]
            others = [asyncio.create_task(work) for work in (self._update(), self._kill())]
            await asyncio.sleep(min(60.0, seconds / 3))
            early = self._usage()
            await asyncio.gather(*clients)
            for task in others:
                task.cancel()
            for outcome in await asyncio.gather(*others, return_exceptions=True):
                if not isinstance(outcome, asyncio.CancelledError):
                    self.wrong.append(f"the load itself failed: {outcome!r}")
            await asyncio.sleep(3.0)
            running, waiting = (
                await self._metric("vllm:num_requests_running"),
                await self._metric("vllm:num_requests_waiting"),
            )
            restarts, preemptions = (
                await self._metric("outrider:replica_restarts"),
                await self._metric("vllm:num_preemptions"),
            )
            hits = await self._metric("vllm:prefix_cache_hits")
        await asyncio.sleep(3.0)  # connections close
        late = self._usage()
        return {
            **self.counts, "wrong": len(self.wrong), "unanswered": self.outstanding, "running": running,
            "waiting": waiting, "replica_restarts": restarts, "preemptions": preemptions, "prefix_hits": hits,
            "front_mib": [round(early[0]), round(late[0])], "replica_mib": [round(early[1]), round(late[1])],
            "front_files": [early[2], late[2]],
        }  # fmt: skip

    def _usage(self) -> tuple[float, float, int]:
        """Memory of the front and of its largest replica, MiB; file descriptors of the front less connections."""
        files = 0
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                files += "socket" not in os.readlink(entry)
        return resident(self.pid), max(map(resident, children(self.pid)), default=0.0), files

    async def _metric(self, name: str) -> float:
        async with self.http.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        prefixes = (name + "{", name + "_total{")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(prefixes))

    # ---- weights and replicas ----------------------------------------------------------------------------------

    async def _update(self) -> None:
        """A new version every second. Version v holds set v % SETS."""
        async with self.http.get(f"{self.url}/outrider/info") as answer:
            info = msgspec.json.decode(await answer.read(), type=ServerInfo)
        current = {name: tensor.clone() for name, tensor in self.weights[0].items()}
        publisher = Publisher(current, "float32", "soak", info.model_fingerprint, None)
        try:
            for version in itertools.count(SETS):
                started = time.monotonic()
                for name, tensor in self.weights[version % SETS].items():
                    current[name].copy_(tensor)
                manifest = await asyncio.wrap_future(publisher.publish(version))
                policy = self.random.choice(["keep", "recompute", "wait"])
                for path, body in (
                    ("stage", StageRequest(manifest=manifest)),
                    ("commit", CommitRequest(run_id="soak", version=version, inflight=policy)),
                ):
                    async with self.http.post(
                        f"{self.url}/outrider/weights/{path}", data=msgspec.json.encode(body)
                    ) as answer:
                        if answer.status not in (200, 409, 503):  # 409, 503: a replica died meanwhile
                            self.wrong.append(f"{path} answered {answer.status}: {await answer.text()}")
                        self.counts[f"{path} {answer.status}"] += 1
                        if answer.status != 200:
                            break
                await asyncio.sleep(max(0.0, 1.0 - (time.monotonic() - started)))
        finally:
            publisher.close()

    async def _kill(self) -> None:
        """Now and then, the newest of the server's processes: a replica."""
        while True:
            await asyncio.sleep(self.random.uniform(15, 30))
            replicas = children(self.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(max(replicas), signal.SIGKILL)
                self.counts["kills"] += 1

    # ---- requests ----------------------------------------------------------------------------------------------

    async def _client(self, end: float) -> None:
        kinds = [self._greedy, self._sampled, self._streamed, self._cancelled, self._refused, self._chopped]
        while time.monotonic() < end:
            kind = self.random.choices(kinds, [5, 5, 3, 2, 1, 1])[0]
            self.outstanding += 1
            try:
                async with asyncio.timeout(ANSWER_DEADLINE):
                    await kind()
                self.outstanding -= 1
                self.counts[kind.__name__[1:]] += 1
            except TimeoutError:
                self.wrong.append(f"{kind.__name__[1:]}: no answer within {ANSWER_DEADLINE:g} s")
            except aiohttp.ClientError as error:
                self.outstanding -= 1
                self.wrong.append(f"{kind.__name__[1:]}: {error!r}")
            if self.random.random() < 0.1:
                await asyncio.sleep(self.random.uniform(0, 2))

    def _body(self, **more: object) -> dict[str, object]:
        prompt = [self.random.randrange(3, 99) for _ in range(self.random.randrange(1, 300))]
        if self.random.random() < 0.3:
            prompt = [7] * 200 + prompt[:50]  # a shared prefix
        body: dict[str, object] = {
            "prompt": prompt, "max_tokens": self.random.randrange(1, 200), "n": self.random.choice([1, 1, 1, 4, 8]),
            "temperature": self.random.choice([0.0, 0.7, 1.0]), "top_p": self.random.choice([1.0, 0.9]),
            "seed": self.random.randrange(10**6), "logprobs": self.random.choice([None, 0, 3]),
            "repetition_penalty": self.random.choice([1.0, 1.0, 1.2]), **more,
        }  # fmt: skip
        return body

    async def _greedy(self) -> None:
        index = self.random.randrange(PROMPTS)
        body = {"prompt": self.prompts[index], "max_tokens": GREEDY_TOKENS, "temperature": 0, "logprobs": 0,
                "n": self.random.choice([1, 3]), "return_token_ids": True}  # fmt: skip
        headers = {"Accept": PACKED_MEDIA_TYPE}
        async with self.http.post(f"{self.url}/v1/completions", json=body, headers=headers) as answer:
            data = await answer.read()
        if answer.status != 200:
            self.wrong.append(f"greedy: {answer.status} {data[:200]!r}")
            return
        for choice in msgspec.msgpack.decode(data, type=PackedCompletion).choices:
            tokens = torch.frombuffer(bytearray(choice.token_ids), dtype=torch.int32).tolist()
            versions = {version for version, _ in choice.weight_versions}
            if len(tokens) != GREEDY_TOKENS or sum(count for _, count in choice.weight_versions) != len(tokens):
                self.wrong.append(f"greedy: {len(tokens)} tokens, versions {choice.weight_versions}")
            elif len(versions) > 1 or min(versions) < SETS:
                self.counts["greedy not compared"] += 1
            else:
                self.counts["greedy compared"] += 1
                if tokens != self.expected[min(versions) % SETS, index]:
                    self.wrong.append(f"greedy: prompt {index}, version {versions}: {tokens}")

    async def _sampled(self) -> None:
        body = self._body(stop=self.random.choice([None, None, "7", ["ab", "12"]]))
        async with self.http.post(f"{self.url}/v1/completions", json=body) as answer:
            data = await answer.json()
        if answer.status != 200 or len(data["choices"]) != body["n"]:
            self.wrong.append(f"sampled: {answer.status} {str(data)[:200]}")

    async def _streamed(self) -> None:
        body = self._body(stream=True)
        finished, done = set(), False
        async with self.http.post(f"{self.url}/v1/completions", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        self.wrong.append(f"streamed: {chunk}")
                        return
                    finished |= {c["index"] for c in chunk["choices"] if c["finish_reason"]}
                done |= line.startswith(b"data: [DONE]")
        if not done or len(finished) != body["n"]:
            self.wrong.append(f"streamed: ended after {len(finished)} of {body['n']} choices, done: {done}")

    async def _cancelled(self) -> None:
        """The client goes away in the middle."""
        body = self._body(stream=self.random.random() < 0.5, max_tokens=400)
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(self.random.uniform(0, 0.5)),
                self.http.post(f"{self.url}/v1/completions", json=body) as answer,
            ):
                await answer.read()

    async def _refused(self) -> None:
        wrong = self.random.choice(
            [{"max_tokens": 100_000}, {"prompt": []}, {"prompt": [10**6]}, {"temperature": -1}, {"nonsense": 1},
             {"prompt": "x" * 3_000_000}, {"n": 10**9}, {"top_p": "much"}]
        )  # fmt: skip
        async with self.http.post(f"{self.url}/v1/completions", json=self._body(**wrong)) as answer:
            if answer.status != 400:
                self.wrong.append(f"refused: {list(wrong)} answered {answer.status}")

    async def _chopped(self) -> None:
        """A connection that breaks off in the middle of a request."""
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 5000\r\n\r\n"
        )
        writer.write(head[: self.random.randrange(1, len(head) + 1)].encode() + b'{"prompt"')
        await writer.drain()
        await asyncio.sleep(self.random.uniform(0, 0.2))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def main() -> int:
    """Start the server, run the load, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model, log = save_bench_model(Path(directory) / "model"), Path(directory) / "server.log"
        flags = ("--torch_dtype", "float32", "--data_parallel_size", "2", "--max_num_seqs", "64",
                 "--max_model_len", "1024", "--kv_cache_gib", "0.12")  # fmt: skip
        with rollout_server(model, log, *flags) as (server, url):
            soak = Soak(url, server, model, options.seed)
            result = asyncio.run(soak.run(options.minutes * 60))
        lines = log.read_text().splitlines()
        errors = [line for line in lines if "Traceback" in line]
        if errors:
            print("\n".join(lines[-80:]), file=sys.stderr)
    for line in soak.wrong[:20]:
        print(line, file=sys.stderr)
    table = Table("what", "count")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console(highlight=False).print(table)
    front, replica, files = result["front_mib"], result["replica_mib"], result["front_files"]
    sound = (
        not soak.wrong
        and not errors
        and not (result["unanswered"] or result["running"] or result["waiting"])
        and front[1] < 1.15 * front[0] + 20  # type: ignore[index]
        and replica[1] < 1.15 * replica[0] + 50  # type: ignore[index]
        and abs(files[1] - files[0]) <= 8  # type: ignore[index,operator]
    )
    print(json.dumps({**result, "minutes": options.minutes, "tracebacks": len(errors), "sound": sound, **about()}))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
