"""Which rows train, validate and test: a pure function of the row's number, the counts and the seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.mixing import key_of, mix64
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions

NUM_SPLITS = 3
LAST_PART_OF_ONE_FILE = 7  # Criteo Kaggle: one file, seven days in order


@dataclass(frozen=True)
class SplitRule:
    """`words` says the rule. Rows below `bounds[0]` train, below `bounds[1]` validate, others test.

    When `key` is set, a hash of the row's number is compared with `bounds` instead of the number itself.
    """

    words: str
    bounds: tuple[int, int]
    key: int | None = None

    def split_of(self, first_row: int, num_rows: int) -> NDArray[np.uint8]:
        """Split numbers (0 train, 1 validation, 2 test) of rows in global order from `first_row` on."""
        places = np.arange(first_row, first_row + num_rows, dtype=np.uint64)
        if self.key is not None:
            places = mix64(mix64(places) ^ np.uint64(self.key))
        splits = (places >= np.uint64(self.bounds[0])).astype(np.uint8)
        splits += places >= np.uint64(self.bounds[1])
        return splits

    def contiguous_split(self, first_row: int, num_rows: int) -> int | None:
        """The one split that all these rows are in, None when there are several or it is not known without counting."""
        if self.key is not None:
            return None
        low, high = (sum(row >= b for b in self.bounds) for row in (first_row, first_row + max(num_rows, 1) - 1))
        return low if low == high else None


def make_split_rule(options: PreprocessOptions, rows_per_file: list[int]) -> SplitRule:
    """Fix the bounds of the splits, now that the rows are counted."""
    num_rows = sum(rows_per_file)
    train, validation, _ = options.fractions
    shares = "/".join(f"{share:g}" for share in options.fractions)
    if options.split == "random":
        bounds = (_hash_bound(train), _hash_bound(train + validation))
        words = f"random: train/validation/test {shares} by splitmix64 of (seed {options.seed}, row number)"
        return SplitRule(words, bounds, key_of(options.seed, "split"))
    if options.split == "fraction":
        return SplitRule(
            f"fraction: train/validation/test {shares} in row order",
            (round(num_rows * train), round(num_rows * (train + validation))),
        )
    if len(rows_per_file) > 1:
        last_rows, last = rows_per_file[-1], "the last file"
    else:
        last_rows, last = num_rows // LAST_PART_OF_ONE_FILE, "the last seventh of the file"
    train_rows = num_rows - last_rows
    words = f"days: {last} ({last_rows} rows) halved in order into validation and test, all rows before it train"
    return SplitRule(words, (train_rows, train_rows + last_rows // 2))


def _hash_bound(share: float) -> int:
    return min(int(share * 2.0**64), 2**64 - 1)
