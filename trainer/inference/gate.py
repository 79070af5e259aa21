"""The gate: a package is written only if it ranks as well as the model that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_pipeline.dataset import Dataset
from trainer.inference.package import Package, PackageError


class GateError(PackageError):
    """The package does not keep the quality asked for; names the tables that cost most, and what would pass."""


@dataclass(frozen=True)
class HeldOut:
    """Samples that the model was not trained on: the validation split, or the test split where that is empty.

    Attributes:
        dataset: what to read; its columns are those of the run's (exporting.py has made sure).
        split: its split.
        max_samples: how many to use, None for all.
    """

    dataset: Dataset
    split: str
    max_samples: int | None = None


@dataclass(frozen=True)
class GateResult:
    """What `check` found: `summary` goes into the manifest, `report` into report.json, `page` into report.html."""

    summary: dict[str, float]
    report: dict[str, Any]
    page: str


def check(reference: Package, candidate: Package, held_out: HeldOut, *, min_auc_ratio: float) -> GateResult:
    """Hold the candidate's predictions on held-out data against the fp32 reference's.

    Args:
        reference: fp32 tables; lies in a scratch folder and is removed afterwards. Of an fp32 export it is the
            candidate itself.
        candidate: the package to be, complete but for its reports; lies in its temporary folder.
        held_out: the samples.
        min_auc_ratio: the candidate's AUC must be at least this share of the reference's.

    Raises:
        GateError: it is below; nothing is written then.
    """
    raise NotImplementedError
