"""Raw values of a feature to ids, the same code at preprocessing and at serving."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.manifest import DatasetError, Manifest
from papilio.data_pipeline.preprocess.column_codes import ColumnCodes
from papilio.data_pipeline.preprocess.table_columns import categorical_codes
from papilio.data_pipeline.preprocess.vocabulary import Vocabulary, load_vocabulary
from papilio.data_pipeline.raw_values import Faults
from papilio.data_pipeline.schema import MISSING_ID, CategoricalColumn
from papilio.data_pipeline.shards import Bags


class IdMapper:
    """Ids of one feature; `vocabulary` is None for hash and identity columns."""

    def __init__(self, column: CategoricalColumn, vocabulary: Vocabulary | None) -> None:
        self.column = column
        self._vocabulary = vocabulary

    def ids_of_codes(self, codes: ColumnCodes) -> NDArray[np.int32]:
        """Return the id of each key of `codes` [U + 1], the last that of a missing value."""
        return np.append(self.ids_of_keys(codes.keys), np.int32(MISSING_ID))

    def ids_of_keys(self, keys: NDArray[Any] | pa.Array) -> NDArray[np.int32]:
        """Return the id of each key."""
        if self._vocabulary is None:
            return keys.astype(np.int32)  # row numbers already
        return self._vocabulary.lookup(keys)

    def map_values(self, values: pa.Array) -> Bags:
        """Map raw values (text, or integers; lists of them for a multi-hot feature) to ids.

        Raises:
            ValueError: a value is not of the feature's kind, or out of range.
        """
        faults = Faults()
        codes = categorical_codes(values, self.column, faults)
        if faults.first_of_row:
            row, (name, reason) = min(faults.first_of_row.items())
            raise ValueError(f"sample {row}, feature {name}: {reason}")
        ids = self.ids_of_codes(codes)[codes.codes]
        if codes.lengths is None:
            return Bags(ids)
        return Bags(ids, np.concatenate([[0], np.cumsum(codes.lengths)]).astype(np.int32))


def load_id_mappers(manifest: Manifest, folder: str) -> dict[str, IdMapper]:
    """Load what maps each categorical feature of a data set, for serving."""
    mappers = {}
    for column in manifest.data_schema.categorical:
        stats = manifest.categorical_stats[column.name]
        vocabulary = None
        if column.encoding == "vocabulary":
            if stats.vocabulary_file is None or stats.vocabulary_crc32 is None:
                raise DatasetError(f"the data set {folder} holds no vocabulary of {column.name}; preprocess raw data")
            vocabulary = load_vocabulary(folder, stats.vocabulary_file, stats.vocabulary_crc32)
        mappers[column.name] = IdMapper(column, vocabulary)
    return mappers
