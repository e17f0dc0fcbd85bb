"""How many processes a run has and where this one stands among them, from the environment. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from outrider.cli.gpus import visible_gpus
from outrider.contract.errors import UserError

#: torchrun's port where none is given.
MASTER_PORT = 29500


@dataclass(frozen=True)
class Placement:
    """launches: this process is to start ``processes`` ranks on this node, number ``node`` of ``nodes``; otherwise it
    is one of so many. address, port: where rank 0 is found, port 0 for any that is free. why: there are so many, in
    words."""

    world_size: int
    launches: bool = False
    nodes: int = 1
    node: int = 0
    processes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    why: str = field(default="", compare=False)

    def data_size(self, tensor_parallel_size: int) -> int:
        """How many micro-batches are computed at a time, by so many processes each. UserError where those would not be
        on one node."""
        if self.processes % tensor_parallel_size:
            near = self.processes - self.processes % tensor_parallel_size
            fewer = f"{near} or " if near else ""
            raise UserError(
                f"--tensor_parallel_size {tensor_parallel_size}: a node has {self.processes} processes, which it does "
                f"not divide, and those that compute layers together are on one node; start {fewer}"
                f"{near + tensor_parallel_size} on each (NPROC_PER_NODE), or give a divisor of their number"
            )
        return self.world_size // tensor_parallel_size


def find_placement(
    environment: Mapping[str, str], gpus: Callable[[Mapping[str, str]], int] = visible_gpus
) -> Placement:
    """From NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR and MASTER_PORT, or what torchrun has made of them. Without
    NPROC_PER_NODE a node has one process for each GPU that it shows, and one without GPUs. UserError where they are
    wrong."""
    if "WORLD_SIZE" in environment and "LOCAL_RANK" in environment:  # torchrun has started this one
        total = _count(environment, "WORLD_SIZE")
        here = _count(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else total
        return Placement(total, processes=here, why="torchrun has started them")
    nodes, asked = _count(environment, "NNODES"), _count(environment, "NPROC_PER_NODE")
    if nodes * asked == 1 and _count(environment, "WORLD_SIZE") > 1:
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} and LOCAL_RANK is not set, so torchrun has not started this "
            "process: set NNODES, NODE_RANK and NPROC_PER_NODE instead (clusters that set WORLD_SIZE and RANK mean "
            "nodes by them)"
        )
    if "NPROC_PER_NODE" in environment:
        processes, why = asked, f"NPROC_PER_NODE={asked}"
    else:
        shown = gpus(environment)
        processes, why = max(shown, 1), f"GPUs shown here: {shown}; NPROC_PER_NODE says otherwise"
    node = _node(environment, nodes)
    if nodes * processes == 1:
        return Placement(1, why=why)
    address = environment.get("MASTER_ADDR", "")
    if nodes > 1 and not address:
        raise UserError(
            f"NNODES={nodes} and MASTER_ADDR is not set: set it on all nodes to the address of the one with NODE_RANK=0"
        )
    port = _port(environment) if nodes > 1 or "MASTER_PORT" in environment else 0
    return Placement(nodes * processes, True, nodes, node, processes, address or "127.0.0.1", port, why)


def _node(environment: Mapping[str, str], nodes: int) -> int:
    text = environment.get("NODE_RANK")
    if text is None:
        if nodes == 1:
            return 0
        raise UserError(f"NNODES={nodes} and NODE_RANK is not set: give each node its own, from 0 to {nodes - 1}")
    if not text.isdecimal() or int(text) >= nodes:
        known = f"NNODES={nodes}" if "NNODES" in environment else "NNODES is not set: set it on all nodes"
        raise UserError(f"NODE_RANK={text}: expected a whole number from 0 to {nodes - 1}, since {known}")
    return int(text)


def _port(environment: Mapping[str, str]) -> int:
    text = environment.get("MASTER_PORT", str(MASTER_PORT))
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"MASTER_PORT={text}: expected a port, from 1 to 65535")
    return int(text)


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={text}: expected a whole number of at least 1")
    return int(text)
