"""The backends to compute a package's answers on a CPU: all look up tables by FBGEMM's operator over the mapped file.

What they do differently is the dense part. At one sample time goes into reading its weights and into calls, at many
into arithmetic, so no one of them is the fastest for all batches.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from papilio.trainer.inference.backends.aoti import compile_graph, has_compiler, load_graph
from papilio.trainer.inference.backends.build_options import DenseArithmetic
from papilio.trainer.inference.backends.dense_backends import for_many_samples, for_one_sample
from papilio.trainer.inference.backends.flat_model import FlatModel, build_dense_of, build_flat_model, map_tables
from papilio.trainer.inference.backends.onnx_model import open_session, quantize_onnx, write_onnx
from papilio.trainer.inference.backends.predictor import RunGraph
from papilio.trainer.inference.package.format import Package

EAGER = "eager"
_PROGRAM = "model.pt2"
_MODEL = "dense.onnx"
_INPUTS, _OUTPUTS = ("dense", "pooled"), ("probabilities",)


@dataclass(frozen=True)
class Backend:
    """One backend: `build` writes what it needs into an empty folder, `load` opens it."""

    dense: DenseArithmetic
    build: Callable[[Package, str], None]
    load: Callable[[Package, str], RunGraph]
    is_compiled: bool = False
    needs: tuple[str, ...] = ()

    def missing_requirement(self) -> str | None:
        """Say what this machine lacks to build it, None if nothing."""
        for library in self.needs:
            if importlib.util.find_spec(library) is None:
                return f"{library} is not installed"
        if self.is_compiled and not has_compiler():
            return "there is no C++ compiler"
        return None


def load_eager(package: Package, folder: str = "") -> RunGraph:
    """Return the model run operator by operator, which needs nothing built."""
    return run_of_model(build_flat_model(package))


def run_of_model(model: FlatModel) -> RunGraph:
    """Return a model's answers together with its count of unknown ids."""

    def run(dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(dense, ids, lengths), model.num_unknown_ids(ids, lengths)

    return run


class _DenseGraph(nn.Module):
    def __init__(self, dense_part: nn.Module) -> None:
        super().__init__()
        self.dense_part = dense_part

    def forward(self, dense: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.dense_part(dense, pooled))


def _build_aoti_fp32(package: Package, folder: str) -> None:
    compile_graph(package, build_dense_of(package), os.path.join(folder, _PROGRAM))


def _build_aoti_bf16(package: Package, folder: str) -> None:
    compile_graph(package, for_many_samples(build_dense_of(package)), os.path.join(folder, _PROGRAM))


def _build_aoti_bf16_packed(package: Package, folder: str) -> None:
    part = for_many_samples(build_dense_of(package))
    compile_graph(package, part, os.path.join(folder, _PROGRAM), is_frozen=True)


def _build_aoti_bf16_sums(package: Package, folder: str) -> None:
    compile_graph(package, for_one_sample(build_dense_of(package)), os.path.join(folder, _PROGRAM))


def _load_aoti(package: Package, folder: str) -> RunGraph:
    return load_graph(os.path.join(folder, _PROGRAM), map_tables(package))


def _build_onnx_fp32(package: Package, folder: str) -> None:
    tables, num_dense = package.manifest.tables, len(package.manifest.dense_features)
    arguments = (torch.zeros(6, num_dense), torch.zeros(6, len(tables), tables[0].dim))
    num_samples = torch.export.Dim("num_samples", min=0)
    path = os.path.join(folder, _MODEL)
    shapes = ({0: num_samples}, {0: num_samples})
    write_onnx(_DenseGraph(build_dense_of(package)), arguments, shapes, (_INPUTS, _OUTPUTS), path)


def _build_onnx_int8(package: Package, folder: str) -> None:
    _build_onnx_fp32(package, folder)
    quantize_onnx(os.path.join(folder, _MODEL))


def _load_onnx(package: Package, folder: str) -> RunGraph:
    lookup = build_flat_model(package).lookup
    session = open_session(os.path.join(folder, _MODEL))

    def run(dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = lookup(ids, lengths)
        (probabilities,) = session.run(list(_OUTPUTS), {"dense": dense.numpy(), "pooled": pooled.numpy()})
        return torch.from_numpy(probabilities), lookup.num_unknown_ids(ids, lengths)

    return run


_ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
BACKENDS: dict[str, Backend] = {
    EAGER: Backend("fp32", lambda package, folder: None, load_eager),
    "aoti_fp32": Backend("fp32", _build_aoti_fp32, _load_aoti, is_compiled=True),
    "onnx_fp32": Backend("fp32", _build_onnx_fp32, _load_onnx, needs=_ONNX_LIBRARIES),
    "aoti_bf16_sums": Backend("bf16", _build_aoti_bf16_sums, _load_aoti, is_compiled=True),
    "aoti_bf16_packed": Backend("bf16", _build_aoti_bf16_packed, _load_aoti, is_compiled=True),
    "aoti_bf16": Backend("bf16", _build_aoti_bf16, _load_aoti, is_compiled=True),
    "onnx_int8": Backend("int8", _build_onnx_int8, _load_onnx, needs=_ONNX_LIBRARIES),
}
