import pytest

from outrider.cli.placement import Placement, find_placement
from outrider.contract.errors import UserError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Placement(1)),
        ({"NNODES": "1", "NPROC_PER_NODE": "1"}, Placement(1)),
        ({"WORLD_SIZE": "16", "RANK": "3", "LOCAL_RANK": "3", "NNODES": "2", "NPROC_PER_NODE": "8"}, Placement(16)),
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
    assert find_placement(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 and LOCAL_RANK is not set, so torchrun has not"),
        ({"NNODES": "two"}, "NNODES=two: expected a whole number"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: expected a whole number of at least 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is not set: give each node its own, from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2: expected a whole number from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "a"}, "NODE_RANK=-1: expected"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT=x: expected a port"),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_placement(environment)
