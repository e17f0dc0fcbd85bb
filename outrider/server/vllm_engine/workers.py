"""All workers of all data-parallel engines, seen from the HTTP application: they are told something together, and every
one of them is heard."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from vllm.v1.engine.exceptions import EngineDeadError

from outrider.contract.errors import UserError
from outrider.contract.manifest import DTypeName
from outrider.server.engine import Unavailable
from outrider.server.vllm_engine.differences import engines_and_ranks, external_id
from outrider.server.vllm_engine.messages import (
    AnyReport,
    CommitReport,
    PrepareOrder,
    PrepareReport,
    ProgressReport,
    Report,
    StageReport,
    all_reports,
)
from outrider.server.vllm_engine.settings import Staging, VllmSettings

#: Seconds for the workers to make room for a second set of weights, to copy a version, and to switch to it.
PREPARE_DEADLINE = 600.0
STAGE_DEADLINE = 600.0
COMMIT_DEADLINE = 60.0


class Workers:
    """Every method raises TimeoutError where some do not answer, and Unavailable when an engine is gone."""

    def __init__(self, client: Any, settings: VllmSettings) -> None:
        """client: vLLM's ``EngineClient``."""
        self._client, self._settings = client, settings
        self.directory = Path(settings.directory)
        self._orders = itertools.count(1)

    def next_order(self) -> int:
        """The number of an order that is to be given."""
        return next(self._orders)

    async def prepare(self, staging: Staging, dtype: DTypeName, shapes: dict[str, tuple[int, ...]]) -> None:
        """Have them make room for a second set of weights. Raises UserError."""
        order = PrepareOrder(self.next_order(), staging == "host", dtype, shapes)
        await self._call("outrider_prepare", PREPARE_DEADLINE, str(self.directory), msgspec.json.encode(order).decode())
        reports = await self._reports("prepare", order.number, PREPARE_DEADLINE, PrepareReport)
        for report in reports:
            if report.error is not None:
                raise UserError(f"this model cannot take weights while it runs: {report.error}")
        self._check_number(reports)

    def _check_number(self, reports: list[PrepareReport]) -> None:
        """Raises UserError where there are other workers than those whose reports are waited for: a version would
        count as staged, or committed, that some do not have."""
        engines, workers = self._settings.engines, self._settings.workers
        found, _ = engines_and_ranks(self._client.vllm_config)
        for report in reports:
            if (found, report.ranks) != (engines, workers // engines):
                raise UserError(
                    f"vLLM runs {found} engine(s) of {report.ranks} worker(s), --data_parallel_size and "
                    f"--tensor_parallel_size are for {engines} of {workers // engines}: take what makes others out of "
                    "--engine_kwargs"
                )

    async def progress(self) -> dict[str, int]:
        """How many tokens have been sampled of each request that runs. Raises UserError where they cannot say."""
        number = self.next_order()
        await self._call("outrider_progress", COMMIT_DEADLINE, number)
        reports = await self._reports("progress", number, COMMIT_DEADLINE, ProgressReport)
        for report in reports:
            if report.error is not None:
                raise UserError(f"engine {report.engine}, rank {report.rank}: {report.error}")
        return tokens_sampled(reports)

    async def stage(self, path: Path, number: int) -> list[StageReport]:
        """Have them copy what the order in ``path`` says; how it went for each."""
        await self._call("outrider_stage", COMMIT_DEADLINE, str(path))
        return await self._reports("stage", number, STAGE_DEADLINE, StageReport)

    async def commit(self, number: int, version: int) -> list[CommitReport]:
        """Have them switch to the staged version; how it went for each."""
        await self._call("outrider_commit", COMMIT_DEADLINE, number, version)
        return await self._reports("commit", number, COMMIT_DEADLINE, CommitReport)

    async def seconds_of_switch(self, number: int) -> float:
        """How long the slowest of them stood still for a commit."""
        switched = await self._reports("switched", number, COMMIT_DEADLINE, Report)
        return max(report.seconds for report in switched)

    async def _call(self, method: str, deadline: float, *arguments: object) -> None:
        try:
            async with asyncio.timeout(deadline):
                await self._client.collective_rpc(method, args=arguments)
        except EngineDeadError as error:
            raise Unavailable("vLLM's engine has stopped; its log says why") from error

    async def _reports(self, kind: str, number: int, deadline: float, type: type[AnyReport]) -> list[AnyReport]:
        return await all_reports(self.directory, kind, number, self._settings.workers, deadline, type)


def tokens_sampled(reports: Sequence[ProgressReport]) -> dict[str, int]:
    """By the ids under which requests were submitted."""
    return {external_id(id): count for report in reports for id, count in (report.progress or {}).items()}
