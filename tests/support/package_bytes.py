"""Tables of a package read by NumPy alone, as trainer/inference/package/format.py describes them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np


def read_tables(folder) -> dict[str, np.ndarray]:
    """Values [rows, dim] float32 of every table, by name."""
    manifest = json.loads(Path(folder, "package.json").read_text())["package"]
    raw = np.fromfile(Path(folder, "tables.bin"), np.uint8)
    tables = {}
    for table in manifest["tables"]:
        begin, end = table["offset"], table["offset"] + table["rows"] * table["row_bytes"]
        rows = raw[begin:end].reshape(table["rows"], table["row_bytes"])
        tables[table["name"]] = values_of(rows, table["precision"], table["dim"])
    return tables


def values_of(rows, precision, dim) -> np.ndarray:
    """Values [n, dim] of rows [n, row_bytes] uint8."""
    if precision == "fp32":
        return np.frombuffer(rows.tobytes(), "<f4").reshape(-1, dim)
    if precision == "fp16":
        return np.frombuffer(rows.tobytes(), "<f2").reshape(-1, dim).astype(np.float32)
    halves = np.frombuffer(rows[:, :4].tobytes(), "<f2").reshape(-1, 2).astype(np.float32)
    bits = {"int8": 8, "int4": 4, "int2": 2}[precision]
    codes = np.empty((len(rows), dim), np.float32)
    for column in range(dim):
        octet = rows[:, 4 + column * bits // 8].astype(np.int64)
        codes[:, column] = (octet >> (column * bits % 8)) % (1 << bits)
    return halves[:, :1] * codes + halves[:, 1:]


def rewrite_format(folder: str, format_name: str, /, **changes: object) -> None:
    """Change what a format says of itself, and its checksum with it."""
    path = Path(folder, "formats", format_name, "format.json")
    content = json.loads(path.read_text()) | changes
    content.pop("crc32", None)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({**content, "crc32": crc32}))
