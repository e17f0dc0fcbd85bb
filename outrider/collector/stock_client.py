"""A vLLM server that somebody started without us, seen from the collector: ``--weight_transport nccl``.

Weights go there by vLLM's own routes: pause, start, update while a process of ours broadcasts, finish, resume. Such a
server does not say which weights sampled a token, so a commit leaves no request half way: it closes the gate to new
ones, has vLLM end those that run (their tokens come back, and the pool continues them with the new weights) or waits
for them, and takes back those that vLLM has not begun. So every answer is of one version.
"""

import asyncio
import logging
import re
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from outrider.collector.client import INFO_TIMEOUT, Refused, ServerClient, ServerLost
from outrider.collector.nccl_link import LinkFailed, NcclLink
from outrider.contract import routes
from outrider.contract.control import Inflight, ServerInfo, WeightStatus
from outrider.contract.errors import UserError
from outrider.contract.generation import CompletionRequest
from outrider.contract.identity import host_identity
from outrider.contract.manifest import Manifest
from outrider.environments.base import Completion, logprob_array, token_array
from outrider.weights.nccl_orders import Connect, Load, Send

log = logging.getLogger(__name__)

#: Seconds that each phase of an update may take. "wait" of --inflight lets rollouts end first.
CONNECT, LOAD, PAUSE, PAUSE_WAIT, START, UPDATE, FINISH, RESUME = 180.0, 600.0, 60.0, 3600.0, 60.0, 600.0, 120.0, 60.0
#: Seconds for the end of an update that has failed: where workers wait for a sender that is gone, it does not come.
ABANDON = 20.0
#: How often a server is told to resume, if it does not.
RESUMPTIONS = 3
#: Seconds for the answers of requests that a pause has ended. What comes later is not in vLLM's scheduler yet.
ANSWERS = 2.0
#: Bytes and number of the buffers in which tensors travel: vLLM's defaults, said to both sides.
BUFFER_BYTES, BUFFERS = 2**30, 2
#: Updates in a row that may fail before the run ends.
FAILURES = 5
#: Sequences that vLLM decodes at once by default. It does not say how many it was told.
MAX_NUM_SEQS = 256
#: Where ``packed`` moved from the update's description to that of the group.
_PACKED_AT_INIT = (0, 28)

_START_TIME = re.compile(rb"^process_start_time_seconds(?:\{.*\})? ([\d.e+]+)", re.MULTILINE)
_HOW = (
    'start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend":"nccl"}\' '
    "--logprobs-mode processed_logprobs"
)


@dataclass(frozen=True)
class TrainerFacts:
    """What such a server cannot be asked, and the trainer knows.

    plain_sampling: temperature 1 and nothing that truncates or shifts the distribution. probe: a text and its token
    ids by the trainer's tokenizer.
    """

    model_fingerprint: str
    tokenizer_hash: str
    torch_dtype: str
    vocab_size: int
    plain_sampling: bool
    probe: tuple[str, list[int]]


class StockClient(ServerClient):
    """Speaks the server contract to the collector, and vLLM's own routes to the server."""

    def __init__(self, url: str, key: str, facts: TrainerFacts, address: str) -> None:
        """address: of this host, as the server reaches it."""
        super().__init__(url, key)
        self._facts, self._address = facts, address
        self._link = NcclLink(key)
        self._manifest: Manifest | None = None
        self._connected = False
        #: Version and run that the server holds; run "" when it holds none of ours.
        self._version, self._run_id = 0, ""
        #: What tells one life of the server from the next.
        self._life: bytes | None = None
        self._known: ServerInfo | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._cut = asyncio.Event()
        self._running: set[asyncio.Task[list[Completion]]] = set()
        self._failures = 0

    # ---- requests ----------------------------------------------------------------------------------------------

    async def complete(self, request: CompletionRequest, run_id: str) -> list[Completion]:
        """As :meth:`ServerClient.complete`; all tokens are of the version that the server holds when it is asked."""
        await self._open.wait()
        if run_id != self._run_id:
            raise Refused(409, f"{self.url} holds no weights of this run")
        version = self._version
        asking = asyncio.create_task(self._complete(request, version))
        self._running.add(asking)
        cut = asyncio.create_task(self._cut.wait())
        try:
            await asyncio.wait({asking, cut}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            return [Completion(token_array([]), logprob_array([]), [], "", "abort", self.url) for _ in range(request.n)]
        finally:
            cut.cancel()
            asking.cancel()
            self._running.discard(asking)

    async def _complete(self, request: CompletionRequest, version: int) -> list[Completion]:
        body = msgspec.to_builtins(request)
        # Whatever is left out, vLLM takes from the model's generation_config.json.
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            body[name] = getattr(request, name)
        return await self._completed(msgspec.json.encode(body), {}, version)

    async def drop_requests(self) -> None:
        """As :meth:`ServerClient.drop_requests`; the group with its workers is gone as well."""
        await super().drop_requests()
        await self._forget()

    async def close(self) -> None:
        """Close all connections, and have vLLM let go of the group where it can."""
        if self._connected:
            with_route = self._bytes("POST", "/shutdown_weight_transfer_engine", b"", INFO_TIMEOUT)
            await asyncio.gather(with_route, return_exceptions=True)  # older ones have no such route
        await self._link.close()
        await super().close()

    # ---- what it is --------------------------------------------------------------------------------------------

    async def info(self) -> ServerInfo:
        """What it says of itself, and for the rest what the trainer's model is. Raises ServerLost, Refused, and
        UserError where it cannot be trained against."""
        life = await self._read_life()
        if self._known is None or life != self._life:
            await self._forget()
            self._known, self._life = await self._meet(), life
        self._known.version, self._known.run_id = self._version, self._run_id
        return self._known

    async def _read_life(self) -> bytes | None:
        found = _START_TIME.search(await self._bytes("GET", routes.METRICS, None, INFO_TIMEOUT))
        return found.group(1) if found else None

    async def _meet(self) -> ServerInfo:
        facts = self._facts
        try:
            models = msgspec.json.decode(await self._bytes("GET", routes.MODELS, None, INFO_TIMEOUT), type=_Models)
            version = msgspec.json.decode(await self._bytes("GET", "/version", None, INFO_TIMEOUT), type=_Version)
        except msgspec.MsgspecError as error:
            raise UserError(f"server {self.url} is not a vLLM server: {error}") from error
        try:
            await self._bytes("GET", "/get_world_size", None, INFO_TIMEOUT)
        except Refused as error:
            if error.status != 404:
                raise
            raise UserError(f"server {self.url} has no routes to change its weights: {_HOW}") from error
        await self._check_tokenizer()
        if not facts.plain_sampling and not await self._logprobs_are_processed():
            raise UserError(
                f"server {self.url} reports log-probabilities from before temperature and truncation, which are not "
                "those its tokens were drawn with: start it with --logprobs-mode processed_logprobs, or sample with "
                "--temperature 1 and nothing else"
            )
        return ServerInfo(
            engine="vllm", engine_version=version.version, model=models.data[0].id,
            model_fingerprint=facts.model_fingerprint, tokenizer_hash=facts.tokenizer_hash,
            torch_dtype=facts.torch_dtype, max_model_len=models.data[0].max_model_len, max_num_seqs=MAX_NUM_SEQS,
            vocab_size=facts.vocab_size, version=0, run_id="",
            host=host_identity(),  # its weights come from a process on this host
            capabilities=("inflight_recompute", "inflight_wait"),
        )  # fmt: skip

    async def _check_tokenizer(self) -> None:
        text, expected = self._facts.probe
        body = msgspec.json.encode({"prompt": text, "add_special_tokens": False})
        answer = msgspec.json.decode(await self._bytes("POST", "/tokenize", body, INFO_TIMEOUT), type=_Tokens)
        if answer.tokens != expected:
            raise UserError(
                f"server {self.url}: its tokenizer makes {answer.tokens} of {text!r}, the trainer's makes {expected}: "
                "start both with the same model"
            )

    async def _logprobs_are_processed(self) -> bool:
        """Whether the temperature shows in the log-probabilities: at 2 they lie half as far apart as at 1."""
        spreads = []
        for temperature in (1.0, 2.0):
            body = msgspec.json.encode(
                {"prompt": self._facts.probe[1], "max_tokens": 1, "temperature": temperature, "logprobs": 5,
                 "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            )  # fmt: skip
            answer = msgspec.json.decode(await self._bytes("POST", routes.COMPLETIONS, body, 60.0), type=_Probed)
            values = answer.choices[0].logprobs.top_logprobs[0].values()
            spreads.append(max(values) - min(values))
        return spreads[1] < 0.75 * spreads[0] or spreads[0] == 0

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
            self._connected = False
            raise Refused(409, str(error)) from error
        self._manifest = manifest
        return WeightStatus(
            version=self._version, run_id=self._run_id, state="staged", staged_version=manifest.version,
            stage_seconds=time.monotonic() - began,
        )  # fmt: skip

    async def commit(self, run_id: str, version: int, inflight: Inflight = "recompute") -> WeightStatus:
        """Pause, send, resume. However that ends, the server is told to resume. Raises ServerLost where it holds
        weights that are in no defined state, and UserError after ``FAILURES`` of these in a row."""
        manifest = self._manifest
        if manifest is None or (manifest.run_id, manifest.version) != (run_id, version):
            raise Refused(409, f"version {version} is to be committed and not staged")
        began = time.monotonic()
        self._open.clear()
        problem: Exception | None = None
        self._version, self._run_id = 0, ""
        try:
            await self._pause(inflight)
            await self._transfer(manifest)
        except (ServerLost, Refused, LinkFailed) as error:
            problem = error
        finally:
            # Also when this is cancelled: nobody else would do it.
            left_paused = await asyncio.shield(self._resume(failed=problem is not None))
            if problem is None and left_paused is None:
                self._version, self._run_id = version, run_id
            self._open.set()
        if problem is not None or left_paused is not None:
            await self._fail(version, problem, left_paused)
        self._failures = 0
        seconds = time.monotonic() - began
        return WeightStatus(version=version, run_id=run_id, state="idle", commit_seconds=seconds)

    async def _pause(self, inflight: Inflight) -> None:
        wait = inflight == "wait"
        await self._phase(f"/pause?mode={'wait' if wait else 'abort'}", PAUSE_WAIT if wait else PAUSE)
        if self._running:
            await asyncio.wait(set(self._running), timeout=ANSWERS)
        self._cut.set()
        await asyncio.sleep(0)  # those that are cut go on, and let go of their connections
        self._cut = asyncio.Event()

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
        await self._phase("/finish_weight_update", FINISH, {"weight_version": f"{manifest.run_id}:{manifest.version}"})

    async def _resume(self, failed: bool) -> str | None:
        """What went wrong with it, or None. failed: the update has; it is brought to an end, so that the next one can
        begin."""
        if failed:
            self._connected = False
            await self._link.close()
            await asyncio.gather(self._phase("/finish_weight_update", ABANDON, {}), return_exceptions=True)
        problem: str | None = None
        for _ in range(RESUMPTIONS):
            try:
                await self._phase("/resume", RESUME)
                return None
            except (ServerLost, Refused) as error:  # such as a connection that vLLM has closed after its error
                problem = str(error)
                await asyncio.sleep(0.1)
        return problem

    async def _fail(self, version: int, problem: Exception | None, left_paused: str | None) -> NoReturn:
        self._failures += 1
        text = f"version {version} of the weights: {problem}" if problem else f"version {version} of the weights"
        if left_paused is not None:
            text += f"; and it did not resume ({left_paused}): restart it if it stays so"
        if self._failures >= FAILURES:
            raise UserError(f"server {self.url}: {self._failures} updates in a row have failed; the last: {text}")
        raise ServerLost(f"{self.url}: {text}")

    async def _connect(self) -> None:
        """A new group with all workers of the server, of which the process on this host is rank 0."""
        size = msgspec.json.decode(await self._bytes("GET", "/get_world_size", None, INFO_TIMEOUT), type=_WorldSize)
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
        self._connected = True

    async def _phase(self, path: str, deadline: float, body: object = None) -> None:
        """One of vLLM's routes. Raises ServerLost or Refused, with its name and the server's error."""
        name = path.partition("?")[0]
        try:
            await self._bytes("POST", path, b"" if body is None else msgspec.json.encode(body), deadline)
        except Refused as error:
            raise Refused(error.status, f"{name}: {error.message}") from error

    async def _forget(self) -> None:
        """The server that was known is gone."""
        self._version, self._run_id, self._known, self._connected = 0, "", None, False
        await self._link.close()

    def _packed_at_init(self) -> bool:
        found = re.match(r"(\d+)\.(\d+)\.", self._known.engine_version if self._known else "")
        # A version that says nothing is that of a build of one's own: the newest is the likeliest.
        return found is None or (int(found[1]), int(found[2])) >= _PACKED_AT_INIT


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
    server = await asyncio.start_server(lambda reader, writer: None, address, 0)
    port = int(server.sockets[0].getsockname()[1])
    server.close()
    await server.wait_closed()
    return port


class _Model(msgspec.Struct):
    id: str
    max_model_len: int


class _Models(msgspec.Struct):
    data: list[_Model]


class _Version(msgspec.Struct):
    version: str


class _WorldSize(msgspec.Struct):
    world_size: int


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _ProbedLogprobs(msgspec.Struct):
    top_logprobs: list[dict[str, float]]


class _ProbedChoice(msgspec.Struct):
    logprobs: _ProbedLogprobs


class _Probed(msgspec.Struct):
    choices: list[_ProbedChoice]
