"""The collector over a real server, with rewards that follow a script and a trainer that publishes after each batch."""

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from outrider.collector.collector import Collector
from outrider.collector.config import CollectorSpec
from outrider.collector.evaluation import Evaluation
from outrider.collector.ledger import Ledger, read_rollouts, trained_steps
from outrider.collector.prompts import PromptSet
from outrider.collector.reward_runner import RewardRunner
from outrider.collector.setup import evaluation_template, ledger_facts, sampling_template
from outrider.contract.arrays import unpack_ints
from outrider.contract.errors import UserError
from outrider.contract.feed import (
    Batch,
    Begin,
    EvalResult,
    EvaluateRequest,
    Failure,
    FromCollector,
    MiniBatch,
    Notice,
    PoolStatus,
    Published,
    Ready,
    Stop,
)
from outrider.environments.single_turn import SingleTurn
from outrider.rewards.settings import RewardSettings
from tests.collector.build import collector_spec
from tests.collector.servers import KEY, PATIENCE, Rig, RolloutProcess, Weights, expected, rig, until

REWARDS = '''
import asyncio
from pathlib import Path

async def scripted(completions, script, **columns):
    """mixed: something to learn; silent: nothing; fail: raises; hang: never ends while the file ``hang`` exists."""
    if script[0] == "fail":
        raise RuntimeError("as the script says")
    while script[0] == "hang" and (Path(__file__).parent / "hang").exists():
        await asyncio.sleep(0.01)
    if script[0] == "silent":
        return [0.25] * len(completions)
    return [float(index % 2) for index in range(len(completions))]
'''

_runs = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutProcess]:
    process = RolloutProcess(tmp_path_factory.mktemp("server"), "--max_num_seqs", "64")
    process.start()
    process.wait()
    yield process
    process.kill()


class Run:
    """One process of a run: a collector with all that belongs to it, and its trainer's side of the conversation."""

    def __init__(self, made: Rig, weights: Weights, directory: Path, scripts: list[str], tokenizer: Any, spec: Any):
        self.rig, self.weights, self.spec = made, weights, spec
        self.messages: list[FromCollector] = []
        rows = [{"prompt": f"{number}+1=", "script": script} for number, script in enumerate(scripts)]
        self.prompts = PromptSet(rows, ["prompt", "script"], "rows", tokenizer, spec.data, limit=20)
        plugin = directory / "rewards.py"
        if not plugin.exists():
            plugin.write_text(REWARDS)
        self.rewards = RewardRunner([f"{plugin}:scripted"], RewardSettings(), [], 60.0, 1)
        self.ledger = Ledger(directory / "ledger.sqlite", ledger_facts(spec, self.prompts, expected()), spec.resume)
        self.collector = Collector(
            spec, self.prompts, made.pool, self.rewards, SingleTurn(), self.ledger, sampling_template(spec), self.send
        )
        made.on_change = self.collector.changed.set

    def send(self, message: FromCollector) -> None:
        self.messages.append(message)
        if isinstance(message, Batch):
            self.rig.announce(self.weights.publish(message.number + 1))

    @property
    def batches(self) -> list[Batch]:
        return [message for message in self.messages if isinstance(message, Batch)]

    async def collect(self, start: int, steps: int) -> list[Batch]:
        """The batches of the steps ``start`` to ``steps`` - 1. Raises what ends the run."""
        task = asyncio.create_task(self.collector.run(start, steps))
        try:
            async with asyncio.timeout(PATIENCE):
                while len(self.batches) < steps - start:
                    if task.done():
                        await task
                    failures = [message.message for message in self.messages if isinstance(message, Failure)]
                    if failures:
                        raise UserError(failures[0])
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return self.batches

    def evaluation(self) -> Evaluation:
        return Evaluation(
            self.prompts, self.rig.pool, self.rewards, (1.0,), SingleTurn(), evaluation_template(self.spec), 0
        )


def whole(batch: Batch) -> MiniBatch:
    """The one part of a batch that is trained in one optimizer step."""
    [part] = batch.mini_batches
    return part


@contextlib.asynccontextmanager
async def run_of(
    server: RolloutProcess, directory: Path, scripts: list[str], tokenizer: Any, start: int = 0, **given: Any
) -> AsyncIterator[Run]:
    """A run over the rows that ``scripts`` describe, its server at version ``start``. given: see collector_spec."""
    run_id = f"collector{next(_runs)}"
    weights = Weights(run_id, noise=0.0)
    async with rig([server.url], run_id) as made:
        run = Run(made, weights, directory, scripts, tokenizer, collector_spec(run_id=run_id, **given))
        made.announce(weights.publish(start))
        await made.ready(start)
        try:
            yield run
        finally:
            run.ledger.close()
            run.rewards.close()
    weights.close()


async def test_silent_groups_are_dropped_and_counted(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    """Their gradient is zero, so they are not sent; the normalization counts them as if they had been."""
    async with run_of(server, tmp_path, ["mixed", "silent", "mixed", "mixed"], tokenizer, max_staleness=0) as run:
        first, second = await run.collect(0, 2)
    assert [sample.group for sample in whole(first).samples] == [0] * 4
    assert (whole(first).sequences, first.stats.groups, first.stats.groups_zero_variance) == (8, 2, 1)
    rows = read_rollouts(run.ledger.path, 1)
    assert (
        whole(first).tokens
        == sum(row.tokens for row in rows)
        > sum(len(sample.completion) // 4 for sample in whole(first).samples)
    )
    assert [row.advantage for row in rows if row.group == 1] == [0.0] * 4
    assert {sample.group for sample in whole(second).samples} == {2, 3}
    assert (whole(second).sequences, second.stats.groups_zero_variance) == (8, 0)
    assert [unpack_ints(sample.prompt).tolist() for sample in whole(first).samples] == [tokenizer.encode("0+1=")] * 4
    assert [round(sample.advantage, 2) for sample in whole(first).samples] == [-0.87, 0.87, -0.87, 0.87]


async def test_silent_groups_are_sent_where_they_count(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    """With a penalty for moving away from the reference they have a gradient."""
    async with run_of(server, tmp_path, ["mixed", "silent"], tokenizer, drop_zero_variance=False) as run:
        [batch] = await run.collect(0, 1)
    assert sorted(sample.group for sample in whole(batch).samples) == [0] * 4 + [1] * 4
    assert batch.stats.groups_zero_variance == 1


async def test_dynamic_sample_fills_the_batch(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    scripts = ["silent", "silent", "mixed", "silent", "mixed", "mixed"]
    async with run_of(server, tmp_path, scripts, tokenizer, dynamic_sample=True, max_staleness=0) as run:
        [batch] = await run.collect(0, 1)
    assert len({sample.group for sample in whole(batch).samples}) == 2
    assert whole(batch).sequences == len(whole(batch).samples) == 8
    dropped = {row.group for row in read_rollouts(run.ledger.path, None) if row.reason == "all rewards equal"}
    assert len(dropped) == batch.stats.groups_zero_variance >= 2


async def test_dynamic_sample_has_a_limit(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    """One batch's worth of groups is replaced; then the batch ships with the silent groups it has."""
    scripts = ["silent", "silent", "mixed", "silent"] + ["mixed"] * 4
    async with run_of(
        server, tmp_path, scripts, tokenizer, dynamic_sample=True, max_resample_times=1, max_staleness=0
    ) as run:
        [batch] = await run.collect(0, 1)
    assert {sample.group for sample in whole(batch).samples} == {2}
    assert whole(batch).sequences == 8


async def test_batches_without_any_signal_end_the_run(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    async with run_of(server, tmp_path, ["silent"] * 8, tokenizer, max_empty_batches=3) as run:
        with pytest.raises(UserError, match=r"3 batches in a row had no group .*mean reward was 0\.25\): nothing is"):
            await run.collect(0, 2)
        assert run.batches == []


async def test_one_batch_without_signal_is_made_anew(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    scripts = ["silent", "silent", "mixed", "mixed"]
    async with run_of(server, tmp_path, scripts, tokenizer, max_staleness=0, max_empty_batches=2) as run:
        [batch] = await run.collect(0, 1)
    assert {sample.group for sample in whole(batch).samples} == {2, 3}
    assert batch.stats.groups_zero_variance == 2


async def test_a_failing_reward_costs_its_group(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    async with run_of(server, tmp_path, ["fail", "mixed", "mixed", "fail"], tokenizer, max_staleness=0) as run:
        first, second = await run.collect(0, 2)
    assert {sample.group for sample in whole(first).samples} == {1, 2}
    assert first.stats.groups_failed + second.stats.groups_failed >= 2
    texts = [message.text for message in run.messages if isinstance(message, Notice)]
    assert any(text.startswith("group 0 given up: reward scripted raised RuntimeError: as the scr") for text in texts)
    trained = {row.group for step in trained_steps(run.ledger.path) for row in read_rollouts(run.ledger.path, step)}
    assert not trained & {0, 3}


async def test_rewards_that_always_fail_end_the_run(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    async with run_of(server, tmp_path, ["fail"] * 4, tokenizer) as run:
        with pytest.raises(UserError, match=r"16 groups in a row were given up; .*raised RuntimeError: as the script"):
            await run.collect(0, 1)


async def test_overlong_prompts_are_rejected_one_by_one(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    async with run_of(server, tmp_path, ["mixed"] * 4, tokenizer, max_staleness=0) as run:
        run.prompts.rows[1]["prompt"] = "1" * 21  # type: ignore[index]
        first, _ = await run.collect(0, 2)
        first_groups = {sample.group for sample in whole(first).samples}
        assert len(first_groups) == 2
        assert 1 not in first_groups
        assert first.stats.prompts_rejected >= 1
        for row in run.prompts.rows:
            row["prompt"] = "1" * 21  # type: ignore[index]
        with pytest.raises(
            UserError, match=r"every prompt of the dataset was rejected; the last one: row \d: prompt of"
        ):
            await run.collect(2, 8)


@pytest.mark.parametrize("bound", [0, 1, 3])
async def test_nothing_ships_beyond_the_bound(
    bound: int, server: RolloutProcess, tmp_path: Path, tokenizer: Any
) -> None:
    async with run_of(server, tmp_path, ["mixed"] * 5, tokenizer, max_staleness=bound) as run:
        batches = await run.collect(0, 6)
    assert [batch.number for batch in batches] == list(range(6))
    assert trained_steps(run.ledger.path) == list(range(1, 7))
    for step, batch in enumerate(batches):
        versions = [version for row in read_rollouts(run.ledger.path, step + 1) for version, _ in row.versions]
        assert 0 <= step - max(versions) <= step - min(versions) == batch.stats.staleness_max <= bound
        assert batch.stats.groups_stale == 0


async def test_the_time_of_a_batch_adds_up(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    """Busy, idle and down are all there is, batch for batch, from the start of the run to its last batch."""
    async with run_of(server, tmp_path, ["mixed"] * 4, tokenizer, max_staleness=0) as run:
        started = time.monotonic()
        batches = await run.collect(0, 4)
        elapsed = time.monotonic() - started
    for batch in batches:
        stats = batch.stats
        parts = stats.generation_busy_seconds + stats.generation_idle_seconds + stats.generation_down_seconds
        assert parts == pytest.approx(stats.batch_seconds, abs=1e-6)
        assert stats.generation_down_seconds == 0
        assert stats.generation_busy_seconds > 0
        assert 0 < stats.pack_seconds < stats.batch_seconds
        assert stats.reward_wait_seconds <= stats.generation_idle_seconds + 1e-6
    assert sum(batch.stats.batch_seconds for batch in batches) <= elapsed


async def test_waiting_for_rewards_is_told_from_waiting_for_versions(
    server: RolloutProcess, tmp_path: Path, tokenizer: Any
) -> None:
    hang = tmp_path / "hang"
    hang.touch()
    async with run_of(server, tmp_path, ["hang", "mixed"], tokenizer, max_staleness=0) as run:
        collecting = asyncio.create_task(run.collect(0, 1))
        await until(lambda: run.rewards.running == 1 and run.collector.finished)
        await asyncio.sleep(0.3)
        hang.unlink()
        [batch] = await collecting
    assert 0.3 <= batch.stats.reward_wait_seconds <= batch.stats.generation_idle_seconds <= batch.stats.batch_seconds
    assert batch.stats.reward_seconds >= 0.3


async def test_evaluation_waits_for_its_version(server: RolloutProcess, tmp_path: Path, tokenizer: Any) -> None:
    """It runs beside the rollouts of a run, and says which versions answered."""
    async with run_of(server, tmp_path, ["mixed", "silent", "fail"], tokenizer, num_generations_eval=2) as run:
        early = asyncio.create_task(run.evaluation().run(step=1, version=1))
        await run.collect(0, 2)
        result = await asyncio.wait_for(early, PATIENCE)
        assert 1 <= result.version_min <= result.version_max <= 2
        await run.rig.ready(2)
        result = await run.evaluation().run(step=2, version=2)
        again = await run.evaluation().run(step=2, version=2)
    assert (result.step, result.version_min, result.version_max) == (2, 2, 2)
    assert (result.count, result.failed) == (4, 1)
    assert result.rewards == {"scripted": 0.375}
    assert result.reward == 0.375
    assert [example.prompt for example in result.examples] == ["0+1=", "1+1="]
    assert result.examples == again.examples, "evaluation is greedy"


async def test_resume_loses_nothing_and_trains_nothing_twice(
    server: RolloutProcess, tmp_path: Path, tokenizer: Any
) -> None:
    """The first process ends with one batch trained, groups finished, and one in flight. The second one starts from
    before that batch: it gets it again, in the same parts, the finished groups are used, and the one in flight is asked
    anew with its own prompt."""
    scripts = ["mixed", "hang"] + ["mixed"] * 8
    hang = tmp_path / "hang"
    hang.touch()
    async with run_of(server, tmp_path, scripts, tokenizer, mini_batches=2) as run:
        task = asyncio.create_task(run.collect(0, 5))
        await until(lambda: len(run.collector.finished) == 3 and run.batches)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        [first] = run.batches
        waiting = set(run.collector.finished)
        assert list(run.collector.gate.running) == [1]
    first_groups = {sample.group for part in first.mini_batches for sample in part.samples}
    assert len(first_groups) == 2
    assert 1 not in first_groups
    before = {(row.group, row.index): row for row in read_rollouts(run.ledger.path, None)}

    hang.unlink()
    async with run_of(server, tmp_path, scripts, tokenizer, mini_batches=2, resume=True) as run:
        batches = await run.collect(0, 5)
    assert batches[0].mini_batches == first.mini_batches
    assert [len(part.samples) for part in first.mini_batches] == [4, 4]
    rows = {step: read_rollouts(run.ledger.path, step) for step in trained_steps(run.ledger.path)}
    assert list(rows) == [1, 2, 3, 4, 5]
    groups = [row.group for own in rows.values() for row in own if row.index == 0]
    assert sorted(groups) == list(range(10)), "each prompt once: nothing lost, nothing twice"
    for row in itertools.chain(*rows.values()):
        assert row.prompt == f"{row.group}+1="
        if row.group in waiting:
            old = before[row.group, row.index]
            assert (row.completion, row.versions, row.rewards) == (old.completion, old.versions, old.rewards)
    for step, own in rows.items():
        assert all(step - 1 - version <= 1 for row in own for version, _ in row.versions)


async def test_a_ledger_that_cannot_be_written_ends_the_run(
    server: RolloutProcess, tmp_path: Path, tokenizer: Any
) -> None:
    """A batch that is not in the ledger does not go out."""
    async with run_of(server, tmp_path, ["mixed"] * 4, tokenizer) as run:
        collecting = asyncio.create_task(run.collect(0, 1000))
        await until(lambda: len(run.batches) >= 2)
        with contextlib.suppress(UserError):  # it may fall into one transaction with what it makes fail
            await asyncio.to_thread(run.ledger._submit(lambda: run.ledger._db.execute("PRAGMA query_only = 1")).result)
        with pytest.raises(UserError, match=r"ledger .* cannot be written"):
            await collecting
        shipped = len(run.batches)
    assert trained_steps(run.ledger.path) == list(range(1, shipped + 1))


async def test_the_process_from_start_to_end(server: RolloutProcess, tmp_path: Path) -> None:
    """What the trainer starts: preflight, batches, an evaluation, and an end in the middle of work."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1=", "solution": str(n + 1)}) + "\n" for n in range(20)))
    (tmp_path / "rewards.py").write_text(REWARDS)
    spec: CollectorSpec = collector_spec(
        run_id=f"collector{next(_runs)}", server_urls=[server.url], ledger=str(tmp_path / "ledger.sqlite"),
        dataset=(str(data),), val_dataset=(str(data),), vllm_server_api_key=KEY,
        reward_funcs=("exact_match",), drop_zero_variance=False, max_staleness=2,
    )  # fmt: skip
    weights = Weights(spec.run_id, noise=0.0)
    context = zmq.asyncio.Context()
    feed, versions = context.socket(zmq.PAIR), context.socket(zmq.PUSH)
    endpoint = f"ipc://{tmp_path}/feed"
    feed.bind(endpoint)
    versions.connect(f"{endpoint}-versions")
    log = tmp_path / "log"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - starting does not block
            [sys.executable, "-m", "outrider.collector.process", endpoint, str(os.getpid())],
            stdout=output, stderr=output, env=environment,
        )  # fmt: skip
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.Decoder(FromCollector).decode

    async def receive(kind: type) -> Any:
        async with asyncio.timeout(PATIENCE):
            while True:
                message = decode(await feed.recv())
                assert not isinstance(message, Failure), message
                if isinstance(message, kind):
                    return message

    await feed.send(encode(spec))
    ready = await receive(Ready)
    assert (ready.prompts, ready.evaluation_prompts, len(ready.servers)) == (20, 20, 1)
    await versions.send(encode(Published(manifest=weights.publish(0))))
    await feed.send(encode(Begin(first=0, end=1000)))
    for step in range(3):
        batch = await receive(Batch)
        assert (batch.number, whole(batch).sequences) == (step, 8)
        await versions.send(encode(Published(manifest=weights.publish(step + 1))))
    assert (await receive(PoolStatus)).servers_alive == 1
    await feed.send(encode(EvaluateRequest(step=3, version=3)))
    assert (await receive(EvalResult)).version_min >= 3
    await feed.send(encode(Stop(reason="the test is over")))
    assert await asyncio.to_thread(process.wait, PATIENCE) == 0
    for word in ("Traceback", "ERROR", "never retrieved", "was destroyed"):
        assert word not in log.read_text(), log.read_text()
    feed.close(linger=0)
    versions.close(linger=0)
    context.term()
    weights.close()
