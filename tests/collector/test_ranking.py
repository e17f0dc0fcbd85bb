"""The ranking against a look at every server."""

from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collector.ranking import Ranking
from tests.collector.bare import INFO, bare_server, change

COUNT = 6

changes = st.lists(
    st.tuples(
        st.integers(0, COUNT - 1),
        st.sampled_from(["occupy", "vacate", "up", "down", "holds", "doubt", "trust", "drain"]),
        st.integers(0, 4),
    ),
    max_size=120,
)


@settings(deadline=None)
@given(changes=changes)
def test_the_least_loaded_is_found(changes: list[tuple[int, str, int]]) -> None:
    """After any history, for every version asked for; and what joins is told apart from what only changes its load."""
    servers, ranking = [bare_server(limit=1 + number % 3) for number in range(COUNT)], Ranking()
    for server in servers:
        server.up(INFO)
        server.holds(0)
        assert ranking.place(server)
    for number, kind, figure in changes:
        server = servers[number]
        before = (server.ready, server.version)
        change(server, kind, figure)
        after = (server.ready, server.version)
        assert ranking.place(server) == (server.ready and before != after)
        for at_least in range(6):
            able = [other for other in servers if other.ready and other.version >= at_least]
            found = ranking.least_loaded(at_least)
            if not able:
                assert found is None
            else:
                assert found in able
                assert (found.load, -found.version) == min((other.load, -other.version) for other in able)
            rest = [other for other in able if other is not server]
            found = ranking.least_loaded(at_least, avoid=server)
            if not rest:
                assert found is (server if able else None)
            else:
                assert found in rest
                assert (found.load, -found.version) == min((other.load, -other.version) for other in rest)
