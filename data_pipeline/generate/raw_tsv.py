"""Writing generated rows as the raw Criteo TSV: label, 13 counts, 26 hexadecimal ids, nothing where missing."""

from __future__ import annotations

from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
from numpy.typing import NDArray

from papilio.data_pipeline.generate.synthetic import Chunk
from papilio.data_pipeline.mixing import key_of
from papilio.data_pipeline.schema import MISSING_ID, NUM_RESERVED_IDS

_HEX_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_WRITE_OPTIONS = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")


def write_tsv(chunk: Chunk, sink: IO[bytes]) -> None:
    """Append the chunk's rows to a TSV file."""
    raw = chunk.raw
    arrays = [pa.array(chunk.labels)]
    arrays += [pa.array(counts, mask=mask) for counts, mask in zip(raw.counts, raw.is_missing, strict=True)]
    for feature, bags in enumerate(raw.bags):
        raw_ids = raw_id(feature, (bags.ids - NUM_RESERVED_IDS).astype(np.uint32))
        arrays.append(_hex_array(raw_ids, bags.ids == MISSING_ID))
    table = pa.table(arrays, [str(i) for i in range(len(arrays))])
    pyarrow.csv.write_csv(table, sink, _WRITE_OPTIONS)


def raw_id(feature: int, ranks: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the raw 32-bit ids that stand for frequency ranks: a bijection (MurmurHash3's finalizer of a xor)."""
    values = ranks ^ np.uint32(key_of("raw id", feature) & 0xFFFFFFFF)
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _hex_array(values: NDArray[np.uint32], is_missing: NDArray[np.bool_]) -> pa.Array:
    shifts = np.arange(28, -1, -4, dtype=np.uint32)
    text = _HEX_DIGITS[(values[:, None] >> shifts) & np.uint32(15)]
    offsets = np.arange(len(values) + 1, dtype=np.int32) * 8
    strings = pa.Array.from_buffers(pa.utf8(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(text)])
    return pa.compute.if_else(pa.array(is_missing), pa.scalar(None, pa.utf8()), strings)
