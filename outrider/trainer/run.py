"""One training run: from the preflight to the final export."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from transformers.utils import logging as transformers_logging

from outrider.contract.errors import UserError
from outrider.contract.feed import Batch, Begin, EvalResult, Kept, Ready
from outrider.contract.identity import model_fingerprint
from outrider.contract.keys import client_key
from outrider.contract.manifest import Manifest
from outrider.contract.output import show
from outrider.observe.metrics import MetricsWriter, read_metrics
from outrider.observe.panel import Panel, make_panel
from outrider.observe.records import EvalRecord, StepRecord
from outrider.observe.reporters import Reporters, make_reporters
from outrider.trainer.agreement import check_directory, compare_settings
from outrider.trainer.checkpoint import earliest_resume, find_checkpoint, load_state
from outrider.trainer.clock import StepClock
from outrider.trainer.directories import SaveFailed
from outrider.trainer.finish import finish_run
from outrider.trainer.follower import Follower
from outrider.trainer.interrupt import Interrupt
from outrider.trainer.link import CollectorLink, Interrupted
from outrider.trainer.model import load_config, load_tokenizer
from outrider.trainer.optimizer import learning_rate
from outrider.trainer.orders import End, Load, Open, Publish, Step, Take, encode
from outrider.trainer.parts import Description, Parts, load_parts, make_publisher, weight_nodes
from outrider.trainer.plan import planned_steps
from outrider.trainer.ranks import Ranks, lost_connection
from outrider.trainer.recording import eval_record, step_record
from outrider.trainer.saving import Saver, patiently
from outrider.trainer.spec import TrainerSpec
from outrider.trainer.step import StepOutcome, StepWork
from outrider.trainer.summary import RunEnd
from outrider.weights.publish import BUFFERS, Publisher
from outrider.weights.segments import remove_stale_segments, segment_path

#: Seconds for servers to hold a version and answer all held-out prompts.
EVALUATION_DEADLINE = 3600.0
#: Seconds for servers to try to reach every node of the trainer.
REACH_DEADLINE = 150.0


def train(spec: TrainerSpec, collector: bytes, check: Callable[[], None]) -> int:
    """Run to the end, or until the user stops it. collector: an encoded ``CollectorSpec``, handed through to the
    child process. check: called by the leading rank before anything is loaded, when all ranks can be told why it
    raises UserError. Returns the exit status: 0 done, 130 stopped by the user. Raises UserError."""
    prepare(spec)
    ranks = Ranks(
        spec.model.shard_across_nodes,
        spec.model.fsdp_cpu_offload,
        spec.model.tensor_parallel_size,
        spec.run.heartbeat_timeout,
    )
    try:
        compare_settings(ranks, spec.configuration)
        check_directory(ranks, Path(spec.run.output_dir))
        if ranks.leads:
            check()
            status = Trainer(spec, Path(spec.run.output_dir), ranks).run(collector)
        else:
            status = Follower(spec, ranks).run()
        ranks.close()  # not after an error: it might wait for what does not come
        return status
    except Exception as error:
        if not (lost := lost_connection(error)):
            ranks.fail(error)
            raise
        ranks.await_verdict()
        print(f"outrider: rank {ranks.rank} on node {ranks.node}: another rank is gone: {lost}", file=sys.stderr)
        return 1


def prepare(spec: TrainerSpec) -> None:
    """What holds for the whole process: threads, seed, a quiet library, no segments that a killed trainer has left."""
    if spec.run.threads is not None:
        torch.set_num_threads(spec.run.threads)
    torch.manual_seed(spec.run.seed)
    transformers_logging.disable_progress_bar()  # it would write over the panel
    remove_stale_segments()


class Trainer:
    """The state of a run, and its loop."""

    # What load() brings.
    parts: Parts
    ready: Ready
    saver: Saver
    publisher: Publisher
    metrics: MetricsWriter
    reporters: Reporters
    clock: StepClock

    def __init__(self, spec: TrainerSpec, output_dir: Path, ranks: Ranks) -> None:
        self.spec, self.output_dir, self.ranks = spec, output_dir, ranks
        self.status = 2
        #: Optimizer steps taken, and batches trained.
        self.step = self.version = 0
        self.max_steps = 0
        self.time_before = 0.0
        # Plain lines until the run is known to start: the live panel has nothing to show before.
        self.panel = self._panel(plain=True)
        last = "step" if spec.steps_per_batch == 1 else "batch"
        self.interrupt = Interrupt(
            lambda: self.panel.notice(f"stopping after this {last}; once more to stop now, without saving"),
            self._abandon,
        )
        ranks.heed(self.interrupt.request, self._abandon)
        self.link = CollectorLink(self.panel, lambda: self.interrupt.requested, output_dir / "collector.log")
        self.closers = contextlib.ExitStack()
        self.started: float | None = None
        self.evaluations: list[EvalResult] = []

    def run(self, collector: bytes) -> int:
        """From the start of the collector to its end; the exit status. Raises UserError."""
        try:
            self.link.start(collector)
            self.load()
            self.status = self.train()
        except Interrupted:
            self.status = self.stopped_by_user()
        finally:
            self.close()
        return self.status

    # ---- getting ready -----------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load model, optimizer and checkpoint while the collector makes its preflight; then publish."""
        spec = self.spec
        checkpoint, state = None, None
        if spec.run.resume_from_checkpoint is not None:
            checkpoint = find_checkpoint(spec.run.resume_from_checkpoint, self.output_dir)
        if checkpoint is not None:
            # Against --model, which the servers serve: the checkpoint's own configuration would always agree.
            asked = load_config(spec.model, spec.model.model)
            state = load_state(checkpoint, spec.model.model, model_fingerprint(asked.to_dict()))
        tokenizer = load_tokenizer(spec.model)
        with self.ranks.together(encode(Load(spec.run_id, None if checkpoint is None else str(checkpoint)))):
            self.parts = load_parts(spec, self.ranks, checkpoint)
        policy, optimizer = self.parts.policy, self.parts.optimizer
        # Servers have --vllm_server_timeout to come up; the collector reports when that has passed.
        self.ready = self.link.ready(deadline=24 * 3600.0)
        self.saver = Saver(
            self.output_dir, policy, optimizer, tokenizer, spec.run, self.ranks,
            ledger=self.ready.ledger, model=spec.model.model,
        )  # fmt: skip
        self.closers.callback(self.saver.close)
        if state is not None:
            self.step, self.version, self.time_before = state.step, state.version, state.time
            self.saver.saved_step = state.step
        self.max_steps = planned_steps(spec, self.ready.prompts)
        self._open_outputs()
        if state is not None:
            self.panel.notice(f"resumed from {checkpoint} after step {state.step}")
        # At its last step a run may still have to evaluate and to write its result.
        if self.step > self.max_steps or (self.step == self.max_steps and self.saver.exported):
            raise UserError(
                f"checkpoint {checkpoint} is at step {self.step} and the run has {self.max_steps}: raise --max_steps "
                "or --num_train_epochs to go on"
            )
        dtype, segment_url = self.ready.serving_dtype, self.ready.segment_url or None
        description = Description(self.ranks, spec.run_id, policy)
        with self.ranks.together(encode(Open(dtype, segment_url, spec.server_url, client_key(spec.api_key)))):
            announce = functools.partial(self._announce, description)
            self.publisher = make_publisher(policy, dtype, spec.run_id, segment_url, announce, self.ranks)
        self.closers.callback(self.publisher.close)
        self.link.check_reach(weight_nodes(self.ranks, spec.run_id, segment_url), REACH_DEADLINE)
        self._publish()

    def _announce(self, description: Description, part: Manifest) -> None:
        self.link.announce(description.whole(part))

    def _panel(self, plain: bool) -> Panel:
        logging = msgspec.structs.replace(self.spec.logging, panel="off") if plain else self.spec.logging
        return make_panel(logging, self.output_dir.name, self.max_steps, self.spec.max_staleness)

    def _open_outputs(self) -> None:
        spec = self.spec
        self.panel = self._panel(plain=False)
        self.link.use_panel(self.panel)
        self.metrics = MetricsWriter(self.output_dir / "metrics.jsonl")
        self.closers.callback(self.metrics.close)
        self.reporters = make_reporters(
            spec.logging, self.output_dir, spec.configuration, self.panel.notice, first_step=self.step + 1
        )
        self.closers.callback(self.reporters.close)
        self.panel.start()

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> int:
        """The loop over batches. Returns the exit status."""
        spec = self.spec
        evaluates = self.ready.evaluation_prompts > 0
        if evaluates and spec.eval_on_start and self.step == 0:
            self._evaluate_now()
        batches = math.ceil((self.max_steps - self.step) / spec.steps_per_batch)
        self.link.send(Begin(first=self.version, end=self.version + batches))
        self._tell_kept()
        self.started = time.monotonic()
        self.clock = StepClock()
        while self.step < self.max_steps and not self.interrupt.requested:
            before = self.step
            self._one_batch()
            if evaluates and self._due(spec.eval_steps, before):
                self.link.request_evaluation(self.step, self.version)
        seconds = self._elapsed()
        if self.interrupt.requested:
            return self.stopped_by_user()
        if evaluates:
            self._evaluate_now()
        self._save_last(seconds)
        patiently(self.saver.export, "the final model", self.panel.notice, lambda: self.interrupt.requested)
        self._write_end(seconds, finished=True)
        return 0

    def _due(self, every: int, before: int) -> bool:
        """Whether what is done every so many steps is due at the end of a batch that began after step ``before``."""
        return every > 0 and self.step // every > before // every and self.step < self.max_steps

    def _one_batch(self) -> None:
        """Wait for a batch, take the optimizer steps on it, publish, save. A row is recorded for each step."""
        clock, before = self.clock, self.step
        self.panel.phase("waiting for rollouts")
        with clock.part("wait"):
            batch = self.link.batch()
        self.panel.phase("training")
        steps = min(self.spec.steps_per_batch, self.max_steps - self.step)
        chosen = batch.mini_batches[:steps]
        with clock.part("train"), self.ranks.together(encode(Take(chosen))):
            works = self.parts.computer.prepare(chosen, clock)
        for index in range(steps):
            outcome, rate = self._one_step(works, index % len(works))
            if index == steps - 1:
                self.version += 1
                with clock.part("publish_wait"):
                    self._publish()
                if self._due(self.spec.run.save_steps, before):
                    with clock.part("save"):
                        self._save()
            self._record_step(batch, outcome, rate)

    def _one_step(self, works: list[StepWork], mini_batch: int) -> tuple[StepOutcome, float]:
        """Take an optimizer step; what it showed, and its learning rate."""
        clock, config = self.clock, self.spec.optimizer
        rate = learning_rate(
            self.step, self.max_steps, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
        )
        self.parts.set_learning_rate(rate)
        with clock.part("train"), self.ranks.together(encode(Step(mini_batch, rate))):
            outcome = self.parts.computer.gradients(works[mini_batch], clock)
        # Copies of the version before read what the optimizer is about to change.
        with clock.part("publish_wait"):
            self.publisher.wait()
        with clock.part("save"):
            self.saver.wait_for_copy()
        with clock.part("train"):
            self.parts.optimizer.step()
            self.parts.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return outcome, rate

    def _record_step(self, batch: Batch, outcome: StepOutcome, rate: float) -> None:
        times = self.clock.lap()
        record = step_record(
            batch.stats, outcome, times, self.step, batch.number, self.max_steps, self._elapsed(), rate
        )
        self._log(record)
        self.panel.step(record)
        for result in self.link.arrived_evaluations():
            self._record_evaluation(result)
        if self.saver.settled:
            self._settle_save()

    def _publish(self) -> None:
        """Copy the weights out in the background; servers are told when the copy is whole."""
        with self.ranks.together(encode(Publish(self.version))):
            self.publisher.publish(self.version)
        if self.spec.max_staleness == 0:
            # Nothing to overlap with: the next batch needs this version.
            self.publisher.finish()

    def _evaluate_now(self) -> None:
        """Evaluate the present version, and wait for the result."""
        self.panel.phase("evaluating")
        self.publisher.finish()
        for result in self.link.arrived_evaluations():
            self._record_evaluation(result)
        self.link.request_evaluation(self.step, self.version)
        while True:
            result = self.link.evaluation(EVALUATION_DEADLINE)
            self._record_evaluation(result)
            if result.step == self.step:
                return

    # ---- records, saves and the end ----------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return self.time_before + (0.0 if self.started is None else time.monotonic() - self.started)

    def _log(self, row: StepRecord | EvalRecord) -> None:
        self.metrics.write(row)
        self.reporters.log(row)

    def _record_evaluation(self, result: EvalResult) -> None:
        self.evaluations.append(result)
        record = eval_record(result, self._elapsed())
        self._log(record)
        self.panel.evaluation(record)

    def _save(self) -> None:
        """Start to save a checkpoint, once the one before is saved."""
        self.panel.phase("saving")
        self._settle_save()
        self.saver.begin_checkpoint(self.step, self.version, self.max_steps, self._elapsed())

    def _settle_save(self) -> None:
        """Hear how the checkpoint in progress has ended. A failure is told and costs the checkpoint, not the run."""
        try:
            if self.saver.settle():
                self._tell_kept()
        except SaveFailed as error:
            self.panel.notice(f"checkpoint not saved: {error}; training goes on")

    def _tell_kept(self) -> None:
        """Tell the collector which batches of its ledger no resume will ask for."""
        if (version := earliest_resume(self.output_dir)) is not None:
            self.link.send(Kept(step=version))

    def _save_last(self, seconds: float) -> None:
        """Save the state at the end of the run, however it ends. Raises UserError."""
        self.panel.phase("saving")
        self._settle_save()
        if self.saver.saved_step != self.step:
            save = functools.partial(self.saver.checkpoint, self.step, self.version, self.max_steps, seconds)
            patiently(save, "the last checkpoint", self.panel.notice, lambda: self.interrupt.requested)

    def stopped_by_user(self) -> int:
        """Save what there is, and say how to go on. Returns the exit status."""
        if self.started is None:
            show("stopped before the first step")
            return 130
        seconds = self._elapsed()
        self._save_last(seconds)
        self._write_end(seconds, finished=False)
        show(
            f"stopped after step {self.step} of {self.max_steps}; go on with the same command and "
            "--resume_from_checkpoint auto"
        )
        return 130

    def _write_end(self, seconds: float, finished: bool) -> None:
        self.panel.stop()
        end = RunEnd(
            finished=finished,
            steps=self.step,
            max_steps=self.max_steps,
            train_seconds=seconds,
            max_staleness=self.spec.max_staleness,
        )
        finish_run(
            self.output_dir,
            end,
            rows=read_metrics(self.output_dir / "metrics.jsonl"),
            evaluations=self.evaluations,
            configuration=self.spec.configuration,
            logprob_gap_alarm=self.spec.logging.logprob_gap_alarm,
        )

    def _abandon(self) -> None:
        """Leave no process, no shared memory and no hidden cursor behind. Runs beside the trainer, whatever it is
        doing: nothing here waits for a thread of the trainer's own but the cursor, which is the last."""
        self.link.abandon()
        for index in range(BUFFERS):
            segment_path(self.spec.run_id, index).unlink(missing_ok=True)
        self.panel.stop()

    def close(self) -> None:
        """End the collector, wait for what is being saved, remove the segments, put the terminal back."""
        self.panel.stop()
        self.link.stop("the run has ended")
        self.closers.close()
        # Last: whoever has started the ranks ends all of them when one of them has ended with a status.
        self.ranks.end(encode(End(self.status)))
        self.interrupt.restore()
