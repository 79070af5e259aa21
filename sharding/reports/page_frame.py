"""What all pages of reports share: their frame's style, the switch between light and dark, and how they are filled."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

FRAME = {"FRAME_STYLE": "frame.css", "FRAME_SCRIPT": "frame.js"}


def fill_page(template: str, fillings: Mapping[str, str]) -> str:
    """Return a template with each %%NAME%% replaced; FRAME_STYLE and FRAME_SCRIPT are there in any case.

    It is split once, so that what is filled in is never searched for placeholders itself.
    """
    frame = {name: packaged_text("papilio.sharding.reports", file) for name, file in FRAME.items()}
    known = {**frame, **fillings}
    pieces = template.split("%%")
    return "".join(known[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def packaged_text(package: str, name: str) -> str:
    """Return a text file that lies beside a package's modules."""
    return (files(package) / name).read_text("utf-8")
