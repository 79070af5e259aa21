"""The quality report as JSON and as a page: nothing from elsewhere, no way out of it, and plots that are plots."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from setuptools.config.setupcfg import read_configuration

import papilio.trainer.inference.export.report_page
from papilio.trainer.inference.export.comparison import compare_scores
from papilio.trainer.inference.export.quality_report import (
    OptionFigures,
    QualityReport,
    Ratio,
    SampleFigures,
    TableFigures,
    Thresholds,
)
from papilio.trainer.inference.export.report_charts import Axis, interval_chart, loss_chart
from papilio.trainer.inference.export.report_page import STYLE, TEMPLATE, report_page
from papilio.trainer.inference.package.format import PRECISIONS

VOID = {"meta", "input", "link", "br", "img", "hr"}
EVIL = "</script><script>alert(1)</script>&<!--%%DATA%%\u2028\"'"
LOSSES = {"fp32": 0.0, "fp16": 1e-11, "int8": 1e-8, "int4": 1e-5, "int2": 1e-3}


class Page(HTMLParser):
    """Elements that must be closed in order, with their attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for number in self.open:
            self.elements[number][2].append(data)

    def texts(self, tag, kind=None):
        return [
            "".join(parts).strip()
            for name, attributes, parts in self.elements
            if name == tag and (kind is None or kind in (attributes.get("class") or "").split())
        ]


def make_comparison(noise=0.01, count=2_000):
    generator = np.random.default_rng(0)
    first = generator.normal(-1, 1, count)
    labels = generator.random(count) < 1 / (1 + np.exp(-first))
    return compare_scores(first, first + noise * generator.normal(size=count), labels)


def make_table(name="t_a", rows=1_000, precision="int8", scale=1.0):
    options = tuple(
        OptionFigures(
            precision=other,
            quantizer={"int8": "minmax", "int4": "greedy", "int2": "greedy"}.get(other),
            num_bytes=rows * size,
            expected_increase=scale * LOSSES[other],
            measured_increase=0.0,
            measured_error=0.0,
            auc_change=-1e-6,
        )
        for other, size in zip(PRECISIONS, (64, 32, 20, 12, 8), strict=True)
    )
    chosen = next(option for option in options if option.precision == precision)
    return TableFigures(
        name=name,
        feature=name,
        rows=rows,
        dim=16,
        precision=precision,
        quantizer=chosen.quantizer,
        num_bytes=chosen.num_bytes,
        fp32_bytes=rows * 64,
        row_error=0.004,
        options=options,
    )


def make_report(*tables, comparison=None, thresholds=None, name="ads", data="/data"):
    tables = tables or (make_table(), make_table("t_b", 10, "int4"))
    sample = SampleFigures(data=data, split="test", num_samples=2_000, num_rows=5_000)
    return QualityReport(
        papilio_version="0.1",
        name=name,
        architecture="dlrm",
        checkpoint="step_0000000007-abcdef",
        step=7,
        made_at="2026-11-21T09:00:00+00:00",
        label="bought",
        thresholds=thresholds or Thresholds(min_auc_ratio=0.999, max_ne_ratio=1.001),
        held_out=sample,
        comparison=comparison or make_comparison(),
        table_sample=sample,
        table_bytes=sum(table.num_bytes for table in tables),
        fp32_table_bytes=sum(table.fp32_bytes for table in tables),
        dense_bytes=1_000,
        tables=tables,
    )


def test_json_and_back():
    report = make_report()
    assert QualityReport.model_validate_json(report.model_dump_json()) == report


def test_the_page_calls_samples_by_the_name_of_their_label():
    page = report_page(make_report())
    assert re.search(r"[\d.]+ % of them positive \(bought = 1\)\.", page)
    assert "clicks" not in page.lower()


def test_the_page_needs_nothing_from_elsewhere():
    text = report_page(make_report())
    attributes = {name for _, found, _ in Page(text).elements for name in found}
    assert attributes.isdisjoint({"src", "href", "srcset", "action", "data"})
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b|//cdn", text)
    assert "%%" not in text


def test_the_page_says_what_was_measured():
    report = make_report()
    page = Page(report_page(report))
    comparison = report.comparison
    cells = page.texts("td")
    for value in (comparison.reference.auc, comparison.candidate.auc, comparison.candidate.ne):
        assert f"{value:.6f}" in cells
    tiles = page.texts("div", "value")
    assert tiles[0] == "Certified"
    assert tiles[1] == f"{comparison.auc_ratio.value * 100:.3f} %"
    assert tiles[3] == f"{100 * 20_120 / 64_640:.1f} %"
    (subtitle,) = [text for text in page.texts("p") if "checkpoint" in text]
    assert subtitle.endswith("2 tables: 1 in int8 (minmax), 1 in int4 (greedy) · dense part in fp32")
    # The costly table is first.
    names = [text for text in page.texts("th") if text.startswith("t_")]
    assert names == ["t_b", "t_a"]
    titles = page.texts("title")
    assert sum("as packaged" in title for title in titles) == 2
    assert "t_b in int4 (as packaged): 120 B, 1.0e\N{MINUS SIGN}5 nats a sample" in titles


def test_names_cannot_break_out():
    page = Page(report_page(make_report(make_table(EVIL), name=EVIL, data=EVIL)))
    assert len(page.texts("script")) == 1
    assert page.texts("h1") == [f"{EVIL} at step 7"]
    assert EVIL in page.texts("th")
    assert page.texts("title")[0] == f"{EVIL} at step 7: quality"


def every_number(page):
    """Coordinates of all that is drawn."""
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height")
    for tag, attributes, _ in page.elements:
        if tag in {"rect", "line", "circle", "text"}:
            yield from (float(attributes[name]) for name in names if name in attributes)
        if tag == "polyline":
            yield from (float(number) for pair in attributes["points"].split() for number in pair.split(","))


@pytest.mark.parametrize(
    "report",
    [
        make_report(),
        make_report(comparison=make_comparison(noise=0)),
        make_report(make_table(precision="fp32")),
        make_report(make_table(scale=0.0)),
        make_report(make_table(rows=1)),
        make_report(*(make_table(f"t_{n}", 10 ** (n % 9), PRECISIONS[n % 5], 10.0**-n) for n in range(20))),
        make_report(comparison=make_comparison(noise=5.0)),
        make_report(thresholds=Thresholds(min_auc_ratio=0.0, max_ne_ratio=2.0)),
        make_report(thresholds=Thresholds(min_auc_ratio=1.0, max_ne_ratio=1.0)),
    ],
    ids=["usual", "no difference", "fp32", "no loss", "one row", "many", "far off", "no threshold", "strictest"],
)
def test_everything_is_drawn_inside_its_plot(report):
    numbers = list(every_number(Page(report_page(report))))
    assert all(math.isfinite(number) and -1 <= number <= 1_000 for number in numbers)
    assert len(numbers) > 100


def test_a_package_that_failed_looks_it():
    report = make_report(comparison=make_comparison(noise=1.0))
    page = Page(report_page(report))
    assert page.texts("div", "bad")[0].startswith("VerdictRefused")
    assert len(report.failures) == 2
    assert not report.is_within_noise


def test_a_threshold_inside_the_interval_is_noise():
    comparison = make_comparison(noise=0.2)
    auc, ne = comparison.auc_ratio, comparison.ne_ratio
    loose, tight = Thresholds(min_auc_ratio=0.5, max_ne_ratio=2.0), Thresholds(min_auc_ratio=0.5, max_ne_ratio=ne.value)
    assert not make_report(comparison=comparison, thresholds=loose).is_within_noise
    assert make_report(comparison=comparison, thresholds=tight).is_within_noise
    just_failed = Thresholds(min_auc_ratio=auc.value + 1e-9, max_ne_ratio=2.0)
    failed = make_report(comparison=comparison, thresholds=just_failed)
    assert len(failed.failures) == 1
    assert failed.is_within_noise


def test_scores_that_rank_alike_but_are_off_fail_by_their_ne():
    generator = np.random.default_rng(0)
    first = generator.normal(-1, 1, 2_000)
    comparison = compare_scores(first, 1.5 * first, generator.random(2_000) < 1 / (1 + np.exp(-first)))
    (failure,) = make_report(comparison=comparison).failures
    assert failure.startswith(f"its NE is {comparison.candidate.ne:.6f}, ")
    assert failure.endswith("where at most 100.1000 % is allowed")
    assert comparison.auc_ratio.value == 1


def test_nan_is_a_failure():
    nan = Ratio(value=math.nan, low=math.nan, high=math.nan)
    comparison = make_comparison().model_copy(update={"auc_ratio": nan})
    assert len(make_report(comparison=comparison).failures) == 1


def test_ticks_are_round():
    assert Axis(0, 0.73, 0, 100).ticks() == pytest.approx([0, 0.2, 0.4, 0.6])
    assert Axis(1e-9, 1e-3, 0, 100, base=10).ticks() == pytest.approx([1e-9, 1e-7, 1e-5, 1e-3])
    assert Axis(100, 5_000, 0, 100, base=4).ticks() == pytest.approx([256, 1024, 4096])


def test_an_axis_puts_values_where_they_are():
    axis = Axis(1e-4, 1.0, 100, 500, base=10)
    assert [axis(value) for value in (1e-4, 1e-2, 1.0)] == pytest.approx([100, 300, 500])
    assert (axis(0.0), axis(7.0)) == (100, 500)


def test_the_interval_shows_which_side_is_bad():
    ratio = Ratio(value=0.9995, low=0.999, high=1.0)
    for is_floor, threshold in ((True, 0.998), (False, 1.002)):
        page = Page(interval_chart(ratio, threshold, is_floor=is_floor))
        (bad,) = [found for tag, found, _ in page.elements if tag == "rect"]
        (dot,) = [found for tag, found, _ in page.elements if tag == "circle"]
        begins_left = float(bad["x"]) < float(dot["cx"])
        assert begins_left == is_floor


def test_smaller_losses_are_lower_and_smaller_tables_further_left():
    page = Page(loss_chart([make_table()]))
    dots = {found["class"].split()[1]: found for tag, found, _ in page.elements if tag == "circle"}
    ordered = [dots[precision] for precision in ("int2", "int4", "int8", "fp16")]
    across, down = [[float(dot[name]) for dot in ordered] for name in ("cx", "cy")]
    assert across == sorted(across)
    assert down == sorted(down)


def test_the_files_of_the_page_are_packaged():
    repository = Path(__file__).resolve().parents[4]
    options = read_configuration(repository / "setup.cfg")["options"]
    folder = Path(papilio.trainer.inference.export.report_page.__file__).parent
    for name in (TEMPLATE, STYLE):
        assert (folder / name).is_file()
        assert any(Path(name).match(pattern) for pattern in options["package_data"]["papilio.trainer.inference.export"])
