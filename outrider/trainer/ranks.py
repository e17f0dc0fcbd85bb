"""The processes of a run, as one of them sees the others: who they are, and what they do together."""

import contextlib
import datetime
import fcntl
import functools
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from outrider.contract.errors import UserError
from outrider.contract.lifetime import die_with_parent
from outrider.trainer.heartbeat import Heartbeat, Hello, new_token
from outrider.trainer.layout import Seat
from outrider.trainer.meeting import Meeting
from outrider.weights.segment_server import address_towards, means_this_host, outward_address

#: Seconds for a collective of a step: whoever is not there by then is not coming. A rank that dies closes its
#: connections, which the others notice at once; the heartbeat notices hosts that vanish.
COLLECTIVE = 600.0
#: Seconds that rank 0 may have nothing to say: it waits for rollouts, or for servers to come up.
ORDER = 48 * 3600.0
#: Seconds for the heartbeat to say who is gone, where something else has noticed first.
VERDICT = 10.0
#: Seconds between two looks for what another rank is to leave in the store.
LOOK = 0.02

_SIOCGIFADDR = 0x8915


def lost_connection(error: Exception) -> str | None:
    """What a collective says whose peer is gone, in a line; None for any other error. Gloo has no type for it."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    kinds = dist.DistNetworkError, dist.DistStoreError
    if isinstance(error, kinds) or "gloo" in text or "remote process exited" in text:
        return text.splitlines()[0].rpartition("] ")[2]
    return None


class Ranks:
    """One process, or torchrun's: rank 0 leads, and the others do as they are told."""

    def __init__(
        self, shard_across_nodes: bool = True, shard_alone: bool = False, peers: int = 1, silence: float = 45.0
    ) -> None:
        """Join the group that torchrun has described in the environment, where there is one. shard_across_nodes: all
        ranks share one copy of the model; else each node has a copy. shard_alone: a single process has a mesh, too,
        as it needs for offloading; on a GPU it has one in any case, for its mixed precision. peers: ranks next to each
        other that compute every layer together; they divide the ranks of a node. silence: seconds after which a host
        of another node that answers nothing is gone. Raises UserError."""
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available()
        if on_gpu and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {self.rank} is process {self.local_rank} of its node, which shows {torch.cuda.device_count()} "
                "GPUs: give each process its own (NPROC_PER_NODE, CUDA_VISIBLE_DEVICES)"
            )
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
            if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & {*os.environ}:
                # Micro-batches differ in size: blocks of fixed size would leave a tenth of the memory in pieces.
                torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        #: Whether the other ranks wait for an order, and are not in the middle of something, or gone.
        self.listening = self.size > 1
        self._device = "cuda" if on_gpu else "cpu"
        #: Ranks that compute every layer together, from the same micro-batches, and which of them this one is.
        self.peers, self.peer = peers, self.rank % peers
        #: How many micro-batches are computed at a time, and which of them this rank computes.
        self.data_size, self.data_rank = self.size // peers, self.rank // peers
        self._orders: Any = None
        #: Ranks that share one copy of the model; with several copies, the first ranks have the first one.
        self.shards = self.size
        if not shard_across_nodes:
            self.shards = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._heartbeat: Heartbeat | None = None
        if self.size > 1:
            die_with_parent(signal.SIGTERM)
            try:
                with _ended_by_signals():
                    self._join(silence)
            except UserError as error:
                self.fail(error)
                raise
        elif shard_alone or on_gpu:
            dist.init_process_group(_backend(on_gpu), store=dist.HashStore(), rank=0, world_size=1)

    def _join(self, silence: float) -> None:
        patience = datetime.timedelta(seconds=COLLECTIVE)
        if self.several_nodes and (interface := _interface_towards(os.environ["MASTER_ADDR"])):
            # Gloo takes the address of the host's name, which is often 127.0.1.1.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        try:
            if self.several_nodes:
                self._meet(silence)
            dist.init_process_group(_backend(self._device == "cuda"), timeout=patience)
            self._orders = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=ORDER))
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank} on node {self.node} could not join the others: {str(error).splitlines()[0]}"
            ) from error

    def _meet(self, silence: float) -> None:
        """Notice from now on when a rank on another node is gone, and wait until all are there."""
        address, host = os.environ["MASTER_ADDR"], socket.gethostname()
        meeting = Meeting(self.rank, int(os.environ["LOCAL_WORLD_SIZE"]))
        if self.leads:
            token = new_token()
            self._heartbeat = Heartbeat(Hello(token, 0, self.node, host), silence)
            meeting.store.set("heartbeat", f"{self._heartbeat.listen(address)} {token}")
        else:
            meeting.wait_for_first()
            port, token = meeting.store.get("heartbeat").decode().split()
            self._heartbeat = Heartbeat(Hello(token, self.rank, self.node, host), silence)
            self._heartbeat.connect(address, int(port))
        meeting.come()
        meeting.wait_for_all(self.size)

    @functools.cached_property
    def mesh(self) -> DeviceMesh | None:
        """Of ranks that share what they have: one dimension, or copies x ranks; None where there is nobody to share
        with. All ranks make it together when they lay out the model, and no earlier: ranks that were told to share
        differently would wait for each other without end, and have to compare what they were told first. Raises
        UserError where nodes have not as many processes each."""
        if self.size % self.shards:
            raise UserError(
                f"--shard_across_nodes false: {self.size} processes are not {self.shards} on each node; give every "
                "node as many (NPROC_PER_NODE)"
            )
        return self._mesh(ranks=self.shards) if dist.is_initialized() else None

    @functools.cached_property
    def peer_mesh(self) -> DeviceMesh | None:
        """The same ranks as shards x peers, or copies x shards x peers; None without peers."""
        return self._mesh(shards=self.shards // self.peers, peers=self.peers) if self.peers > 1 else None

    def _mesh(self, **sizes: int) -> DeviceMesh:
        """Of all ranks, where ``sizes`` by name are the dimensions of one copy of the model."""
        if (copies := self.size // self.shards) > 1:
            sizes = {"copies": copies} | sizes
        return init_device_mesh(self._device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    @property
    def several_nodes(self) -> bool:
        """Whether there are ranks elsewhere; those of one node are watched by whoever has started them."""
        return self.size > int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    @property
    def nodes(self) -> int:
        """How many there are."""
        return int(os.environ.get("GROUP_WORLD_SIZE", "1"))

    @property
    def publishing_nodes(self) -> int:
        """How many of them, the first ones, have rows of the copy of the model that is published."""
        return -(-self.shards // (self.size // self.nodes))

    def heed(self, stop: Callable[[], None], last_words: Callable[[], None]) -> None:
        """stop: what to do when another node is told to stop. last_words: before this process ends, since another rank
        is gone."""
        if self._heartbeat is not None:
            self._heartbeat.stop, self._heartbeat.last_words = stop, last_words

    def ask_to_stop(self) -> None:
        """This node is told to stop: rank 0 is asked to end the run in order. On one node whoever has told this rank
        has told rank 0 as well."""
        if self._heartbeat is not None:
            self._heartbeat.ask_to_stop()

    def await_verdict(self) -> None:
        """Somebody is gone: give the heartbeat the time to say who, and to end this process."""
        if self._heartbeat is not None:
            self._heartbeat.wait(VERDICT)

    def fail(self, error: Exception) -> None:
        """This rank ends because of an error, which the others are told."""
        if self._heartbeat is not None:
            self._heartbeat.leave((str(error).splitlines() or [type(error).__name__])[0])

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def in_first_copy(self) -> bool:
        """Whether this rank's rows are of the copy of the model that is published and saved."""
        return self.rank < self.shards

    def seat(self, rank: int | None = None) -> Seat:
        """Where a rank stands among those of its copy of the model; this one, unless another is asked for."""
        return Seat((self.rank if rank is None else rank) % self.shards, self.shards, self.peers)

    @contextlib.contextmanager
    def together(self, order: bytes) -> Iterator[None]:
        """Rank 0 tells the others to do something, and does it as well. Where that fails here, they hang in it: they
        are told nothing more, and whoever has started them ends them when this process has gone."""
        told, self.listening = self.listening, False
        if told:
            self._tell(order)
        yield
        self.listening = told

    def end(self, order: bytes) -> None:
        """The last thing that rank 0 tells, to whoever is still there."""
        told, self.listening = self.listening, False
        if told:
            with contextlib.suppress(RuntimeError):  # somebody is gone, and then all of them will be
                self._tell(order)
                if self._heartbeat is not None:
                    self._heartbeat.leave()

    def _tell(self, message: bytes) -> None:
        dist.broadcast(torch.tensor([len(message)]), 0, group=self._orders)
        dist.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0, group=self._orders)

    def hear(self) -> bytes:
        """What rank 0 tells."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0, group=self._orders)
        message = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(message, 0, group=self._orders)
        return message.numpy().tobytes()

    def gather(self, message: bytes) -> list[bytes]:
        """What each rank has to say, on all of them."""
        if self.size == 1:
            return [message]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, message, group=self._orders)
        return found

    def sum(self, values: Tensor, counts: bool) -> Tensor:
        """Elementwise over ranks, in place. counts: whether this rank's are added; another one may have the same."""
        if not counts:
            values.zero_()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def put(self, name: str, value: str) -> None:
        """Leave something where :meth:`take` finds it, from any thread."""
        dist.distributed_c10d._get_default_store().set(name, value)

    def take(self, name: str) -> str:
        """What a rank has put there, waiting for it; it is gone then. Raises RuntimeError after a while."""
        value = self.see(name)
        dist.distributed_c10d._get_default_store().delete_key(name)
        return value

    def has(self, name: str) -> bool:
        """Whether something is there for :meth:`take`."""
        return dist.distributed_c10d._get_default_store().check([name])

    def see(self, name: str) -> str:
        """What a rank has put there for several to see, looking for it: whoever waits in the store keeps the other
        threads of its process from it, among them one that is to join the others in a collective."""
        until = time.monotonic() + COLLECTIVE
        while not self.has(name):
            if time.monotonic() > until:
                raise RuntimeError(f"rank {self.rank}: nobody has left {name!r} within {COLLECTIVE:g} s")
            time.sleep(LOOK)
        return bytes(dist.distributed_c10d._get_default_store().get(name)).decode()

    def close(self) -> None:
        """Leave the group."""
        if self._heartbeat is not None:
            self._heartbeat.leave()
        if dist.is_initialized():
            dist.destroy_process_group()


def _backend(on_gpu: bool) -> str:
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Python's own handlers would only be heard when a call of torch returns."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interface_towards(host: str) -> str | None:
    """The network interface from which ``host`` is reached; None where that cannot be said (it has no IPv4)."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        # A host's own name often is 127.0.1.1 there, and its address elsewhere.
        address = socket.inet_aton(address_towards(host) if means_this_host(host) else outward_address(host))
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                found = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if found[20:24] == address:
                    return name
    return None
