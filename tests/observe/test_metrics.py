import math
from pathlib import Path

import pytest

from outrider.contract.errors import UserError
from outrider.observe.metrics import MetricsWriter, evaluations_of, read_metrics, steps_of
from outrider.observe.records import MetricsRow
from tests.observe.build import make_evaluation, make_step


def write(path: Path, *rows: MetricsRow) -> None:
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [make_evaluation(0), make_step(1), make_step(2), make_evaluation(2)]
    write(tmp_path / "run" / "metrics.jsonl", *rows)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == rows


def test_a_row_is_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(make_step(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [make_step(1)]
    writer.close()


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer, open("/dev/full", "ab", buffering=0) as full:
        writer._file.close()
        writer._file = full
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device; free space th"):
            writer.write(make_step(1))


def test_values_that_are_not_finite_come_back_as_nan(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", make_step(1, loss=math.nan, grad_norm=math.inf, rewards={"a": math.nan}))
    (step,) = steps_of(read_metrics(tmp_path / "metrics.jsonl"))
    assert math.isnan(step.loss)
    assert math.isnan(step.grad_norm)
    assert math.isnan(step.rewards["a"])


def test_a_torn_last_line_is_left_out_and_cut_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_step(1), make_step(2))
    path.write_bytes(path.read_bytes()[:-40])
    assert read_metrics(path) == [make_step(1)]
    write(path, make_step(2, reward=0.9))
    assert read_metrics(path) == [make_step(1), make_step(2, reward=0.9)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_step(1))
    path.write_bytes(b'{"kind":"step"}\n' + path.read_bytes())
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        read_metrics(path)


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_of_a_resumed_run_the_later_rows_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_evaluation(0), make_step(1), make_step(2), make_evaluation(2), make_step(3))
    write(path, make_step(2, reward=0.8), make_step(3, reward=0.9), make_evaluation(2, reward=0.7))
    rows = read_metrics(path)
    assert [(row.step, row.reward) for row in steps_of(rows)] == [(1, 0.05), (2, 0.8), (3, 0.9)]
    assert [(row.step, row.reward) for row in evaluations_of(rows)] == [(0, 0.1), (2, 0.7)]


def test_steps_that_a_resumed_run_went_back_behind_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(make_step(step) for step in range(1, 9)), make_evaluation(8))
    write(path, make_step(4, reward=0.5))
    rows = read_metrics(path)
    assert [row.step for row in rows] == [1, 2, 3, 4]
    assert rows[-1].reward == 0.5


def test_a_late_evaluation_does_not_take_steps_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_step(1), make_step(2), make_step(3), make_evaluation(1))
    assert [row.step for row in read_metrics(path)] == [1, 2, 3, 1]
