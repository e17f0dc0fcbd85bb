"""What is particular to servers with vLLM: its own routes, failures at the start, and how they end."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from outrider.contract import routes
from outrider.contract.control import ServerInfo, WeightStatus
from outrider.weights.segments import segment_directory
from tests.contract.client import Client
from tests.contract.publishing import publishing
from tests.contract.servers import END_DEADLINE, READY_DEADLINE, Server, command, environment
from tests.server.test_orphans import children
from tests.vllm.conftest import KEY, StartEndless

pytestmark = pytest.mark.real_vllm


async def test_every_route_of_vllms_server_needs_the_key(
    start_endless: StartEndless, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its control routes included: all that it lists, without a key and with a wrong one."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    server = start_endless()
    listed = re.findall(r"Route: (/\S*), Methods: ([A-Z, ]+)$", server.output.read_text(), re.M)
    paths = {path for path, _ in listed}
    assert {"/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/version", "/v1/completions"} <= paths
    for wrong in (None, "wrong"):
        async with Client(server.url, wrong) as stranger:
            for path, methods in listed:
                if path == routes.HEALTH:
                    continue
                for verb in methods.split(", "):
                    status, _ = await stranger.ask(verb, re.sub(r"\{\w+\}", "x", path), b"{}")
                    assert status == 401, (verb, path)
            async with stranger.session.get("/v1/realtime", headers={"Upgrade": "websocket"}) as answer:
                assert answer.status == 401
    async with Client(server.url, KEY) as client:
        assert (await client.ask("GET", "/version"))[0] == 200
        assert (await client.ask("GET", "/is_paused"))[0] == 200


def test_a_failed_start_says_why(tmp_path: Path, endless: Callable[[int], Path]) -> None:
    """The cause from vLLM's log in one line, not the stack of its launcher."""
    arguments = command(endless(0), "--engine", "vllm", "--port", "0", "--kv_cache_gib", "0.00001")
    ended = subprocess.run(
        arguments, env=environment(KEY), capture_output=True, text=True, timeout=READY_DEADLINE, check=False
    )
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("outrider: --engine vllm: its server did not start: ValueError: ")
    assert "cache" in last.lower()


def test_workers_that_nobody_waits_for_are_no_start(endless: Callable[[int], Path]) -> None:
    """By a name that vLLM completes to ``--pipeline-parallel-size``: nothing is known of it before workers report."""
    arguments = command(endless(0), "--engine", "vllm", "--port", "0", "--kv_cache_gib", "0.25")
    arguments += ["--engine_kwargs", '{"pipeline_parallel": 2}']
    ended = subprocess.run(
        arguments, env=environment(KEY), capture_output=True, text=True, timeout=READY_DEADLINE, check=False
    )
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert "did not start: vLLM runs 1 engine(s) of 2 worker(s)" in last
    assert "--engine_kwargs" in last


def test_a_killed_launcher_leaves_nothing(start_endless: StartEndless) -> None:
    """No process, and no file."""
    before = set(segment_directory().glob("outrider-vllm-*"))
    server = start_endless("--data_parallel_size", "2")
    descendants = children(server.process.pid)
    assert len(descendants) >= 5  # vLLM's server, two engines, a worker each
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    deadline = time.monotonic() + END_DEADLINE
    while left := [pid for pid in descendants if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert set(segment_directory().glob("outrider-vllm-*")) <= before


def test_a_server_that_ends_leaves_no_files(start_endless: StartEndless) -> None:
    before = set(segment_directory().glob("outrider-vllm-*"))
    server = start_endless()
    assert set(segment_directory().glob("outrider-vllm-*")) > before
    server.terminate()
    assert server.wait() == 0
    assert set(segment_directory().glob("outrider-vllm-*")) <= before
    assert "Traceback" not in server.output.read_text()


async def test_an_engine_that_dies_ends_the_server(start_endless: StartEndless) -> None:
    """For whoever supervises it; the reason is in its last words."""
    server = start_endless()
    async with Client(server.url, KEY) as client:
        running = asyncio.create_task(
            client.ask("POST", routes.COMPLETIONS, b'{"prompt": [5], "max_tokens": 1000, "n": 16}')
        )
        await client.until_running(1)
        for pid in workers_of(server):
            os.kill(pid, signal.SIGKILL)
        status, body = await running
        assert status == 503, body
    assert await asyncio.to_thread(server.wait) == 1
    assert "vLLM's server has ended" in server.output.read_text()


def workers_of(server: Server) -> list[int]:
    """vLLM's worker processes."""
    found = children(server.process.pid)
    return [pid for pid in found if "VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_text()]


#: A trainer that publishes a version, says so, and waits to be killed.
PUBLISHER = """
import sys, time
import msgspec
from pathlib import Path
from outrider.contract.control import ServerInfo, StageRequest
from tests.contract.publishing import publishing
info = msgspec.json.decode(sys.argv[2], type=ServerInfo)
with publishing(Path(sys.argv[1]), info, sys.argv[3]) as publisher:
    print(msgspec.json.encode(StageRequest(manifest=publisher.publish(7).result())).decode(), flush=True)
    time.sleep(600)
"""


async def test_a_trainer_killed_in_the_middle_of_a_stage(
    start_endless: StartEndless, endless: Callable[[int], Path]
) -> None:
    """The old weights go on; a new trainer attaches to the same server, which was not restarted."""
    server = start_endless()
    async with Client(server.url, KEY) as client:
        info = await client.get(routes.INFO, ServerInfo)
        before = await client.greedy([5, 6], 32)
        arguments = [
            sys.executable,
            "-c",
            PUBLISHER,
            str(endless(1)),
            msgspec.json.encode(info).decode(),
            uuid.uuid4().hex[:12],
        ]
        trainer = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE, limit=2**20)
        assert trainer.stdout is not None
        order = await trainer.stdout.readline()
        staging = asyncio.create_task(client.ask("POST", routes.STAGE, order))
        trainer.kill()
        await trainer.wait()
        await staging  # it may have been quick enough
        assert await client.greedy([5, 6], 32) == before
        with publishing(endless(1), info, uuid.uuid4().hex[:12]) as publisher:
            manifest = await asyncio.wrap_future(publisher.publish(1))
            await client.stage(manifest)
            await client.commit(manifest)
        status = await client.get(routes.STATUS, WeightStatus)
        assert (status.version, status.run_id, status.state) == (1, manifest.run_id, "idle")
        assert await client.greedy([5, 6], 32) != before
