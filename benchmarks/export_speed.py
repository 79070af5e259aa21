"""How fast tables are quantized, with what error, and in how much memory: exports of one large table, nothing trained.

    python -m benchmarks.export_speed [--gib 2] [--dim 64] [--rounds 3] [--folder DIR] [--ways int8 int4:greedy ...]

A checkpoint of normal(0, 0.05) rows is written as training writes it, in blocks of 16 MiB; each export runs in a
process of its own with one thread, ways in turn, without the gate. Seconds are from the first byte read to the package
in place, reading, checksums and fsync included; medians of the rounds. Memory is the highest resident set over that of
the process before, once a small export has loaded what is loaded when first used. `--folder` needs 2.5 times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections import defaultdict
from typing import Any

import numpy as np

from papilio.data_pipeline.dataset import Dataset, open_dataset
from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generator import generate
from papilio.trainer.checkpoint.format import INDEX, MARKER, Block, Index, Marker, SavedTensor
from papilio.trainer.config import Config, table_name
from papilio.trainer.config_file import build_config
from papilio.trainer.models.dense_part import build_dense_part
from papilio.trainer.run.folder import data_identity

BLOCK_BYTES = 16 << 20
WAYS = ("fp32", "fp16", "int8", "int4:minmax", "int4:greedy", "int4:least_squares", "int2:least_squares")
LARGE = "C3"
WORKER = """
import json, re, sys, time
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package

def resident_mib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

small, run, output, precision, quantizer = sys.argv[1:]
options = ExportOptions(quantize=precision, quantizer=quantizer, has_gate=False)
export_package(small, output + ".small", options)
before = resident_mib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the highest so far begins anew
begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
package = export_package(run, output, options)
found = {"seconds": time.perf_counter() - begin_s, "cpu_s": time.process_time() - begin_cpu_s}
(table,) = (table for table in package.manifest.tables if table.feature == "C3")
found |= {"grown_mib": resident_mib("VmHWM") - before, "error": table.row_error.mean_relative}
mib = sum(table.fp32_bytes for table in package.manifest.tables) / 2**20
print(json.dumps(found | {"share": table.num_bytes / table.fp32_bytes, "mib": mib}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where on the disk to work (default: the folder of temporary files)")
    parser.add_argument("--ways", nargs="+", default=WAYS, metavar="PRECISION[:QUANTIZER]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        generate(GenerateOptions(shape="criteo_small", num_rows=1000, output=f"{folder}/data"))
        num_rows = int(options.gib * 2**30) // (4 * options.dim)
        write_run(f"{folder}/run", f"{folder}/data", options.dim, num_rows)
        write_run(f"{folder}/small", f"{folder}/data", options.dim, None)
        measured = defaultdict(list)
        for _ in range(options.rounds):
            for way in options.ways:
                measured[way].append(measure(folder, way))
    mib = measured[options.ways[0]][0]["mib"]
    print(
        f"{mib / 1024:.2f} GiB in fp32, {num_rows:,} rows x {options.dim} in one table; medians of {options.rounds}\n"
    )
    print("| way | of fp32 | row error | s | CPU s | MiB/s of fp32 | memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for way, rounds in measured.items():
        middle = {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
        print(
            f"| {way.replace(':', ' ')} | {middle['share']:.1%} | {middle['error']:.2%} | {middle['seconds']:.1f} | "
            f"{middle['cpu_s']:.1f} | {mib / middle['cpu_s']:.0f} | {middle['grown_mib']:.0f} |"
        )


def measure(folder: str, way: str) -> dict[str, float]:
    """Export once in a fresh process."""
    precision, _, quantizer = way.partition(":")
    output = f"{folder}/package"
    command = [sys.executable, "-c", WORKER, f"{folder}/small", f"{folder}/run", output]
    command += [precision, quantizer or "least_squares"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for made in (output, f"{output}.small"):
        shutil.rmtree(made)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_run(folder: str, data: str, dim: int, num_rows: int | None) -> None:
    """Write a run with one checkpoint of random weights; the table of one feature may be larger than it need be."""
    model: dict[str, Any] = {"embedding_dim": dim}
    if num_rows is not None:
        model["table_rows"] = {LARGE: num_rows}
    config = build_config({"name": "speed", "data": {"path": data}, "model": model}, source="benchmark")
    dataset = open_dataset(data)
    path = f"{folder}/checkpoints/step_0000000001-abcdef"
    os.makedirs(path)
    tensors = _write_tensors(f"{path}/r.bin", dataset, config)
    index = Index(tensors).to_json()
    with open(f"{path}/{INDEX}", "w", encoding="utf-8") as file:
        file.write(index)
    files = {INDEX: (len(index), zlib.crc32(index.encode())), "r.bin": (os.path.getsize(f"{path}/r.bin"), None)}
    tree, identity = config.model_dump(mode="json"), json.loads(json.dumps(data_identity(dataset)))
    marker = Marker("", 1, "2026-11-21T00:00:00+00:00", "end", 1, 1, files, {}, tree, identity, {})
    with open(f"{path}/{MARKER}", "w", encoding="utf-8") as file:
        file.write(marker.to_json())


def _write_tensors(path: str, dataset: Dataset, config: Config) -> dict[str, SavedTensor]:
    generator = np.random.default_rng(0)
    dim, num_features = config.model.embedding_dim, len(dataset.num_embeddings)
    dense = build_dense_part(config.model, len(dataset.schema.dense), num_features).state_dict()
    tensors = {}
    with open(path, "xb") as file:

        def write(shape: tuple[int, ...], rows_at_once: int) -> SavedTensor:
            blocks = []
            for start in range(0, shape[0], rows_at_once):
                sizes = (min(rows_at_once, shape[0] - start), *shape[1:])
                data = (generator.standard_normal(sizes, np.float32) * np.float32(0.05)).tobytes()
                offsets = (start, *(0 for _ in shape[1:]))
                blocks.append(Block(offsets, sizes, "r.bin", file.tell(), len(data), zlib.crc32(data)))
                file.write(data)
            return SavedTensor("float32", shape, tuple(blocks))

        for feature, needed in dataset.num_embeddings.items():
            rows = config.model.table_rows.get(feature, needed)
            tensors[f"tables.{table_name(feature)}.weight"] = write((rows, dim), BLOCK_BYTES // (4 * dim))
        for name, values in dense.items():
            tensors[f"dense.model.{name}"] = write(tuple(values.shape), values.shape[0])
    return tensors


if __name__ == "__main__":
    main()
