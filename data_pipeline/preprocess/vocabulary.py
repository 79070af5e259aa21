"""Exact vocabularies: raw value -> id, the most frequent first; saved as the raw values in the order of their ids."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from papilio.data_pipeline.inner_path import link_problem
from papilio.data_pipeline.manifest import DatasetError
from papilio.data_pipeline.mixing import mix64
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, UNKNOWN_ID, ValueKind
from papilio.data_pipeline.shards import file_crc32
from papilio.data_pipeline.transforms import fnv1a

VOCABULARY_FOLDER = "vocabulary"


class Vocabulary:
    """Maps keys to ids; made from the keys by rank: uint32, int64, or Arrow large binary (strings)."""

    def __init__(self, keys_by_rank: NDArray[Any] | pa.Array) -> None:
        self.keys_by_rank = keys_by_rank
        self._is_binary = isinstance(keys_by_rank, pa.Array)
        probes = _probes(keys_by_rank) if self._is_binary else keys_by_rank
        self._sorted, self._order = _sort(probes)

    def __len__(self) -> int:
        return len(self.keys_by_rank)

    @property
    def num_embeddings(self) -> int:
        """Rows of a table that holds every id, the reserved ones included."""
        return len(self) + NUM_RESERVED_IDS

    def lookup(self, keys: NDArray[Any] | pa.Array) -> NDArray[np.int32]:
        """Return the id of each key, UNKNOWN_ID where the vocabulary has none. Fastest for sorted keys."""
        if len(self) == 0:
            return np.full(len(keys), UNKNOWN_ID, np.int32)
        probes = _probes(keys) if self._is_binary else keys
        places = np.minimum(np.searchsorted(self._sorted, probes), len(self) - 1)
        ranks = self._order[places]
        if not self._is_binary:
            is_known = self._sorted[places] == probes
            return np.where(is_known, ranks + np.int32(NUM_RESERVED_IDS), np.int32(UNKNOWN_ID))
        return self._resolve(keys, probes, places)

    def _resolve(self, keys: pa.Array, probes: NDArray[np.uint64], places: NDArray[np.int64]) -> NDArray[np.int32]:
        """Compare the strings themselves, at each place with an equal hash in turn (there is hardly ever a second)."""
        ids = np.full(len(keys), UNKNOWN_ID, np.int32)
        open_keys = np.flatnonzero(self._sorted[places] == probes)
        while len(open_keys):
            ranks = self._order[places[open_keys]]
            is_same = pc.equal(self.keys_by_rank.take(pa.array(ranks)), keys.take(pa.array(open_keys)))
            same = is_same.to_numpy(zero_copy_only=False)
            ids[open_keys[same]] = ranks[same] + NUM_RESERVED_IDS
            open_keys = open_keys[~same]
            places[open_keys] += 1
            open_keys = open_keys[places[open_keys] < len(self)]
            open_keys = open_keys[self._sorted[places[open_keys]] == probes[open_keys]]
        return ids


def _sort(probes: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Sorted probes and where each stood; for 32-bit ones in half the memory of argsort."""
    if probes.dtype != np.uint32:
        order = np.argsort(probes).astype(np.int32)
        return probes[order], order
    pairs = np.empty((len(probes), 2), "<u4")  # as one 64-bit number each: the second is the high half
    pairs[:, 1] = probes
    pairs[:, 0] = np.arange(len(probes), dtype=np.uint32)
    pairs.view("<u8")[:, 0].sort()
    return pairs[:, 1].copy(), pairs[:, 0].astype(np.int32)


def _probes(keys: pa.Array) -> NDArray[np.uint64]:
    return mix64(fnv1a(keys))


def vocabulary_file(feature: str, kind: ValueKind) -> str:
    """File of a feature's vocabulary, relative to the data set's folder."""
    safe_name = feature.replace("%", "%25").replace("/", "%2F")
    return f"{VOCABULARY_FOLDER}/{safe_name}.{'arrow' if kind == 'string' else 'npy'}"


def save_vocabulary(keys_by_rank: NDArray[Any] | pa.Array, folder: str, file: str) -> int:
    """Write a vocabulary (through a temporary name) and return the file's CRC-32."""
    path = os.path.join(folder, file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as sink:
        if isinstance(keys_by_rank, pa.Array):
            batch = pa.record_batch([keys_by_rank.cast(pa.large_string())], names=["value"])
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
        else:
            np.save(sink, keys_by_rank)
    os.replace(temporary, path)
    return file_crc32(path)


def load_vocabulary(folder: str, file: str, crc32: int) -> Vocabulary:
    """Load a vocabulary, for serving.

    Raises:
        DatasetError: the file is missing or was changed after it was written.
    """
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        raise DatasetError(f"vocabulary {path} is missing; restore it or preprocess the data again")
    problem = link_problem(folder, file)
    if problem is not None:
        raise DatasetError(f"vocabulary {problem}")
    if file_crc32(path) != crc32:
        raise DatasetError(
            f"vocabulary {path} was changed after it was written (checksum differs from the manifest's); restore it or "
            "preprocess the data again"
        )
    if path.endswith(".npy"):
        return Vocabulary(np.load(path))
    with pa.OSFile(path) as source:
        values = pa.ipc.open_file(source).read_all().column("value").combine_chunks()
    return Vocabulary(values.cast(pa.large_binary()))
