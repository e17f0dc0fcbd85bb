"""What vLLM loads into each of its processes, as a general plugin: none of them outlives the one that started it.

In servers that `outrider rollout` did not start it does nothing.
"""

import os

from outrider.contract.lifetime import die_with_parent
from outrider.server.vllm_engine.settings import VARIABLE


def load() -> None:
    """The entry point."""
    if VARIABLE in os.environ:
        die_with_parent()
