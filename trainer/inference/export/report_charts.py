"""The plots of the quality report as SVG text. Colours are CSS variables, so one drawing serves light and dark."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from papilio.sharding.reports.figures import size
from papilio.trainer.inference.export.quality_report import (
    CalibrationPoint,
    Histogram,
    Ratio,
    Scatter,
    TableFigures,
    percent,
)

WIDTH, HEIGHT = 500, 310
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 14, 44
# Losses are drawn on a logarithmic scale; a millionth of the largest is next to nothing.
LOSS_RANGE = 1e-6
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, linear or logarithmic to `base`, over pixels `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    base: int | None = None

    def __call__(self, value: float) -> float:
        """Pixel of a value, kept inside the plot."""
        low, high, at = (self._scaled(max(each, self.low)) for each in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values between the ends."""
        if self.base:
            first = math.ceil(self._scaled(self.low) - 1e-9)
            last = math.floor(self._scaled(self.high) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / (wanted + 1)))
            return [float(self.base) ** power for power in range(first, last + 1, every)]
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log(value, self.base) if self.base else value


def calibration_chart(reference: Sequence[CalibrationPoint], candidate: Sequence[CalibrationPoint]) -> str:
    """Predicted against observed share of positives, of both models."""
    most = max(max(point.predicted, point.observed) for point in [*reference, *candidate])
    across, up = _axes(0.0, min(1.0, most * 1.06), 0.0, min(1.0, most * 1.06))
    pieces = [*_frame(across, up, "predicted probability", "share of positives", _share, _share)]
    pieces.append(_line(across(across.low), up(across.low), across(across.high), up(across.high), "ideal"))
    for name, points in (("reference", reference), ("candidate", candidate)):
        path = " ".join(f"{across(p.predicted):.1f},{up(p.observed):.1f}" for p in points)
        pieces.append(f'<polyline class="curve {name}" points="{path}"/>')
        radius = 5.5 if name == "reference" else 2.6
        pieces += [_dot(across(p.predicted), up(p.observed), f"dot {name}", radius, _point_title(p)) for p in points]
    return _svg(pieces, "Calibration of the fp32 model and of the package")


def scatter_chart(scatter: Scatter) -> str:
    """Score of the fp32 model against the change of the score; the darker, the more samples."""
    across, up = _axes(0.0, 1.0, -scatter.limit, scatter.limit)
    num_rows, num_columns = len(scatter.counts), len(scatter.counts[0])
    most = math.log1p(max(map(max, scatter.counts)))
    width, height = (across.stop - across.start) / num_columns, (up.start - up.stop) / num_rows
    pieces = []
    for row, counts in enumerate(scatter.counts):
        for column, count in enumerate(counts):
            if count:
                x, y = across.start + column * width, up.start - (row + 1) * height
                title = f"{count:,} samples of score {column / num_columns:.2f} to {(column + 1) / num_columns:.2f}"
                opacity = f'fill-opacity="{0.08 + 0.92 * math.log1p(count) / most:.2f}"'
                pieces.append(_box(x, y, width, height, "heat", title, opacity))
    frame = _frame(across, up, "score in fp32", "change of the score", _share, _signed)
    return _svg([*frame, *pieces, _line(across(0), up(0), across(1), up(0), "ideal")], "Change of scores by score")


def histogram_chart(histogram: Histogram) -> str:
    """How many scores change by how much."""
    total, limit, counts = sum(histogram.counts) + histogram.num_beyond, histogram.limit, histogram.counts
    shares = [count / max(1, total) for count in counts]
    across, up = _axes(-limit, limit, 0.0, max(shares, default=0.0) * 1.04 or 1.0)
    pieces = _frame(across, up, "change of the score", "share of samples", _signed, _percent)
    width = (across.stop - across.start) / len(counts)
    for number, (count, share) in enumerate(zip(counts, shares, strict=True)):
        if count:
            low = -limit + 2 * limit * number / len(counts)
            title = f"{count:,} samples: {_signed(low, 2)} to {_signed(low + 2 * limit / len(counts), 2)}"
            x, y = across.start + number * width, up(share)
            pieces.append(_box(x + 0.5, y, width - 1, up.start - y, "column", title))
    pieces.append(_line(across(0), up.start, across(0), up.stop, "ideal"))
    return _svg(pieces, "Distribution of the changes of scores")


def loss_chart(tables: Sequence[TableFigures]) -> str:
    """Bytes of each table against what its precision costs; a thread joins what other precisions would."""
    sizes = [option.num_bytes for table in tables for option in table.options]
    most = max((option.expected_increase for table in tables for option in table.options), default=0.0) or 1e-6
    floor = _power(max(most * LOSS_RANGE, _least_loss(tables)), -1)
    across = Axis(min(sizes) / 1.6, max(sizes) * 1.6, LEFT, 2 * WIDTH - RIGHT, base=4)
    up = Axis(floor, _power(most, 1), HEIGHT - BOTTOM, TOP, base=10)
    pieces = _frame(
        across, up, "size of the table", "log loss added, nats a sample", _bytes, partial(_loss_from, floor)
    )
    for table in sorted(tables, key=lambda table: table.expected_increase):
        options = sorted(table.options, key=lambda option: option.num_bytes)
        path = " ".join(f"{across(o.num_bytes):.1f},{up(o.expected_increase):.1f}" for o in options)
        pieces.append(f'<polyline class="thread" points="{path}"/>')
    for is_front in (False, True):
        for table in tables:
            chosen = table.chosen
            for option in table.options:
                if (option == chosen) == is_front:
                    title = (
                        f"{table.name} in {option.precision}{' (as packaged)' if is_front else ''}: "
                        f"{size(option.num_bytes)}, {_loss(option.expected_increase, 2)} nats a sample"
                    )
                    kind = f"precision {option.precision} {'chosen' if is_front else 'other'}"
                    at = across(option.num_bytes), up(option.expected_increase)
                    pieces.append(_dot(*at, kind, 5.5 if is_front else 2.6, title))
    return _svg(pieces, "Size and loss of each table", width=2 * WIDTH)


def interval_chart(ratio: Ratio, threshold: float, *, is_floor: bool) -> str:
    """A ratio with its interval, beside 100 % and the threshold."""
    reach = max(abs(value - 1) for value in (ratio.low, ratio.high, ratio.value, threshold)) * 1.25 or 1e-6
    left, right, y, top, bottom = 12.0, WIDTH - 12.0, 24, 8, 40
    across = Axis(1 - reach, 1 + reach, left, right)
    at = across(threshold)
    begin, end = (left, at) if is_floor else (at, right)
    pieces = [
        f'<rect class="bad" x="{begin:.1f}" y="{top}" width="{max(0.0, end - begin):.1f}" height="32" rx="3"/>',
        _line(left, bottom, right, bottom, "grid"),
        _line(across(1), top, across(1), bottom, "ideal"),
        _line(at, top, at, bottom, "limit"),
        _line(across(ratio.low), y, across(ratio.high), y, "interval"),
        _dot(across(ratio.value), y, "dot candidate", 5, f"{percent(ratio.value, 5)}"),
    ]
    if abs(at - across(1)) > 60:
        pieces.append(_text(across(1), bottom + 16, "fp32", "middle"))
    pieces.append(_text(at, bottom + 16, f"{threshold * 100:.6g} %", "middle", "limit-name"))
    return _svg(pieces, f"{percent(ratio.value)} of fp32", height=60)


def _axes(left: float, right: float, low: float, high: float) -> tuple[Axis, Axis]:
    return Axis(left, right, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP)


def _frame(
    across: Axis,
    up: Axis,
    across_name: str,
    up_name: str,
    across_text: Callable[[float], str],
    up_text: Callable[[float], str],
) -> list[str]:
    pieces = []
    for value in up.ticks():
        pieces.append(_line(across.start, up(value), across.stop, up(value), "grid"))
        pieces.append(_text(across.start - 7, up(value) + 4, up_text(value), "end"))
    for value in across.ticks(6):
        pieces.append(_text(across(value), up.start + 17, across_text(value), "middle"))
    pieces.append(_text((across.start + across.stop) / 2, up.start + 36, across_name, "middle", "axis-name"))
    middle = (up.start + up.stop) / 2
    pieces.append(
        f'<text class="axis-name" x="13" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 13 {middle:.1f})">{html.escape(up_name)}</text>'
    )
    return pieces


def _svg(pieces: Sequence[str], label: str, *, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label, quote=True)}">'
        f"{''.join(pieces)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(x: float, y: float, kind: str, radius: float, title: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{html.escape(title)}</title></circle>'


def _box(x: float, y: float, width: float, height: float, kind: str, title: str, more: str = "") -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {more}>'
        f"<title>{html.escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _point_title(point: CalibrationPoint) -> str:
    return f"{point.num_samples:,} samples: predicted {point.predicted:.4f}, observed {point.observed:.4f}"


def _least_loss(tables: Sequence[TableFigures]) -> float:
    """The smallest loss that is none."""
    return min((o.expected_increase for t in tables for o in t.options if o.expected_increase > 0), default=1e-9)


def _power(value: float, direction: int) -> float:
    """The power of ten beyond a value."""
    exponent = math.log10(value)
    return 10.0 ** (math.floor(exponent + 1e-9) if direction < 0 else math.ceil(exponent - 1e-9))


def _share(value: float) -> str:
    return f"{value:.2g}"


def _percent(value: float) -> str:
    return f"{value * 100:.3g} %"


def _signed(value: float, num_digits: int = 1) -> str:
    return "0" if abs(value) < 1e-15 else _short(f"{value:+.{num_digits}g}")


def _loss(value: float, num_digits: int = 1) -> str:
    return _short(f"{value:.{num_digits - 1}e}") if value else "0"


def _loss_from(floor: float, value: float) -> str:
    """A loss on an axis whose end stands for all that is less."""
    return f"\N{LESS-THAN OR EQUAL TO} {_loss(value)}" if value <= floor * 1.01 else _loss(value)


def _bytes(value: float) -> str:
    return re.sub(r"\.0+ ", " ", size(value))


def _short(text: str) -> str:
    return text.replace("e-0", "e-").replace("-", MINUS)
