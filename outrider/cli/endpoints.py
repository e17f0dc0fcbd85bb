"""From hosts, ports and base URLs to the URLs of the rollout servers."""

from collections.abc import Set
from urllib.parse import urlsplit

import msgspec

from outrider.collector.config import ServersConfig
from outrider.contract.errors import UserError


def server_urls(servers: ServersConfig, given: Set[str]) -> list[str]:
    """One URL a server, without a slash at the end. UserError where the settings contradict each other."""
    urls = _from_base_urls(servers, given) if servers.vllm_server_base_url else _from_hosts_and_ports(servers)
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise UserError(f"the rollout server {twice[0]} is listed twice: list every server once")
    return urls


def _from_base_urls(servers: ServersConfig, given: Set[str]) -> list[str]:
    defaults = {field.name: field.default for field in msgspec.structs.fields(ServersConfig)}
    for name in ("vllm_server_host", "vllm_server_port"):
        value = getattr(servers, name)
        if name in given and value != defaults[name]:
            raise UserError(
                f"--vllm_server_base_url {' '.join(servers.vllm_server_base_url)} and --{name} "
                f"{' '.join(map(str, value))} both say where the servers are: give one of them"
            )
    return [_checked(url) for url in servers.vllm_server_base_url]


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or a bracket that is not closed
        usable = False
    if not usable or parts.query or parts.fragment:
        raise UserError(f"--vllm_server_base_url {url} is not a server's URL: expected one like http://host:8000")
    if parts.path.rstrip("/").endswith("/v1"):
        raise UserError(f"--vllm_server_base_url {url}: leave out /v1, which is one of the server's routes")
    return url.rstrip("/")


def _from_hosts_and_ports(servers: ServersConfig) -> list[str]:
    hosts, ports = servers.vllm_server_host, servers.vllm_server_port
    if not hosts or not ports:
        raise UserError("--vllm_server_host and --vllm_server_port need at least one value each")
    if len(hosts) != len(ports) and 1 not in (len(hosts), len(ports)):
        raise UserError(
            f"--vllm_server_host has {len(hosts)} values and --vllm_server_port has {len(ports)}: give one port for "
            "each host, one port for all hosts, or one host with several ports"
        )
    count = max(len(hosts), len(ports))
    hosts = hosts * count if len(hosts) == 1 else hosts
    ports = ports * count if len(ports) == 1 else ports
    return [f"http://{_bracketed(host)}:{port}" for host, port in zip(hosts, ports, strict=True)]


def _bracketed(host: str) -> str:
    """The host as a URL has it: an IPv6 address stands in brackets."""
    bare = host.removeprefix("[").removesuffix("]")
    if "/" in host or host.count(":") == 1 or any(letter.isspace() for letter in host):
        raise UserError(
            f"--vllm_server_host {host} is not a host: expected a name or an address, with its port in "
            "--vllm_server_port; for a URL there is --vllm_server_base_url"
        )
    return f"[{bare}]" if ":" in bare else bare
