"""A directory for segments of the test's own, so that nobody else's are counted or removed."""

from pathlib import Path

import pytest

import outrider.weights.publish
import outrider.weights.segment_server
import outrider.weights.segments


@pytest.fixture(autouse=True)
def segment_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (outrider.weights.segments, outrider.weights.publish, outrider.weights.segment_server):
        monkeypatch.setattr(module, "segment_directory", lambda: tmp_path)
    return tmp_path
