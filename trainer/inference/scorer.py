"""A package that answers: raw records or encoded batches in, probabilities out. Needs no torchrec.

B samples, F categorical features, I dense inputs, V ids in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from papilio.data_pipeline.schema import TRANSFORM_VERSION
from papilio.trainer.inference.backends.cpu_backends import EAGER
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.backends.opening import open_format, open_predictor
from papilio.trainer.inference.encoding.request_encoder import EncodedBatch, RequestEncoder, load_request_encoder
from papilio.trainer.inference.package.format import Package, PackageError, read_package

# (dense [B, I] fp32, ids [V] int32, lengths [F * B] int32) -> probabilities [B] fp32; B is at least 1.
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Formats:
    """Whether a package's format "fastest" is used.

    Attributes:
        use: "if_fit" leaves one that was not built, or does not fit, with a warning; "always" refuses the package then.
        are_trusted: open it though somebody else built it, which runs their code (formats/trust.py).
    """

    use: Literal["never", "if_fit", "always"] = "never"
    are_trusted: bool = False


EXACT = Formats()


@dataclass(frozen=True)
class Scorer:
    """A package in memory. Safe to call from several threads.

    Attributes:
        package: what it is.
        encoder: makes batches of raw records.
        predict: the model.
        form: what the model runs as: "eager", or the format that it was built in.
    """

    package: Package
    encoder: RequestEncoder
    predict: Predict
    form: str = EAGER

    @property
    def label(self) -> str:
        """The package in a word: its name and the checkpoint that it was made from."""
        manifest = self.package.manifest
        return f"{manifest.name}@{manifest.source.checkpoint}"

    def score(self, batch: EncodedBatch) -> NDArray[np.float32]:
        """Return the probabilities [B] of a batch."""
        if batch.num_rows == 0:
            return np.empty(0, np.float32)
        with torch.inference_mode():
            scores = self.predict(*(torch.from_numpy(part) for part in (batch.dense, batch.ids, batch.lengths)))
        return scores.numpy()


def load_scorer(folder: str, *, formats: Formats = EXACT) -> Scorer:
    """Load a package, its tables mapped; what is read of it is held against its checksums first.

    Args:
        folder: of the package.
        formats: whether its format "fastest" is used, whose dense part may be in bf16 or int8.

    Raises:
        PackageError: it is none, is damaged, is of another version, or its raw values mean something else here.
    """
    package = read_package(folder)
    scorer = load_exact_scorer(package)
    return with_format(scorer, formats) if formats.use != "never" else scorer


def load_exact_scorer(package: Package) -> Scorer:
    """Load the eager model in fp32, whose answers are the package's by definition.

    Raises:
        PackageError: as of `load_scorer`.
    """
    version = package.manifest.transform_version
    if version != TRANSFORM_VERSION:
        raise PackageError(
            f"{package.folder} was made with version {version} of the transforms, this Papilio has "
            f"{TRANSFORM_VERSION}: the same raw values would become other inputs; serve it with Papilio "
            f"{package.manifest.papilio_version}, or preprocess, train and export again"
        )
    return Scorer(package, load_request_encoder(package), build_flat_model(package))


def with_format(scorer: Scorer, formats: Formats) -> Scorer:
    """Return the scorer of the same package by its format "fastest".

    Raises:
        PackageError: the format has to be used, and cannot be.
    """
    if formats.use == "always":
        predictor = open_format(scorer.package, "fastest", trusts_formats=formats.are_trusted)
    else:
        predictor = open_predictor(scorer.package, trusts_formats=formats.are_trusted)
    return replace(scorer, predict=predictor.predict, form=predictor.format_name)


def split_batch(batch: EncodedBatch, max_rows: int) -> Iterator[EncodedBatch]:
    """Yield a batch in parts of at most `max_rows` samples, in order; counts and faults are left out."""
    if batch.num_rows <= max_rows:
        yield batch
        return
    lengths_FB = batch.lengths.reshape(-1, batch.num_rows)
    ends = np.cumsum(batch.lengths).reshape(lengths_FB.shape)
    begins = ends - lengths_FB
    for start in range(0, batch.num_rows, max_rows):
        stop = min(start + max_rows, batch.num_rows)
        ids = [
            batch.ids[begin:end]
            for begin, end in zip(begins[:, start].tolist(), ends[:, stop - 1].tolist(), strict=True)
        ]
        yield EncodedBatch(
            np.ascontiguousarray(batch.dense[start:stop]),
            np.concatenate(ids),
            np.ascontiguousarray(lengths_FB[:, start:stop]).reshape(-1),
        )
