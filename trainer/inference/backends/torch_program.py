"""Format "torch": one `torch.export` file with the tables inside, of plain operators, for any machine with torch.

program = torch.export.load("model.pt2").module()
probabilities, num_unknown_ids = program(dense, ids, lengths)
"""

from __future__ import annotations

import os

import torch

from papilio.trainer.inference.backends.format_folder import FormatInfo, Made, format_path, read_format, write_format
from papilio.trainer.inference.backends.graph import PlainGraph, export_program
from papilio.trainer.inference.backends.predictor import Predictor
from papilio.trainer.inference.package.format import Package

PROGRAM = "model.pt2"


def build_torch_program(package: Package) -> FormatInfo:
    """Write the program; takes memory for one more copy of the tables."""

    def build(folder: str) -> Made:
        torch.export.save(export_program(PlainGraph(package), package), os.path.join(folder, PROGRAM))
        return Made({})

    return write_format(package, "torch", build)


def open_torch_program(package: Package, *, trusts_formats: bool) -> Predictor:
    """Open the program.

    Raises:
        PackageError: it was not built, is damaged, or is not trusted.
    """
    read_format(package, "torch", trusts_formats=trusts_formats)
    program = torch.export.load(format_path(package, "torch", PROGRAM)).module()
    return Predictor("torch", package.manifest, program)
