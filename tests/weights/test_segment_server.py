"""Under which address other hosts reach this one."""

import ipaddress
import subprocess
import sys

import pytest

from outrider.weights.segment_server import address_towards, outward_address


def test_names_that_mean_nothing_here_are_passed_over() -> None:
    assert outward_address("no-such-host.invalid", "", "127.0.0.1") == outward_address("127.0.0.1")


def test_a_loopback_address_is_the_last_choice() -> None:
    """As where a server's name is resolved to 127.0.1.1, or it is reached through a tunnel."""
    try:
        expected = address_towards("192.0.2.1")
    except OSError:
        expected = "127.0.0.1"
    assert outward_address("127.0.1.1") == expected
    if not ipaddress.ip_address(expected).is_loopback:
        assert outward_address("127.0.1.1", expected) == expected


def test_hosts_without_a_way_out_keep_what_there_is() -> None:
    program = "from outrider.weights.segment_server import outward_address as a; print(a('127.0.0.1'))"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", sys.executable, "-c", program],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no network namespaces: {done.stderr.strip()[-200:]}")
    assert done.stdout.strip() == "127.0.0.1"
