import sys
from pathlib import Path

import msgspec
import pytest

from outrider.contract.errors import UserError
from outrider.observe.config import LoggingConfig
from outrider.observe.records import MetricsRow, StepRecord
from outrider.observe.reporters import Reporters, make_reporters, named_metrics
from outrider.observe.secrets import without_secrets
from tests.observe.build import make_evaluation, make_step


def test_names_are_grouped_and_no_field_is_forgotten() -> None:
    metrics = named_metrics(make_step(3, rewards={"accuracy": 0.5, "format": 0.25}))
    assert metrics["train/reward"] == pytest.approx(0.15)
    assert metrics["train/rewards/format"] == 0.25
    assert metrics["rollouts/staleness_max"] == 1
    assert metrics["perf/tokens_per_second"] == 6000
    left_out = {"step", "max_steps", "time", "rewards"}
    assert {name.split("/")[1] for name in metrics} - {"rewards"} == set(StepRecord.__struct_fields__) - left_out
    assert named_metrics(make_evaluation(2))["eval/reward"] == pytest.approx(0.2)
    assert {name.split("/")[0] for name in named_metrics(make_evaluation(2))} == {"eval"}


def test_tensorboard_files_hold_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(report_to=("tensorboard",))
    reporters = make_reporters(config, tmp_path, {"model": "m", "path": tmp_path}, pytest.fail)
    for row in (make_step(1), make_evaluation(1), make_step(2)):
        reporters.log(row)
    reporters.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [
        (1, pytest.approx(0.05)), (2, pytest.approx(0.1))
    ]  # fmt: skip
    assert [event.step for event in events.Scalars("eval/reward")] == [1]


@pytest.mark.parametrize("service", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_a_user_error(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if service == "tensorboard" else service, None)
    config = msgspec.convert({"report_to": [service]}, LoggingConfig)
    with pytest.raises(UserError, match=rf"--report_to {service}.*pip install 'outrider\[{service}\]'"):
        make_reporters(config, tmp_path, {}, pytest.fail)


def test_none_reports_to_nobody(tmp_path: Path) -> None:
    reporters = make_reporters(LoggingConfig(), tmp_path, {}, pytest.fail)
    reporters.log(make_step(1))
    reporters.close()
    assert list(tmp_path.iterdir()) == []


class Remembering:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, row: MetricsRow) -> None:
        self.steps.append(row.step)

    def close(self) -> None:
        self.steps.append(-1)


class Failing(Remembering):
    def log(self, row: MetricsRow) -> None:
        super().log(row)
        raise ConnectionError("no route to host")


def test_a_failing_service_is_given_up_with_one_warning() -> None:
    good, bad, warnings = Remembering(), Failing(), list[str]()
    reporters = Reporters({"bad": bad, "good": good}, warnings.append)
    for step in (1, 2, 3):
        reporters.log(make_step(step))
    reporters.close()
    assert good.steps == [1, 2, 3, -1]
    assert bad.steps == [1]
    assert len(warnings) == 1
    assert "bad is given up for this run: ConnectionError: no route to host" in warnings[0]


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Remembering):
        def log(self, row: MetricsRow) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reporters({"x": Interrupted()}, pytest.fail).log(make_step(1))


def test_secrets_are_hidden_wherever_they_stand(tmp_path: Path) -> None:
    shown = without_secrets(
        {
            "servers": {"vllm_server_api_key": "k", "host": "h"},
            "OTHER_API_KEY": None,
            "stop_token_ids": (1,),
            "p": tmp_path,
        }
    )
    assert shown == {
        "servers": {"vllm_server_api_key": "(hidden)", "host": "h"},
        "OTHER_API_KEY": None,
        "stop_token_ids": [1],
        "p": str(tmp_path),
    }
