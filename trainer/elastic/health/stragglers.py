"""Which rank the others wait for, and why: reported once when it has been so for a while, and once when it is over.

Ranks are held against each other in windows of some seconds, by medians. An alert needs several windows in a row and a
difference that a step would feel; it ends below a lower threshold, again after several windows. No torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from papilio.trainer.elastic.health.heartbeat import RankFigures

Kind = Literal["dense", "lookups", "data", "all_data"]

WINDOW_S = 5.0
NUM_WINDOWS = 4
# A rank's medians are over fewer steps at the beginning.
MIN_TIMED = 8
# How many times the others' time; where an alert begins, and where it ends.
BEGINS_AT, ENDS_AT = 1.5, 1.25
# Forward is a third of the work: so much more of it makes a step longer by some 9 %.
MIN_SHARE_OF_STEP = 0.03
# Of a rank's time, beyond the others' (median).
DATA_BEGINS_AT, DATA_ENDS_AT = 0.10, 0.05
# Of all ranks' time (median).
ALL_DATA_BEGINS_AT, ALL_DATA_ENDS_AT = 0.25, 0.15


@dataclass(frozen=True)
class RankState:
    """What is known of a rank at one time."""

    host: str
    step: int
    figures: RankFigures


@dataclass(frozen=True)
class Alert:
    """Why everyone waits: `ranks` of one host, none for `all_data`; the text is for people."""

    kind: Kind
    ranks: tuple[int, ...]
    host: str
    text: str


@dataclass(frozen=True)
class _Measured:
    """One window of one rank."""

    lookup_ms: float
    dense_ms: float
    wait_share: float
    step_ms: float


@dataclass
class _AlertState:
    """How many windows in a row met the condition to begin the alert or, once active, to end it."""

    is_active: bool = False
    num_windows: int = 0
    own: float = 0.0
    others: float = 0.0


@dataclass
class StragglerDetector:
    """Takes in the ranks' figures as they come; `alerts` are the active ones."""

    window_s: float = WINDOW_S
    num_windows: int = NUM_WINDOWS
    alerts: tuple[Alert, ...] = ()
    _before: dict[int, RankState] = field(default_factory=dict)
    _before_s: float | None = None
    _states: dict[tuple[Kind, int], _AlertState] = field(default_factory=dict)

    def look(self, states: Mapping[int, RankState], now_s: float) -> list[str]:
        """Take in what all ranks report now; return what is new, a sentence each: alerts that begin or end."""
        if self._before_s is not None and now_s - self._before_s < self.window_s:
            return []
        before, self._before, self._before_s = self._before, dict(states), now_s
        measured = _measure(before, states)
        if not measured:
            return []
        began: list[tuple[Kind, int]] = []
        ended: list[tuple[Kind, int]] = []
        for kind, rank, own, others, is_begin, is_end in _comparisons(measured):
            alert_state = self._states.setdefault((kind, rank), _AlertState())
            alert_state.own, alert_state.others = own, others
            is_met = is_end if alert_state.is_active else is_begin
            alert_state.num_windows = alert_state.num_windows + 1 if is_met else 0
            if alert_state.num_windows >= self.num_windows:
                alert_state.is_active, alert_state.num_windows = not alert_state.is_active, 0
                (began if alert_state.is_active else ended).append((kind, rank))
        self.alerts = tuple(_alerts(self._active(), states))
        new = [alert.text for alert in _alerts({key: self._states[key] for key in began}, states)]
        return new + [_format_end(kind, rank, states) for kind, rank in ended]

    def _active(self) -> dict[tuple[Kind, int], _AlertState]:
        return {key: alert_state for key, alert_state in self._states.items() if alert_state.is_active}


def _measure(before: Mapping[int, RankState], now: Mapping[int, RankState]) -> dict[int, _Measured]:
    """Return what each rank did since; nothing unless all have trained and timed steps in between."""
    measured = {}
    for rank, state in now.items():
        figures, earlier = state.figures, before.get(rank)
        if earlier is None or figures.num_timed < max(MIN_TIMED, earlier.figures.num_timed + 1):
            return {}
        num_steps, train_s = state.step - earlier.step, figures.train_s - earlier.figures.train_s
        if num_steps <= 0 or train_s <= 0 or figures.lookup_ms is None or figures.dense_ms is None:
            return {}
        wait_share = (figures.wait_s - earlier.figures.wait_s) / train_s
        measured[rank] = _Measured(figures.lookup_ms, figures.dense_ms, wait_share, 1e3 * train_s / num_steps)
    return measured


def _comparisons(measured: Mapping[int, _Measured]) -> Iterator[tuple[Kind, int, float, float, bool, bool]]:
    """Yield for each kind and rank: its own value, that of the others, does it begin here, does it end here?"""
    step_ms = statistics.median(found.step_ms for found in measured.values())
    floor_ms = MIN_SHARE_OF_STEP * step_ms
    waits = [found.wait_share for found in measured.values()]
    most = statistics.median_low(waits)  # of two ranks, what both wait at least
    yield "all_data", -1, most, most, most >= ALL_DATA_BEGINS_AT, most < ALL_DATA_ENDS_AT
    if len(measured) < 2:
        return
    ranks = list(measured)
    dense = _others_median([found.dense_ms for found in measured.values()])
    lookups = _others_mean([found.lookup_ms for found in measured.values()])
    others_waits = _others_median(waits)
    for index, rank in enumerate(ranks):
        own = measured[rank]
        slowdown = own.dense_ms / dense[index] if dense[index] else 1.0
        yield "dense", rank, own.dense_ms, dense[index], *_is_slower(own.dense_ms, dense[index], floor_ms)
        # A rank that is slow in everything has too many lookups only if it is slower still in these.
        expected_ms = lookups[index] * max(1.0, slowdown)
        yield "lookups", rank, own.lookup_ms, lookups[index], *_is_slower(own.lookup_ms, expected_ms, floor_ms)
        more = own.wait_share - others_waits[index]
        yield "data", rank, own.wait_share, others_waits[index], more >= DATA_BEGINS_AT, more < DATA_ENDS_AT


def _is_slower(own_ms: float, others_ms: float, floor_ms: float) -> tuple[bool, bool]:
    excess_ms = own_ms - others_ms
    begins = own_ms >= BEGINS_AT * others_ms and excess_ms >= floor_ms
    ends = own_ms < ENDS_AT * others_ms or excess_ms < floor_ms / 2
    return begins, ends


def _others_median(values: Sequence[float]) -> list[float]:
    """Return for each value the median of all but it; of two, the other one."""
    places = sorted(range(len(values)), key=values.__getitem__)
    ordered = [values[place] for place in places]
    medians = [0.0] * len(values)
    for index, place in enumerate(places):
        # The middle of the others, without making a list of them for each of 512 ranks.
        low, high = (len(values) - 2) // 2, (len(values) - 1) // 2
        medians[place] = (ordered[low + (low >= index)] + ordered[high + (high >= index)]) / 2
    return medians


def _others_mean(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [(total - value) / (len(values) - 1) for value in values]


def _alerts(found: Mapping[tuple[Kind, int], _AlertState], states: Mapping[int, RankState]) -> Iterator[Alert]:
    """Format alerts, those of one kind on one host together."""
    grouped: dict[tuple[Kind, str], list[int]] = {}
    for kind, rank in sorted(found):
        grouped.setdefault((kind, states[rank].host if rank in states else ""), []).append(rank)
    for (kind, host), ranks in grouped.items():
        own = statistics.median(found[kind, rank].own for rank in ranks)
        others = statistics.median(found[kind, rank].others for rank in ranks)
        if kind == "all_data":
            yield Alert(kind, (), "", _format_all_data(own))
            continue
        text = _FORMATS[kind](describe_on(ranks, host), len(ranks) > 1, own, others)
        tables = _tables(states[ranks[0]].figures) if kind == "lookups" else ""
        yield Alert(kind, tuple(ranks), host, f"{text}{tables}; {_FIXES[kind]}")


def _format_dense(who: str, is_many: bool, own: float, others: float) -> str:
    verb, whose = ("compute", "their") if is_many else ("computes", "its")
    return (
        f"{who} {verb} {whose} dense layers {own / others:.1f} times as slowly as the others ({own:.1f} ms against "
        f"{others:.1f} ms), and everyone waits"
    )


def _format_lookups(who: str, is_many: bool, own: float, others: float) -> str:
    verb, whose = ("take", "their") if is_many else ("takes", "its")
    times = f"{own / others:.1f} times as long as the others" if others else "all the time"
    return f"{who} {verb} {times} for {whose} lookups ({own:.1f} ms against {others:.1f} ms), and everyone waits"


def _format_data(who: str, is_many: bool, own: float, others: float) -> str:
    verb = "wait" if is_many else "waits"
    return f"{who} {verb} {own:.0%} of the time for data, the others {others:.0%}, and everyone waits with that"


def _format_all_data(share: float) -> str:
    return (
        f"all ranks wait for data, {share:.0%} of the time: faster storage, more cores a rank, or more of "
        "data.prefetch_batches"
    )


_FORMATS = {"dense": _format_dense, "lookups": _format_lookups, "data": _format_data}
_FIXES = {
    "dense": "look there for other processes, clocks, temperature",
    "lookups": "`papilio calibrate` and plan anew, or give sharding.constraints",
    "data": "look at the storage and the cores there",
}
_ENDS = {"dense": "as fast as the others", "lookups": "as fast in lookups as the others", "data": "in time with data"}


def _format_end(kind: Kind, rank: int, states: Mapping[int, RankState]) -> str:
    if kind == "all_data":
        return "data comes in time again"
    return f"{describe_on([rank], states[rank].host)} is {_ENDS[kind]} again"


def _tables(figures: RankFigures) -> str:
    shares = ", ".join(f"{name} ({share:.0%})" for name, share in figures.tables if share >= 0.01)
    return f"; most bytes are read from {shares}" if shares else ""


def describe_on(ranks: Sequence[int], host: str) -> str:
    """Write ranks of one host as "rank 3 (host n2)"."""
    return f"{describe_ranks(ranks)} (host {host})"


def describe_ranks(ranks: Sequence[int]) -> str:
    """Write sorted rank numbers as "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    text = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
