import math

import pytest

from outrider.observe.parts import BESIDE, SERVERS, TRAINER, one_a_batch, sampling_rate, shares, totals
from outrider.observe.records import StepRecord
from tests.observe.build import make_step


def test_the_parts_of_either_side_add_up_to_its_wall_clock() -> None:
    rows = [make_step(step, reward_wait_seconds=0.1 * step) for step in range(1, 6)]
    assert sum(totals(rows, TRAINER).values()) == pytest.approx(sum(row.seconds for row in rows))
    assert sum(totals(rows, SERVERS).values()) == pytest.approx(sum(row.batch_seconds for row in rows))
    assert sum(shares(rows, TRAINER).values()) == pytest.approx(1.0)


def test_every_length_of_time_of_a_row_has_its_place() -> None:
    zero = dict.fromkeys((name for name in StepRecord.__struct_fields__ if name.endswith("_seconds")), 0.0)
    before = {**zero, "generation_idle_seconds": 2.0}
    for name in zero.keys() - {"batch_seconds"}:
        rows = [make_step(1, **before), make_step(1, **{**before, name: 1.0})]
        without, having = ([totals([row], parts) for parts in (TRAINER, SERVERS, BESIDE)] for row in rows)
        assert without != having, name


def test_waiting_for_rewards_is_a_part_of_being_idle() -> None:
    found = totals([make_step(1, generation_idle_seconds=0.5, reward_wait_seconds=0.2)], SERVERS)
    assert (found["idle"], found["wait for rewards"]) == (pytest.approx(0.3), 0.2)
    # Half of the servers are down, and the others have nothing to do but to wait for rewards.
    found = totals([make_step(1, generation_idle_seconds=0.5, reward_wait_seconds=1.0)], SERVERS)
    assert (found["idle"], found["wait for rewards"]) == (0.0, 0.5)


def test_what_is_no_length_of_time_counts_as_nothing(weird_step: StepRecord) -> None:
    for parts in (TRAINER, SERVERS, BESIDE):
        assert all(0 <= seconds < 1e10 for seconds in totals([weird_step], parts).values())
    assert all(math.isnan(share) for share in shares([], TRAINER).values())


def test_what_is_said_of_a_batch_is_added_up_once() -> None:
    rows = [make_step(step, version=(step - 1) // 4, batch_seconds=2.0) for step in range(1, 11)]
    assert [row.version for row in one_a_batch(rows)] == [0, 1, 2]
    assert sum(totals(one_a_batch(rows), SERVERS).values()) == pytest.approx(6.0)


def test_the_sampling_rate_is_of_all_batches_together() -> None:
    # The second of two batches that leave together has no tokens of its own; the third has two steps.
    rows = [
        make_step(1, version=0, tokens_per_second=300.0, batch_seconds=2.0),
        make_step(2, version=1, tokens_per_second=0.0, batch_seconds=0.001),
        make_step(3, version=2, tokens_per_second=90.0, batch_seconds=4.0),
        make_step(4, version=2, tokens_per_second=90.0, batch_seconds=4.0),
    ]
    assert sampling_rate(rows) == pytest.approx(960 / 6.001)
    assert math.isnan(sampling_rate([]))
