"""Servers of the contract tests: one of each kind per engine, shared by every test that leaves it as it was."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from outrider.contract.keys import client_key
from tests.contract.client import Client
from tests.contract.servers import ENGINES, STARTERS, Server
from tests.contract.speaking import save_speaking_model
from tests.server.models import save_endless_model

#: Key of the servers that are given one; the shared server makes its own.
KEY = "a key for tests"

#: A random model, by seed, that never ends a text of its own accord.
EndlessModel = Callable[[int], Path]


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def server(engine: str, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the demo's model at version 0 and keeps a key file. Tests do not change its weights."""
    flags = ("--max_num_seqs", "32", "--max_model_len", "128")
    server = STARTERS[engine](demo_model, tmp_path_factory.mktemp("server"), *flags)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def key(server: Server) -> str:
    """The shared server's key, found as a trainer of the same user finds it."""
    return client_key(None)


@pytest.fixture
async def client(server: Server, key: str) -> AsyncIterator[Client]:
    async with Client(server.url, key) as client:
        yield client


@pytest.fixture(scope="session")
def speaking_server(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a model that babbles in bytes and knows conversations; see ``save_speaking_model``."""
    directory = tmp_path_factory.mktemp("speaking-server")
    model = save_speaking_model(tmp_path_factory.mktemp("speaking"))
    server = STARTERS[engine](model, directory, "--max_num_seqs", "16", key=KEY)
    yield server
    server.kill()


@pytest.fixture
async def speaking_client(speaking_server: Server) -> AsyncIterator[Client]:
    async with Client(speaking_server.url, KEY) as client:
        yield client


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> EndlessModel:
    return functools.cache(lambda seed: save_endless_model(tmp_path_factory.mktemp("endless"), seed))


@pytest.fixture(scope="session")
def weights_server(
    engine: str, endless_model: EndlessModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Serves an endless model whose weights tests may change: each commits what it relies on."""
    directory = tmp_path_factory.mktemp("weights-server")
    server = STARTERS[engine](endless_model(0), directory, "--max_num_seqs", "16", key=KEY)
    yield server
    server.kill()


@pytest.fixture
async def weights_client(weights_server: Server) -> AsyncIterator[Client]:
    async with Client(weights_server.url, KEY) as client:
        yield client


@pytest.fixture
def start_endless(engine: str, endless_model: EndlessModel, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``start(*flags, seed=0)``: a server of the test's own."""
    started: list[Server] = []

    def start(*flags: str, seed: int = 0) -> Server:
        started.append(STARTERS[engine](endless_model(seed), tmp_path, *flags, key=KEY))
        return started[-1]

    yield start
    for server in started:
        server.kill()
