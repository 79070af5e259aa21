"""Format "onnx": the whole model for ONNX Runtime or any other reader of ONNX; no operator of FBGEMM's.

Inputs dense [samples, I] float, ids [ids] int32, lengths [features * samples] int32; outputs probabilities [samples]
float and num_unknown_ids [] int64. Tables lie in `model.onnx.data`, which ONNX Runtime maps.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from papilio.trainer.compat.torch_internals import any_batch_size
from papilio.trainer.inference.backends.format_folder import FormatInfo, Made, format_path, read_format, write_format
from papilio.trainer.inference.backends.graph import PlainGraph, example_inputs
from papilio.trainer.inference.backends.predictor import Predictor
from papilio.trainer.inference.package.format import Package, PackageError

MODEL = "model.onnx"
OPSET = 20
INPUTS = ("dense", "ids", "lengths")
OUTPUTS = ("probabilities", "num_unknown_ids")
_EXTRA = 'pip install "papilio[onnx]"'


def build_onnx(package: Package) -> FormatInfo:
    """Write the model.

    Raises:
        PackageError: a library for it is not installed.
    """
    require_installed("onnx", "onnxscript")

    def build(folder: str) -> Made:
        arguments, shapes = example_inputs(package)
        write_onnx(PlainGraph(package), arguments, shapes, (INPUTS, OUTPUTS), os.path.join(folder, MODEL))
        return Made({})

    return write_format(package, "onnx", build)


def open_onnx(package: Package, *, trusts_formats: bool) -> Predictor:
    """Open the model in ONNX Runtime, with as many threads as torch has.

    Raises:
        PackageError: it was not built, is damaged, is not trusted, or ONNX Runtime is not installed.
    """
    read_format(package, "onnx", trusts_formats=trusts_formats)
    session = open_session(format_path(package, "onnx", MODEL))

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(INPUTS, tensors, strict=True)}
        probabilities, num_unknown = session.run(list(OUTPUTS), feeds)
        return torch.from_numpy(probabilities), torch.as_tensor(num_unknown)

    return Predictor("onnx", package.manifest, run)


def write_onnx(
    graph: nn.Module,
    arguments: tuple[torch.Tensor, ...],
    shapes: tuple[dict[int, Any], ...],
    names: tuple[Sequence[str], Sequence[str]],
    path: str,
) -> None:
    """Write a graph as ONNX, its weights beside it.

    Args:
        graph: what to write.
        arguments: example inputs.
        shapes: which sizes of theirs are free.
        names: of inputs and outputs.
        path: of the file; weights go to the same name with `.data`.
    """
    with torch.no_grad(), any_batch_size(), _quiet():
        program = torch.onnx.export(
            graph.eval(),
            arguments,
            dynamic_shapes=shapes,
            input_names=list(names[0]),
            output_names=list(names[1]),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def quantize_onnx(path: str) -> None:
    """Turn a model's matrix products to int8, in place: weights by output channel, activations by batch as they come.

    A sample's answer then depends a little on the samples that it is computed with.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    model = onnx.load(path)
    # Shapes that the exporter noted contradict those of the quantized products.
    del model.graph.value_info[:]
    quantize_dynamic(
        model, path, op_types_to_quantize=["Gemm", "MatMul"], per_channel=True, weight_type=QuantType.QInt8
    )
    os.remove(path + ".data")


def open_session(path: str) -> Any:
    """Open a model in ONNX Runtime on the CPU, with as many threads as torch has.

    Raises:
        PackageError: ONNX Runtime is not installed.
    """
    require_installed("onnxruntime")
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait by spinning take the processor from others between two requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def require_installed(*libraries: str) -> None:
    """Make sure that libraries are there.

    Raises:
        PackageError: one is not.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise PackageError(f"ONNX needs {library}, which is not installed: {_EXTRA}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter has to say of libraries that we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
