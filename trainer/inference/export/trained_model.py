"""A trained model as its checkpoint holds it, read row after row, whatever plan and world size saved it; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.contents import WEIGHT, Contents, NamedTensor
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import Marker, SavedTensor
from papilio.trainer.checkpoint.whole_tensors import row_bands, stream_tensor
from papilio.trainer.config import Config, table_name
from papilio.trainer.config_file import build_config
from papilio.trainer.inference.package.format import PackageError

_DENSE_PREFIX = "model."
_DTYPES = {"float32": np.float32, "float16": np.float16, "float64": np.float64}
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TrainedTable:
    """A table of the checkpoint and the feature that looks it up."""

    name: str
    feature: str
    rows: int
    dim: int
    pooling: Literal["sum", "mean"]
    key: str
    tensor: SavedTensor

    @property
    def fp32_bytes(self) -> int:
        """Bytes of its values in fp32."""
        return self.rows * self.dim * 4


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint opened for reading.

    Attributes:
        folder: of the checkpoint.
        name: of the checkpoint.
        tables: by name, in the order of the schema's features.
    """

    folder: str
    name: str
    marker: Marker
    config: Config
    tables: dict[str, TrainedTable]
    dense: tuple[NamedTensor, ...]

    def stream(self, table: str) -> Iterator[Floats]:
        """Yield the rows [n, D] of a table as fp32, some at a time, from the first to the last.

        Raises:
            DamagedError: a block is missing or damaged.
        """
        found = self.tables[table]
        dtype = np.dtype(_DTYPES[found.tensor.dtype]).newbyteorder("<")
        for chunk in stream_tensor(self.folder, found.key, found.tensor):
            yield np.frombuffer(chunk, dtype).reshape(-1, found.dim).astype(np.float32, copy=False)

    def read_dense(self) -> dict[str, Floats]:
        """Return the dense part's parameters as fp32, by name."""
        values = {}
        for named in self.dense:
            raw = b"".join(stream_tensor(self.folder, named.key, named.tensor))
            dtype = np.dtype(_DTYPES[named.tensor.dtype]).newbyteorder("<")
            name = named.name.removeprefix(_DENSE_PREFIX)
            values[name] = np.frombuffer(raw, dtype).reshape(named.tensor.shape).astype(np.float32)
        return values


def open_trained_model(checkpoints: CheckpointFolder, name: str) -> TrainedModel:
    """Open a complete checkpoint, and make sure that all of its model is there to be read.

    Raises:
        CheckpointError: it is damaged or of another version.
        PackageError: it holds what no package can.
    """
    marker = checkpoints.read_marker(name)
    if marker.num_copies > 1:
        raise PackageError(
            f"checkpoint {name} holds {marker.num_copies} models whose tables differ "
            "(sharding.replicas.independent_tables = true): a package is one model; resume the run with "
            "--sharding.replicas.independent_tables=false and export what it saves, or train without it"
        )
    contents = Contents.of(checkpoints.read_index(name, marker))
    config = build_config(marker.config, source=f"the config of checkpoint {name}")
    tables = _tables(contents, config, [column["name"] for column in marker.data["schema"]["categorical"]], name)
    for named in contents.dense:
        _require_readable(named, name)
    return TrainedModel(join(checkpoints.path, name), name, marker, config, tables, contents.dense)


def _tables(contents: Contents, config: Config, features: list[str], checkpoint: str) -> dict[str, TrainedTable]:
    tables = {}
    for feature in features:
        name = table_name(feature)
        weight = next((named for named in contents.tables.get(name, ()) if named.name == WEIGHT), None)
        if weight is None:
            raise PackageError(f"checkpoint {checkpoint} has no table {name}, though the data has feature {feature}")
        _require_readable(weight, checkpoint)
        rows, dim = weight.tensor.shape
        pooling = config.model.table_pooling.get(feature, config.model.pooling)
        tables[name] = TrainedTable(name, feature, rows, dim, pooling, weight.key, weight.tensor)
    return tables


def _require_readable(named: NamedTensor, checkpoint: str) -> None:
    if named.tensor.dtype not in _DTYPES:
        raise PackageError(
            f"{named.key} of checkpoint {checkpoint} is {named.tensor.dtype}; packages are made from "
            f"{', '.join(_DTYPES)}"
        )
    for _ in row_bands(named.key, named.tensor):
        pass
