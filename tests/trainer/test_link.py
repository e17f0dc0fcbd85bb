"""The trainer's end of the conversation, with a real child process on the other end."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.contract.errors import UserError
from outrider.contract.feed import Begin
from outrider.observe.config import LoggingConfig
from outrider.observe.panel import make_panel
from outrider.trainer.link import CollectorLink, Interrupted


@pytest.fixture
def asked_to_stop() -> list[bool]:
    return []


@pytest.fixture
def link(tmp_path: Path, asked_to_stop: list[bool]) -> Iterator[CollectorLink]:
    panel = make_panel(LoggingConfig(panel="off"), "run", 1, 0)
    made = CollectorLink(panel, lambda: bool(asked_to_stop), tmp_path / "collector.log")
    yield made
    made.kill()


def child(link: CollectorLink) -> int:
    assert link._process is not None
    return link._process.pid


def test_what_the_collector_cannot_use_is_told(link: CollectorLink) -> None:
    link.start(b"no specification")
    with pytest.raises(UserError, match="collector: ValidationError"):
        link.ready(60)
    link.stop("it has failed")


def test_a_message_to_a_dead_collector_does_not_wait(link: CollectorLink, tmp_path: Path) -> None:
    link.start(b"no specification")
    with pytest.raises(UserError):
        link.ready(60)
    link.send(Begin(first=0, end=1))
    with pytest.raises(UserError, match=r"ended with exit code 1 while the trainer waited for a batch") as caught:
        link.batch()
    assert str(tmp_path / "collector.log") in str(caught.value)


def test_a_collector_that_does_not_get_as_far_as_to_listen(
    link: CollectorLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\nexit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(UserError, match=r"ended with exit code 3 while the trainer waited for it to start"):
        link.start(b"")


def test_the_user_may_stop_while_the_collector_starts(link: CollectorLink, asked_to_stop: list[bool]) -> None:
    asked_to_stop.append(True)
    with pytest.raises(Interrupted):
        link.start(b"")
    os.kill(child(link), signal.SIGKILL)
