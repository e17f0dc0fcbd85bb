"""``manifest_faults`` finds every way in which a manifest could make a server read where it must not."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from outrider.contract.manifest import DTYPE_BYTES, Manifest, Piece, Segment, TensorEntry, manifest_faults


def manifest(segments: list[int], tensors: list[TensorEntry]) -> Manifest:
    """segments: their lengths."""
    listed = tuple(Segment(host="h", path=f"/dev/shm/{i}", length=length) for i, length in enumerate(segments))
    return Manifest(run_id="r", version=1, model_fingerprint="f", segments=listed, tensors=tuple(tensors))


@st.composite
def sound_manifests(draw: st.DrawFn) -> Manifest:
    """Tensors of any shape, cut anywhere into pieces that lie in any order in several segments."""
    ends = [0] * draw(st.integers(1, 3))
    tensors = []
    for index in range(draw(st.integers(0, 5))):
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        entry = TensorEntry(name=f"t{index}", dtype=dtype, shape=shape, pieces=())
        cuts = sorted(draw(st.lists(st.integers(0, entry.nbytes), max_size=3)))
        pieces = []
        for start, end in zip([0, *cuts], [*cuts, entry.nbytes], strict=True):
            segment = draw(st.integers(0, len(ends) - 1))
            pieces.append(Piece(segment=segment, offset=ends[segment], length=end - start, checksum=0))
            ends[segment] += end - start + draw(st.integers(0, 63))
        tensors.append(replace(entry, pieces=tuple(pieces)))
    return manifest(ends, tensors)


@given(sound_manifests())
def test_a_sound_one_has_none_and_survives_the_wire(sound: Manifest) -> None:
    assert manifest_faults(sound) == []
    assert msgspec.json.decode(msgspec.json.encode(sound), type=Manifest) == sound
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sound), type=Manifest) == sound
    assert sound.nbytes == sum(piece.length for tensor in sound.tensors for piece in tensor.pieces)


_numbers = st.integers(-3, 12) | st.integers()
_pieces = st.builds(Piece, segment=_numbers, offset=_numbers, length=_numbers, checksum=_numbers)
_tensors = st.builds(
    TensorEntry,
    name=st.sampled_from("abc"),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    shape=st.lists(_numbers, max_size=2).map(tuple),
    pieces=st.lists(_pieces, max_size=2).map(tuple),
)


@given(st.lists(_numbers, max_size=2), st.lists(_tensors, max_size=3))
def test_one_without_faults_stays_within_its_segments(segments: list[int], tensors: list[TensorEntry]) -> None:
    """Whatever the figures are: either a fault is found, or reading the pieces fills each tensor exactly."""
    given_manifest = manifest(segments, tensors)
    if manifest_faults(given_manifest):
        return
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        read = [len(range(segments[p.segment])[p.offset : p.offset + p.length]) for p in tensor.pieces]
        assert read == [piece.length for piece in tensor.pieces]
        assert sum(read) == tensor.nbytes


_DAMAGE: dict[str, Callable[[Piece, int], Piece]] = {
    "shorter": lambda piece, by: replace(piece, length=piece.length - by),
    "longer": lambda piece, by: replace(piece, length=piece.length + by),
    "before its segment": lambda piece, by: replace(piece, offset=-by),
    "beyond its segment": lambda piece, by: replace(piece, offset=10_000 + by),
    "in no segment": lambda piece, by: replace(piece, segment=2 + by),
    "in a negative segment": lambda piece, by: replace(piece, segment=-by),
}


@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=_DAMAGE.keys())
@given(sound=sound_manifests(), by=st.integers(1, 100), which=st.integers(0, 100))
def test_a_damaged_piece_is_found(damage: Callable[[Piece, int], Piece], sound: Manifest, by: int, which: int) -> None:
    if not sound.tensors:
        return
    tensor = sound.tensors[which % len(sound.tensors)]
    broken = replace(tensor, pieces=(damage(tensor.pieces[0], by), *tensor.pieces[1:]))
    faults = manifest_faults(
        replace(sound, tensors=tuple(broken if each is tensor else each for each in sound.tensors))
    )
    assert any(repr(tensor.name) in fault for fault in faults)


def test_faults_are_words_for_a_person() -> None:
    piece = Piece(segment=0, offset=4, length=8, checksum=0)
    entry = TensorEntry(name="w", dtype="float32", shape=(3,), pieces=(piece,))
    assert manifest_faults(manifest([8], [entry, entry])) == [
        "a tensor is listed twice",
        *["tensor 'w': its pieces hold 8 bytes, its shape needs 12", "tensor 'w': a piece ends beyond its segment"] * 2,
    ]
    assert manifest_faults(manifest([-1], [])) == ["segment /dev/shm/0: its length -1 is negative"]
