import pytest

from outrider.cli.endpoints import server_urls
from outrider.cli.train_config import TRAIN
from outrider.collector.config import ServersConfig
from outrider.contract.errors import UserError


def urls(line: str) -> list[str]:
    parsed = TRAIN.parse(["--model", "m", "--dataset", "d", "--reward_funcs", "f", *line.split()])
    return server_urls(parsed.section(ServersConfig), parsed.given)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ["http://127.0.0.1:8000"]),
        ("--vllm_server_host a --vllm_server_port 1", ["http://a:1"]),
        ("--vllm_server_host a b --vllm_server_port 1 2", ["http://a:1", "http://b:2"]),
        ("--vllm_server_host a b", ["http://a:8000", "http://b:8000"]),
        ("--vllm_server_host a --vllm_server_port 1 2 3", ["http://a:1", "http://a:2", "http://a:3"]),
        ("--vllm_server_port 1 2", ["http://127.0.0.1:1", "http://127.0.0.1:2"]),
        ("--vllm_server_host ::1 [::2]", ["http://[::1]:8000", "http://[::2]:8000"]),
        ("--vllm_server_base_url http://a:1/ https://b", ["http://a:1", "https://b"]),
        ("--vllm_server_base_url http://a/proxy/", ["http://a/proxy"]),
        ("--vllm_server_base_url http://a:1 --vllm_server_host 127.0.0.1 --vllm_server_port 8000", ["http://a:1"]),
    ],
)
def test_urls(line: str, expected: list[str]) -> None:
    assert urls(line) == expected


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "--vllm_server_host a b c --vllm_server_port 1 2",
            ["--vllm_server_host has 3 values", "--vllm_server_port has 2"],
        ),
        (
            "--vllm_server_base_url http://a:1 --vllm_server_host b",
            ["--vllm_server_base_url http://a:1", "--vllm_server_host b", "one of them"],
        ),
        ("--vllm_server_base_url http://a:1 --vllm_server_port 9", ["--vllm_server_port 9"]),
        ("--vllm_server_base_url a:8000", ["a:8000 is not a server's URL"]),
        ("--vllm_server_base_url http://", ["not a server's URL"]),
        ("--vllm_server_base_url http://a:port", ["not a server's URL"]),
        ("--vllm_server_base_url http://[::1", ["not a server's URL"]),
        ("--vllm_server_base_url http://a:1/v1", ["leave out /v1"]),
        ("--vllm_server_host http://a", ["--vllm_server_host http://a is not a host", "--vllm_server_base_url"]),
        ("--vllm_server_host a:8000", ["--vllm_server_host a:8000 is not a host"]),
        ("--vllm_server_host a a", ["http://a:8000 is listed twice"]),
        ("--vllm_server_host none", ["--vllm_server_host and --vllm_server_port need at least one value each"]),
        ("--vllm_server_port 0", ["--vllm_server_port is '0'", "from 1 to 65535"]),
        ("--vllm_server_port 70000", ["--vllm_server_port is '70000'"]),
    ],
)
def test_settings_that_give_no_urls(line: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        urls(line)
    assert all(part in str(caught.value) for part in parts), caught.value
