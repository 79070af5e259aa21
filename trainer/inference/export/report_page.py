"""`report.html`: the quality report as one page that needs nothing else. Needs no torch."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence

from papilio.sharding.reports.figures import size
from papilio.sharding.reports.page_frame import fill_page, packaged_text
from papilio.trainer.inference.export.quality_report import QualityReport, SampleFigures, TableFigures, percent
from papilio.trainer.inference.export.report_charts import (
    MINUS,
    calibration_chart,
    histogram_chart,
    interval_chart,
    loss_chart,
    scatter_chart,
)
from papilio.trainer.inference.package.format import PRECISIONS, Precision

PACKAGE = "papilio.trainer.inference.export"
TEMPLATE = "report_page.html"
STYLE = "report_page.css"
NO_FIGURE = "\N{EN DASH}"


def report_page(report: QualityReport) -> str:
    """Return the report as an HTML page with its style and plots inside."""
    comparison = report.comparison
    return fill_page(
        packaged_text(PACKAGE, TEMPLATE),
        {
            "TITLE": html.escape(f"{report.name} at step {report.step:,}"),
            "STYLE": packaged_text(PACKAGE, STYLE),
            "SUBTITLE": html.escape(_subtitle(report)),
            "TILES": _tiles(report),
            "QUALITY_NOTE": html.escape(_quality_note(report)),
            "QUALITY": _quality(report),
            "INTERVALS": _intervals(report),
            "SCATTER": scatter_chart(comparison.differences.scatter),
            "HISTOGRAM_NOTE": _histogram_note(report),
            "HISTOGRAM": histogram_chart(comparison.differences.histogram),
            "DIFFERENCES": _differences(report),
            "CALIBRATION_KEY": _swatch("reference", "fp32") + _swatch("", "package"),
            "CALIBRATION": calibration_chart(comparison.reference_calibration, comparison.candidate_calibration),
            "CALIBRATION_NOTE": _calibration_note(report),
            "CALIBRATION_TABLE": _calibration_table(report),
            "LOSS_NOTE": html.escape(_loss_note(report)),
            "LOSS_KEY": _loss_key(report),
            "LOSS": loss_chart(report.tables),
            "TABLES": _tables(report),
            "FOOTER": html.escape(f"Measured by Papilio {report.papilio_version}, {report.made_at}."),
        },
    )


def _subtitle(report: QualityReport) -> str:
    counts = Counter(table.precision for table in report.tables)
    quantizers = {table.precision: table.quantizer for table in report.tables}
    mix = ", ".join(
        f"{counts[precision]} in {precision}" + (f" ({quantizers[precision]})" if quantizers[precision] else "")
        for precision in PRECISIONS
        if counts[precision]
    )
    tables = "1 table" if len(report.tables) == 1 else f"{len(report.tables)} tables"
    return f"{report.architecture} · checkpoint {report.checkpoint} · {tables}: {mix} · dense part in fp32"


def _tiles(report: QualityReport) -> str:
    comparison, differences = report.comparison, report.comparison.differences
    auc, change = comparison.auc_ratio, comparison.candidate.auc - comparison.reference.auc
    share = report.table_bytes / report.fp32_table_bytes
    passed = not report.failures
    limits = report.thresholds
    asked = f"asked: {limits.min_auc_ratio * 100:.6g} % of the AUC, {limits.max_ne_ratio * 100:.6g} % of the NE"
    error = _figure((auc.high - auc.low) / 2 * comparison.reference.auc)
    return "".join(
        [
            _tile("Verdict", "Certified" if passed else "Refused", asked, "good" if passed else "bad"),
            _tile("AUC of fp32's", percent(auc.value, 3), f"{_signed(change)} ± {error}"),
            _tile("NE of fp32's", percent(comparison.ne_ratio.value, 3), "less is better"),
            _tile(
                "Size of tables",
                percent(share, 1),
                f"{size(report.table_bytes)} of {size(report.fp32_table_bytes)} in fp32",
                meter=_meter(report),
            ),
            _tile(
                "Largest change",
                _figure(differences.max_absolute),
                f"of a score; of 99 % below {_figure(differences.absolute_quantiles['0.99'])}",
            ),
            _tile("Order kept", percent(1 - differences.swapped_pairs_share, 3), "of pairs of samples"),
        ]
    )


def _tile(label: str, value: str, detail: str, kind: str = "", meter: str = "") -> str:
    return (
        f'<div class="tile {kind}"><div class="label">{label}</div><div class="value">{html.escape(value)}</div>{meter}'
        f'<div class="detail">{html.escape(detail)}</div></div>'
    )


def _meter(report: QualityReport) -> str:
    """The tables' bytes by precision, as a share of those in fp32."""
    parts = []
    for precision in PRECISIONS:
        held = sum(table.num_bytes for table in report.tables if table.precision == precision)
        if held:
            parts.append(f'<i class="{precision}" style="width:{held / report.fp32_table_bytes * 100:.2f}%"></i>')
    return f'<div class="meter">{"".join(parts)}</div>'


def _samples(sample: SampleFigures) -> str:
    some = f"{sample.num_samples:,}" + (f" of {sample.num_rows:,}" if sample.num_samples < sample.num_rows else "")
    return f"{some} samples of split {sample.split} of {sample.data}"


def _quality_note(report: QualityReport) -> str:
    positives = percent(report.comparison.label_rate, 2)
    return (
        f"Both models on {_samples(report.held_out)}, {positives} of them positive ({report.label} = 1). Intervals "
        "hold 95 %, and are of the difference on the same samples."
    )


def _quality(report: QualityReport) -> str:
    reference, candidate = report.comparison.reference, report.comparison.candidate
    rows = (
        (name, f"{before:.6f}", f"{after:.6f}", _signed(after - before))
        for name, before, after in (
            ("AUC", reference.auc, candidate.auc),
            ("Normalized entropy", reference.ne, candidate.ne),
            ("Log loss", reference.logloss, candidate.logloss),
            ("Predicted / actual positives", reference.calibration, candidate.calibration),
        )
    )
    return _table(("", "fp32", "package", "change"), rows)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th class="num">{name}</th>' for name in names[1:])
    body = ""
    for first, *cells in rows:
        body += f"<tr><th>{first}</th>" + "".join(f'<td class="num">{cell}</td>' for cell in cells) + "</tr>"
    return f"<thead><tr><th>{names[0]}</th>{head}</tr></thead><tbody>{body}</tbody>"


def _intervals(report: QualityReport) -> str:
    thresholds, comparison = report.thresholds, report.comparison
    pieces = []
    for name, ratio, limit, is_floor in (
        ("AUC, share of fp32's", comparison.auc_ratio, thresholds.min_auc_ratio, True),
        ("NE, share of fp32's", comparison.ne_ratio, thresholds.max_ne_ratio, False),
    ):
        figures = f"{percent(ratio.value)} <span class='quiet'>({percent(ratio.low)} to {percent(ratio.high)})</span>"
        chart = interval_chart(ratio, limit, is_floor=is_floor)
        pieces.append(f'<div><div class="name"><span>{name}</span><span>{figures}</span></div>{chart}</div>')
    return "".join(pieces)


def _differences(report: QualityReport) -> str:
    found = report.comparison.differences
    items = [
        (f"{float(share) * 100:g} % change less than", _figure(v)) for share, v in found.absolute_quantiles.items()
    ]
    items += [
        ("largest change", _figure(found.max_absolute)),
        ("mean, with the sign", _signed(found.mean)),
        ("rank correlation", f"{found.rank_correlation:.7f}"),
    ]
    return "".join(f"<div><span>{name}</span><b>{value}</b></div>" for name, value in items)


def _histogram_note(report: QualityReport) -> str:
    histogram = report.comparison.differences.histogram
    beyond = histogram.num_beyond / report.comparison.num_samples
    return f"of 99 % of samples; {histogram.num_beyond:,} change more" if beyond else ""


def _calibration_note(report: QualityReport) -> str:
    num_points = len(report.comparison.reference_calibration)
    return (
        f"Samples in the order of their scores, in {num_points} parts of equal number: what a model predicts of each "
        "part, and the share of it that was positive. On the dashed line the two are equal."
    )


def _calibration_table(report: QualityReport) -> str:
    """Every fourth part, from both models' own order."""
    pairs = list(zip(report.comparison.reference_calibration, report.comparison.candidate_calibration, strict=True))
    shown = sorted({*range(0, len(pairs), 4), len(pairs) - 1})
    rows = (
        (
            f"part&nbsp;{number + 1}",
            f"{pairs[number][0].predicted:.4f}",
            f"{pairs[number][1].predicted:.4f}",
            f"{pairs[number][0].observed:.4f}",
            f"{pairs[number][1].observed:.4f}",
        )
        for number in shown
    )
    return _table(("", "predicted, fp32", "package", "actual, fp32", "package"), rows)


def _loss_note(report: QualityReport) -> str:
    total = sum(table.expected_increase for table in report.tables)
    return (
        f"Each table alone at a precision, all others in fp32, on {_samples(report.table_sample)}. The loss added is "
        "what labels drawn from the fp32 model's own probabilities would show, in nats a sample. As packaged the "
        f"tables add {_figure(total)} together: {_figure(total / report.comparison.reference.logloss * 100)} % of the "
        "fp32 model's log loss."
    )


def _loss_key(report: QualityReport) -> str:
    pieces = [_swatch(precision, precision) for precision in _tried(report)]
    return "".join(pieces) + _swatch("other", "small: not chosen")


def _tried(report: QualityReport) -> list[Precision]:
    return [p for p in PRECISIONS if any(option.precision == p for table in report.tables for option in table.options)]


def _tables(report: QualityReport) -> str:
    tried = [precision for precision in _tried(report) if precision != "fp32"]
    others = "".join(f'<th class="num">loss in {precision}</th>' for precision in tried)
    head = (
        '<thead><tr><th>table</th><th class="num">rows</th><th class="num">dim</th><th>precision</th>'
        '<th class="num">size</th><th class="num">row error</th><th class="num">AUC change</th>'
        f'<th class="num">loss added</th>{others}</tr></thead>'
    )
    most = max((table.expected_increase for table in report.tables), default=0.0) or 1.0
    order = sorted(report.tables, key=lambda table: -table.expected_increase)
    return f"{head}<tbody>{''.join(_table_row(table, tried, most) for table in order)}</tbody>"


def _table_row(table: TableFigures, tried: Sequence[str], most: float) -> str:
    kind = f'<span class="kind"><i class="swatch {table.precision}"></i>{table.precision}</span>'
    width = f"{table.expected_increase / most * 100:.1f}%"
    bar = f'<span class="bar"><i class="{table.precision}" style="width:{width}"></i></span>'
    by_precision = {option.precision: option.expected_increase for option in table.options}
    cells = [
        ("rows", f"{table.rows:,}"),
        ("dim", str(table.dim)),
        (None, kind),
        ("size", size(table.num_bytes)),
        ("row error", percent(table.row_error, 2)),
        ("AUC", _signed(table.chosen.auc_change) if table.chosen else NO_FIGURE),
        ("loss", f'{bar}<span class="figure">{_figure(table.expected_increase)}</span>'),
        *((f"in {p}", _figure(by_precision[p]) if p in by_precision else NO_FIGURE) for p in tried),
    ]
    text = "".join(
        f'<td class="num" data-label="{label}">{cell}</td>' if label else f"<td>{cell}</td>" for label, cell in cells
    )
    return f"<tr><th>{html.escape(table.name)}</th>{text}</tr>"


def _swatch(kind: str, name: str) -> str:
    return f'<span><i class="swatch {kind}"></i>{name}</span>'


def _figure(value: float) -> str:
    """Three digits; powers of ten where there are many zeros."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def _signed(value: float) -> str:
    return _figure(value) if value <= 0 else f"+{_figure(value)}"
