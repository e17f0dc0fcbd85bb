"""The collector as a process: set up, preflight, and the conversation with the trainer."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from outrider.collector.client import ServerClient
from outrider.collector.collector import Collector
from outrider.collector.config import CollectorSpec
from outrider.collector.evaluation import Evaluation
from outrider.collector.keeper import Keeper, watch_pool
from outrider.collector.ledger import Ledger
from outrider.collector.pool import Pool
from outrider.collector.preflight import Expected, check_reach, check_server, wait_for_server
from outrider.collector.prompts import PromptSet
from outrider.collector.pruning import Pruner
from outrider.collector.server import Server
from outrider.collector.setup import (
    evaluation_template,
    ledger_facts,
    load_identity,
    load_sources,
    prompt_sets,
    sampling_template,
    start_rewards,
)
from outrider.collector.stock_client import StockClient
from outrider.collector.stock_meeting import TrainerFacts
from outrider.contract.errors import UserError
from outrider.contract.feed import (
    Begin,
    EvaluateRequest,
    Failure,
    FromCollector,
    FromTrainer,
    Kept,
    Notice,
    Published,
    Reach,
    Reached,
    Ready,
    Stop,
    WeightNode,
)
from outrider.contract.garbage import search_less_often
from outrider.contract.identity import host_identity
from outrider.contract.keys import client_key
from outrider.contract.lifetime import die_with_parent
from outrider.contract.manifest import DTypeName, Manifest
from outrider.environments.single_turn import SingleTurn
from outrider.weights.segment_server import SegmentServer, outward_address, own_address

log = logging.getLogger(__name__)

#: Files that the process may have open, where the system lets it.
FILES = 65536


def main(endpoint: str, trainer: int) -> int:
    """Entry point of the child process. endpoint: ZeroMQ address on which the trainer listens. trainer: its process
    id, which is 1 in many a container."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    die_with_parent()
    if os.getppid() != trainer:
        return 1  # the trainer was gone before the kernel knew whom to watch
    # Ctrl-C reaches the whole terminal group, and a cluster's SIGTERM every process of a job; when to stop is the
    # trainer's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers of rewards inherit what is ignored, and have to hear this one: it ends those that hang.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    _allow_files()
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        return runner.run(CollectorProcess(endpoint).run())


class CollectorProcess:
    """Owns everything that has to be started before collecting and closed after it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.manifest: Manifest | None = None
        self.keepers: list[Keeper] = []
        self.closers = contextlib.AsyncExitStack()
        self._encode = msgspec.msgpack.Encoder().encode
        self._tasks: list[asyncio.Task[Any]] = []
        self.collector: Collector | None = None

    async def run(self) -> int:
        """Serve one run; the exit status."""
        context = zmq.asyncio.Context()
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 2000)
        # Queues are bounded by the admission gate, not by dropping or blocking here.
        self.socket.set_hwm(0)
        self.socket.connect(self.endpoint)
        versions = context.socket(zmq.PULL)
        versions.set_hwm(0)
        versions.bind(f"{self.endpoint}-versions")
        self._incoming: asyncio.Queue[FromTrainer] = asyncio.Queue()
        try:
            async with self.closers:
                spec = msgspec.msgpack.decode(await self.socket.recv(), type=CollectorSpec)
                self._spawn(self._read(self.socket))
                self._spawn(self._read(versions))
                await self._serve(spec)
            return 0
        except UserError as error:
            self.send(Failure(message=str(error)))
            return 2
        except Exception as error:  # noqa: BLE001 - the last resort: the trainer must hear of it and not wait
            traceback.print_exc()
            self.send(Failure(message=f"collector: {type(error).__name__}: {error}"))
            return 1
        finally:
            await self._end_tasks()
            versions.close(linger=0)
            self.socket.close()
            context.term()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def send(self, message: FromCollector) -> None:
        """Hand a message to the trainer; never waits."""
        future = self.socket.send(self._encode(message))
        del future  # with no high-water mark the message is queued at once

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        """Queue what arrives on a socket."""
        decode = msgspec.msgpack.Decoder(FromTrainer).decode
        while True:
            self._incoming.put_nowait(decode(await socket.recv()))

    async def _serve(self, spec: CollectorSpec) -> None:
        key = client_key(spec.servers.vllm_server_api_key)
        tokenizer, expected, facts = load_identity(spec)
        sources = load_sources(spec)
        rewards = start_rewards(spec, sources)
        self.closers.callback(rewards.close)
        servers = await self._reach_servers(spec, expected, facts, key)
        train, held_out = prompt_sets(spec, tokenizer, sources, [s.info for s in servers if s.info is not None])

        def decode(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

        pool = Pool(servers, spec.run_id, spec.staleness.request_retries, self._changed, decode)
        ledger = Ledger(Path(spec.ledger), ledger_facts(spec, train, expected), resume=spec.resume)
        self.closers.callback(ledger.close)
        loop = asyncio.get_running_loop()
        pruner = Pruner(ledger, spec.ledger_keep_steps, lambda text: loop.call_soon_threadsafe(self._notice, text))
        self.closers.callback(pruner.close)
        environment, template = SingleTurn(), sampling_template(spec)
        self.collector = Collector(spec, train, pool, rewards, environment, ledger, template, self.send)
        evaluation = None
        if held_out is not None:
            template = evaluation_template(spec)
            evaluation = Evaluation(held_out, pool, rewards, spec.reward_weights, environment, template, spec.seed)
        self.keepers = [
            Keeper(server, expected, lambda: self.manifest, self._changed, self._notice, self._fail)
            for server in servers
        ]
        for keeper in self.keepers:
            self._spawn(keeper.run())
        self._spawn(self.collector.report())
        self._spawn(watch_pool(servers, spec.servers.vllm_server_timeout))
        segment_url = await self._serve_segments(spec, servers, key)
        search_less_often()
        self.send(ready(servers, train, held_out, segment_url, ledger.id))
        # Last in, first out: nothing is still at work when what it works with is closed.
        self.closers.push_async_callback(self._end_tasks)
        await self._converse(self.collector, evaluation, pruner, servers)

    async def _reach_servers(
        self, spec: CollectorSpec, expected: Expected, facts: TrainerFacts, key: str
    ) -> list[Server]:
        servers, stock = [], spec.servers.weight_transport == "nccl"
        for url in spec.server_urls:
            client = (
                StockClient(url, key, facts, spec.servers.weight_host or own_address(url))
                if stock
                else ServerClient(url, key)
            )
            self.closers.push_async_callback(client.close)
            servers.append(Server(client))
        infos = await asyncio.gather(
            *(
                wait_for_server(
                    server.client, spec.servers.vllm_server_timeout, spec.servers.vllm_server_api_key, self._notice
                )
                for server in servers
            )
        )
        for server, info in zip(servers, infos, strict=True):
            check_server(server.url, info, expected)
            server.limit = spec.servers.max_concurrent_rollouts or 2 * info.max_num_seqs
            server.up(info)
        return servers

    async def _serve_segments(self, spec: CollectorSpec, servers: list[Server], key: str) -> str:
        """Serve published weights over HTTP where a server is on another host; the URL, or "" where none is."""
        elsewhere = [server for server in servers if server.info and server.info.host != host_identity()]
        if not elsewhere:
            return ""
        address = spec.servers.weight_host or outward_address(*(urlsplit(s.url).hostname or "" for s in elsewhere))
        segments = SegmentServer(address, key, spec.run_id)
        self.closers.push_async_callback(segments.stop)
        return await segments.start()

    async def _converse(
        self, collector: Collector, evaluation: Evaluation | None, pruner: Pruner, servers: list[Server]
    ) -> None:
        """Follow the trainer until it says stop, or a task of ours fails."""
        while True:
            incoming = asyncio.ensure_future(self._incoming.get())
            await asyncio.wait([incoming, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in list(self._tasks):
                if task.done():
                    self._tasks.remove(task)
                    task.result()  # raises what ended it
            if not incoming.done():
                incoming.cancel()
                continue
            match incoming.result():
                case Begin(first=first, end=end):
                    self._spawn(collector.run(first, end))
                case Kept(step=step):
                    pruner.release(step)
                case Reach(nodes=nodes):
                    self._spawn(self._reach(servers, nodes, collector.spec.run_id))
                case Published(manifest=manifest):
                    self.manifest = manifest
                    for keeper in self.keepers:
                        keeper.wake.set()
                case EvaluateRequest(step=step, version=version) if evaluation is not None:
                    self._spawn(self._evaluate(evaluation, step, version))
                case Stop():
                    return
                case other:
                    raise UserError(f"the trainer sent {type(other).__name__}, which has no meaning now")

    async def _reach(self, servers: list[Server], nodes: list[WeightNode], run_id: str) -> None:
        await check_reach(servers, nodes, run_id)
        self.send(Reached())

    async def _evaluate(self, evaluation: Evaluation, step: int, version: int) -> None:
        self.send(await evaluation.run(step, version))

    def _spawn(self, coroutine: Any) -> None:
        self._tasks.append(asyncio.create_task(coroutine))

    def _changed(self) -> None:
        if self.collector is not None:
            self.collector.changed.set()

    def _notice(self, text: str) -> None:
        log.info("%s", text)
        self.send(Notice(text=text))

    def _fail(self, message: str) -> None:
        self.send(Failure(message=message))


def _allow_files() -> None:
    """Every request in flight has a connection of its own, and the usual limit is 1,024 files."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def ready(servers: list[Server], train: PromptSet, held_out: PromptSet | None, segment_url: str, ledger: str) -> Ready:
    """What the collector has found."""
    infos = [server.info for server in servers if server.info is not None]
    return Ready(
        servers=infos,
        serving_dtype=cast(DTypeName, infos[0].torch_dtype),
        prompts=len(train),
        evaluation_prompts=len(held_out) if held_out is not None else 0,
        segment_url=segment_url,
        ledger=ledger,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
