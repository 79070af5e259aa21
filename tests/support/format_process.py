"""Answers requests with a format of a package in a process of its own: `python -m tests.support.format_process`.

Arguments: the package, the format, an .npz of requests (dense_0, ids_0, lengths_0, dense_1, ...), the .npz to write.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from papilio.trainer.inference.backends.opening import open_format
from papilio.trainer.inference.package.format import read_package


def main() -> None:
    folder, name, requests, output = sys.argv[1:]
    predictor = open_format(read_package(folder), name)
    answers = {}
    with np.load(requests) as given:
        for number in range(len(given.files) // 3):
            request = [torch.from_numpy(given[f"{part}_{number}"]) for part in ("dense", "ids", "lengths")]
            before = [tensor.clone() for tensor in request]
            unknown = predictor.num_unknown_ids
            answers[f"answer_{number}"] = predictor.predict(*request).numpy()
            answers[f"unknown_{number}"] = predictor.num_unknown_ids - unknown
            assert all(torch.equal(now, then) for now, then in zip(request, before, strict=True))
    assert "torchrec" not in sys.modules
    np.savez(output, **answers, private_table_bytes=private_bytes("tables.bin"))


def private_bytes(file_name: str) -> int:
    """Bytes of a mapped file that this process has copies of, -1 if it maps no such file."""
    total, is_here, is_mapped = 0, False, False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if "-" in line.split(" ", 1)[0]:
                is_here = line.rstrip().endswith(file_name)
                is_mapped = is_mapped or is_here
            elif is_here and line.startswith("Private_Dirty:"):
                total += int(line.split()[1]) << 10
    return total if is_mapped else -1


if __name__ == "__main__":
    main()
