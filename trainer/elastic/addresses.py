"""What a host name resolves to, seen from this host."""

from __future__ import annotations

import ipaddress
import socket


def is_own_address(host: str) -> bool:
    """Whether a name resolves to this host: one can listen at its address only there."""
    for family, kind, protocol, _, address in _resolve(host):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def addresses_of(host: str) -> list[str]:
    """Return the addresses that a name has here; none if it does not resolve."""
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in _resolve(host)))


def is_loopback(address: str) -> bool:
    """Whether an address is loopback; False for text that is no address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def own_address_towards(host: str, port: int) -> str | None:
    """Return the address under which this host is seen from another one, None where there is no route to it.

    Nothing is sent.
    """
    for family, _, _, _, address in _resolve(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address[0], port, *address[2:]))
            except OSError:
                continue
            return str(probe.getsockname()[0]).partition("%")[0]
    return None


def _resolve(host: str) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str | int, ...]]]:
    try:
        return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)  # type: ignore[return-value]
    except OSError:
        return []
