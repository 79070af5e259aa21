"""The curves of `benchmarks/colocation.py`: aggregate throughput over tail latency, and what a latency limit allows."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
# A row says little if other processes kept more of the cores busy meanwhile.
MAX_OTHER_CORES = 0.1
# Limits on the 99th percentile that a service may have to keep.
LIMITS_MS = (0.5, 1, 2, 5, 10, 20, 50, 100)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 78, 16, 20, 92
COPY_COLOURS = {1: "#1f77b4", 2: "#2ca02c", 4: "#d62728"}
OTHER_COLOUR = "#7f7f7f"
# Of (threads, waits, weights): how its line is dashed, its marker, and what the legend says.
STYLES = {
    (1, "passive", "shared"): ("", "circle", "1 thread, shared weights"),
    (1, "passive", "private"): ("2 3", "ring", "1 thread, private weights"),
    (2, "passive", "shared"): ("8 3", "square", "2 threads, passive waits"),
    (2, "spin", "shared"): ("8 3 2 3", "cross", "2 threads, spinning waits"),
}
STYLE_SHEET = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 900px }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #222 }
.grid { stroke: #e4e4e4 } .axis { stroke: #888 } .best { fill: none; stroke: #222; stroke-width: 7; opacity: .13 }
.line { fill: none; stroke-width: 1.5 }
table { border-collapse: collapse } td, th { padding: .15em .9em .15em 0; text-align: left }
td.n, th.n { text-align: right } .note { color: #555 }"""


def best_within(rows: Sequence[Row], limit_ms: float) -> Row | None:
    """Return the row of the highest throughput whose 99th percentile keeps a limit."""
    within = [row for row in rows if row["p99_ms"] <= limit_ms]
    return max(within, key=lambda row: float(row["samples_per_s"]), default=None)


def write_page(rows: Sequence[Row], words: Mapping[str, str], path: Path) -> None:
    """Write a page with a figure and a table for each shape."""
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of_shape = [row for row in rows if row["shape"] == shape]
        parts.append(
            f"<h2>{shape.upper()}: {html.escape(words[shape])}</h2>{figure(of_shape)}{_limits_table(of_shape)}"
        )
    note = (
        "Each point is a batch size (the number beside it), each line a number of copies (colour) and how they run "
        "(dashes, marker). Up is more samples per second of the whole machine, left is a shorter tail. The grey band "
        "is the best that any setting gives within a limit: the latency-bounded throughput."
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Co-located copies</title>'
        f"<style>{STYLE_SHEET}</style><h1>Co-located copies of a model</h1>"
        f'<p class="note">{note} {html.escape(words_on_disturbance(rows))}</p>{"".join(parts)}</html>'
    )
    path.write_text(page, encoding="utf-8")


def words_on_disturbance(rows: Sequence[Row]) -> str:
    """Say how far the machine was the copies' own."""
    disturbed = sum(row["other_cores"] > MAX_OTHER_CORES for row in rows)
    if not disturbed:
        return "No other process disturbed it."
    return (
        f"{disturbed} of {len(rows)} points were measured while other processes kept more than {MAX_OTHER_CORES:g} "
        "cores busy, and say little: run it again on an idle machine."
    )


def figure(rows: Sequence[Row]) -> str:
    """Draw one shape as SVG."""
    across = _logarithmic([row["p99_ms"] for row in rows], LEFT, WIDTH - RIGHT)
    up = _logarithmic([row["samples_per_s"] for row in rows], HEIGHT - BOTTOM, TOP)
    pieces = [*_frame(rows, across, up), _best_band(rows, across, up)]
    for key in dict.fromkeys(_key(row) for row in rows):
        line = sorted((row for row in rows if _key(row) == key), key=lambda row: int(row["batch_size"]))
        pieces += _curve(line, across, up)
    pieces += _legend(rows)
    title = "Aggregate samples per second over the 99th percentile of latency"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{title}</title>{"".join(pieces)}</svg>'


def _key(row: Row) -> tuple[int, int, str, str]:
    return row["copies"], row["threads"], row["waits"], row["weights"]


def _logarithmic(values: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    low, high = math.log(min(values) / 1.3), math.log(max(values) * 1.3)

    def place(value: float) -> float:
        return start + (math.log(value) - low) / (high - low) * (stop - start)

    return place


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values) / 1.3, max(values) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _frame(rows: Sequence[Row], across: Callable[[float], float], up: Callable[[float], float]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    pieces = []
    for tick in _ticks([row["p99_ms"] for row in rows]):
        x = across(tick)
        pieces.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        pieces.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks([row["samples_per_s"] for row in rows]):
        y = up(tick)
        pieces.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        pieces.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
    pieces.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    pieces.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 36}" text-anchor="middle">p99 latency, ms</text>')
    middle = (TOP + bottom) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 16 {middle})"'
    pieces.append(f'<text x="16" y="{middle}" {turned}>samples/s, all copies</text>')
    return pieces


def _best_band(rows: Sequence[Row], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """The staircase of the best within every limit."""
    path, best = "", 0.0
    for row in sorted(rows, key=lambda row: float(row["p99_ms"])):
        if row["samples_per_s"] > best:
            best = row["samples_per_s"]
            x, y = across(row["p99_ms"]), up(best)
            path += f"M{x:.1f} {y:.1f}" if not path else f"H{x:.1f}V{y:.1f}"
    return f'<path class="best" d="{path}H{WIDTH - RIGHT}"/>'


def _curve(line: Sequence[Row], across: Callable[[float], float], up: Callable[[float], float]) -> list[str]:
    copies, *style = _key(line[0])
    colour = COPY_COLOURS.get(copies, OTHER_COLOUR)
    dashes, marker, _ = STYLES[tuple(style)]  # type: ignore[index]
    points = [(across(row["p99_ms"]), up(row["samples_per_s"])) for row in line]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    pieces = [f'<path class="line" stroke="{colour}" stroke-dasharray="{dashes}" d="M{path}"/>']
    for row, (x, y) in zip(line, points, strict=True):
        hint = html.escape(f"{copies} copies, {STYLES[tuple(style)][2]}, batch {row['batch_size']}")  # type: ignore[index]
        figures = f"{row['samples_per_s']:,.0f}/s, p50 {row['p50_ms']:.2f}, p99 {row['p99_ms']:.2f} ms"
        pieces.append(f"<g>{_marker(marker, x, y, colour)}<title>{hint}: {figures}</title></g>")
        if style[2] == "shared" and style[0] == 1:
            pieces.append(f'<text x="{x + 6:.1f}" y="{y - 5:.1f}" style="fill:{colour}">{row["batch_size"]}</text>')
    return pieces


def _marker(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"/>'
    if kind == "ring":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="#fff" stroke="{colour}" stroke-width="1.5"/>'
    if kind == "square":
        return f'<rect x="{x - 3.4:.1f}" y="{y - 3.4:.1f}" width="6.8" height="6.8" fill="{colour}"/>'
    return f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8" stroke="{colour}" stroke-width="2" fill="none"/>'


def _legend(rows: Sequence[Row]) -> list[str]:
    """Two rows under the plot: colours, then dashes and markers."""
    pieces = []
    x, y = LEFT, HEIGHT - 30
    for copies in dict.fromkeys(row["copies"] for row in rows):
        colour = COPY_COLOURS.get(copies, OTHER_COLOUR)
        pieces.append(f'<path stroke="{colour}" stroke-width="3" d="M{x} {y - 4}h26"/>')
        pieces.append(f'<text x="{x + 34}" y="{y}">{copies} cop{"ies" if copies > 1 else "y"}</text>')
        x += 110
    x, y = LEFT, HEIGHT - 8
    for style in dict.fromkeys(_key(row)[1:] for row in rows):
        dashes, marker, words = STYLES[style]
        pieces.append(f'<path stroke="#444" stroke-dasharray="{dashes}" fill="none" d="M{x} {y - 4}h26"/>')
        pieces.append(_marker(marker, x + 13, y - 4, "#444") + f'<text x="{x + 34}" y="{y}">{words}</text>')
        x += 195
    return pieces


def _limits_table(rows: Sequence[Row]) -> str:
    lines = []
    for limit_ms in LIMITS_MS:
        best = best_within(rows, limit_ms)
        if best is not None:
            style = STYLES[(best["threads"], best["waits"], best["weights"])][2]
            lines.append(
                f'<tr><td class="n">{limit_ms:g} ms</td><td class="n">{best["samples_per_s"]:,.0f}</td>'
                f'<td class="n">{best["copies"]}</td><td>{style}</td><td class="n">{best["batch_size"]}</td></tr>'
            )
    head = '<tr><th class="n">p99 at most</th><th class="n">samples/s</th><th class="n">copies</th><th>of</th>'
    return f'<table>{head}<th class="n">batch</th></tr>{"".join(lines)}</table>'
