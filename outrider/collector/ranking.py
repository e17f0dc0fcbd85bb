"""The least loaded server, without a look at every one of them for every request."""

from bisect import bisect_left, insort
from typing import TypeAlias

from outrider.collector.server import Server

#: Load, number of the server, server. The number makes places comparable.
_Place: TypeAlias = tuple[float, int, Server]


class Ranking:
    """Servers that take work, by version, each version's in the order of their load.

    A change of one server moves one entry of a sorted list. Versions in use at a time are few: K + 1 or so.
    """

    def __init__(self) -> None:
        self._by_version: dict[int, list[_Place]] = {}
        self._places: dict[Server, tuple[int, _Place]] = {}  # version and place of those that are listed
        self._numbers: dict[Server, int] = {}

    def place(self, server: Server) -> bool:
        """A server's load, version or readiness may be another. Returns whether it takes work that it did not take
        before: it has become ready, or holds another version."""
        listed = self._places.pop(server, None)
        if listed is not None:
            version, place = listed
            ranks = self._by_version[version]
            del ranks[bisect_left(ranks, place)]
            if not ranks:
                del self._by_version[version]
        if not server.ready:
            return False
        place = (server.load, self._numbers.setdefault(server, len(self._numbers)), server)
        insort(self._by_version.setdefault(server.version, []), place)
        self._places[server] = server.version, place
        return listed is None or listed[0] != server.version

    def least_loaded(self, at_least: int, avoid: Server | None = None) -> Server | None:
        """The least loaded server that holds version ``at_least`` or a later one; of equals the newest version. avoid:
        taken only if there is no other."""
        best: tuple[float, int, Server] | None = None
        for version, ranks in self._by_version.items():
            load, _, server = ranks[0]
            if server is avoid and len(ranks) > 1:
                load, _, server = ranks[1]
            if version < at_least or server is avoid:
                continue
            if best is None or (load, -version) < best[:2]:
                best = (load, -version, server)
        if best is not None:
            return best[2]
        return avoid if avoid in self._places and avoid.version >= at_least else None
