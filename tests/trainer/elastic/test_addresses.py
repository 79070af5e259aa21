import socket

import pytest

from papilio.trainer.elastic.addresses import addresses_of, is_loopback, is_own_address, own_address_towards

NOT_HERE = "192.0.2.7"  # RFC 5737: of no host


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("fd00::1", False), ("", False), ("no address", False)],
)
def test_what_leads_nowhere_but_home(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_a_name_is_this_hosts_if_one_can_listen_there() -> None:
    assert is_own_address("localhost")
    assert not is_own_address(NOT_HERE)
    assert not is_own_address("no-such-host.invalid")


def test_names_that_do_not_resolve_have_no_address() -> None:
    assert addresses_of("no-such-host.invalid") == []
    assert addresses_of("127.0.0.1") == ["127.0.0.1"]


def test_the_way_home_is_by_loopback() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        assert own_address_towards("127.0.0.1", server.getsockname()[1]) == "127.0.0.1"
    assert own_address_towards("no-such-host.invalid", 1) is None
