"""Where the hosts of a job meet before any torch is loaded: the first host listens, the others come to it.

All hosts then run the same steps and exchange what they found with `Meeting.gather`. Every wait has a limit; a host
that never comes, or falls silent, is known by its number and why, and the others go on without it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from papilio.launch.preflight.wire import Line, SilenceError, listen, why_not
from papilio.trainer.elastic.addresses import is_own_address

NUM_CLOCK_QUESTIONS = 5
HANDSHAKE_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
RETRY_S = 0.2
TELL_S = 5.0
SMALL_SEGMENT_BYTES = 536  # what every network carries (RFC 879)
MAX_NAMED = 8
# What the head needs beyond the limit of a step, to hear of all and to answer.
ANSWER_MARGIN_S = 10.0


class MeetingError(ValueError):
    """This host cannot take part: it cannot listen, or does not reach the first host."""


@dataclass(frozen=True)
class Place:
    """This host in the job: its number (None: the first host gives it one) and where the hosts meet."""

    num_hosts: int
    head: str
    port: int
    job: str
    index: int | None
    wait_s: float

    @property
    def endpoint(self) -> str:
        """Where the hosts meet, as messages show it."""
        return f"{self.head}:{self.port}"


@dataclass(frozen=True)
class Excuse:
    """Why a host does not come, as it said itself where the first host can read it; None for a number not given."""

    index: int | None
    name: str
    why: str


@dataclass
class Meeting:
    """The hosts that came, in the same order on all of them.

    `roster` has each host's card, None for those that did not come; `absent` says why, by number. `clock_ahead_s` is by
    how much this host's clock is ahead of the first host's, and `clock_error_s` how far off that may be.
    """

    place: Place
    index: int
    lines: dict[int, Line]
    roster: list[dict[str, Any] | None]
    absent: dict[int, str] = field(default_factory=dict)
    clock_ahead_s: float = 0.0
    clock_error_s: float = 0.0
    arrived_s: float = 0.0
    absent_names: dict[int, str] = field(default_factory=dict)

    @property
    def is_head(self) -> bool:
        """Whether this is the first host."""
        return self.index == 0

    @property
    def present(self) -> list[int]:
        """Numbers of the hosts that are still there."""
        return [index for index, card in enumerate(self.roster) if card is not None and index not in self.absent]

    def gather(self, what: str, value: Any, timeout_s: float) -> list[Any]:
        """Return every host's value, by number; None for a host that is not there. All present hosts call this.

        Raises:
            MeetingError: the first host does not answer any more.
        """
        if self.is_head:
            return self._gather_at_head(what, value, timeout_s)
        line = self.lines[0]
        try:
            line.send([what, value], ANSWER_MARGIN_S)
            answer = line.receive(timeout_s + ANSWER_MARGIN_S)
        except SilenceError as error:
            raise MeetingError(
                f"the first host ({self.place.endpoint}) fell silent while the hosts exchanged {what}: {error}; look "
                "at its log"
            ) from None
        self.absent = {int(index): why for index, why in answer["absent"].items()}
        values: list[Any] = answer["values"]
        return values

    def close(self) -> None:
        """End the connections."""
        for line in self.lines.values():
            line.close()

    def _gather_at_head(self, what: str, value: Any, timeout_s: float) -> list[Any]:
        values: list[Any] = [None] * self.place.num_hosts
        values[0] = value

        def hear(index: int) -> None:
            try:
                said, found = self.lines[index].receive(timeout_s)
                if said != what:
                    raise SilenceError(f"it spoke of {said} when it was asked for {what}")
                values[index] = found
            except SilenceError as error:
                self.absent[index] = f"fell silent while the hosts exchanged {what}: {error}"

        guests = [index for index in self.present if index]
        _at_once(hear, guests)
        answer = {"values": values, "absent": self.absent}

        def tell(index: int) -> None:
            try:
                self.lines[index].send(answer, ANSWER_MARGIN_S)
            except SilenceError as error:
                self.absent[index] = f"fell silent after the hosts exchanged {what}: {error}"

        _at_once(tell, guests)
        return values


def open_meeting(
    place: Place,
    card: Mapping[str, Any],
    now: Callable[[], float],
    *,
    note: Callable[[str], None] = lambda why: None,
    absences: Callable[[], Sequence[Excuse]] = tuple,
    tell: Callable[[str], None] = lambda progress: None,
) -> Meeting:
    """Come to the meeting, or hold it on the first host; every host gets the cards of all.

    Args:
        place: this host's number, and where to go.
        card: what the others should know of this host before they know it better.
        now: this host's clock, in seconds since 1970.
        note: called with the reason, each time that the first host is not reached, and with "" once it is.
        excuses: on the first host, what hosts that do not reach it left word of.
        tell: called on the first host, now and then while it waits, with how many are there.

    Raises:
        MeetingError: this host cannot take part; the message names the fix.
    """
    if holds_meeting(place):
        meeting = _receive_guests(place, dict(card), now, absences, tell)
    else:
        meeting = _go(place, dict(card), now, note)
    meeting.roster = meeting.gather("cards", meeting.roster[meeting.index], HANDSHAKE_TIMEOUT_S)
    return meeting


def holds_meeting(place: Place) -> bool:
    """Whether this host is the first one."""
    return place.index == 0 if place.index is not None else is_own_address(place.head)


def _receive_guests(
    place: Place,
    card: dict[str, Any],
    now: Callable[[], float],
    absences: Callable[[], Sequence[Excuse]],
    tell: Callable[[str], None],
) -> Meeting:
    """Wait until all are there, or the time is over."""
    if place.num_hosts == 1:
        return Meeting(place, 0, {}, [card])
    try:
        server = listen(place.port)
    except OSError as error:
        raise MeetingError(
            f"cannot listen on port {place.port} of {place.head}: {why_not(error)}; another job may hold it (`ss -ltnp "
            f"'sport = :{place.port}'` names it): end that one, or take another port with --rdzv-port"
        ) from None
    begin_s = time.monotonic()
    # Where packets of full size are lost, the hosts should still be able to say so.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT_BYTES)
    reception = _Reception(place, now)
    with server:
        thread = threading.Thread(target=reception.run, args=(server,), name="reception", daemon=True)
        thread.start()
        reported_s = begin_s
        while len(reception.lines) < place.num_hosts - 1 and time.monotonic() < begin_s + place.wait_s:
            reception.changed.wait(RETRY_S)
            reception.changed.clear()
            if time.monotonic() > reported_s + TELL_S:
                reported_s = time.monotonic()
                tell(_who_is_missing(reception, place, begin_s))
        reception.is_over = True
    thread.join(HANDSHAKE_TIMEOUT_S)
    lines = dict(reception.lines)
    if lines:
        card["address"] = next(iter(lines.values())).own_address
    meeting = Meeting(place, 0, lines, [card, *(None for _ in range(1, place.num_hosts))])
    meeting.arrived_s = time.monotonic() - begin_s
    never = reception.refused or f"did not come to {place.endpoint} within {place.wait_s:g} s"
    for index in lines:
        meeting.roster[index] = {}
    missing = [index for index in range(1, place.num_hosts) if index not in lines]
    known = {report_absence.index: report_absence for report_absence in absences() if report_absence.index in missing}
    # Of hosts without a number one knows only how many there are.
    unnumbered = iter([report_absence for report_absence in absences() if report_absence.index is None])
    for index in missing:
        report_absence = known.get(index) or next(unnumbered, None) or Excuse(index, "", never)
        meeting.absent_names[index], meeting.absent[index] = report_absence.name, report_absence.why
    return meeting


def _who_is_missing(reception: _Reception, place: Place, begin_s: float) -> str:
    missing = [str(index) for index in range(1, place.num_hosts) if index not in reception.lines]
    shown = ", ".join(missing[:MAX_NAMED]) + (", ..." if len(missing) > MAX_NAMED else "")
    left_s = max(0.0, begin_s + place.wait_s - time.monotonic())
    here = f"{place.num_hosts - len(missing)} of {place.num_hosts} hosts are at {place.endpoint}"
    return f"{here}; waiting up to {left_s:.0f} s for host {shown}"


class _Reception:
    """Greets the hosts that come, each in a thread of its own: gives numbers and answers questions for the time."""

    def __init__(self, place: Place, now: Callable[[], float]) -> None:
        self.lines: dict[int, Line] = {}
        self.changed = threading.Event()
        self.is_over = False
        self.refused = ""
        self._place = place
        self._now = now
        self._taken: set[int] = {0}
        self._lock = threading.Lock()

    def run(self, server: socket.socket) -> None:
        server.settimeout(RETRY_S)
        while not self.is_over:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(Line(connection),), name="greeting", daemon=True).start()

    def _greet(self, line: Line) -> None:
        try:
            hello = line.receive(HANDSHAKE_TIMEOUT_S)
            index, refusal = self._number(hello)
            line.send({"index": index, "refusal": refusal}, HANDSHAKE_TIMEOUT_S)
            while not refusal and line.receive(HANDSHAKE_TIMEOUT_S) == "time":
                line.send(self._now(), HANDSHAKE_TIMEOUT_S)
        except SilenceError:
            refusal = "silence"
        if refusal:
            line.close()
            return
        self.lines[index] = line
        self.changed.set()

    def _number(self, hello: Any) -> tuple[int, str]:
        if not isinstance(hello, dict) or hello.get("job") != self._place.job:
            return -1, f"the preflight that listens at {self._place.endpoint} is of another job"
        with self._lock:
            free = (index for index in range(self._place.num_hosts) if index not in self._taken)
            index = hello["index"] if hello["index"] is not None else next(free, -1)
            if not 0 < index < self._place.num_hosts or index in self._taken:
                self.refused = (
                    f"did not come; instead {hello['name']} came as a second host {index}: the hosts' numbers (0 to "
                    f"{self._place.num_hosts - 1}) must differ"
                )
                return -1, f"there is a host {index} already, of {self._place.num_hosts}"
            self._taken.add(index)
        return index, ""


def _go(place: Place, card: dict[str, Any], now: Callable[[], float], note: Callable[[str], None]) -> Meeting:
    line = _reach(place, note)
    note("")
    try:
        line.send({"job": place.job, "index": place.index, "name": card["name"]}, HANDSHAKE_TIMEOUT_S)
        welcome = line.receive(HANDSHAKE_TIMEOUT_S)
        if welcome["refusal"]:
            raise MeetingError(f"{place.endpoint} refused this host: {welcome['refusal']}")
        ahead_s, error_s = _ask_time(line, now)
        line.send("ready", HANDSHAKE_TIMEOUT_S)
    except (SilenceError, KeyError, TypeError) as error:
        why = f"{place.endpoint} was reached, but {error}; is another program at that port (--rdzv-port)?"
        note(why)
        raise MeetingError(why) from None
    roster: list[dict[str, Any] | None] = [None] * place.num_hosts
    index = int(welcome["index"])
    roster[index] = {**card, "address": line.own_address}
    return Meeting(place, index, {0: line}, roster, clock_ahead_s=ahead_s, clock_error_s=error_s)


def _reach(place: Place, note: Callable[[str], None]) -> Line:
    """Connect to the first host, which may not be up yet, until the time is over."""
    deadline = time.monotonic() + place.wait_s
    note(f"does not reach the first host at {place.endpoint}: no answer")
    while True:
        try:
            left_s = deadline - time.monotonic()
            connection = socket.create_connection((place.head, place.port), max(1.0, min(CONNECT_TIMEOUT_S, left_s)))
            return Line(connection)
        except OSError as error:
            why = f"does not reach the first host at {place.endpoint}: {why_not(error)}"
        if time.monotonic() > deadline:
            raise MeetingError(why)
        note(why)
        time.sleep(RETRY_S)


def _ask_time(line: Line, now: Callable[[], float]) -> tuple[float, float]:
    """Return by how much this clock is ahead of the first host's, and how wrong that may be."""
    answers = []
    for _ in range(NUM_CLOCK_QUESTIONS):
        asked_s, clock_s = time.perf_counter(), now()
        line.send("time", HANDSHAKE_TIMEOUT_S)
        head_s = float(line.receive(HANDSHAKE_TIMEOUT_S))
        took_s = time.perf_counter() - asked_s
        answers.append((took_s, clock_s + took_s / 2 - head_s))
    took_s, ahead_s = min(answers)
    return ahead_s, took_s / 2


def _at_once(task: Callable[[int], None], indices: list[int]) -> None:
    if indices:
        with ThreadPoolExecutor(min(64, len(indices))) as pool:
            list(pool.map(task, indices))
