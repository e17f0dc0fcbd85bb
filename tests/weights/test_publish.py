"""The trainer's side: versions in two alternating segments, and what becomes of the segments."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from outrider.contract.errors import UserError
from outrider.contract.manifest import DTypeName, Manifest, manifest_faults
from outrider.weights.checksums import FetchError
from outrider.weights.fetch import fetch_tensors
from outrider.weights.publish import BUFFERS, Publisher
from outrider.weights.segments import remove_stale_segments

Publish = Callable[..., Publisher]


@pytest.fixture
def publisher_of() -> Iterator[Publish]:
    """``publisher_of(tensors, dtype="float32", run_id="run", ...)``, closed at the end."""
    made: list[Publisher] = []

    def make(
        tensors: dict[str, Tensor], dtype: DTypeName = "float32", run_id: str = "run", **more: object
    ) -> Publisher:
        made.append(Publisher(tensors, dtype, run_id, "fingerprint", more.pop("segment_url", None), **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


def fetched(manifest: Manifest, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a server of this host gets."""
    targets = {entry.name: torch.full(entry.shape, torch.nan, dtype=dtype) for entry in manifest.tensors}
    fetch_tensors(manifest, targets, "key")
    return targets


def odd_tensors() -> dict[str, Tensor]:
    """Sizes and layouts that do not end on any boundary."""
    torch.manual_seed(0)
    return {
        "scalar": torch.randn(()),
        "one": torch.randn(1),
        "odd": torch.randn(3, 5, 7),
        "transposed": torch.randn(6, 11).T,
        "strided": torch.randn(40)[::3],
        "expanded": torch.randn(1, 4).expand(5, 4),
        "empty": torch.randn(0, 8),
        "double": torch.randn(9, dtype=torch.float64),
        "half": torch.randn(13).half(),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("serving", [torch.float32, torch.bfloat16])
def test_what_is_fetched_is_what_was_published(publisher_of: Publish, dtype: DTypeName, serving: torch.dtype) -> None:
    tensors = odd_tensors()
    manifest = publisher_of(tensors, dtype).publish(3).result()
    assert manifest_faults(manifest) == []
    assert (manifest.version, manifest.run_id, manifest.model_fingerprint) == (3, "run", "fingerprint")
    got = fetched(manifest, serving)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(got[name], tensor.to(getattr(torch, dtype)).to(serving)), name


def test_values_that_are_not_numbers_arrive_as_they_are(publisher_of: Publish) -> None:
    """Whether to use them is not for the transport to say."""
    tensor = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-42])
    got = fetched(publisher_of({"w": tensor}).publish(1).result())["w"]
    assert got.numpy().tobytes() == tensor.numpy().tobytes()


def test_tied_weights_are_published_once(publisher_of: Publish, demo_model: Path) -> None:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    names = {entry.name for entry in publisher_of(dict(model.named_parameters())).publish(1).result().tensors}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert names <= model.state_dict().keys()


def test_two_versions_are_there_at_once_and_the_third_replaces_the_first(publisher_of: Publish) -> None:
    tensor = torch.zeros(1000)
    publisher = publisher_of({"w": tensor})
    manifests = []
    for version in range(3):
        tensor.fill_(version)
        manifests.append(publisher.publish(version).result())
    assert len({manifest.segments[0].path for manifest in manifests}) == BUFFERS == 2
    assert fetched(manifests[1])["w"].unique().tolist() == [1]
    assert fetched(manifests[2])["w"].unique().tolist() == [2]
    with pytest.raises(FetchError, match=r"tensor 'w'.*checksum"):
        fetched(manifests[0])


def test_a_version_does_not_follow_the_weights(publisher_of: Publish) -> None:
    """After ``wait`` the optimizer may go on: what was published stays what it was."""
    tensor = torch.ones(1000)
    publisher = publisher_of({"w": tensor})
    publisher.publish(1)
    assert publisher.wait() >= 0
    tensor.zero_()
    assert publisher.wait() == 0, "nothing is being copied any more"
    manifest = publisher.publish(2).result()
    assert fetched(manifest)["w"].unique().tolist() == [0]


def test_every_version_is_announced_before_it_counts_as_done(publisher_of: Publish) -> None:
    announced: list[Manifest] = []
    publisher = publisher_of({"w": torch.ones(3)}, announce=announced.append, segment_url="http://node:1/segments")
    done = [publisher.publish(version).result() for version in (1, 2)]
    assert announced == done
    [segment] = done[0].segments
    assert segment.url == f"http://node:1/segments/{Path(segment.path).name}"


def test_what_goes_wrong_with_a_version_comes_out_of_the_next_call(publisher_of: Publish) -> None:
    def fail(manifest: Manifest) -> None:
        raise RuntimeError("nobody listens")

    publisher = publisher_of({"w": torch.ones(3)}, announce=fail)
    publisher.publish(1)
    with pytest.raises(RuntimeError, match="nobody listens"):
        publisher.finish()
    publisher.finish()
    publisher.publish(2)
    with pytest.raises(RuntimeError, match="nobody listens"):
        publisher.publish(3)


def test_close_removes_the_segments_twice_over(publisher_of: Publish, segment_directory: Path) -> None:
    publisher = publisher_of({"w": torch.ones(3)})
    publisher.publish(1)
    assert len(list(segment_directory.iterdir())) == BUFFERS
    publisher.close()
    assert list(segment_directory.iterdir()) == []
    publisher.close()


def test_shared_memory_that_is_full(
    publisher_of: Publish, segment_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second segment does not fit any more: the user is told, and the first one is given back."""
    reserve = os.posix_fallocate

    def fallocate(descriptor: int, offset: int, length: int) -> None:
        if len(list(segment_directory.iterdir())) == BUFFERS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(UserError, match=r"2 x 4 MiB do not fit in .*No space left.*--shm-size"):
        publisher_of({"w": torch.ones(2**20)})
    assert list(segment_directory.iterdir()) == []


def test_the_segments_of_another_publisher_are_left_alone(publisher_of: Publish) -> None:
    first = publisher_of({"w": torch.ones(3)})
    manifest = first.publish(1).result()
    with pytest.raises(UserError, match="File exists"):
        publisher_of({"w": torch.ones(3)})
    assert fetched(manifest)["w"].tolist() == [1, 1, 1]


_CHILD = """
import sys, time
from pathlib import Path
import outrider.weights.segments as segments
segments.segment_directory = lambda: Path(sys.argv[1])
import torch
from outrider.weights.publish import Publisher
publisher = Publisher({"w": torch.ones(8)}, "float32", "killed", "f", None)
publisher.publish(1).result()
print("published", flush=True)
time.sleep(600)
"""


def test_only_the_segments_of_the_dead_are_removed(publisher_of: Publish, segment_directory: Path) -> None:
    """A publisher that was killed leaves its segments behind; the next trainer of the host clears them away."""
    living = publisher_of({"w": torch.ones(3)}, run_id="living")
    manifest = living.publish(1).result()
    (segment_directory / "outrider-notes").write_text("not a segment")
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(segment_directory)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"published\n"
        assert remove_stale_segments() == 0, "its publisher lives, in another process"
        child.send_signal(signal.SIGKILL)
        child.wait(60)
        assert len(list(segment_directory.glob("outrider-killed-*"))) == BUFFERS
        assert remove_stale_segments() == BUFFERS
    finally:
        child.kill()
        child.wait(60)
        child.stdout.close()
    assert list(segment_directory.glob("outrider-killed-*")) == []
    assert (segment_directory / "outrider-notes").exists()
    assert fetched(manifest)["w"].tolist() == [1, 1, 1]
    assert remove_stale_segments() == 0
