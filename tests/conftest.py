"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from outrider.contract.garbage import search_less_often

# An example that another process keeps from the core is none that fails.
settings.register_profile("outrider", deadline=None)
settings.load_profile("outrider")

# Small models: threads would only fight each other on the few cores of a test machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish() -> None:
    """Servers and trainers go on while this process looks for cycles in all that has been imported: a quarter of a
    second, in which tests miss what they wait for."""
    search_less_often()


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keys made by tests do not end up in the home of whoever runs them."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    from tests.server.models import DEMO_MODEL

    return DEMO_MODEL


@pytest.fixture(scope="session", params=["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3"])
def random_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random model, one architecture after the other."""
    from tests.server.models import save_model

    return save_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends a text of its own accord."""
    from tests.server.models import save_endless_model

    return save_endless_model(tmp_path_factory.mktemp("endless"))
