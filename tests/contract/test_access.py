"""Who may ask, what a server says of itself, and how it is found."""

import json
import shlex
import subprocess

import msgspec
import pytest

from outrider.contract import routes
from outrider.contract.control import ServerInfo, WeightStatus
from outrider.contract.errors import ErrorBody
from outrider.contract.generation import ModelList
from outrider.contract.identity import host_identity
from outrider.contract.keys import key_file
from tests.contract.client import Client
from tests.contract.servers import END_DEADLINE, Server, command, environment

_ROUTES = [
    ("GET", routes.METRICS),
    ("GET", routes.MODELS),
    ("POST", routes.COMPLETIONS),
    ("POST", routes.CHAT),
    ("GET", routes.INFO),
    ("POST", routes.STAGE),
    ("POST", routes.COMMIT),
    ("GET", routes.STATUS),
    ("POST", routes.REACH),
    ("POST", routes.DRAIN),
]
_UNKNOWN = [("GET", "/"), ("GET", "/docs"), ("POST", "/v1/nothing"), ("GET", "/health/"), ("PUT", routes.INFO)]


async def test_health_needs_no_key(server: Server) -> None:
    async with Client(server.url, None) as stranger:
        assert (await stranger.ask("GET", routes.HEALTH))[0] == 200


@pytest.mark.parametrize(("verb", "path"), _ROUTES + _UNKNOWN)
async def test_every_other_route_needs_the_key(server: Server, key: str, verb: str, path: str) -> None:
    """An unknown route, too: a stranger does not learn which ones there are."""
    for wrong in (None, "", "wrong", key[:-1], key + "x"):
        async with Client(server.url, wrong) as stranger:
            status, body = await stranger.ask(verb, path, b"{}" if verb == "POST" else None)
            assert status == 401
            error = msgspec.json.decode(body, type=ErrorBody).error
            assert error.type == "authentication_error"
            assert "Authorization: Bearer" in error.message
            assert key not in error.message


@pytest.mark.parametrize(("verb", "path"), _UNKNOWN[:3])
async def test_with_the_key_an_unknown_route_is_not_found(client: Client, verb: str, path: str) -> None:
    status, body = await client.ask(verb, path)
    assert status == 404
    assert path in msgspec.json.decode(body, type=ErrorBody).error.message


@pytest.mark.parametrize(("verb", "path"), _ROUTES)
async def test_another_method_is_refused_in_the_same_shape(client: Client, verb: str, path: str) -> None:
    """And told which one there is."""
    for other in {"GET", "POST", "PUT", "DELETE"} - {verb}:
        async with client.session.request(other, path, data=b"{}") as answer:
            error = msgspec.json.decode(await answer.read(), type=ErrorBody).error
            assert (answer.status, error.type) == (405, "invalid_request_error")
            assert verb in answer.headers["Allow"]
            assert verb in error.message


async def test_models_lists_the_served_one(client: Client, server: Server) -> None:
    [card] = (await client.get(routes.MODELS, ModelList)).data
    assert (card.id, card.max_model_len) == (str(server.model), 128)


async def test_info_says_who_the_server_is(client: Client, server: Server) -> None:
    status, body = await client.ask("GET", routes.INFO)
    assert status == 200
    assert json.loads(body).keys() == set(ServerInfo.__struct_fields__)
    info = msgspec.json.decode(body, type=ServerInfo)
    assert info.engine == server.engine
    assert info.model == str(server.model)
    assert (info.max_model_len, info.max_num_seqs, info.vocab_size) == (128, 32, 99)
    assert (info.version, info.run_id, info.draining) == (0, "", False)
    assert info.host == host_identity()
    assert info.engine_version
    assert info.torch_dtype in ("float32", "bfloat16", "float16")
    assert len(info.model_fingerprint) == len(info.tokenizer_hash) == 16
    assert {"weights_shared_memory", "weights_http"} <= set(info.capabilities)


async def test_status_of_untouched_weights(client: Client) -> None:
    status = await client.get(routes.STATUS, WeightStatus)
    assert (status.version, status.run_id, status.state, status.staged_version) == (0, "", "idle", None)


async def test_the_ready_message_holds_flags_that_reach_the_server(server: Server, key: str) -> None:
    """``--port 0`` was asked for: the message has the port there is. The key file is found without any flag."""
    [line] = [line for line in server.output.read_text().splitlines() if line.strip().startswith("outrider train ")]
    words = shlex.split(line)
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert flags["--model"] == str(server.model)
    assert flags["--vllm_server_port"] != "0"
    async with Client(f"http://{flags['--vllm_server_host']}:{flags['--vllm_server_port']}", key) as trainer:
        assert (await trainer.get(routes.INFO, ServerInfo)).model == flags["--model"]


def test_the_key_is_only_its_owners_to_read(server: Server, key: str) -> None:
    assert len(key) >= 32
    assert key_file().stat().st_mode & 0o077 == 0
    assert key not in server.output.read_text()


def test_a_second_server_on_the_port_fails_and_names_it(server: Server) -> None:
    """At once: it does not get as far as to find out that there is no such model."""
    arguments = command("/no/such/model", "--host", server.host, "--port", str(server.port))
    ended = subprocess.run(arguments, env=environment(None), capture_output=True, text=True, timeout=END_DEADLINE)
    assert ended.returncode == 2
    assert f"--port {server.port}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "/no/such/model" not in ended.stdout


def test_an_address_of_another_machine_is_named() -> None:
    arguments = command("/no/such/model", "--host", "192.0.2.1")  # reserved for documentation
    ended = subprocess.run(arguments, env=environment(None), capture_output=True, text=True, timeout=END_DEADLINE)
    assert ended.returncode == 2
    assert "--host 192.0.2.1" in ended.stderr
    assert "Traceback" not in ended.stderr
