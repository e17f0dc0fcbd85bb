import io

import pytest
from rich.console import Console

from outrider.observe.rollouts import pick_rollouts, render_rollouts, staleness
from tests.observe.build import make_rollout


def text_of(rows: list, **options: int) -> str:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(render_rollouts(rows, **options))
    return console.export_text()


def test_best_worst_and_random_are_different_rollouts() -> None:
    rows = [make_rollout(index, index / 10) for index in range(10)]
    picked = pick_rollouts(rows, best=2, worst=2, random=3, seed=0)
    assert [(kind, row.index) for kind, row in picked[:4]] == [("best", 9), ("best", 8), ("worst", 0), ("worst", 1)]
    assert [kind for kind, _ in picked[4:]] == ["random"] * 3
    assert len({row.index for _, row in picked}) == 7
    assert picked == pick_rollouts(rows, best=2, worst=2, random=3, seed=0)


def test_the_seed_chooses_the_random_ones() -> None:
    rows = [make_rollout(index, 0.5) for index in range(100)]
    draws = [tuple(row.index for _, row in pick_rollouts(rows, best=0, worst=0, random=3, seed=s)) for s in range(5)]
    assert len(set(draws)) == 5


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_rollouts_than_asked_for(count: int) -> None:
    rows = [make_rollout(index, float(index)) for index in range(count)]
    assert len(pick_rollouts(rows, best=2, worst=2, random=2, seed=0)) == count
    assert f"{count} rollout" in text_of(rows)


def test_a_rollout_without_a_reward_is_never_best() -> None:
    rows = [make_rollout(0, None), make_rollout(1, float("nan")), make_rollout(2, -1.0)]
    assert [row.index for _, row in pick_rollouts(rows, best=1, worst=0, random=0, seed=0)] == [2]


def test_staleness_is_that_of_the_oldest_token() -> None:
    assert staleness(make_rollout(0, 1.0)) == 2  # step 5 trains version 4; the oldest token is of version 2
    assert staleness(make_rollout(0, 1.0, step=None)) is None
    assert staleness(make_rollout(0, 1.0, versions=[])) is None


def test_everything_is_printed_as_it_is() -> None:
    row = make_rollout(
        3,
        0.75,
        prompt="What is [bold]2 + 2[/bold]?",
        completion="a [/] b\n\tfour",
        rewards={"accuracy": 1.0, "judge": None},
    )
    text = text_of([row])
    for expected in (
        "group 7, rollout 3", "What is [bold]2 + 2[/bold]?", "a [/] b", "four", "0.750", "accuracy 1.000", "judge none",
        "0.500", "12, ended by stop", "2 ×4, 3 ×8; staleness 2", "http://127.0.0.1:8000",
    ):  # fmt: skip
        assert expected in text
    assert "state" not in text
    assert "dropped: too old" in text_of([make_rollout(0, 1.0, state="dropped", reason="too old", step=None)])


def test_sampled_control_characters_do_not_reach_the_terminal() -> None:
    text = text_of([make_rollout(0, 1.0, completion="a\x1b[2Jb\x9bc\x07")])
    assert "a␛[2Jb\N{REPLACEMENT CHARACTER}c␇" in text
