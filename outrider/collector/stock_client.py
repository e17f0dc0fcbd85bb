"""A vLLM server that somebody started without us, seen from the collector: ``--weight_transport nccl``.

Weights go there by vLLM's own routes: pause, start, update while a process of ours broadcasts, finish, resume. Such a
server does not say which weights sampled a token, so a commit leaves no request half way: it closes the gate to new
ones, has vLLM end those that run (their tokens come back, and the pool continues them with the new weights) or waits
for them, and takes back those that vLLM has not begun. So every answer is of one version.
"""

import asyncio
import contextlib
import functools
import logging
import re
import time
from typing import Any

import msgspec

from outrider.collector.client import INFO_TIMEOUT, Refused, ServerClient, ServerLost
from outrider.collector.nccl_link import LinkFailed, NcclLink
from outrider.collector.stock_meeting import HOW, Paused, TrainerFacts, WeightInfo, WorldSize, decoded, meet
from outrider.contract import routes
from outrider.contract.control import Inflight, ServerInfo, WeightStatus
from outrider.contract.errors import UserError
from outrider.contract.generation import CompletionRequest
from outrider.contract.manifest import Manifest
from outrider.environments.base import Completion, logprob_array, token_array
from outrider.weights.nccl_orders import Connect, Load, Prepare, Send
from outrider.weights.reach import unreachable

log = logging.getLogger(__name__)

#: Seconds that each phase of an update may take. "wait" of --inflight lets rollouts end first. vLLM's workers try for
#: five minutes to join a group, and hear nothing else meanwhile.
PREPARE, CONNECT, LOAD, PAUSE, PAUSE_WAIT, START = 180.0, 330.0, 600.0, 60.0, 3600.0, 60.0
UPDATE, FINISH, RESUME = 600.0, 120.0, 60.0
#: Seconds for the end of an update that has failed: where workers wait for a sender that is gone, it does not come.
ABANDON = 20.0
#: How often a server is told to resume, if it does not, and seconds between two times.
RESUMPTIONS, AGAIN = 20, 0.25
#: Seconds for the answers of requests that a pause has ended. What comes later is not in vLLM's scheduler yet.
ANSWERS = 2.0
#: Bytes and number of the buffers in which tensors travel, said to both sides. The sender's are on the trainer's GPU.
BUFFER_BYTES, BUFFERS = 2**28, 2
#: Updates in a row that may fail before the run ends.
FAILURES = 5
#: The first version with these routes, and the one in which ``packed`` moved from an update's description to the
#: group's.
_OLDEST, _PACKED_AT_INIT = (0, 24), (0, 28)

_START_TIME = re.compile(rb"^process_start_time_seconds(?:\{.*\})? ([\d.e+]+)", re.MULTILINE)
#: Sampling parameters that vLLM takes from the model's generation_config.json where a request leaves them out.
_DEFAULTED = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip


class StockClient(ServerClient):
    """Speaks the server contract to the collector, and vLLM's own routes to the server."""

    probed = routes.MODELS
    keeps_connections = False  # vLLM closes them after an error, or when idle, and a POST on one would be lost

    def __init__(self, url: str, key: str, facts: TrainerFacts, address: str) -> None:
        """address: of this host, as the server reaches it."""
        super().__init__(url, key)
        self._facts, self._address = facts, address
        self._key, self._link = key, NcclLink(key)
        self._manifest: Manifest | None = None
        self._connected = False
        #: Version and run that the server holds; run "" when it holds none of ours.
        self._version, self._run_id = 0, ""
        #: What tells one life of the server from the next.
        self._life: bytes | None = None
        self._known: ServerInfo | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._running: set[asyncio.Task[list[Completion]]] = set()
        self._updating: asyncio.Task[float] | None = None
        self._failures = 0

    # ---- requests ----------------------------------------------------------------------------------------------

    async def complete(self, request: CompletionRequest, run_id: str) -> list[Completion]:
        """As :meth:`ServerClient.complete`; all tokens are of the version that the server holds when it is asked."""
        await self._open.wait()
        if run_id != self._run_id:
            raise Refused(409, f"{self.url} holds no weights of this run")
        asking = asyncio.create_task(self._complete(request, self._version))
        self._running.add(asking)
        try:
            await asyncio.wait({asking})
        finally:
            asking.cancel()
            self._running.discard(asking)
        if asking.cancelled():  # taken back by a commit
            return [Completion(token_array([]), logprob_array([]), [], "", "abort", self.url) for _ in range(request.n)]
        return asking.result()

    async def _complete(self, request: CompletionRequest, version: int) -> list[Completion]:
        body = msgspec.to_builtins(request)
        body |= {name: getattr(request, name) for name in _DEFAULTED}
        return await self._completed(msgspec.json.encode(body), {}, version)

    async def drop_requests(self) -> None:
        """As :meth:`ServerClient.drop_requests`; the group with its workers is gone as well."""
        await super().drop_requests()
        await self._forget()

    async def close(self) -> None:
        """Close all connections, once an update that is under way has ended, and have vLLM let go of the group."""
        if self._updating is not None:
            await asyncio.wait({self._updating})
        if self._connected:
            self._connected = False
            await self._let_go()
        await self._link.close()
        await super().close()

    async def reach(self, url: str, run_id: str) -> str | None:
        """As :meth:`ServerClient.reach`; it is a process on this host that fetches, and hands on."""
        return await asyncio.to_thread(unreachable, url, run_id, self._key)

    # ---- what it is --------------------------------------------------------------------------------------------

    async def info(self) -> ServerInfo:
        """What it says of itself, and for the rest what the trainer's model is. Raises ServerLost, Refused, and
        UserError where it cannot be trained against."""
        life = await self._read_life()
        if life != self._life or not await self._holds_what_it_was_given():
            self._known = None
            await self._forget()
        if self._known is None:
            resume = functools.partial(self._end_update, failed=True)
            self._known, self._life = await meet(self.url, self._bytes, self._facts, resume), life
        self._known.version, self._known.run_id = self._version, self._run_id
        return self._known

    async def _read_life(self) -> bytes | None:
        found = _START_TIME.search(await self._bytes("GET", routes.METRICS, None, INFO_TIMEOUT))
        return found.group(1) if found else None

    async def _holds_what_it_was_given(self) -> bool:
        """By the name of its weights, where it has one for them."""
        if not self._run_id or self._updating is not None:
            return True
        try:
            content = await self._bytes("GET", "/weight_info", None, INFO_TIMEOUT)
        except Refused:
            return True  # an older one does not say
        return decoded(content, WeightInfo).weight_version == _label(self._run_id, self._version)

    async def status(self) -> WeightStatus:
        """What it holds, as far as is known here."""
        return WeightStatus(version=self._version, run_id=self._run_id, state="idle")

    # ---- weights -----------------------------------------------------------------------------------------------

    async def stage(self, manifest: Manifest) -> WeightStatus:
        """Have the version held ready by the process that sends it, connected with the server's workers."""
        began = time.monotonic()
        if not self._connected:
            await self._connect()
        try:
            await self._link.order(Load(manifest), LOAD)
        except LinkFailed as error:
            self._connected = self._link.alive
            raise Refused(409, str(error)) from error
        self._manifest = manifest
        return WeightStatus(
            version=self._version, run_id=self._run_id, state="staged", staged_version=manifest.version,
            stage_seconds=time.monotonic() - began,
        )  # fmt: skip

    async def commit(self, run_id: str, version: int, inflight: Inflight = "recompute") -> WeightStatus:
        """Pause, send, resume. Once begun it goes on to its end, also when this call is cancelled: else workers would
        wait in it for ever. Raises ServerLost where the server holds weights that are in no defined state, and
        UserError after ``FAILURES`` of these in a row."""
        manifest = self._manifest
        if manifest is None or (manifest.run_id, manifest.version) != (run_id, version):
            raise Refused(409, f"version {version} is to be committed and not staged")
        self._updating = asyncio.create_task(self._update(manifest, inflight))
        self._updating.add_done_callback(lambda _: setattr(self, "_updating", None))
        seconds = await asyncio.shield(self._updating)
        return WeightStatus(version=version, run_id=run_id, state="idle", commit_seconds=seconds)

    async def _update(self, manifest: Manifest, inflight: Inflight) -> float:
        """Seconds that it took. However it ends, the server is told to resume."""
        began = time.monotonic()
        self._open.clear()
        self._version, self._run_id = 0, ""
        problem: Exception | None = None
        try:
            await self._pause(inflight)
            await self._transfer(manifest)
        except Exception as error:  # noqa: BLE001 - whatever it was, the server must not stay as it is
            problem = error
        paused = await self._end_update(failed=problem is not None)
        if problem is None and paused is None:
            self._version, self._run_id, self._failures = manifest.version, manifest.run_id, 0
        self._open.set()
        if problem is None and paused is None:
            return time.monotonic() - began
        self._failures += 1
        text = f"version {manifest.version} of the weights" + (f": {problem}" if problem else "")
        if paused is not None:
            text += f"; and it did not resume ({paused}): restart it if it stays so"
        if self._failures >= FAILURES:
            raise UserError(f"server {self.url}: {self._failures} updates in a row have failed; the last: {text}")
        raise ServerLost(f"{self.url}: {text}") from problem

    async def _pause(self, inflight: Inflight) -> None:
        wait = inflight == "wait"
        await self._phase(f"/pause?mode={'wait' if wait else 'abort'}", PAUSE_WAIT if wait else PAUSE)
        if self._running:
            await asyncio.wait(set(self._running), timeout=ANSWERS)
        for asking in (late := set(self._running)):
            asking.cancel()
        if late:
            await asyncio.wait(late)

    async def _transfer(self, manifest: Manifest) -> None:
        await self._phase("/start_weight_update", START, {"is_checkpoint_format": True})
        update: dict[str, Any] = {
            "names": [entry.name for entry in manifest.tensors],
            "dtype_names": [entry.dtype for entry in manifest.tensors],
            "shapes": [list(entry.shape) for entry in manifest.tensors],
        }
        if not self._packed_at_init():
            update |= _PACKING
        receiving = asyncio.create_task(self._phase("/update_weights", UPDATE, {"update_info": update}))
        sending = asyncio.create_task(self._link.order(Send(BUFFER_BYTES, BUFFERS), UPDATE))
        await _both(receiving, sending)
        label = _label(manifest.run_id, manifest.version)
        await self._phase("/finish_weight_update", FINISH, {"weight_version": label})

    async def _end_update(self, failed: bool) -> str | None:
        """Have the server resume; what went wrong with that, or None. failed: the update has. vLLM then holds some
        layers open for weights, and takes a part of them for the next ones unless they are closed."""
        if failed:
            self._connected = False
            await self._link.close()
            if not await self._is_done("/finish_weight_update") and await self._is_done("/start_weight_update"):
                await self._is_done("/finish_weight_update")
        problem = ""
        for _ in range(RESUMPTIONS):
            try:
                await self._phase("/resume", RESUME)
                if not decoded(await self._bytes("GET", "/is_paused", None, RESUME), Paused).is_paused:
                    return None
                problem = "it says that it is paused"  # a pause that was still under way
            except ServerLost as error:
                problem = str(error)
                if "no answer within" in problem:
                    break
            except Refused as error:
                problem = str(error)
            await asyncio.sleep(AGAIN)
        return problem

    async def _is_done(self, path: str) -> bool:
        """Whether a phase was gone through, in the time there is after a failure."""
        try:
            await self._phase(path, ABANDON, {})
        except (ServerLost, Refused) as error:
            log.info("after a failed update: %s", error)
            return False
        return True

    async def _connect(self) -> None:
        """A new group with all workers of the server, of which the process on this host is rank 0."""
        try:
            await self._link.order(Prepare(), PREPARE)
        except LinkFailed as error:
            raise UserError(f"--weight_transport nccl: {error}") from error
        await self._let_go()
        size = decoded(await self._bytes("GET", "/get_world_size", None, INFO_TIMEOUT), WorldSize)
        port = await _free_port(self._address)
        init = {"master_address": self._address, "master_port": port, "rank_offset": 1,
                "world_size": 1 + size.world_size}  # fmt: skip
        if self._packed_at_init():
            init |= _PACKING
        joining = asyncio.create_task(self._phase("/init_weight_transfer_engine", CONNECT, {"init_info": init}))
        opening = asyncio.create_task(self._link.order(Connect(self._address, port, 1 + size.world_size), CONNECT))
        try:
            await _both(joining, opening)
        except LinkFailed as error:
            raise Refused(
                500,
                f"{error} (the server was told to reach this host under {self._address}; --weight_host says another)",
            ) from error
        except Refused as error:
            if "not configured" in error.message:
                raise UserError(f"server {self.url} takes no weights ({error.message}): {HOW}") from error
            raise
        self._connected = True

    async def _let_go(self) -> None:
        """Have vLLM forget a group that there was: it keeps memory on its GPUs. Older ones have no such route."""
        with contextlib.suppress(ServerLost, Refused):
            await self._bytes("POST", "/shutdown_weight_transfer_engine", b"", INFO_TIMEOUT)

    async def _phase(self, path: str, deadline: float, body: object = None) -> None:
        """One of vLLM's routes. Raises ServerLost or Refused, with its name and the server's error."""
        name = path.partition("?")[0]
        try:
            await self._bytes("POST", path, b"" if body is None else msgspec.json.encode(body), deadline)
        except Refused as error:
            raise Refused(error.status, f"{name}: {error.message}") from error

    async def _forget(self) -> None:
        """What the server held is gone, or not what it was."""
        self._version, self._run_id, self._connected = 0, "", False
        if self._updating is None:
            await self._link.close()

    def _packed_at_init(self) -> bool:
        found = re.match(r"(\d+)\.(\d+)\.", self._known.engine_version if self._known else "")
        # By its number, which is all that a server says of it: its OpenAPI page describes both fields as objects with
        # anything in them. Only workers look into them, and to have these fail would be an error in somebody's server.
        version = (int(found[1]), int(found[2])) if found else (0, 0)
        # A version that says nothing is that of a build of one's own: the newest is the likeliest.
        return version >= _PACKED_AT_INIT or version < _OLDEST


def _label(run_id: str, version: int) -> str:
    return f"{run_id}:{version}"


_PACKING = {"packed": True, "packed_buffer_size_bytes": BUFFER_BYTES, "packed_num_buffers": BUFFERS}


async def _both(*tasks: asyncio.Task[None]) -> None:
    """Wait for all of them; the first that fails ends the others, which wait for it."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _free_port(address: str) -> int:
    try:
        server = await asyncio.start_server(lambda reader, writer: None, address, 0)
    except OSError as error:
        raise UserError(
            f"--weight_host {address} is no address of this host ({error.strerror}), and NCCL needs one that the "
            "server reaches: give another, or leave it out"
        ) from error
    port = int(server.sockets[0].getsockname()[1])
    server.close()
    await server.wait_closed()
    return port
