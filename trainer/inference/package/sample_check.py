"""A package checked before it answers anybody: every byte, and its sample request against the expected answers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from pydantic import BaseModel

from papilio.trainer.inference.backends.cpu_backends import EAGER
from papilio.trainer.inference.encoding.json_records import RequestError, check_records
from papilio.trainer.inference.package.format import SAMPLE, PackageError, read_package
from papilio.trainer.inference.scorer import EXACT, Formats, Scorer, load_exact_scorer, with_format

# Of the eager model, between machines: their matrix products add in another order. On one machine it is 1e-7.
MAX_DIFFERENCE = 1e-5
# Of a format whose dense part may be in bf16 or int8: what that costs was measured when it was built.
MAX_ROUNDED_DIFFERENCE = 0.02


class _Encoded(BaseModel):
    dense: list[list[float]]
    ids: list[int]
    lengths: list[int]


class _Sample(BaseModel):
    request: dict[str, Any]
    encoded: _Encoded
    probabilities: list[float]


def load_checked_scorer(folder: str, *, formats: Formats = EXACT) -> Scorer:
    """Load a package once all its files are found sound and its sample request is answered as expected.

    Args:
        folder: of the package.
        formats: whether its format "fastest" is used; then both the eager model and the format are checked.

    Raises:
        PackageError: it is none, is damaged or of another version, or does not give the expected answers.
    """
    package = read_package(os.path.realpath(folder))  # what a link leads to may change on the way
    package.require_sound()
    scorer = load_exact_scorer(package)
    check_sample(scorer, MAX_DIFFERENCE)
    if formats.use != "never":
        scorer = with_format(scorer, formats)
        check_sample(scorer, MAX_DIFFERENCE if scorer.form == EAGER else MAX_ROUNDED_DIFFERENCE)
    return scorer


def check_sample(scorer: Scorer, max_difference: float) -> float:
    """Score the package's sample request, raw; return the largest difference to the expected answers.

    Raises:
        PackageError: raw values become other inputs, or inputs other probabilities, than when it was made.
    """
    folder = scorer.package.folder
    sample = scorer.package.read_section(SAMPLE, _Sample)
    try:
        batch = scorer.encoder.encode_records(check_records(sample.request, scorer.encoder.schema))
    except RequestError as error:
        raise PackageError(f"{folder}: its {SAMPLE} is no request for it ({error}); export the run again") from None
    encoded = sample.encoded
    same_ids = batch.ids.tolist() == encoded.ids and batch.lengths.tolist() == encoded.lengths
    if batch.faults or not same_ids or batch.dense.tolist() != encoded.dense:
        raise PackageError(
            f"{folder} does not fit this Papilio: the raw values of its {SAMPLE} become other inputs here than where "
            f"it was made, with Papilio {scorer.package.manifest.papilio_version}; serve it with that, or export again"
        )
    if len(sample.probabilities) != batch.num_rows:
        raise PackageError(f"{folder}: its {SAMPLE} has answers to other records than its own; export the run again")
    difference = np.abs(scorer.score(batch) - np.array(sample.probabilities, np.float32)).max(initial=0.0)
    # Said so that a NaN does not pass, either.
    if not difference <= max_difference:
        raise PackageError(
            f"{folder}, as {scorer.form}, answers its {SAMPLE} with probabilities up to {difference:.3g} from the "
            f"expected ones, more than {max_difference:g}; export it again, or report this with the output of "
            "`papilio doctor`"
        )
    return float(difference)
