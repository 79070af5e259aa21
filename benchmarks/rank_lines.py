"""Starts ranks on this machine and yields the lines of JSON that the first of them prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any


def run_ranks(module: str, words: Sequence[str], num_ranks: int) -> Iterator[dict[str, Any]]:
    """Start `python -m module words` as so many ranks of one thread; yield each line of JSON as it comes.

    Raises:
        SystemExit: a rank failed; with the end of what the ranks said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "--", module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            errors.seek(0)
            raise SystemExit(f"{module} {' '.join(words)} failed:\n{errors.read()[-4000:]}")
