"""The merged view of a job's ranks as text, at the width of a terminal."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence

from papilio.data_pipeline.terminal import format_duration
from papilio.trainer.elastic.health.live_view import LiveView, RankView
from papilio.trainer.run.progress_lines import progress_bar

# Up to so many ranks have a line each; of more, the hosts and the slowest ranks.
MAX_RANK_LINES = 16
MAX_HOST_LINES = 12
NUM_SLOWEST = 5
WIDE, BAR_WIDTH = 100, 24
MIN_BAR_WIDTH, MAX_BAR_WIDTH = 8, 40
COLORS = {"running": "32", "done": "32", "saved": "33", "failed": "31", "old": "33", "waiting": "33"}
WARNING_COLOR, FAINT = "33", "2"


class Ink:
    """Colors for a terminal, or none."""

    def __init__(self, *, has_colors: bool) -> None:
        self._has_colors = has_colors

    def paint(self, text: str, code: str) -> str:
        """Return the text in a color (an ANSI code)."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._has_colors and text else text


def view_lines(view: LiveView, width: int, now_unix_s: float, ink: Ink) -> list[str]:
    """Return the view, no line longer than `width` but for names that are."""
    lines = [*_head(view, width, now_unix_s, ink), ""]
    unresponsive = view.unresponsive()
    marked = {rank for finding in view.findings for rank in finding.ranks} | {rank.rank for rank in unresponsive}
    if len(view.ranks) <= MAX_RANK_LINES:
        lines += _rank_table(view, view.ranks, marked, width, ink)
    else:
        slowest = sorted(view.ranks, key=lambda rank: -view.own_ms(rank))[:NUM_SLOWEST]
        lines += [*_host_table(view, marked, ink), "", ink.paint("slowest by their own work", FAINT)]
        lines += _rank_table(view, slowest, marked, width, ink)
    missing = view.world_size - len(view.ranks)
    if missing:
        lines.append(f"{missing} of {view.world_size} ranks gave no heartbeat yet")
    if unresponsive:
        lines += ["", *_wrapped(_unresponsive_text(unresponsive), width, ink, WARNING_COLOR)]
    for finding in view.findings:
        lines += ["", *_wrapped(finding.text, width, ink, WARNING_COLOR)]
    return lines


def _head(view: LiveView, width: int, now_unix_s: float, ink: Ink) -> list[str]:
    is_old = view.is_stale(now_unix_s)
    is_waiting = bool(view.unresponsive())
    state = "old" if is_old else "waiting" if is_waiting else view.state
    ended = "" if view.state == "running" and not is_old else f" {ago(view.age_s(now_unix_s))}"
    words = [view.name, f"{state}{ended}", f"step {view.step:,} of {view.num_steps:,}"]
    has_end = view.state == "running" and view.remaining_s is not None and not is_old and not is_waiting
    left = f"  {format_duration(view.remaining_s or 0.0)} left" if has_end else ""
    room = width - len("  ".join(words)) - len(left) - len("  || 100%")
    bar = progress_bar(view.step, view.num_steps, min(MAX_BAR_WIDTH, room)) if room >= MIN_BAR_WIDTH else ""
    words[1] = ink.paint(state, COLORS[state]) + ended
    lines = [f"{'  '.join([*words, *([bar] if bar else [])])}{left}", *_filled(_facts(view, now_unix_s), width)]
    if is_old:
        text = f"this was written {ago(view.age_s(now_unix_s))} and should be anew every {_seconds(view.interval_s)}"
        lines += _wrapped(f"{text}: rank 0 is gone, or its host hangs", width, ink, WARNING_COLOR)
    if view.error is not None:
        lines += _wrapped(view.error, width, ink, COLORS["failed"])
    return lines


def _unresponsive_text(ranks: Sequence[RankView]) -> str:
    longest = sorted(ranks, key=lambda rank: -rank.silent_s)
    named = [f"rank {rank.rank} (host {rank.host}) for {_seconds(rank.silent_s)}" for rank in longest[:NUM_SLOWEST]]
    others = f" and {len(ranks) - NUM_SLOWEST} more" if len(ranks) > NUM_SLOWEST else ""
    return f"unresponsive: {', '.join(named)}{others}; the others wait, so nothing can be said of the time left"


def _facts(view: LiveView, now_unix_s: float) -> list[str]:
    facts = []
    if view.samples_per_s is not None and view.step_ms is not None:
        facts += [f"{view.samples_per_s:,.0f} samples/s", f"{view.step_ms:.1f} ms a step"]
    facts.append(f"epoch {view.epoch} of {view.num_epochs} ({view.epoch_share:.0%})")
    if view.loss is not None:
        facts.append(f"logloss {view.loss:.4f} (train)")
    if view.validation_auc is not None:
        facts.append(f"AUC {view.validation_auc:.4f} (validation)")
    waits = {rank.rank: rank.wait_share for rank in view.ranks if rank.wait_share is not None}
    if waits:
        worst = max(waits, key=waits.__getitem__)
        told = f" (rank {worst}: {waits[worst]:.1%})" if len(waits) > 1 else ""
        facts.append(f"data wait {statistics.mean(waits.values()):.1%}{told}")
    saved = view.checkpoint
    facts.append(f"saved step {saved.step:,}, {ago(now_unix_s - saved.unix_s)}" if saved else "nothing saved yet")
    return facts


def _rank_table(view: LiveView, ranks: Sequence[RankView], marked: set[int], width: int, ink: Ink) -> list[str]:
    head = ["", "rank", "host", "step", "phase", "lookups", "dense", "data wait", "sign"]
    rows = [
        [
            "!" if rank.rank in marked else "",
            str(rank.rank),
            rank.host,
            f"{rank.step:,}",
            rank.phase,
            _ms(rank.lookup_ms),
            _ms(rank.dense_ms),
            _share(rank.wait_share),
            _seconds(rank.silent_s),
        ]
        for rank in ranks
    ]
    lines = table([head, *rows], right={1, 3, 5, 6, 7, 8})
    if width >= WIDE:
        bars = [f"own work of a step: lookups {LOOKUPS}, dense {DENSE}, data wait {WAIT}"]
        bars += [_bar(view, rank) for rank in ranks]
        longest = max(map(len, lines))
        lines = [f"{line:<{longest}}   {bar}".rstrip() for line, bar in zip(lines, bars, strict=True)]
    painted = [ink.paint(line, WARNING_COLOR) if line.startswith("!") else line for line in lines[1:]]
    return [ink.paint(lines[0], FAINT), *painted]


LOOKUPS, DENSE, WAIT = "▒", "█", "░"


def _bar(view: LiveView, rank: RankView) -> str:
    """Draw a rank's own work, the longest of all ranks over the whole width."""
    longest_ms = max(view.own_ms(other) for other in view.ranks)
    parts_ms = (rank.lookup_ms or 0.0, rank.dense_ms or 0.0, (rank.wait_share or 0.0) * (view.step_ms or 0.0))
    if not longest_ms:
        return ""
    ends = [round(BAR_WIDTH * sum(parts_ms[: place + 1]) / longest_ms) for place in range(3)]
    return LOOKUPS * ends[0] + DENSE * (ends[1] - ends[0]) + WAIT * (ends[2] - ends[1])


def _host_table(view: LiveView, marked: set[int], ink: Ink) -> list[str]:
    """Each host's ranks in a line; of many hosts those that are slowest."""
    hosts: dict[str, list[RankView]] = {}
    for rank in view.ranks:
        hosts.setdefault(rank.host, []).append(rank)
    order = sorted(hosts, key=lambda host: -max(view.own_ms(rank) for rank in hosts[host]))
    shown = sorted(order[:MAX_HOST_LINES], key=lambda host: hosts[host][0].rank)
    rows = [["", "host", "ranks", "step", "lookups", "dense", "data wait", "sign"]]
    for host in shown:
        ranks = hosts[host]
        rows.append(
            [
                "!" if any(rank.rank in marked for rank in ranks) else "",
                host,
                f"{ranks[0].rank}-{ranks[-1].rank}" if len(ranks) > 1 else str(ranks[0].rank),
                f"{min(rank.step for rank in ranks):,}",
                _ms(_longest(rank.lookup_ms for rank in ranks)),
                _ms(_longest(rank.dense_ms for rank in ranks)),
                _share(_longest(rank.wait_share for rank in ranks)),
                _seconds(max(rank.silent_s for rank in ranks)),
            ]
        )
    lines = table(rows, right={3, 4, 5, 6, 7})
    lines = [ink.paint(line, WARNING_COLOR) if line.startswith("!") else line for line in lines]
    rest = f"the longest of each host's ranks; {len(hosts) - len(shown)} faster hosts are left out"
    return [ink.paint(lines[0], FAINT), *lines[1:], *([ink.paint(rest, FAINT)] if len(shown) < len(hosts) else [])]


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Return rows as lines with columns of one width each; those in `right` end at the same place."""
    flush = set(right)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in flush else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in rows
    ]


def ago(seconds: float) -> str:
    """Return how long ago something was."""
    return f"{_seconds(seconds)} ago"


def _seconds(seconds: float) -> str:
    return format_duration(max(0.0, seconds)) if seconds < 48 * 3_600 else f"{seconds / 86_400:.0f} days"


def _longest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _filled(facts: Sequence[str], width: int) -> list[str]:
    """Put as many facts into a line as fit."""
    lines = [""]
    for fact in facts:
        longer = f"{lines[-1]}   {fact}" if lines[-1] else fact
        if len(longer) > width and lines[-1]:
            lines.append(fact)
        else:
            lines[-1] = longer
    return lines


def _wrapped(text: str, width: int, ink: Ink, code: str) -> list[str]:
    lines = textwrap.wrap(text, width, initial_indent="! ", subsequent_indent="  ", break_long_words=False)
    return [ink.paint(line, code) for line in lines]
