"""A sample request of a package: raw records, what they are encoded to, and the answer that is expected.

The encoded values do not come from the encoder: ids are those of the data set's rows, raw values are looked up in its
vocabularies. Whoever holds a package can so check its encoder and its model on a machine of their own.

B samples, F categorical features, I dense inputs, V ids in all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.id_mapper import IdMapper
from papilio.data_pipeline.manifest import SPLITS
from papilio.data_pipeline.preprocess.vocabulary import vocabulary_file
from papilio.data_pipeline.schema import MISSING_ID, NUM_RESERVED_IDS, UNKNOWN_ID, CategoricalColumn, DenseColumn
from papilio.data_pipeline.shards import Bags
from papilio.data_pipeline.transforms import transform_dense
from papilio.trainer.inference.backends.flat_model import FlatModel
from papilio.trainer.inference.package.format import Package, PackageError

NUM_SAMPLES = 4
# Held-out rows first: a sample of what the model has not seen.
_SPLITS = ("test", "validation", "train")
# Raw dense values are written with as many digits.
_DIGITS = 6


def make_sample(package: Package, dataset: Dataset, model: FlatModel) -> dict[str, Any]:
    """Return the contents of `sample.json`.

    Args:
        package: its vocabularies are in its folder already.
        dataset: the rows are taken from it, from a split that the model was not trained on if there is one.
        model: the package's model.

    Raises:
        PackageError: the data set has no rows.
    """
    dense, bags = _first_rows(dataset)
    schema = dataset.schema
    records: list[dict[str, Any]] = [{} for _ in dense]
    encoded = np.empty(dense.shape, np.float32)
    for place, dense_column in enumerate(schema.dense):
        raw = _raw_numbers(dense[:, place], dense_column)
        encoded[:, place] = transform_dense(raw, np.zeros(len(raw), bool), dense_column)
        for record, number in zip(records, raw.tolist(), strict=True):
            record[dense_column.name] = int(number) if number.is_integer() else number
    ids, lengths = [], []
    for column, bag in zip(schema.categorical, bags, strict=True):
        values, column_ids = _raw_ids(package, column, bag)
        ids += [number for of_sample in column_ids for number in of_sample]
        lengths += [len(of_sample) for of_sample in column_ids]
        for record, of_sample in zip(records, values, strict=True):
            record[column.name] = of_sample if column.multi_hot else of_sample[0]
    answer = model(torch.from_numpy(encoded), torch.tensor(ids, dtype=torch.int32), torch.tensor(lengths).int())
    return {
        "request": {"records": records},
        "encoded": {"dense": encoded.tolist(), "ids": ids, "lengths": lengths},
        "probabilities": answer.tolist(),
    }


def _first_rows(dataset: Dataset) -> tuple[NDArray[np.float32], list[list[list[int]]]]:
    """Return dense values [B, I] and ids by feature and sample."""
    assert set(_SPLITS) == set(SPLITS)
    filled = [s for s in _SPLITS if s in dataset.manifest.splits and dataset.manifest.splits[s].num_rows]
    if not filled:
        raise PackageError(
            f"data set {dataset.folder} has no rows to take a sample request from; name another (--data)"
        )
    columns = next(shard for shard in _shards(dataset, filled[0]) if shard.num_rows)
    num_rows = min(NUM_SAMPLES, columns.num_rows)
    return np.array(columns.dense[:num_rows]), [_first_ids(bags, num_rows) for bags in columns.bags]


def _shards(dataset: Dataset, name: str) -> Any:
    split = dataset.open_split(name)
    return (split.shard(number) for number in range(len(split.info.shards)))


def _first_ids(bags: Bags, num_rows: int) -> list[list[int]]:
    if bags.offsets is None:
        return [[int(number)] for number in bags.ids[:num_rows]]
    bounds = bags.offsets[: num_rows + 1].tolist()
    return [bags.ids[bounds[row] : bounds[row + 1]].tolist() for row in range(num_rows)]


def _raw_numbers(values: NDArray[np.float32], column: DenseColumn) -> NDArray[np.float64]:
    """Undo the transform, roughly: counts become whole numbers again."""
    raw = np.expm1(values.astype(np.float64)) if column.transform == "log1p" else values.astype(np.float64)
    return np.array([float(f"{number:.{_DIGITS}g}") for number in raw.tolist()])


def _raw_ids(
    package: Package, column: CategoricalColumn, bags: list[list[int]]
) -> tuple[list[list[Any]], list[list[int]]]:
    """Return raw values that have these ids, by sample, and their ids; they differ where no raw value is known."""
    if column.encoding == "identity":
        known = [_present([_known(number, 1) for number in bag], column) for bag in bags]
        return [[None if row == MISSING_ID else row - NUM_RESERVED_IDS for row in bag] for bag in known], known
    if column.encoding == "hash":
        values = [[_invented(number, column) for number in bag] for bag in bags]
        return values, [[_hashed(value, column) for value in bag] for bag in values]
    keys = _open_vocabulary(package, column)
    known = [_present([_known(number, len(keys)) for number in bag], column) for bag in bags]
    return [[_raw_value(keys, number, column) for number in bag] for bag in known], known


def _present(bag: list[int], column: CategoricalColumn) -> list[int]:
    """Missing values of a bag are left out."""
    return [number for number in bag if number != MISSING_ID] if column.multi_hot else bag


def _known(number: int, num_keys: int) -> int:
    """The id itself; what is rare has no raw value of its own, so the most frequent one takes its place."""
    if number != UNKNOWN_ID:
        return number
    return NUM_RESERVED_IDS if num_keys else MISSING_ID


def _open_vocabulary(package: Package, column: CategoricalColumn) -> NDArray[Any] | pa.Array:
    """Map a vocabulary's file: of a large one, only what is looked up is read."""
    file = vocabulary_file(column.name, column.kind)
    if file not in package.manifest.files:
        return np.empty(0, np.int64)
    if column.kind != "string":
        return np.load(package.path(file), mmap_mode="r")
    return pa.ipc.open_file(pa.memory_map(package.path(file))).get_batch(0).column(0)


def _raw_value(keys: NDArray[Any] | pa.Array, number: int, column: CategoricalColumn) -> str | int | None:
    if number == MISSING_ID:
        return None
    key = keys[number - NUM_RESERVED_IDS]
    if column.kind == "string":
        return str(key.as_py())
    return f"{int(key):08x}" if column.kind == "hex" else int(key)


def _invented(number: int, column: CategoricalColumn) -> str | int | None:
    """A raw value for a hashed id, whose own is lost."""
    if number == MISSING_ID:
        return None
    if column.kind == "integer":
        return number
    return f"{number:08x}" if column.kind == "hex" else f"{column.name.lower()}-{number}"


def _hashed(value: str | int | None, column: CategoricalColumn) -> int:
    if value is None:
        return MISSING_ID
    one_hot = column.model_copy(update={"multi_hot": False})
    return int(IdMapper(one_hot, None).map_values(pa.array([value])).ids[0])
