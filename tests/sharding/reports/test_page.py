"""A plan as a page: it parses, needs nothing from elsewhere, holds the whole plan, and no name breaks out of it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

from setuptools.config.setupcfg import read_configuration

import papilio.sharding.reports.page
from papilio.sharding.config import ShardingTypeName
from papilio.sharding.reports.figures import MEMORY_NAMES, PHASE_NAMES
from papilio.sharding.reports.page import SCRIPTS, STYLE, TEMPLATE, plan_page
from papilio.sharding.reports.page_frame import FRAME
from tests.support.plan_files import hand_made, real_plan, table

VOID = {"meta", "input", "link", "br", "img", "hr"}
EVIL = "</script><script>alert(1)</script>&<!--%%DATA%%\u2028\"'"


class Page(HTMLParser):
    """Elements that must be closed in order, their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[-1][2].append(data)

    def text_of(self, tag):
        return ["".join(parts).strip() for name, _, parts in self.texts if name == tag]

    @property
    def data(self):
        (text,) = ["".join(parts) for _, attrs, parts in self.texts if attrs.get("id") == "plan"]
        return json.loads(text)


def test_the_page_needs_nothing_from_elsewhere():
    text = plan_page(real_plan(8, 2, 4))
    assert {name for _, name, _ in Page(text).attributes}.isdisjoint({"src", "href", "srcset", "action", "data"})
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b|//cdn", text)


def test_the_page_holds_every_table_and_rank():
    plan = real_plan(40, 4, 8, types=["data_parallel", "table_wise", "row_wise"])
    data = Page(plan_page(plan)).data
    assert [found["name"] for found in data["tables"]] == [placed.name for placed in plan.tables]
    assert [found["rank"] for found in data["ranks"]] == list(range(32))
    for found, placed in zip(data["tables"], plan.tables, strict=True):
        covered = [rank for first, last in found["ranks"] for rank in range(first, last + 1)]
        assert covered == sorted(set(placed.ranks))
        assert abs(sum(found["phases"]) - placed.phases.total_s) < 1e-7
    for found, rank in zip(data["ranks"], plan.ranks, strict=True):
        assert sum(found["memory"]) == rank.memory.device_bytes
    assert abs(sum(part["s"] for part in data["parts"]) - plan.step.total_s) < 1e-6
    assert data["notes"] == list(plan.notes)


def test_names_cannot_break_out():
    plan = hand_made(table(EVIL, 0, feature=EVIL), recipe=EVIL, notes=(EVIL,))
    page = Page(plan_page(plan))
    assert len(page.text_of("script")) == 2, "the data and the program"
    assert page.data["tables"][0]["name"] == EVIL
    assert page.data["notes"] == [EVIL]
    assert page.text_of("title") == [f"{EVIL} on 4 ranks of some_machine"]
    assert page.text_of("h1") == page.text_of("title")


def test_the_program_never_puts_names_into_markup():
    """Markup in the program is of numbers and fixed words only; what the plan names becomes text."""
    program = Page(plan_page(hand_made(table("t", 0)))).text_of("script")[1]
    assert "insertAdjacentHTML" not in program
    assert "document.write" not in program
    markup = "".join(re.findall(r"`<[^`]*`", program))
    assert not re.search(r"\$\{[^}]*\.(name|feature|module|recipe|note)s?\b(?!\})", markup.replace("limit.name", ""))


def test_a_large_plan_makes_a_small_page():
    everywhere = table("t", *range(512), rows=5_120)
    tables = [everywhere.model_copy(update={"name": f"t_{i}"}) for i in range(1_000)]
    assert len(plan_page(hand_made(*tables, num_ranks=512)).encode()) < 1 << 20


def test_the_files_of_the_page_are_packaged():
    repository = Path(__file__).resolve().parents[3]
    options = read_configuration(repository / "setup.cfg")["options"]
    patterns = options["package_data"]["papilio.sharding.reports"]
    folder = Path(papilio.sharding.reports.page.__file__).parent
    for name in (TEMPLATE, STYLE, *SCRIPTS, *FRAME.values()):
        assert (folder / name).is_file()
        assert any(Path(name).match(pattern) for pattern in patterns)


def test_every_part_of_memory_and_step_has_a_colour():
    names = {*MEMORY_NAMES.values(), *PHASE_NAMES, *get_args(ShardingTypeName)}
    style = Path(papilio.sharding.reports.page.__file__).with_name(STYLE).read_text("utf-8")
    colours = set(re.findall(r"--c-([\w-]+):", style))
    assert {name.replace(" ", "-") for name in names} <= colours
