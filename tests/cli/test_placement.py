import pytest

import outrider.cli.launch
from outrider.cli.gpus import count_visible
from outrider.cli.launch import check_gpus
from outrider.cli.placement import Placement, find_placement
from outrider.contract.errors import UserError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Placement(1)),
        ({"NNODES": "1", "NPROC_PER_NODE": "1"}, Placement(1)),
        (
            {
                "WORLD_SIZE": "16",
                "RANK": "3",
                "LOCAL_RANK": "3",
                "NNODES": "2",
                "NPROC_PER_NODE": "8",
                "LOCAL_WORLD_SIZE": "8",
            },
            Placement(16, processes=8),
        ),
        # A cluster that counts nodes by the same names.
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "1",
                "NNODES": "2",
                "NODE_RANK": "1",
                "NPROC_PER_NODE": "8",
                "MASTER_ADDR": "a",
            },
            Placement(16, True, 2, 1, 8, "a", 29500),
        ),
        ({"NPROC_PER_NODE": "4"}, Placement(4, True, 1, 0, 4, "127.0.0.1", 0)),
        ({"NPROC_PER_NODE": "4", "MASTER_PORT": "4000"}, Placement(4, True, 1, 0, 4, "127.0.0.1", 4000)),
        (
            {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "4000"},
            Placement(16, True, 2, 1, 8, "a", 4000),
        ),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, Placement(2, True, 2, 0, 1, "a", 29500)),
    ],
)
def test_placement(environment: dict[str, str], expected: Placement) -> None:
    assert find_placement(environment, lambda environment: 0) == expected


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 8, Placement(8, True, 1, 0, 8, "127.0.0.1", 0)),
        ({}, 1, Placement(1)),
        ({"NPROC_PER_NODE": "1"}, 8, Placement(1)),
        ({"NPROC_PER_NODE": "2"}, 8, Placement(2, True, 1, 0, 2, "127.0.0.1", 0)),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            8,
            Placement(16, True, 2, 1, 8, "a", 29500),
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, 8, Placement(2, processes=2)),
    ],
)
def test_one_process_for_each_gpu(environment: dict[str, str], gpus: int, expected: Placement) -> None:
    assert find_placement(environment, lambda environment: gpus) == expected


def test_gpus_are_looked_for_only_where_they_decide() -> None:
    def asked(environment: object) -> int:
        raise AssertionError

    assert find_placement({"NPROC_PER_NODE": "4"}, asked).why == "NPROC_PER_NODE=4"
    find_placement({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, asked)


@pytest.mark.parametrize(
    ("present", "named", "count"),
    [(8, None, 8), (8, "", 0), (8, "0,1", 2), (8, "3", 1), (8, "-1", 0), (8, "0,-1,1", 1), (2, "0,1,2,3", 2),
     (2, "0, 7", 1), (0, "0,1", 0), (8, "GPU-3a,GPU-3b", 2)],
)  # fmt: skip
def test_visible_gpus(present: int, named: str | None, count: int) -> None:
    assert count_visible(present, named) == count


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 and LOCAL_RANK is not set, so torchrun has not"),
        ({"NNODES": "two"}, "NNODES=two: expected a whole number"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: expected a whole number of at least 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is not set: give each node its own, from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2: expected a whole number from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "a"}, "NODE_RANK=-1: expected"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: expected a whole number from 0 to 0, since NNODES is not set: set it"),
        ({"NODE_RANK": "1", "NPROC_PER_NODE": "1"}, "since NNODES is not set"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT=x: expected a port"),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_placement(environment, lambda environment: 8)


@pytest.mark.parametrize(("shown", "fits"), [(0, True), (1, False), (4, True), (8, True)])
def test_processes_do_not_share_gpus(shown: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they do."""
    monkeypatch.setattr(outrider.cli.launch, "visible_gpus", lambda environment: shown)
    placement = find_placement({"NPROC_PER_NODE": "4"})
    if fits:
        check_gpus(placement)
    else:
        with pytest.raises(UserError, match=r"NPROC_PER_NODE=4: 1 GPUs are shown here, .* \(CUDA_VISIBLE_DEVICES\)"):
            check_gpus(placement)


def test_processes_that_compute_layers_together_are_on_one_node() -> None:
    two_nodes = find_placement({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, lambda environment: 6)
    assert [two_nodes.data_size(size) for size in (1, 2, 3, 6)] == [12, 6, 4, 2]
    message = r"--tensor_parallel_size 4: a node has 6 processes, .* start 4 or 8 on each \(NPROC_PER_NODE\)"
    with pytest.raises(UserError, match=message):
        two_nodes.data_size(4)
    with pytest.raises(UserError, match=r"a node has 1 processes, .* start 2 on each"):
        Placement(1).data_size(2)
