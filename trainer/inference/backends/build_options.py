"""What `papilio package build` takes. Needs no torch."""

from __future__ import annotations

import argparse
from typing import Literal

FormatName = Literal["fastest", "aoti", "torch", "onnx"]
FORMAT_NAMES: tuple[FormatName, ...] = ("fastest", "aoti", "torch", "onnx")
DenseArithmetic = Literal["fp32", "bf16", "int8"]
# From exact to coarse; a backend is tried if its arithmetic is not beyond what was allowed.
DENSE_ARITHMETICS: tuple[DenseArithmetic, ...] = ("fp32", "bf16", "int8")
DEFAULT_DENSE: DenseArithmetic = "bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser that has the package already."""
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMAT_NAMES,
        help="fastest: for each batch size the fastest of several backends on this machine; serve uses it by itself, "
        "predict with --fastest; aoti: AOTInductor code over the package's own tables; "
        "torch: one torch.export file for any machine with torch; "
        "onnx: the whole model, without FBGEMM",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="with fastest: data set whose held-out samples tell what bf16 costs (default: the run's)",
    )
    parser.add_argument(
        "--dense",
        choices=DENSE_ARITHMETICS,
        help="with fastest: the coarsest arithmetic that the dense part may have; with bf16 and int8 an answer depends "
        f"a little on the batch that it is computed in (default: {DEFAULT_DENSE})",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="with fastest: threads to measure with (default: torch's own choice)"
    )
