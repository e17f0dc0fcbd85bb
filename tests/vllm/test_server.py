"""What is particular to servers with vLLM: its own routes, failures at the start, and how they end."""

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from outrider.contract import routes
from outrider.weights.segments import segment_directory
from tests.contract.client import PATIENCE, Client
from tests.contract.servers import END_DEADLINE, READY_DEADLINE, Server, command, environment
from tests.server.test_orphans import children
from tests.vllm import plugins, websocket_route
from tests.vllm.conftest import KEY, StartEndless

pytestmark = pytest.mark.real_vllm


async def test_every_route_of_vllms_server_needs_the_key(
    start_endless: StartEndless, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its control routes included: all that it lists, and a websocket, without a key and with a wrong one."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    for name, value in plugins.install(tmp_path / "plugin", "websocket_route").items():
        monkeypatch.setenv(name, value)
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
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await stranger.session.ws_connect(websocket_route.PATH)
            assert refused.value.status == 403
    async with Client(server.url, KEY) as client:
        assert (await client.ask("GET", "/version"))[0] == 200
        assert (await client.ask("GET", "/is_paused"))[0] == 200
        async with client.session.ws_connect(websocket_route.PATH) as socket:
            assert await socket.receive_str(timeout=PATIENCE) == websocket_route.GREETING


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


def test_workers_that_know_requests_by_other_names_are_no_start(
    endless: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every difference that would else be found in the middle of a run, by the first commit."""
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    arguments = command(endless(0), "--engine", "vllm", "--port", "0", "--kv_cache_gib", "0.25")
    ended = subprocess.run(
        arguments, env=environment(KEY), capture_output=True, text=True, timeout=READY_DEADLINE, check=False
    )
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert re.search(r"did not start: vLLM \S+ cannot be used: .*'outrider-warm.*0\.24\.0 to 0\.32\.0", last), last


UNTRIED = """
import sys
from outrider.server.vllm_engine import command
command.vllm_version = lambda: "0.99.0"
from outrider.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_version_that_was_not_tried_is_said_and_goes_on(endless: Callable[[int], Path], tmp_path: Path) -> None:
    """Where it has what is needed, as this one has."""
    words = command(endless(0), "--engine", "vllm", "--port", "0", "--threads", "1", "--kv_cache_gib", "0.25")
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [words[0], "-c", UNTRIED, *words[3:]], stdout=output, stderr=output, env=environment(KEY)
        )
    try:
        deadline = time.monotonic() + READY_DEADLINE
        while "ready: " not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.terminate()
        assert server.wait(END_DEADLINE) == 0
    finally:
        server.kill()
    assert "vLLM 0.99.0 has not been tried, 0.24.0 to 0.32.0 have" in log.read_text()


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
