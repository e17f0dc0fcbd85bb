"""Run as a script, ``guard.py GROUP DIRECTORY``: waits until whoever holds the other end of its standard input is gone,
however it went, and then ends all processes of the group and removes the directory. vLLM's processes outlive a parent
that is killed."""

import contextlib
import os
import shutil
import signal
import sys

if __name__ == "__main__":
    while sys.stdin.buffer.read(1):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    shutil.rmtree(sys.argv[2], ignore_errors=True)
