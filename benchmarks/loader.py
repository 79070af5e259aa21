"""Samples per second of the loader: Criteo's columns, batch 8192, shuffled, one process and one thread, warm.

python benchmarks/loader.py [--rows 2000000] [--prefetch-batches 4]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time

import torch

from papilio.data_pipeline.config import DataConfig
from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generator import generate
from papilio.data_pipeline.loading.loader import Loader

NUM_PARTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--block-rows", type=int, default=64)
    parser.add_argument("--rows-per-shard", type=int, default=1_048_576)
    parser.add_argument("--prefetch-batches", type=int, default=0, help="0: built where they are asked for")
    parser.add_argument("--shape", default="criteo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        generate(
            GenerateOptions(
                shape=options.shape, num_rows=options.rows, output=folder, rows_per_shard=options.rows_per_shard
            )
        )
        rates = measure(folder, options)
    print(
        f"{statistics.median(rates):,.0f} samples/s (median of {NUM_PARTS} epochs; {min(rates):,.0f}-{max(rates):,.0f})"
    )


def measure(folder: str, options: argparse.Namespace) -> list[float]:
    """Return the samples per second of each epoch after the first, which checks the shards and warms the page cache."""
    config = DataConfig(path=folder, shuffle_block_rows=options.block_rows, prefetch_batches=options.prefetch_batches)
    loader = Loader(
        open_dataset(folder), "train", config, global_batch_size=options.batch_size, num_epochs=NUM_PARTS + 1
    )
    ends_s = []
    for batch in loader:
        if batch.position.sample == 0:
            ends_s.append(time.perf_counter())
    return [loader.num_samples_per_epoch / (stop - start) for start, stop in itertools.pairwise(ends_s)]


if __name__ == "__main__":
    main()
