"""Several named arrays in one file that is either whole or absent; parts of an array are read without the rest."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FOOTER_LENGTHS_BYTES = 16
_ALIGNMENT = 8


def write_arrays(path: str, arrays: dict[str, NDArray[Any]], meta: Any = None) -> None:
    """Write arrays and a JSON value under a temporary name and rename: killed at any time, the file is not half there.

    Layout: the arrays' bytes, each from a multiple of 8; the JSON value; a line "name dtype offset size" an array; the
    lengths of these two in 8 bytes each.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    index: dict[str, tuple[str, int, int]] = {}
    with open(temporary, "wb") as file:
        for name, array in arrays.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            index[name] = (array.dtype.str, file.tell(), array.size)
            file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        footer = [json.dumps(meta).encode(), "\n".join(" ".join(map(str, (n, *e))) for n, e in index.items()).encode()]
        file.write(b"".join(footer) + np.array([len(part) for part in footer], "<i8").tobytes())
    os.replace(temporary, path)


class ArrayFile:
    """A file of `write_arrays`, opened for reading (a context manager). Arrays come back flat."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        self._file.seek(-_FOOTER_LENGTHS_BYTES, os.SEEK_END)
        footer_end = self._file.tell()
        meta_bytes, index_bytes = np.frombuffer(self._file.read(_FOOTER_LENGTHS_BYTES), "<i8").tolist()
        self._file.seek(footer_end - index_bytes - meta_bytes)
        self.meta: Any = json.loads(self._file.read(meta_bytes))
        self._index = b"\n" + self._file.read(index_bytes) + b"\n"

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return self._find(name) >= 0

    def _find(self, name: str) -> int:
        # Searched, not parsed: most readers want 1 array of 100.
        return self._index.find(b"\n" + name.encode() + b" ")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read elements [start, stop) of an array into memory (not mapped, so that it is freed when dropped)."""
        start_of_line = self._find(name) + 1
        if start_of_line == 0:
            raise KeyError(name)
        line = self._index[start_of_line : self._index.find(b"\n", start_of_line)]
        _, dtype_name, offset, size = line.decode().split(" ")
        dtype = np.dtype(dtype_name)
        stop = int(size) if stop is None else stop
        self._file.seek(int(offset) + start * dtype.itemsize)
        array = np.empty(stop - start, dtype)
        if array.size:
            self._file.readinto(array.data.cast("B"))
        return array
