"""What in a new data set most likely keeps a model from learning, in whole sentences that name the key to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from papilio.data_pipeline.manifest import CategoricalStats, DenseStats, SplitInfo
from papilio.data_pipeline.preprocess.column_symptoms import ColumnSymptoms
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema

# Criteo's commonest values: 94 % of one column; 10 to 13 % of another are negative counts of -1 to -3.
_NEAR_CONSTANT_SHARE = 0.99
_CLIPPED_SHARE = 0.2
_MISSING_SHARE = 0.99
_UNKNOWN_SHARE = 0.9
_LARGE_INPUT = 1000.0
_LIKE_A_ROW_NUMBER_SHARE = 0.95
_FEWEST_VALUES = 200  # below, distinct ids in every row are no surprise
_FEWEST_ROWS = 50
_FEWEST_OF_A_LABEL = 10
_LABEL_RATE_RATIO = 2.0
# Of an id column's values, those that look like something else; "null" counts from the first.
_SUSPECT_SHARES = {"null": 0.0, "list": 0.2, "decimal": 0.5, "blank": 0.01}
_SPLIT_HINT = "choose --split fraction or random, and --fractions"


@dataclass(frozen=True)
class Found:
    """What preprocessing knows of a data set when it is done."""

    schema: Schema
    split_rule: str
    splits: Mapping[str, SplitInfo]
    dense_stats: Mapping[str, DenseStats]
    categorical_stats: Mapping[str, CategoricalStats]
    symptoms: ColumnSymptoms


def find_warnings(found: Found) -> tuple[str, ...]:
    """Return all warnings, those of the splits first, then column by column."""
    num_rows = sum(split.num_rows for split in found.splits.values())
    warnings = list(_of_splits(found))
    if not found.schema.dense:
        warnings.append(
            "no dense column: `papilio train` needs at least one; add [[dense]] with the name of a numeric column to "
            "the schema (where the table has none, add one to it, such as the hour of the day, or 0 in every row)"
        )
    for i, dense in enumerate(found.schema.dense):
        warnings += _of_dense(dense, found.dense_stats[dense.name], found.symptoms, i, num_rows)
    for i, column in enumerate(found.schema.categorical):
        stats = found.categorical_stats[column.name]
        # Without training rows every id is unknown: the split has a warning of its own.
        if found.splits["train"].num_rows:
            warnings += _of_categorical(column, stats, num_rows)
        warnings += _of_ids(column, stats, found.symptoms, i, num_rows)
    return tuple(warnings)


def _of_splits(found: Found) -> Iterator[str]:
    train = found.splits["train"]
    small = {}
    for name, split in found.splits.items():
        rarer = min(split.num_positives, split.num_rows - split.num_positives)
        if split.num_rows == 0:
            yield f"split {name} has no rows ({found.split_rule}): {_SPLIT_HINT} with a share above 0 for it"
        elif rarer == 0:
            label = 1 if split.num_positives else 0
            yield (
                f"split {name}: all {split.num_rows:,} labels are {label}, so AUC is not defined and a model learns "
                f"nothing from them; check column {shown_name(found.schema.label)}, or {_SPLIT_HINT}"
            )
        elif split.num_rows < _FEWEST_ROWS or rarer < _FEWEST_OF_A_LABEL:
            small[name] = f"{name} {split.num_rows:,} rows, {rarer:,} of its rarer label"
        elif name != "train" and 0 < train.num_positives < train.num_rows and _differ(train, split):
            yield (
                f"split {name}: its label rate is {split.label_rate:.3f}, that of train {train.label_rate:.3f}; if the "
                "rows are sorted, use --split random"
            )
    if small:
        yield f"small splits, whose figures say little ({'; '.join(small.values())}): give more rows, or {_SPLIT_HINT}"


def _differ(train: SplitInfo, split: SplitInfo) -> bool:
    """Whether label rates differ twofold, by more than chance (five standard errors)."""
    rates = [train.label_rate, split.label_rate]
    if min(1 - rate for rate in rates) < min(rates):
        rates = [1 - rate for rate in rates]
    error = math.sqrt(rates[1] * (1 - rates[1]) / split.num_rows)
    return max(rates) > _LABEL_RATE_RATIO * min(rates) and abs(rates[1] - rates[0]) > 5 * error


def _of_dense(column: DenseColumn, stats: DenseStats, symptoms: ColumnSymptoms, i: int, num_rows: int) -> Iterator[str]:
    name = f"dense column {shown_name(column.name)}"
    value, count = max(symptoms.modes[i].items(), key=lambda item: item[1], default=(0.0, 0))
    num_present = round((1 - stats.missing_rate) * num_rows)
    clipped_share = int(symptoms.num_clipped[i]) / max(num_present, 1)
    if stats.missing_rate >= _MISSING_SHARE:
        yield f"{name}: {_percent(stats.missing_rate)} of its values are missing; correct the table, or leave it out"
    elif clipped_share >= _CLIPPED_SHARE:
        yield (
            f"{name}: {_percent(clipped_share)} of its values are negative, which log1p makes 0; set "
            'transform = "identity" for it in the schema'
        )
    elif count >= _NEAR_CONSTANT_SHARE * num_rows:
        fix = "leave it out" if len(symptoms.modes) > 1 else "correct it, unless it is there because one must be"
        yield f"{name}: {value:g} (after {column.transform}) in {_percent(count / num_rows)} of the rows; {fix}"
    elif abs(stats.mean) + stats.standard_deviation >= _LARGE_INPUT:
        yield (
            f"{name}: values of {stats.minimum:g} to {stats.maximum:g} enter the model as they are, too large to learn "
            'from; set transform = "log1p" for it in the schema, or scale it to about -1 to 1'
        )


def _of_categorical(column: CategoricalColumn, stats: CategoricalStats, num_rows: int) -> list[str]:
    name = f"categorical column {shown_name(column.name)}"
    num_values = round(stats.mean_ids_per_sample * num_rows)
    if stats.missing_rate >= _MISSING_SHARE:
        what = "bags are empty" if column.multi_hot else "values are missing"
        return [f"{name}: {_percent(stats.missing_rate)} of its {what}; correct the table, or leave it out"]
    if column.encoding == "vocabulary" and stats.unknown_rate >= _UNKNOWN_SHARE:
        return [
            f"{name}: {_percent(stats.unknown_rate)} of its ids occur fewer than {column.frequency_threshold} time(s) "
            "in the training split, and share one row; lower frequency_threshold, or leave it out"
        ]
    if stats.cardinality == 1 and stats.missing_rate == 0 and not column.multi_hot:
        return [f"{name}: the same id in all rows; leave it out"]
    if num_values >= _FEWEST_VALUES and stats.cardinality >= _LIKE_A_ROW_NUMBER_SHARE * num_values:
        return [
            f"{name}: {stats.cardinality:,} different ids in {num_values:,} values, like a row number: nothing is "
            "learnt of an id that is seen once; leave it out, or raise frequency_threshold"
        ]
    return []


def _of_ids(
    column: CategoricalColumn, stats: CategoricalStats, symptoms: ColumnSymptoms, i: int, num_rows: int
) -> Iterator[str]:
    num_values = max(1, round(stats.mean_ids_per_sample * num_rows))
    for kind, (count, _, example) in symptoms.suspects[i].items():
        if count <= _SUSPECT_SHARES[kind] * num_values:
            continue
        head = f"categorical column {shown_name(column.name)}: {count:,} of {num_values:,} ids"
        yield {
            "null": f"{head} are words for a missing value, such as {shown_name(example)}, but count as an id; leave "
            "the field empty where nothing is known",
            "list": f"{head} look like parts of a printed list, such as {shown_name(example)}; write bags as ids with "
            f"{shown_name(column.separator)} between them and multi_hot = true, or as a list column of Parquet",
            "decimal": f"{head} are decimal numbers, such as {shown_name(example)}; write whole numbers, or make it a "
            "[[dense]] column",
            "blank": f"{head} begin or end with a blank, such as {shown_name(example)}, and differ from the same id "
            "without; strip them",
        }[kind]


def _percent(share: float) -> str:
    return "all" if share == 1 else f"{min(share, 0.9999):.2%}" if share > 0.99 else f"{share:.0%}"


def shown_name(text: str) -> str:
    """A name or a value as messages show it: quoted where blanks or odd characters are in it, and cut."""
    cut = text if len(text) <= 40 else text[:39] + "…"
    return cut if cut.isprintable() and cut == cut.strip() and cut else repr(cut)
