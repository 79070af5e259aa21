"""Do the hosts find each other by name, and do their ports let data through?"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from papilio.launch.preflight.facts import Card, Reached
from papilio.launch.preflight.wire import Line, SilenceError, listen, plain_address, why_not
from papilio.trainer.elastic.addresses import is_loopback

# More than one packet of any network: where packets of full size are dropped, a connection opens and then stalls.
PARCEL_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 4.0  # room for the second try of TCP, after 3 s
ECHO_TIMEOUT_S = 5.0
TOO_LARGE = "packets of full size may be dropped"
SIOCGIFADDR = 0x8915  # <linux/sockios.h>: address of an interface


class DataPort:
    """A port of this host that confirms what arrives at it, in threads, until it is closed."""

    def __init__(self, token: str, port: int = 0) -> None:
        """Open a port (0: a free one); the token says whose it is."""
        self._server = listen(port)
        self.port = int(self._server.getsockname()[1])
        self._token = token
        threading.Thread(target=self._serve, name="data_port", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        # Closing alone would leave the thread in accept().
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._confirm, args=(Line(connection),), name="confirm", daemon=True).start()

    def _confirm(self, line: Line) -> None:
        with contextlib.suppress(SilenceError):
            parcel = line.receive(ECHO_TIMEOUT_S)
            line.send({"token": self._token, "parcel": parcel}, ECHO_TIMEOUT_S)
        line.close()


def reach_all(own_index: int, cards: Sequence[Card | None]) -> tuple[Reached, ...]:
    """Resolve the name of every other host and send a parcel to its data port, all at once."""
    others = [(index, card) for index, card in enumerate(cards) if card is not None and index != own_index]
    if not others:
        return ()
    with ThreadPoolExecutor(min(64, len(others))) as pool:
        return tuple(pool.map(lambda other: _reach(*other), others))


def gloo_address(name: str) -> str:
    """Return the address that gloo gives the other ranks: its interface's, else that of this host's own name."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface:
        return address_of_interface(interface) or "no such interface"
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return "127.0.0.1"  # gloo's fallback
    return plain_address(str(found[0][4][0]))


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an (IPv4) address; empty if none is found."""
    return next((name for _, name in socket.if_nameindex() if address_of_interface(name) == address), "")


def address_of_interface(name: str) -> str:
    """Return the IPv4 address of a network interface, empty if it has none."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _reach(index: int, card: Card) -> Reached:
    addresses, name_error = resolve(card.name)
    reverse_error = "" if name_error or card.name in addresses else _reverse_error(addresses[0])
    # The name is what torch will use; where it leads nowhere, the address tells whether the port at least is open.
    address = addresses[0] if addresses else card.address
    if is_loopback(address) and not is_loopback(card.address):
        name_error = f"resolves to {address}, which leads every host to itself"
        address = card.address
    return Reached(
        host=index,
        addresses=addresses,
        name_error=name_error,
        reverse_error=reverse_error,
        port_error=send_parcel(address, card.data_port, card.token),
        tried=f"{address}:{card.data_port}",
    )


def _reverse_error(address: str) -> str:
    try:
        socket.gethostbyaddr(address)
    except OSError as error:
        return f"{address} has no name: {(error.strerror or str(error)).lower()}"
    return ""


def resolve(name: str) -> tuple[tuple[str, ...], str]:
    """Return the addresses of a name and, where there are none, why."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        return (), why_not(error) if isinstance(
            error, TimeoutError
        ) else f"does not resolve ({error.strerror or error})"
    return tuple(dict.fromkeys(plain_address(str(address[0])) for *_, address in found)), ""


def send_parcel(address: str, port: int, token: str) -> str:
    """Send a parcel to the host with this token and hear that it came; return what went wrong, or nothing."""
    parcel = os.urandom(PARCEL_BYTES // 2).hex()
    try:
        line = Line(socket.create_connection((address, port), CONNECT_TIMEOUT_S))
    except OSError as error:
        return why_not(error)
    try:
        line.send(parcel, ECHO_TIMEOUT_S)
        answer = line.receive(ECHO_TIMEOUT_S)
    except SilenceError as error:
        return f"opens, but {PARCEL_BYTES >> 10} KiB do not come through ({error}); {TOO_LARGE}"
    finally:
        line.close()
    if not isinstance(answer, dict) or answer.get("token") != token:
        return "leads to another host than its own"
    return "" if answer["parcel"] == parcel else "gives back other bytes than were sent"
