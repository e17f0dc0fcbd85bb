"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

# Small models: threads would only fight each other on the few cores of a test machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
