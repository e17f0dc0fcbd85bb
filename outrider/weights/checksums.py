"""Whether the bytes of a published version are those of its manifest, where they lie; imports no torch."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import xxhash

from outrider.contract.manifest import Manifest, Piece, Segment, TensorEntry

#: Threads that compute checksums of a version in shared memory.
CHECKERS = min(8, os.cpu_count() or 1)


class FetchError(Exception):
    """A published version cannot be read, or its bytes are not those of its manifest."""


class Segments:
    """Segments of this host, mapped from when they are first asked for until their files are gone. So the kernel need
    not find their pages, which are millions, each time."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[str, int, int], memoryview] = {}

    def check(self, manifest: Manifest) -> None:
        """Verify all pieces. Whoever has copied them before then knows that the copies are right: bytes that have been
        overwritten do not turn back. Raises FetchError."""
        for file in [file for file in self._mapped if is_gone(*file[:2])]:
            del self._mapped[file]
        segments = [self._map(segment) for segment in manifest.segments]
        pieces = [(tensor, piece) for tensor in manifest.tensors for piece in tensor.pieces if piece.length]

        def check(item: tuple[TensorEntry, Piece]) -> None:
            tensor, piece = item
            check_piece(tensor, piece, segments[piece.segment][piece.offset : piece.offset + piece.length])

        with ThreadPoolExecutor(max_workers=CHECKERS) as pool:
            list(pool.map(check, pieces))

    def _map(self, segment: Segment) -> memoryview:
        try:
            status = os.stat(segment.path)
            key = (segment.path, status.st_ino, status.st_size)
            if key not in self._mapped:
                self._mapped[key] = map_segment(segment)
            return self._mapped[key]
        except OSError as error:
            raise FetchError(f"segment {segment.path}: {error}") from error


def is_gone(path: str, inode: int) -> bool:
    """Whether a file has been removed, or another one is in its place."""
    try:
        return os.stat(path).st_ino != inode
    except OSError:
        return True


def map_segment(segment: Segment) -> memoryview:
    """Its bytes. Raises FetchError."""
    try:
        with open(segment.path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), segment.length, access=mmap.ACCESS_READ))
    except (OSError, ValueError, OverflowError) as error:
        raise FetchError(f"segment {segment.path}: {error}") from error


def check_piece(entry: TensorEntry, piece: Piece, data: memoryview) -> None:
    """Raises FetchError for bytes that are not those of the piece."""
    if xxhash.xxh3_64_intdigest(data) != piece.checksum:
        raise FetchError(
            f"tensor {entry.name!r}: the bytes at offset {piece.offset} of segment {piece.segment} do not have the "
            "manifest's checksum (overwritten by a newer version, or corrupt)"
        )
