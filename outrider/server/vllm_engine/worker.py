"""The extension of vLLM's workers: prepare, progress, stage, commit. Mixed into the worker class by
``--worker-extension-cls``.

Every method returns at once or after a commit, so that steps go on; what came of it is in the worker's report.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from outrider.contract.garbage import search_less_often
from outrider.server.vllm_engine.differences import check_steps, engine_index, engines_and_ranks, needed, sampled_tokens
from outrider.server.vllm_engine.messages import (
    CommitReport,
    PrepareOrder,
    PrepareReport,
    ProgressReport,
    Report,
    StageOrder,
    StageReport,
    read_order,
    write_report,
)
from outrider.server.vllm_engine.staging import Shadow


class OutriderWorker:
    """Methods that the front calls by collective RPC. Their names and attributes all begin alike: they live in vLLM's
    own class."""

    def outrider_prepare(self, directory: str, order: str) -> None:
        """Make room for a second set of weights, as ``order`` says, in JSON. Called before there are requests."""
        search_less_often()
        self._outrider = _Member(self, Path(directory))
        self._outrider.prepare(msgspec.json.decode(order, type=PrepareOrder))

    def outrider_progress(self, number: int) -> None:
        """Say how far requests have got."""
        self._outrider.tell_progress(number)

    def outrider_stage(self, path: str) -> None:
        """Begin to copy the version of the order in ``path``."""
        self._outrider.stage(read_order(Path(path)))

    def outrider_commit(self, number: int, version: int) -> None:
        """Switch to the staged version."""
        self._outrider.commit(number, version)


class _Member:
    """What a worker keeps between the calls."""

    def __init__(self, worker: Any, directory: Path) -> None:
        self.worker, self.directory = worker, directory
        self.shadow: Shadow | None = None
        self.staged: int | None = None
        self._latest = 0
        self._loading = threading.Lock()

    @property
    def who(self) -> tuple[int, int]:
        """Engine and rank."""
        return engine_index(self.worker), self.worker.rank

    def prepare(self, order: PrepareOrder) -> None:
        with needed():
            engine, rank = self.who
        report = PrepareReport(number=order.number, engine=engine, rank=rank)

        def make() -> None:
            with needed():
                _, report.ranks = engines_and_ranks(self.worker.vllm_config)
                check_steps(self.worker.vllm_config)
                self.shadow = Shadow(self.worker, order.host, getattr(torch, order.dtype), order.shapes)

        self.report("prepare", report, make)

    def tell_progress(self, number: int) -> None:
        engine, rank = self.who
        report = ProgressReport(number=number, engine=engine, rank=rank)

        def look() -> None:
            with needed():
                report.progress = sampled_tokens(self.worker.model_runner) if rank == 0 else None

        self.report("progress", report, look)

    def stage(self, order: StageOrder) -> None:
        self.staged, self._latest = None, order.number
        engine, rank = self.who
        report = StageReport(number=order.number, engine=engine, rank=rank)
        threading.Thread(
            target=self.report,
            args=("stage", report, lambda: self._load(order, report)),
            name="outrider-stage",
            daemon=True,
        ).start()

    def commit(self, number: int, version: int) -> None:
        """On a GPU the switch is only queued here, and takes its turn among the steps: how far requests have got is
        known, and is reported; how long it took is another report, when the GPU has come to it."""
        engine, rank = self.who
        report = CommitReport(number=number, engine=engine, rank=rank, began=time.monotonic())
        on_gpu = self.worker.device.type == "cuda"
        marks: list[torch.cuda.Event] = []

        def switch() -> None:
            if rank == 0:
                report.progress = sampled_tokens(self.worker.model_runner)
            if self.shadow is None or self.staged != version:
                raise RuntimeError(f"version {version} is to be committed, {self.staged} is staged")
            marks.extend(torch.cuda.Event(enable_timing=True) for _ in range(2 if on_gpu else 0))
            for mark in marks[:1]:
                mark.record()
            self.staged = None
            report.cleared = self.shadow.commit()
            for mark in marks[1:]:
                mark.record()

        self.report("commit", report, switch)
        switched = Report(number=number, engine=engine, rank=rank, seconds=report.seconds)
        if not on_gpu or report.error is not None:
            write_report(self.directory, "switched", switched)
            return

        def finish() -> None:
            torch.cuda.set_device(self.worker.device)
            marks[1].synchronize()
            switched.seconds = marks[0].elapsed_time(marks[1]) / 1000
            write_report(self.directory, "switched", switched)

        threading.Thread(target=finish, name="outrider-commit", daemon=True).start()

    def _load(self, order: StageOrder, report: StageReport) -> None:
        if self.worker.device.type == "cuda":
            torch.cuda.set_device(self.worker.device)
        with self._loading:  # one that nobody waits for any more may still be at it
            assert self.shadow is not None
            report.known_copies = self.shadow.load(order.tensors)
            if order.number == self._latest:
                self.staged = order.version

    def report(self, kind: str, report: Report, task: Callable[[], None]) -> None:
        """Do it, and say what came of it."""
        started = time.monotonic()
        report.error = self.attempt(task)
        report.seconds = time.monotonic() - started
        write_report(self.directory, kind, report)

    @staticmethod
    def attempt(task: Callable[[], None]) -> str | None:
        """Why it failed, or None."""
        try:
            task()
        except Exception as error:  # noqa: BLE001 - whoever gave the order must hear it, and vLLM must not end of it
            return f"{type(error).__name__}: {error}"
        return None
