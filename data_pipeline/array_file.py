"""Several named arrays in one file that is either whole or absent; parts of an array are read without the rest."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.preprocess.bad_rows import PreprocessError

_FOOTER_END_BYTES = 24
_ALIGNMENT = 8


def write_arrays(path: str, arrays: dict[str, NDArray[Any]], meta: Any = None) -> None:
    """Write arrays and a JSON value under a temporary name and rename: killed at any time, the file is not half there.

    Layout: the arrays' bytes, each from a multiple of 8; the JSON value; a line "name dtype offset size crc32" an
    array; the lengths of these two and their checksum in 8 bytes each.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    index: dict[str, tuple[str, int, int, int]] = {}
    with open(temporary, "wb") as file:
        for name, array in arrays.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            data = np.ascontiguousarray(array).data.cast("B") if array.size else b""
            index[name] = (array.dtype.str, file.tell(), array.size, zlib.crc32(data))
            file.write(data)
        parts = [json.dumps(meta).encode(), "\n".join(" ".join(map(str, (n, *e))) for n, e in index.items()).encode()]
        footer = b"".join(parts)
        file.write(footer + np.array([*map(len, parts), zlib.crc32(footer)], "<i8").tobytes())
    os.replace(temporary, path)


class ArrayFile:
    """A file of `write_arrays`, opened for reading (a context manager). Arrays come back flat.

    The footer is checked here, an array when the whole of it is read.

    Raises:
        PreprocessError: the file is not as it was written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        try:
            meta_bytes, index_bytes, crc32 = self._read_end()
            self._file.seek(-_FOOTER_END_BYTES - index_bytes - meta_bytes, os.SEEK_END)
            footer = self._file.read(meta_bytes + index_bytes)
            if zlib.crc32(footer) != crc32:
                raise ValueError
            self.meta: Any = json.loads(footer[:meta_bytes])
        except (OSError, ValueError):
            self._file.close()
            raise self._damaged() from None
        self._index = b"\n" + footer[meta_bytes:] + b"\n"

    def _read_end(self) -> list[int]:
        self._file.seek(-_FOOTER_END_BYTES, os.SEEK_END)
        numbers: list[int] = np.frombuffer(self._file.read(_FOOTER_END_BYTES), "<i8").tolist()
        if min(numbers) < 0 or sum(numbers[:2]) > os.fstat(self._file.fileno()).st_size:
            raise ValueError
        return numbers

    def _damaged(self) -> PreprocessError:
        return PreprocessError(
            f"work in progress is damaged: {self._path} is not as it was written (its checksum differs); delete it and "
            "give the same command again, which makes it anew"
        )

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
        """Read elements [start, stop) of an array into memory (not mapped, so that it is freed when dropped).

        Raises:
            PreprocessError: it is not as it was written.
        """
        start_of_line = self._find(name) + 1
        if start_of_line == 0:
            raise KeyError(name)
        line = self._index[start_of_line : self._index.find(b"\n", start_of_line)]
        _, dtype_name, offset, size, crc32 = line.decode().split(" ")
        dtype = np.dtype(dtype_name)
        stop = int(size) if stop is None else stop
        self._file.seek(int(offset) + start * dtype.itemsize)
        array = np.empty(stop - start, dtype)
        data = array.data.cast("B") if array.size else b""
        num_read = self._file.readinto(data) if array.size else 0
        if num_read != array.nbytes or (stop - start == int(size) and zlib.crc32(data) != int(crc32)):
            raise self._damaged()
        return array
