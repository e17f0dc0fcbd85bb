"""What the user is told when a server cannot be used."""

import dataclasses
import http.server
import threading
from collections.abc import Iterator

import msgspec
import pytest

from outrider.collector.client import ServerClient
from outrider.collector.preflight import check_reach, check_server, wait_for_server
from outrider.collector.server import Server
from outrider.contract.errors import UserError
from outrider.contract.feed import WeightNode
from outrider.weights.segment_server import SegmentServer
from tests.collector.servers import KEY, RolloutProcess, expected, free_port
from tests.collector.stub import fitting_info


async def ask(url: str, key: str = KEY, timeout: float = 1.0, given: str | None = None) -> str:
    """The message that ends the preflight."""
    client = ServerClient(url, key)
    with pytest.raises(UserError) as caught:
        await wait_for_server(client, timeout, given, lambda text: None)
    await client.close()
    return str(caught.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutProcess]:
    process = RolloutProcess(tmp_path_factory.mktemp("server"), "--max_model_len", "32")
    process.start()
    process.wait()
    yield process
    process.kill()


@pytest.fixture
def web_server() -> Iterator[str]:
    """Some other HTTP server that happens to listen there."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()
    thread.join()
    found.server_close()


async def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    message = await ask(url)
    assert f"rollout server {url}: not reachable within --vllm_server_timeout 1 s" in message
    assert f"Tried GET {url}/outrider/info" in message
    assert "Connection refused" in message
    assert "`outrider rollout` runs there" in message
    assert "--vllm_server_host" in message


async def test_a_name_that_does_not_exist() -> None:
    message = await ask("http://no-such-host.invalid:8000")
    assert "http://no-such-host.invalid:8000: not reachable" in message


async def test_a_wrong_key(server: RolloutProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    message = await ask(server.url, "wrong", given="wrong")
    assert f"{server.url}: it refuses the API key taken from --vllm_server_api_key" in message
    assert "wrong" not in message.replace(server.url, "")
    message = await ask(server.url, "")
    assert "taken from OUTRIDER_API_KEY or " in message


async def test_not_an_outrider_server(web_server: str) -> None:
    message = await ask(web_server)
    assert f"rollout server {web_server}: it answers, but has no /outrider/info" in message
    assert "it is not an Outrider server" in message
    assert "outrider rollout --model MODEL" in message


async def test_another_model_another_tokenizer_too_little_room(server: RolloutProcess) -> None:
    """Both sides are named: which is wrong, only the user can know."""
    client = ServerClient(server.url, KEY)
    info = await wait_for_server(client, 30.0, None, lambda text: None)
    await client.close()
    wanted = expected()
    check_server(server.url, info, wanted)
    for change, words in [
        ({"model": "other/model", "model_fingerprint": "f00"}, ["serves the model", info.model, "--model other/model"]),
        ({"tokenizer_hash": "ba5"}, ["the tokenizer of", info.tokenizer_hash, "hash ba5", "same tokenizer"]),
        ({"max_completion_length": 32}, ["--max_completion_length 32", "32 tokens in all", "--max_model_len"]),
    ]:
        with pytest.raises(UserError) as caught:
            check_server(server.url, info, dataclasses.replace(wanted, **change))  # type: ignore[arg-type]
        assert server.url in str(caught.value)
        for word in words:
            assert word in str(caught.value)
    check_server(server.url, info, dataclasses.replace(wanted, max_completion_length=31))


def test_what_a_server_cannot_do_with_requests_in_flight() -> None:
    info, wanted = fitting_info(), expected()
    check_server("http://a", info, dataclasses.replace(wanted, inflight="keep"))
    with pytest.raises(UserError, match=r"--inflight wait: server http://a \(torch engine\) can only keep: choose"):
        check_server("http://a", info, dataclasses.replace(wanted, inflight="wait"))
    info.capabilities = ("weights_http", "inflight_keep", "inflight_recompute")
    check_server("http://a", info, dataclasses.replace(wanted, inflight="recompute"))
    with pytest.raises(UserError, match=r"can only keep or recompute: choose what it can, or another server"):
        check_server("http://a", info, dataclasses.replace(wanted, inflight="wait"))


async def test_a_server_that_comes_late_is_waited_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    process = RolloutProcess(tmp_path_factory.mktemp("late"))
    process.start()
    notices: list[str] = []
    client = ServerClient(process.url, KEY)
    info = await wait_for_server(client, 90.0, None, notices.append)
    await client.close()
    process.kill()
    assert info.run_id == ""
    assert all(f"waiting for server {process.url}" in notice for notice in notices)
    assert len(notices) <= 1


async def test_a_node_that_servers_do_not_reach_is_named(server: RolloutProcess) -> None:
    client = ServerClient(server.url, KEY)
    info = await client.info()
    segments = SegmentServer("127.0.0.1", KEY, "a-run")
    good = WeightNode(node=0, host="elsewhere", name="trainer-0", url=await segments.start())
    bad = WeightNode(node=1, host="elsewhere", name="trainer-1", url="http://127.0.0.1:1/outrider/segments")
    here = msgspec.structs.replace(bad, host=info.host)
    pool = [Server(client, info=info)]
    await check_reach(pool, [good, here], "a-run")
    with pytest.raises(UserError) as caught:
        await check_reach(pool, [good, bad], "a-run")
    said = str(caught.value)
    assert f"server {server.url} cannot fetch weights from node 1 of the trainer (trainer-1) at {bad.url}" in said
    assert "refused" in said
    with pytest.raises(UserError, match=r"node 0 of the trainer .* by --weight_host"):
        await check_reach(pool, [good], "another-run")
    await segments.stop()
    await client.close()
