"""Pages of the documentation that are made from the code, so that none can be out of date; a hook of mkdocs.

`make docs` builds the site into build/site, with warnings as errors. Nothing made here is committed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from papilio.launch.cli import parser_of
from papilio.launch.verbs import VERBS
from papilio.trainer.config import Config

REPOSITORY = Path(__file__).resolve().parents[1]
# Where the bytes of each thing on disk are described: the docstring of one module.
FILE_FORMATS = {
    "Data set: the manifest": "data_pipeline/manifest.py",
    "Data set: a shard": "data_pipeline/shards.py",
    "Data set: a vocabulary": "data_pipeline/preprocess/vocabulary.py",
    "Plan file": "sharding/plan_file.py",
    "Hardware file": "sharding/hardware.py",
    "Run folder": "trainer/run/folder.py",
    "Checkpoint": "trainer/checkpoint/format.py",
    "Package": "trainer/inference/package/format.py",
    "Formats of a package": "trainer/inference/backends/format_folder.py",
    "Live view": "trainer/elastic/health/live_view.py",
    "Job folder": "launch/schedulers/job_folder.py",
}
# What a program of one's own may rely on; anything else may change without notice.
PYTHON_API = {
    "papilio.data_pipeline.dataset": ("open_dataset", "Dataset"),
    "papilio.data_pipeline.loading.loader": ("Loader",),
    "papilio.trainer.config_file": ("load_config",),
    "papilio.sharding.plan_file": ("read_plan_file", "PlanFile"),
    "papilio.trainer.inference.package.format": ("read_package", "verify_package"),
    "papilio.trainer.inference.package.sample_check": ("load_checked_scorer",),
    "papilio.trainer.inference.scorer": ("Scorer",),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those that lie outside of docs/."""
    pages = {
        "reference/commands.md": commands(),
        "reference/recipe_keys.md": recipe_keys(),
        "reference/file_formats.md": file_formats(),
        "reference/python_api.md": python_api(),
        "benchmarks.md": (REPOSITORY / "benchmarks/RESULTS.md").read_text("utf-8"),
        "contributing.md": (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8"),
        "changelog.md": (REPOSITORY / "CHANGELOG.md").read_text("utf-8"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Name files of the repository by their path: the site does not know where the repository is read.

    They are links to repo:PATH in pages, and any link to a file in those that lie outside of docs/.
    """
    is_outside = page.file.generated_by is not None
    home = "../" * page.file.src_uri.count("/")

    def replaced(match: re.Match[str]) -> str:
        target = match[2].removeprefix("repo:")
        if target.endswith("benchmarks/RESULTS.md"):
            return f"[{match[1]}]({home}benchmarks.md)"
        if target.startswith("docs/"):
            return f"[{match[1]}]({target.removeprefix('docs/')})"
        if (is_outside and "://" not in target and not target.startswith("#")) or target != match[2]:
            return f"`{target}`"
        return match[0]

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", replaced, markdown)


def commands() -> str:
    """Return every verb with every flag, from the parsers that the command line itself uses."""
    lines = ["# Commands and flags", ""]
    for verb in VERBS:
        lines += [f"## papilio {verb.name}", "", f"{verb.summary[0].upper()}{verb.summary[1:]}.", ""]
        lines += _arguments(parser_of(verb))
        if verb.takes_overrides:
            lines += ["Settings of the recipe follow as `--section.key=value`: [recipe keys](recipe_keys.md).", ""]
    return "\n".join(lines)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ")
    yield from ("```text", *textwrap.wrap(usage, 84, subsequent_indent="    ", break_on_hyphens=False), "```", "")
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from (f"### {parser.prog} {name}", "", *_arguments(child))
        elif action.help is not argparse.SUPPRESS and action.dest != "help":
            what = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            value = f" {action.metavar}" if action.option_strings and isinstance(action.metavar, str) else ""
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            rows.append(f"| `{what}{value}` | {_cell(text)} |")
    if rows:
        yield from ("| argument | meaning |", "|---|---|", *rows, "")


def recipe_keys() -> str:
    """Return every key of a recipe with its type, default and meaning, from the types that check it."""
    lines = ["# Recipe keys", "", "Given in a recipe, or as `--section.key=value` on a command line.", ""]
    return "\n".join([*lines, *_section(Config, "")])


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    rows, sections = [], []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            sections.append((kind, f"{prefix}{name}."))
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{_toml(default)}`"
        rows.append(f"| `{prefix}{name}` | `{_cell(_type(kind))}` | {shown} | {_cell(field.description or '')} |")
    title = prefix.rstrip(".") or "the recipe itself"
    yield from (f"## {title}", "", inspect.getdoc(model) or "", "")
    yield from ("| key | type | default | meaning |", "|---|---|---|---|", *rows, "")
    for kind, inner in sections:
        yield from _section(kind, inner)


def _type(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    text = re.sub(r"\b[a-z_]+\.(?:\w+\.)*(?=\w)", "", text.replace("NoneType", "None")).replace(" | ", " or ")
    return re.sub(r"Literal\[([^\]]+)\]", lambda match: match[1].replace(", ", " or "), text)


def _toml(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value).replace("|", "\\|")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def file_formats() -> str:
    """Return the descriptions of what lies on disk, from the modules that write it."""
    lines = ["# File formats", "", "Each says its version; another version is refused by name.", ""]
    for title, path in FILE_FORMATS.items():
        text = ast.get_docstring(ast.parse((REPOSITORY / path).read_text("utf-8"))) or ""
        lines += [f"## {title}", "", f"Written by `{path}`.", "", "```text", text, "```", ""]
    return "\n".join(lines)


def python_api() -> str:
    """Return the signatures and docstrings of what programs of one's own may use."""
    lines = ["# Python API", "", "Anything that is not here may change between versions without notice.", ""]
    for module, names in PYTHON_API.items():
        path = REPOSITORY / Path(*module.split(".")[1:]).with_suffix(".py")
        found = {node.name: node for node in ast.parse(path.read_text("utf-8")).body if hasattr(node, "name")}
        lines += [f"## {module}", ""]
        for name in names:
            node = found[name]  # a KeyError names what has gone from the API
            head = ast.unparse(node).split('"""')[0].split("\n")
            signature = next(line for line in head if line.startswith(("def ", "class ")))
            lines += [
                f"### {name}",
                "",
                "```python",
                signature,
                "```",
                "",
                "```text",
                ast.get_docstring(node) or "",
                "```",
                "",
            ]
    return "\n".join(lines)
