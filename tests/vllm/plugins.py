"""Modules of this room as plugins of vLLM, which calls their ``register`` in each of its processes."""

import os
from pathlib import Path


def install(directory: Path, name: str) -> dict[str, str]:
    """Make an installed distribution of module ``name`` in ``directory``; returns the environment by which vLLM
    finds it."""
    information = directory / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = tests.vllm.{name}:register\n")
    paths = [str(directory), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
