"""The gate: a package is written only if it ranks as well as the model that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.inference.held_out import HeldOut
from trainer.inference.package import Package, PackageError


class GateError(PackageError):
    """The package does not keep the quality asked for; names the tables that cost most, and what would pass."""


@dataclass(frozen=True)
class GateResult:
    """What `check` found: `summary` goes into the manifest, `report` into report.json, `page` into report.html."""

    summary: dict[str, float]
    report: dict[str, Any]
    page: str


def check(reference: Package, package: Package, held_out: HeldOut, *, min_auc_ratio: float) -> GateResult:
    """Hold the package's predictions on held-out data against those of the model in fp32.

    Args:
        reference: the model with all tables in fp32; of an fp32 export it is the package itself.
        package: the package to be, complete but for its reports.
        held_out: the samples.
        min_auc_ratio: the package's AUC must be at least this share of the reference's; its NE at most as much above.

    Raises:
        GateError: it is not; nothing is to be written then.
    """
    raise NotImplementedError
