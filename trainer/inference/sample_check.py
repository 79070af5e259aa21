"""A package checked before it answers anybody: every byte, and its sample request against the expected answers."""

from __future__ import annotations

import os

import numpy as np

from trainer.inference.formats.ways import EAGER
from trainer.inference.json_records import check_records
from trainer.inference.package import SAMPLE, PackageError
from trainer.inference.scorer import Scorer, load_scorer, require_sound

# Of the eager model, between machines: their matrix products add in another order. On one machine it is 1e-7.
MAX_DIFFERENCE = 1e-5
# Of a format whose dense part may be in bf16 or int8: what that costs was measured when it was built.
MAX_ROUNDED_DIFFERENCE = 0.02


def load_checked_scorer(folder: str, *, is_exact: bool = True) -> Scorer:
    """Load a package once all its files are found sound and its sample request is answered as expected.

    Args:
        folder: of the package.
        is_exact: see `load_scorer`; otherwise both the eager model and the format are checked.

    Raises:
        PackageError: it is none, is damaged or of another version, or does not give the expected answers.
    """
    folder = os.path.realpath(folder)  # what a link leads to may change on the way
    require_sound(folder)
    scorer = load_scorer(folder)
    check_sample(scorer, MAX_DIFFERENCE)
    if not is_exact:
        scorer = load_scorer(folder, is_exact=False)
        check_sample(scorer, MAX_DIFFERENCE if scorer.form == EAGER else MAX_ROUNDED_DIFFERENCE)
    return scorer


def check_sample(scorer: Scorer, max_difference: float) -> float:
    """Score the package's sample request, raw; return the largest difference to the expected answers.

    Raises:
        PackageError: raw values become other inputs, or inputs other probabilities, than when it was made.
    """
    folder = scorer.package.folder
    sample = scorer.package.read_json(SAMPLE)
    batch = scorer.encoder.encode_records(check_records(sample["request"], scorer.encoder.schema))
    encoded = sample["encoded"]
    same_ids = batch.ids.tolist() == encoded["ids"] and batch.lengths.tolist() == encoded["lengths"]
    dense = np.array(encoded["dense"], np.float32).reshape(batch.dense.shape)
    if batch.faults or not same_ids or not np.array_equal(batch.dense, dense):
        raise PackageError(
            f"{folder} does not fit this Papilio: the raw values of its {SAMPLE} become other inputs here than where "
            f"it was made, with Papilio {scorer.package.manifest.papilio_version}; serve it with that, or export again"
        )
    difference = np.abs(scorer.score(batch) - np.array(sample["probabilities"], np.float32)).max(initial=0.0)
    # Said so that a NaN does not pass, either.
    if not difference <= max_difference:
        raise PackageError(
            f"{folder}, as {scorer.form}, answers its {SAMPLE} with probabilities up to {difference:.3g} from the "
            f"expected ones, more than {max_difference:g}; export it again, or report this with the output of "
            "`papilio doctor`"
        )
    return float(difference)
