"""An export's memory depends on neither the tables' rows nor their bytes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.datasets import write_dataset
from tests.support.trained_runs import write_run

REPOSITORY = Path(__file__).resolve().parents[4]
MIB = 1 << 20
DIM = 64
ROW_BYTES = {"int8": 68, "fp32": 256}
TABLE_MIB = 256
MAX_GROWTH_MIB = 96
CODE = """
import re, sys
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.export.export_options import ExportOptions

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

options = ExportOptions(quantize={precision!r}, has_gate=False)
export_package({small!r}, {small!r} + ".package", options)  # what is loaded when first used is no growth
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the highest so far begins anew
export_package({large!r}, {output!r}, options)
print("grown", status("VmHWM") - before)
"""


@pytest.mark.parametrize("precision", ROW_BYTES)
def test_growth_is_bounded(tmp_path, precision):
    """Blocks of 16 MiB, as training saves them."""
    data = write_dataset(tmp_path / "data")
    num_rows = TABLE_MIB * MIB // (DIM * 4)
    small, _ = write_run(tmp_path / "small", data, embedding_dim=DIM)
    large, _ = write_run(
        tmp_path / "large", data, rows_per_block=16 * MIB // (DIM * 4), embedding_dim=DIM, table_rows={"a": num_rows}
    )
    output = tmp_path / "package"
    code = CODE.format(small=small, large=large, output=str(output), precision=precision)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    grown = re.search(r"grown (\d+)", result.stdout)
    assert grown is not None
    assert int(grown[1]) < MAX_GROWTH_MIB
    assert (output / "tables.bin").stat().st_size >= ROW_BYTES[precision] * num_rows
