"""Raw records to a model's inputs, by the code that preprocessing uses: there is no second set of rules to drift.

B samples, I dense inputs, F categorical features, V ids in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.arrow_types import plain_column, type_fault
from papilio.data_pipeline.id_mapper import IdMapper
from papilio.data_pipeline.preprocess.raw_chunk import RawChunk, keys_of_numbers
from papilio.data_pipeline.preprocess.table_columns import categorical_codes, dense_values
from papilio.data_pipeline.preprocess.vocabulary import load_vocabulary, vocabulary_file
from papilio.data_pipeline.raw_values import Faults
from papilio.data_pipeline.schema import MISSING_ID, UNKNOWN_ID, CategoricalColumn, DenseColumn, Schema
from papilio.data_pipeline.shards import Bags
from papilio.data_pipeline.transforms import dense_fault, transform_dense
from papilio.trainer.inference.encoding.json_records import (
    Record,
    RequestError,
    categorical_array,
    dense_matrix,
    unknown_column,
)
from papilio.trainer.inference.encoding.plain_numbers import (
    Numbers,
    dense_numbers_of_arrays,
    hex_numbers_of_arrays,
    hex_numbers_of_texts,
    numbers_of_array,
)
from papilio.trainer.inference.package.format import SCHEMA, Package, PackageError


@dataclass(frozen=True)
class EncodedBatch:
    """Inputs of a model.

    Attributes:
        dense: [B, I] float32, transformed.
        ids: [V] int32, feature after feature.
        lengths: [F * B] int32, feature after feature: ids of each sample.
        num_unknown_ids: how many of them the training data did not have (or too rarely); they share row 0.
        faults: by row what is wrong with it, as (column, reason); the values of such a row mean nothing.
    """

    dense: NDArray[np.float32]
    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    num_unknown_ids: int = 0
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.dense)


class RequestEncoder:
    """Encodes raw records of one schema. Safe to use from several threads."""

    def __init__(self, schema: Schema, mappers: dict[str, IdMapper]) -> None:
        """Make an encoder; `mappers` has one for each categorical feature."""
        self.schema = schema
        self.separators = {column.name: column.separator for column in schema.categorical if column.multi_hot}
        self._mappers = [mappers[name] for name in schema.categorical_names]
        self._dense_groups = _group_by_transform(schema.dense)
        self._open_columns = [_without_limit(column) for column in schema.categorical]
        self._hex_features = [
            i for i, column in enumerate(schema.categorical) if column.kind == "hex" and not column.multi_hot
        ]

    @property
    def raw_schema(self) -> Schema:
        """The schema to parse raw files by: other than in preprocessing, ids beyond an identity table are sound."""
        return self.schema.model_copy(update={"categorical": tuple(self._open_columns)})

    def encode_records(self, records: Sequence[Record]) -> EncodedBatch:
        """Encode JSON objects by column name (see `check_records`); an absent column is a missing value."""
        faults = Faults()
        dense = self._transform(dense_matrix(records, self.schema.dense_names, faults), faults)
        quick = self._encode_hex(records)
        bags = []
        for number, column in enumerate(self.schema.categorical):
            ready = quick.get(number)
            if ready is None:
                ready = self._map(categorical_array(records, column, faults), number, faults)
            bags.append(ready)
        return self._assemble(dense, bags, faults)

    def encode_table(self, table: pa.Table) -> EncodedBatch:
        """Encode Arrow columns by name, of the types that a Parquet file may have.

        Raises:
            RequestError: a column is lacking, is not of the schema, or is of a type that it cannot have.
        """
        self._check_columns(table)
        faults = Faults()
        dense = self._dense_of_table(table, faults)
        arrays = [plain_column(table.column(name)) for name in self.schema.categorical_names]
        quick = self._hex_of_arrays(arrays)
        bags = []
        for number, array in enumerate(arrays):
            ready = quick.get(number)
            bags.append(ready if ready is not None else self._map(array, number, faults))
        return self._assemble(dense, bags, faults)

    def encode_chunk(self, chunk: RawChunk) -> EncodedBatch:
        """Encode rows as a source of `papilio preprocess` parsed them (malformed ones are not among them)."""
        bags = []
        for number, (mapper, codes) in enumerate(zip(self._mappers, chunk.columns, strict=True)):
            ids = self._within_table(mapper.ids_of_codes(codes)[codes.codes], number)
            bags.append(_bags(ids, codes.lengths))
        return self._assemble(chunk.dense, bags, Faults())

    def _dense_of_table(self, table: pa.Table, faults: Faults) -> NDArray[np.float32]:
        arrays = [plain_column(table.column(name)) for name in self.schema.dense_names]
        plain = dense_numbers_of_arrays(arrays) if arrays else np.empty((0, table.num_rows))
        if plain is not None:
            return self._transform(plain.T, faults)
        dense = np.empty((table.num_rows, len(arrays)), np.float32)
        for i, (array, column) in enumerate(zip(arrays, self.schema.dense, strict=True)):
            dense[:, i] = dense_values(array, column, faults)[0]
        return dense

    def _transform(self, numbers: NDArray[np.float64], faults: Faults) -> NDArray[np.float32]:
        missing = np.isnan(numbers)
        if len(self._dense_groups) == 1:
            dense = transform_dense(numbers, missing, self.schema.dense[0])
        else:
            dense = np.empty(numbers.shape, np.float32)
            for places in self._dense_groups:
                dense[:, places] = transform_dense(numbers[:, places], missing[:, places], self.schema.dense[places[0]])
        is_wrong = np.isinf(dense) | np.isinf(numbers)
        if is_wrong.any():
            for row, i in np.argwhere(is_wrong).tolist():
                reason = dense_fault(float(numbers[row, i]))
                faults.first_of_row.setdefault(row, (self.schema.dense[i].name, reason))
        return dense

    def _encode_hex(self, records: Sequence[Record]) -> dict[int, Bags]:
        """Encode all one-hot features of hexadecimal text at once, or none: if one is malformed, it is found later."""
        names = [self.schema.categorical[number].name for number in self._hex_features]
        if not names or not records:
            return {}
        return self._bags_of_hex(hex_numbers_of_texts([record.get(name) for name in names for record in records]))

    def _hex_of_arrays(self, arrays: Sequence[pa.Array]) -> dict[int, Bags]:
        """As `_encode_hex`, of Arrow columns."""
        if not self._hex_features or len(arrays[0]) == 0:
            return {}
        return self._bags_of_hex(hex_numbers_of_arrays([arrays[number] for number in self._hex_features]))

    def _bags_of_hex(self, plain: Numbers | None) -> dict[int, Bags]:
        if plain is None:
            return {}
        numbers, missing = (part.reshape(len(self._hex_features), -1) for part in plain)
        return {
            number: self._ids_of_numbers(numbers[place], missing[place], number)
            for place, number in enumerate(self._hex_features)
        }

    def _map(self, array: pa.Array, number: int, faults: Faults) -> Bags:
        column = self._open_columns[number]
        is_numeric = not column.multi_hot and column.kind != "string"
        plain = numbers_of_array(array, column) if is_numeric else None
        if plain is not None:
            return self._ids_of_numbers(*plain, number)
        codes = categorical_codes(array, column, faults)
        ids = self._mappers[number].ids_of_codes(codes)[codes.codes]
        return _bags(self._within_table(ids, number), codes.lengths)

    def _ids_of_numbers(self, values: NDArray[Any], missing: NDArray[np.bool_], number: int) -> Bags:
        keys = keys_of_numbers(values, self._open_columns[number])
        ids = self._mappers[number].ids_of_keys(keys.astype(np.uint32) if keys.dtype == np.uint64 else keys)
        ids[missing] = MISSING_ID
        return Bags(self._within_table(ids, number))

    def _within_table(self, ids: NDArray[np.int32], number: int) -> NDArray[np.int32]:
        column = self.schema.categorical[number]
        if column.encoding == "identity":
            ids[ids >= column.num_fixed_rows] = UNKNOWN_ID
        return ids

    def _check_columns(self, table: pa.Table) -> None:
        names = table.column_names
        roles = self.schema.roles()
        wanted = [*self.schema.dense_names, *self.schema.categorical_names]
        lacking = sorted(set(wanted).difference(names))
        if lacking:
            raise RequestError(f"there is no column {', '.join(lacking)}; send nulls where values are missing")
        others = sorted(set(names) - roles.keys())
        if others:
            raise RequestError(unknown_column(others[0], self.schema))
        if len(set(names)) < len(names):
            raise RequestError("several columns have the same name; names must differ")
        for name in wanted:
            if (fault := type_fault(table.schema.field(name).type, name, roles[name])) is not None:
                raise RequestError(fault)

    def _assemble(self, dense: NDArray[np.float32], bags: Sequence[Bags], faults: Faults) -> EncodedBatch:
        num_rows = len(dense)
        ones = np.ones(num_rows, np.int32)
        lengths = [ones if bag.offsets is None else np.diff(bag.offsets) for bag in bags]
        ids = np.concatenate([bag.ids for bag in bags])
        num_unknown = int(np.count_nonzero(ids == UNKNOWN_ID))
        found = dict(sorted(faults.first_of_row.items()))
        return EncodedBatch(np.ascontiguousarray(dense), ids, np.concatenate(lengths), num_unknown, found)


def load_request_encoder(package: Package) -> RequestEncoder:
    """Load the encoder of a package.

    Raises:
        PackageError: the package holds no vocabulary of a column that needs one, or a damaged one; or its columns are
            not those of its tables.
    """
    schema, manifest = package.read_section(SCHEMA, Schema), package.manifest
    if (schema.categorical_names, schema.dense_names) != (manifest.features, list(manifest.dense_features)):
        raise PackageError(
            f"{package.folder}: {SCHEMA} has other columns, or in another order, than the tables of package.json; "
            "export the run again"
        )
    return RequestEncoder(schema, {column.name: _load_mapper(package, column) for column in schema.categorical})


def merge_batches(batches: Sequence[EncodedBatch]) -> EncodedBatch:
    """Put the samples of several batches one after the other."""
    if len(batches) == 1:
        return batches[0]
    num_features = len(batches[0].lengths) // max(batches[0].num_rows, 1)
    lengths_FB = [batch.lengths.reshape(-1, batch.num_rows) for batch in batches if batch.num_rows]
    bounds = [np.concatenate([[0], np.cumsum(lengths.sum(axis=1))]) for lengths in lengths_FB]
    filled = [batch for batch in batches if batch.num_rows]
    pieces = [
        batch.ids[bound[feature] : bound[feature + 1]]
        for feature in range(num_features)
        for batch, bound in zip(filled, bounds, strict=True)
    ]
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
    faults = {
        start + row: fault for start, batch in zip(starts, batches, strict=False) for row, fault in batch.faults.items()
    }
    return EncodedBatch(
        np.concatenate([batch.dense for batch in batches]),
        np.concatenate(pieces) if pieces else np.empty(0, np.int32),
        np.concatenate(lengths_FB, axis=1).reshape(-1) if lengths_FB else np.empty(0, np.int32),
        sum(batch.num_unknown_ids for batch in batches),
        faults,
    )


def _load_mapper(package: Package, column: CategoricalColumn) -> IdMapper:
    if column.encoding != "vocabulary":
        return IdMapper(column, None)
    file = vocabulary_file(column.name, column.kind)
    entry = package.manifest.files.get(file)
    if entry is None:
        raise PackageError(
            f"package {package.folder} holds no vocabulary of column {column.name}, so raw values of it mean nothing; "
            "export it again from a run on preprocessed data"
        )
    package.checked_path(file)
    return IdMapper(column, load_vocabulary(package.folder, file, entry.crc32))


def _group_by_transform(columns: Sequence[DenseColumn]) -> list[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, column in enumerate(columns):
        groups.setdefault((column.transform, column.missing_value), []).append(place)
    return list(groups.values())


def _without_limit(column: CategoricalColumn) -> CategoricalColumn:
    """Ids of an identity column beyond its table are unknown ones, not malformed: new items are born every day."""
    return column.model_copy(update={"num_buckets": None}) if column.encoding == "identity" else column


def _bags(ids: NDArray[np.int32], lengths: NDArray[np.int32] | None) -> Bags:
    if lengths is None:
        return Bags(ids)
    return Bags(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
