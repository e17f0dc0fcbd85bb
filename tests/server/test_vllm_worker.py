"""What workers report of a vLLM that is another one than was thought. Nothing here needs vLLM."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import pytest

from outrider.contract.errors import UserError
from outrider.server.vllm_engine.differences import needed
from outrider.server.vllm_engine.messages import PrepareOrder, PrepareReport, ProgressReport
from outrider.server.vllm_engine.worker import OutriderWorker


class Worker(OutriderWorker):
    """As far as it is known to the extension at first."""

    def __init__(self, **config: object) -> None:
        parallel = SimpleNamespace(data_parallel_index=0, data_parallel_size=1, world_size=1)
        self.rank, self.vllm_config = 0, SimpleNamespace(parallel_config=parallel, **config)


@pytest.fixture(autouse=True)
def _another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ModuleType("vllm")
    vllm.__version__ = "0.99.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)


def prepared(worker: Worker, directory: Path) -> PrepareReport:
    """Its report."""
    order = msgspec.json.encode(PrepareOrder(1, False, "float32", {})).decode()
    worker.outrider_prepare(str(directory), order)
    return msgspec.json.decode((directory / "prepare-0-0.report").read_bytes(), type=PrepareReport)


def test_what_it_lacks_is_named_with_the_versions_that_were_tried(tmp_path: Path) -> None:
    error = prepared(Worker(), tmp_path).error or ""
    assert "vLLM 0.99.1 cannot be used: AttributeError: 'Worker' object has no attribute 'model_runner'" in error
    assert "0.24.0 to 0.32.0" in error


def test_so_it_is_when_not_even_its_engine_is_known(tmp_path: Path) -> None:
    worker = Worker()
    del worker.vllm_config
    with pytest.raises(UserError, match=r"0\.99\.1 .* 'vllm_config'"):
        prepared(worker, tmp_path)


def test_so_it_is_when_progress_is_not_to_be_had(tmp_path: Path) -> None:
    worker = Worker()
    prepared(worker, tmp_path)
    worker.model_runner = SimpleNamespace()
    worker.outrider_progress(2)
    report = msgspec.json.decode((tmp_path / "progress-0-0.report").read_bytes(), type=ProgressReport)
    assert (report.number, report.progress) == (2, None)
    assert "0.99.1 cannot be used: AttributeError: " in (report.error or "")


def test_several_tokens_a_step_are_reported(tmp_path: Path) -> None:
    report = prepared(Worker(speculative_config=object()), tmp_path)
    assert "speculative_config is set" in (report.error or "")
    assert report.ranks == 1


def test_other_failures_are_what_they_are() -> None:
    with pytest.raises(OSError, match="full"), needed():
        raise OSError("full")
