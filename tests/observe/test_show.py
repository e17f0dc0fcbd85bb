from pathlib import Path

import pytest

from outrider.cli.show import choose_step, describe_run, main
from outrider.contract.errors import UserError
from tests.observe.build import make_evaluation, make_step


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run: it has no ledger\.sqlite"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere is no directory"):
        main([str(tmp_path / "nowhere")])


def test_the_newest_step_is_the_default() -> None:
    assert choose_step(Path("run"), [1, 2, 5], None) == 5
    assert choose_step(Path("run"), [1, 2, 5], 2) == 2


def test_a_step_that_is_not_there() -> None:
    with pytest.raises(UserError, match="steps 1 to 5; the nearest is --step 5"):
        choose_step(Path("run"), [1, 2, 5], 9)
    with pytest.raises(UserError, match="has not trained a step yet"):
        choose_step(Path("run"), [], None)


def test_the_summary() -> None:
    text = describe_run([make_evaluation(0), make_step(1), make_step(5), make_evaluation(5)])
    assert text == (
        "5 of 10 steps in 10 s. Training reward 0.050 at step 1, 0.250 at step 5. "
        "Held-out reward 0.350 after step 5, 0.100 after step 0."
    )
    assert describe_run([make_evaluation(0)]) == "No step has been trained yet."


@pytest.mark.parametrize("arguments", [[], ["run", "--best", "-1"], ["run", "--step", "x"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "outrider show" in capsys.readouterr().err
