"""Servers with real vLLM: these tests run where it is installed, by `make test-vllm`."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outrider.server.vllm_engine.command import vllm_version
from tests.contract.servers import Server, start_vllm
from tests.server.models import save_endless_model

KEY = "a key for tests"

#: ``start(*flags, seed=0)``: a server of a random endless model.
StartEndless = Callable[..., Server]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if vllm_version() is None:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents and item.get_closest_marker("real_vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: `make test-vllm` installs it"))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A model by its seed."""
    return functools.cache(lambda seed: save_endless_model(tmp_path_factory.mktemp("endless"), seed))


@pytest.fixture
def start_endless(endless: Callable[[int], Path], tmp_path: Path) -> Iterator[StartEndless]:
    started: list[Server] = []

    def start(*flags: str, seed: int = 0) -> Server:
        directory = tmp_path / f"server{len(started)}"
        directory.mkdir()
        started.append(start_vllm(endless(seed), directory, "--max_num_seqs", "16", *flags, key=KEY))
        return started[-1]

    yield start
    for server in started:
        server.kill()
