"""Builds and opens a package's formats by their names; needs no torchrec."""

from __future__ import annotations

import logging

import torch

from papilio.trainer.inference.backends.aoti import build_aoti, open_aoti
from papilio.trainer.inference.backends.build_options import DEFAULT_DENSE, DenseArithmetic, FormatName
from papilio.trainer.inference.backends.cpu_backends import EAGER, run_of_model
from papilio.trainer.inference.backends.fastest import build_fastest, open_fastest
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.backends.format_folder import FormatInfo, has_format
from papilio.trainer.inference.backends.onnx_model import build_onnx, open_onnx
from papilio.trainer.inference.backends.predictor import Predictor
from papilio.trainer.inference.backends.torch_program import build_torch_program, open_torch_program
from papilio.trainer.inference.package.format import Package, PackageError

logger = logging.getLogger(__name__)
_BUILDERS = {"aoti": build_aoti, "torch": build_torch_program, "onnx": build_onnx}
_OPENERS = {"fastest": open_fastest, "aoti": open_aoti, "torch": open_torch_program, "onnx": open_onnx}


def build_format(
    package: Package,
    name: FormatName,
    *,
    data: str | None = None,
    dense: DenseArithmetic = DEFAULT_DENSE,
    num_threads: int | None = None,
) -> FormatInfo:
    """Build a format; one that is there is replaced.

    Args:
        package: what to build it of.
        name: the format.
        data: of "fastest": data set with held-out samples; that of the run by default.
        dense: of "fastest": the coarsest arithmetic that the dense part may have.
        num_threads: of "fastest": threads to measure with; changed for the whole process.

    Raises:
        PackageError: something that it takes is missing, or the package is damaged.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    package.require_sound()
    return build_fastest(package, data, dense) if name == "fastest" else _BUILDERS[name](package)


def open_format(package: Package, name: FormatName, *, trusts_formats: bool = False) -> Predictor:
    """Open a format.

    Args:
        package: whose format.
        name: which.
        trusts_formats: open it even if this user did not build it on this machine: that runs its builder's code.

    Raises:
        PackageError: it was not built, is damaged, does not fit this machine, or is not trusted.
    """
    return _OPENERS[name](package, trusts_formats=trusts_formats)


def open_predictor(package: Package, *, trusts_formats: bool = False) -> Predictor:
    """Open a package by format "fastest" where that can be, else eagerly: with a warning if it was built."""
    if has_format(package, "fastest"):
        try:
            return open_fastest(package, trusts_formats=trusts_formats)
        except PackageError as error:
            logger.warning("%s; the package is used without it: slower, and its dense part in fp32", error)
    return Predictor(EAGER, package.manifest, run_of_model(build_flat_model(package)))
