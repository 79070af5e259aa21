"""Format "aoti": the model compiled by AOTInductor; tables stay in `tables.bin`, which it is given mapped.

The dense weights are in the compiled code, packed for the processor. Tables are an input rather than constants: code
whose constants were not loaded ends the process, a missing input is an error.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import fbgemm_gpu
import torch
from torch import nn

from papilio.trainer.compat.torch_internals import compile_and_package, load_archive
from papilio.trainer.inference.backends.flat_model import build_dense_of, map_tables
from papilio.trainer.inference.backends.format_folder import FormatInfo, Made, format_path, read_format, write_format
from papilio.trainer.inference.backends.graph import GraphOnFile, export_program
from papilio.trainer.inference.backends.predictor import Predictor, RunGraph
from papilio.trainer.inference.package.format import Package, PackageError

PROGRAM = "model.pt2"
# The name that torch gives a model in an archive unless told otherwise.
_MODEL_NAME = "model"


def build_aoti(package: Package) -> FormatInfo:
    """Compile the model with its dense part in fp32.

    Raises:
        PackageError: there is no C++ compiler.
    """

    def build(folder: str) -> Made:
        compile_graph(package, build_dense_of(package), os.path.join(folder, PROGRAM))
        return Made(versions_needed(), instruction_sets())

    return write_format(package, "aoti", build)


def open_aoti(package: Package, *, trusts_formats: bool) -> Predictor:
    """Open the compiled model.

    Raises:
        PackageError: it was not built, is damaged, is not trusted, or is for other versions or another processor.
    """
    read_format(package, "aoti", trusts_formats=trusts_formats, require_fit=require_fit)
    run = load_graph(format_path(package, "aoti", PROGRAM), map_tables(package))
    return Predictor("aoti", package.manifest, run)


def compile_graph(package: Package, dense_part: nn.Module, path: str, *, is_frozen: bool = False) -> None:
    """Compile the package's lookups and a dense part into an archive.

    Args:
        package: what to compile.
        dense_part: its dense part, in any arithmetic.
        path: the archive, a new .pt2 file.
        is_frozen: pack the weights of matrix products when compiling.

    Raises:
        PackageError: there is no C++ compiler.
    """
    if not has_compiler():
        raise PackageError(
            "AOTInductor needs a C++ compiler and finds none; install one (Debian and Ubuntu: apt-get install g++) or "
            "name it in CXX, or use --format torch or onnx, which need none"
        )
    # Tables that are not read: only their size counts.
    table_bytes = torch.empty(64, dtype=torch.uint8)
    program = export_program(GraphOnFile(package, dense_part), package, table_bytes)
    compile_and_package(program, path, {"freezing": is_frozen})


def has_compiler() -> bool:
    """Say whether AOTInductor will find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def load_graph(path: str, table_bytes: torch.Tensor) -> RunGraph:
    """Load an archive that `compile_graph` wrote.

    Calls from several threads wait for each other: running at once, each would need weights of its own.
    """
    with _fleeting_folder():
        loader = load_archive(path, _MODEL_NAME)

    def run(dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities, num_unknown = loader.boxed_run([table_bytes, dense, ids, lengths])
        return probabilities, num_unknown

    return run


@contextmanager
def _fleeting_folder() -> Iterator[None]:
    """Let torch unpack its archive into a folder that is gone after the block: the code is mapped by then.

    Torch removes its own folder (aotinductor_*) in a destructor, which no process reaches that is ended by a signal.
    """
    with tempfile.TemporaryDirectory(prefix="papilio_aoti_") as folder:
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            del os.environ["TMPDIR"]
            os.environ.update({} if before is None else {"TMPDIR": before})


def versions_needed() -> dict[str, str]:
    """Return the versions that compiled code is bound to."""
    return {"torch": torch.__version__, "fbgemm_gpu": fbgemm_gpu.__version__}


def instruction_sets() -> tuple[str, ...]:
    """Return what this processor can do, by torch's names."""
    return tuple(sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True))


def require_fit(package: Package, info: FormatInfo) -> None:
    """Make sure that compiled code can run here.

    Raises:
        PackageError: it was built for other versions, or for another processor.
    """
    fix = f"`papilio package build {package.folder} --format {info.name}` on this machine makes one that fits"
    for library, version in versions_needed().items():
        if info.needs.get(library) != version:
            raise PackageError(
                f"format {info.name} of {package.folder} was compiled for {library} {info.needs.get(library)}, here is "
                f"{version}; {fix}"
            )
    lacking = sorted(set(info.instruction_sets) - set(instruction_sets()))
    if lacking:
        raise PackageError(
            f"format {info.name} of {package.folder} was compiled for a processor with {', '.join(lacking)}, which "
            f"this one lacks; {fix}"
        )
