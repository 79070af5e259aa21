"""A package that answers: raw records or encoded batches in, probabilities out. Needs no torchrec.

B samples, F categorical features, I dense inputs, V ids in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.schema import TRANSFORM_VERSION
from trainer.inference.flat_model import build_flat_model
from trainer.inference.formats.opening import open_predictor
from trainer.inference.formats.ways import EAGER
from trainer.inference.package import Package, PackageError, read_package, verify_package
from trainer.inference.request_encoder import EncodedBatch, RequestEncoder, load_request_encoder

# (dense [B, I] fp32, ids [V] int32, lengths [F * B] int32) -> probabilities [B] fp32; B is at least 1.
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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


def load_scorer(folder: str, *, is_exact: bool = True) -> Scorer:
    """Load a package, its tables mapped.

    Args:
        folder: of the package.
        is_exact: with the eager model in fp32, whose answers are the package's by definition. Otherwise in the
            package's format "fastest" if it was built, whose dense part may be in bf16 or int8.

    Raises:
        PackageError: it is none, is damaged, is of another version, or its raw values mean something else here.
    """
    package = read_package(folder)
    version = package.manifest.transform_version
    if version != TRANSFORM_VERSION:
        raise PackageError(
            f"{folder} was made with version {version} of the transforms, this Papilio has {TRANSFORM_VERSION}: the "
            f"same raw values would become other inputs; serve it with Papilio {package.manifest.papilio_version}, or "
            "preprocess, train and export again"
        )
    encoder = load_request_encoder(package)
    if is_exact:
        return Scorer(package, encoder, build_flat_model(package))
    predictor = open_predictor(package)
    return Scorer(package, encoder, predictor.predict, predictor.format_name)


def require_sound(folder: str) -> None:
    """Read every byte of a package against its checksums.

    Raises:
        PackageError: it is no package, or a file is missing or damaged.
    """
    for _, problem in verify_package(folder):
        if problem is not None:
            raise PackageError(problem)


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
