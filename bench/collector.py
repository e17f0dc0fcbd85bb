"""The collector on one core: rollouts a second and CPU time a rollout, from 100 to 10,000 rollouts in flight.

    python bench/collector.py [--rounds 3] [--seconds 6] [--in_flight 100 1000 10000] [--servers 1 200]
                              [--num_generations 8 2] [--json]

The whole path is the real one: admission, HTTP, decoding, a plain reward function in its worker process, groups,
advantages, the ledger on disk, packed batches over ZeroMQ. Only the servers generate nothing (see stub_servers.py), and
the trainer is a reader that answers every batch with a new version at once. The collector process is started as the
trainer starts it, and pinned to one core with its ledger thread and the reward worker; servers and reader share another
one. Loads are interleaved over the rounds. Prints a table of medians and, last, one line of JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from about import about
from rich.console import Console
from rich.table import Table
from stub_servers import Plan, Rollout

import outrider.demo
from outrider.collector.config import (
    CollectorSpec,
    DataConfig,
    EvaluationConfig,
    RewardConfig,
    SamplingConfig,
    ServersConfig,
    StalenessConfig,
)
from outrider.collector.setup import load_identity
from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.control import ServerInfo
from outrider.contract.feed import Begin, PoolStatus
from outrider.contract.identity import host_identity
from outrider.contract.manifest import Manifest
from outrider.observe.panel import Panel
from outrider.rewards.settings import RewardSettings
from outrider.trainer.link import CollectorLink

MODEL = Path(outrider.demo.__file__).parent / "model"
TOKENS = 512
TEXT_CHARACTERS, PROMPT_CHARACTERS = 2000, 120
GROUPS_PER_BATCH = 256
ROWS, ANSWERS = 4096, 16
START_DEADLINE = 60.0

REWARD = '''
def bench_reward(completions, solution, **columns):
    """Something of every completion has to be read, and rewards have to differ."""
    return [float(hash(completion) % 7) for completion in completions]
'''


class Level(NamedTuple):
    """One load. generations: rollouts of a group, which is one request."""

    servers: int
    in_flight: int
    generations: int


class Figures(NamedTuple):
    """What one run of a level gave. Costs are CPU seconds of one rollout."""

    in_flight: float
    rollouts_per_second: float
    cost: float
    worker_cost: float
    core_share: float


class Watcher(Panel):
    """Keeps what the collector says of itself."""

    def __init__(self) -> None:
        self.statuses: list[PoolStatus] = []

    def pool(self, status: PoolStatus) -> None:
        """What the collector does right now."""
        self.statuses.append(status)

    def notice(self, text: str) -> None:
        """Something went wrong, or is odd."""
        print(f"collector: {text}", file=sys.stderr, flush=True)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds of a process with all its threads, and of its children."""
    ticks, own, children = os.sysconf("SC_CLK_TCK"), 0.0, 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended in the meantime
            continue
        seconds = (int(fields[11]) + int(fields[12])) / ticks
        own += seconds if path.parent.name == str(pid) else 0.0
        children += seconds if fields[1] == str(pid) else 0.0
    return own, children


def slack(level: Level) -> int:
    """Rollouts that the collector may have in flight beyond those that the servers hold: the ones it works on."""
    return max(3 * level.generations, level.in_flight // 50)


def make_spec(directory: Path, level: Level, urls: Sequence[str]) -> CollectorSpec:
    """A run as long as it likes. The bound K leaves room for more groups than are in flight at most."""
    prompts, source = directory / "prompts.jsonl", random.Random(0)
    if not prompts.exists():
        lines = [
            {"prompt": "".join(source.choices("0123456789+=", k=PROMPT_CHARACTERS)), "solution": str(row)}
            for row in range(ROWS)
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory / "bench_reward.py").write_text(REWARD)
    groups = level.in_flight // level.generations + level.servers
    return CollectorSpec(
        run_id="bench", resume=False, model=str(MODEL), trust_remote_code=False, server_urls=list(urls),
        servers=ServersConfig(
            max_concurrent_rollouts=(level.in_flight + slack(level)) // level.servers, vllm_server_api_key="bench"
        ),
        data=DataConfig(dataset=(str(prompts),)),
        sampling=SamplingConfig(num_generations=level.generations, max_completion_length=TOKENS),
        rewards=RewardConfig(reward_funcs=(f"{directory}/bench_reward.py:bench_reward",)),
        reward_weights=(1.0,), reward_settings=RewardSettings(), staleness=StalenessConfig(),
        max_staleness=groups // GROUPS_PER_BATCH + 4, evaluation=EvaluationConfig(), groups_per_batch=GROUPS_PER_BATCH,
        mini_batches=1, seed=0, ledger=str(directory / "ledger.sqlite"), ledger_keep_steps=100,
        drop_zero_variance=True,
    )  # fmt: skip


def make_plan(spec: CollectorSpec, level: Level, packs: bool) -> Plan:
    """Servers that fit the run."""
    _, expected, _ = load_identity(spec)
    draw, source = np.random.default_rng(0), random.Random(0)
    info = ServerInfo(
        engine="torch", engine_version="0", model=spec.model, model_fingerprint=expected.model_fingerprint,
        tokenizer_hash=expected.tokenizer_hash, torch_dtype="float32", max_model_len=8192, max_num_seqs=level.in_flight,
        vocab_size=99, version=0, run_id="", host=host_identity(),
        capabilities=("inflight_keep", "inflight_recompute", "inflight_wait"),
    )  # fmt: skip
    answers = [
        [
            Rollout(
                text="".join(source.choices("abcdefghijklmnopqrstuvwxyz     ", k=TEXT_CHARACTERS)),
                token_ids=pack_ints(draw.integers(3, 99, TOKENS)),
                logprobs=pack_floats(-draw.exponential(1.0, TOKENS)),
            )
            for _ in range(level.generations)
        ]
        for _ in range(ANSWERS)
    ]
    return Plan(info=info, servers=level.servers, answers=answers, hold=level.in_flight, packs=packs)


def measure(level: Level, seconds: float, cores: Sequence[int], packs: bool) -> Figures:
    """Run the collector under one load for ``seconds`` after it has got going."""
    ours, theirs = cores
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        plan = directory / "plan"
        plan.write_bytes(msgspec.msgpack.encode(make_plan(make_spec(directory, level, []), level, packs)))
        os.sched_setaffinity(0, {theirs})
        stub = Path(__file__).with_name("stub_servers.py")
        servers = subprocess.Popen([sys.executable, stub, plan], stdout=subprocess.PIPE)
        watcher = Watcher()
        link = CollectorLink(watcher, lambda: False, directory / "collector.log")
        try:
            assert servers.stdout is not None
            urls = [f"http://127.0.0.1:{port}" for port in json.loads(servers.stdout.readline())]
            # The child and its own children inherit the core.
            os.sched_setaffinity(0, {ours})
            link.start(msgspec.msgpack.encode(make_spec(directory, level, urls)))
            os.sched_setaffinity(0, {theirs})
            return follow(link, watcher, level, seconds)
        finally:
            link.stop("the bench is over")
            servers.kill()
            servers.wait()


def follow(link: CollectorLink, watcher: Watcher, level: Level, seconds: float) -> Figures:
    """Be the trainer: take batches and announce versions. Counts from when the load is what it is to be."""

    def publish(version: int) -> None:
        link.announce(Manifest(run_id="bench", version=version, model_fingerprint="", segments=(), tensors=()))

    link.ready(START_DEADLINE)
    assert link._process is not None
    collector = link._process.pid
    publish(0)
    link.send(Begin(first=0, end=10**6))
    warm = 2 + level.in_flight // (GROUPS_PER_BATCH * level.generations)
    rollouts, began, before = 0, 0.0, (0.0, 0.0)
    while True:
        batch = link.batch()
        now = time.perf_counter()
        publish(batch.number + 1)
        if batch.number < warm:
            continue
        if batch.number == warm:
            began, before = now, cpu_seconds(collector)
            watcher.statuses.clear()
            continue
        rollouts += sum(part.sequences for part in batch.mini_batches)
        samples = [sample for part in batch.mini_batches for sample in part.samples]
        assert all(len(sample.completion) == 4 * TOKENS for sample in samples)
        if now - began >= seconds and watcher.statuses:
            after, elapsed = cpu_seconds(collector), now - began
            own, workers = after[0] - before[0], after[1] - before[1]
            return Figures(
                in_flight=statistics.mean(status.rollouts_running for status in watcher.statuses),
                rollouts_per_second=rollouts / elapsed,
                cost=own / rollouts,
                worker_cost=workers / rollouts,
                core_share=(own + workers) / elapsed,
            )


def main() -> None:
    """Measure all loads, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="measured at each load in each round")
    parser.add_argument("--in_flight", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument(
        "--servers", type=int, nargs="+", default=[1, 200], help="all but the first: most in flight only"
    )
    parser.add_argument(
        "--num_generations", type=int, nargs="+", default=[8, 2], help="all but the first: most in flight only"
    )
    parser.add_argument("--json", action="store_true", help="servers answer JSON, as stock ones do")
    parser.add_argument("--cores", type=int, nargs=2, default=sorted(os.sched_getaffinity(0))[:2])
    options = parser.parse_args()
    (servers, *more_servers), (generations, *more_generations) = options.servers, options.num_generations
    most = max(options.in_flight)
    levels = [Level(servers, count, generations) for count in options.in_flight]
    levels += [Level(other, most, generations) for other in more_servers]
    levels += [Level(servers, most, other) for other in more_generations]
    results: dict[Level, list[Figures]] = {level: [] for level in levels}
    for round_ in range(options.rounds):
        for level in levels:
            results[level].append(measure(level, options.seconds, options.cores, packs=not options.json))
            print(f"round {round_} {level}: {results[level][-1]}", file=sys.stderr, flush=True)
    report(
        results, Level(servers, min(options.in_flight), generations), Level(servers, most, generations), options.cores
    )


def report(results: dict[Level, list[Figures]], low: Level, high: Level, cores: Sequence[int]) -> None:
    """The table and the line of JSON. low, high: the loads whose costs are compared."""
    median = {
        level: Figures(*(statistics.median(column) for column in zip(*runs, strict=True)))
        for level, runs in results.items()
    }
    table = Table(
        *("servers", "a request", "in flight", "a second", "µs each", "worker µs", "core used"),
        title=f"rollouts of {TOKENS} tokens: medians",
        caption=f"core {cores[0]}: collector, its ledger thread, its reward worker; core {cores[1]}: servers, reader",
    )
    summary: dict[str, float] = {
        "in_flight": round(median[high].in_flight),
        "rollouts_per_second": round(median[high].rollouts_per_second),
        f"cost_ratio_{high.in_flight}_to_{low.in_flight}": round(median[high].cost / median[low].cost, 3),
    }
    for level, figures in median.items():
        table.add_row(
            f"{level.servers}", f"{level.generations}", f"{figures.in_flight:,.0f}",
            f"{figures.rollouts_per_second:,.0f}", f"{figures.cost * 1e6:.0f}", f"{figures.worker_cost * 1e6:.0f}",
            f"{figures.core_share:.0%}",
        )  # fmt: skip
        label = f"{level.in_flight}_in_flight_{level.servers}_servers_{level.generations}_a_request"
        summary[f"microseconds_{label}"] = round(figures.cost * 1e6, 1)
        summary[f"rollouts_per_second_{label}"] = round(figures.rollouts_per_second)
    Console(highlight=False).print(table)
    print(json.dumps({**summary, **about()}))


if __name__ == "__main__":
    main()
