"""How many GPUs this process may use, found without torch and without a context on any of them."""

import contextlib
import ctypes
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version


def visible_gpus(environment: Mapping[str, str]) -> int:
    """As torch would count them: those of the driver, or those of them that CUDA_VISIBLE_DEVICES names; 0 where torch
    is built without CUDA."""
    with contextlib.suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return 0
    return count_visible(_driver_gpus(), environment.get("CUDA_VISIBLE_DEVICES"))


def count_visible(present: int, named: str | None) -> int:
    """GPUs of ``present`` that a list of CUDA_VISIBLE_DEVICES leaves visible. CUDA reads it up to the first entry that
    names none."""
    if named is None:
        return present
    count = 0
    for entry in map(str.strip, named.split(",")):
        if not entry or entry.startswith("-") or (entry.isdecimal() and int(entry) >= present):
            break
        count += 1
    return min(count, present)


def _driver_gpus() -> int:
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
        found = ctypes.c_uint(0)
        if driver.nvmlInit_v2() != 0:
            return 0
        driver.nvmlDeviceGetCount_v2(ctypes.byref(found))
        driver.nvmlShutdown()
    except (OSError, AttributeError):  # no driver, or one without these functions
        return 0
    return found.value
