"""What a backend with a rounded dense part costs in ranking, measured against the package's own dense part in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from papilio.trainer.inference.backends.cpu_backends import BACKENDS
from papilio.trainer.inference.backends.flat_model import FlatModel
from papilio.trainer.inference.backends.format_folder import BackendFigures
from papilio.trainer.inference.backends.predictor import RunGraph
from papilio.trainer.inference.export.comparison import compare_scores
from papilio.trainer.inference.export.held_out import Block, HeldOut
from papilio.trainer.inference.package.format import PackageManifest

# Samples computed at once: dynamic int8 rounds by batch, so that accuracy is measured on batches as they are served.
PIECE_SAMPLES = 256
DEFAULT_MIN_AUC_RATIO = 0.999


def measure(
    model: FlatModel, runs: Mapping[str, RunGraph], held_out: HeldOut, manifest: PackageManifest
) -> dict[str, BackendFigures]:
    """Compare backends with the eager model in fp32 on held-out samples.

    Returns:
        Figures by backend; `refusal` says which would break the package's promise.

    Raises:
        ComparisonError: the samples cannot tell two models apart.
        DatasetError: they cannot be read.
    """
    logits: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ("", *runs)}
    labels = []
    with torch.inference_mode():
        for block in held_out.blocks():
            for piece in _pieces(block, model.lookup.num_features):
                logits[""].append(_logits(model(*piece)))
                for name, run in runs.items():
                    logits[name].append(_logits(run(*piece)[0]))
            labels.append(block.labels)
    joined = {name: np.concatenate(found) for name, found in logits.items()}
    return {name: _figures(name, joined[""], joined[name], np.concatenate(labels), manifest) for name in runs}


def min_auc_ratio(manifest: PackageManifest) -> float:
    """Return what share of the trained model's AUC the package promises to keep."""
    return (manifest.certified or {}).get("min_auc_ratio", DEFAULT_MIN_AUC_RATIO)


def _figures(
    name: str,
    exact: NDArray[np.float32],
    rounded: NDArray[np.float32],
    labels: NDArray[np.uint8],
    manifest: PackageManifest,
) -> BackendFigures:
    comparison = compare_scores(exact, rounded, labels)
    certified, least = manifest.certified or {}, min_auc_ratio(manifest)
    auc_ratio, ne_ratio = comparison.auc_ratio.value, comparison.ne_ratio.value
    # What exporting lost counts, too: the promise is about the model that was trained.
    kept, grown = auc_ratio * certified.get("auc_ratio", 1.0), ne_ratio * certified.get("ne_ratio", 1.0)
    refusal = None
    if kept < least:
        refusal = f"keeps {kept:.5f} of the trained model's AUC, less than {least}"
    elif grown > 2 - least:
        refusal = f"has {grown:.5f} times the trained model's normalized entropy, more than {2 - least:.6g}"
    return BackendFigures(
        dense=BACKENDS[name].dense,
        auc_ratio=auc_ratio,
        ne_ratio=ne_ratio,
        max_difference=comparison.differences.max_absolute,
        refusal=refusal,
    )


def _logits(probabilities: torch.Tensor) -> NDArray[np.float32]:
    return torch.logit(probabilities, eps=1e-7).numpy()


def _pieces(block: Block, num_features: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield a block's samples in batches (dense, ids, lengths)."""
    num_samples = len(block.labels)
    lengths_FB = block.lengths.view(num_features, num_samples)
    ends = block.lengths.cumsum(0).view(num_features, num_samples)
    begins = ends - lengths_FB
    for start in range(0, num_samples, PIECE_SAMPLES):
        stop = min(start + PIECE_SAMPLES, num_samples)
        ids = torch.cat([block.ids[begins[f, start] : ends[f, stop - 1]] for f in range(num_features)])
        yield block.dense[start:stop].contiguous(), ids, lengths_FB[:, start:stop].reshape(-1)
