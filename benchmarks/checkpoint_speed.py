"""How fast a checkpoint is written and read, and what it costs training: 2 ranks, against dd and stock DCP.

    python -m benchmarks.checkpoint_speed [--gib 2] [--rounds 5] [--folder DIR] [--json FILE]

Variants in turn, medians of the rounds, rates as shares of the same round's dd on the same disk (bs=16M, conv=fsync).
Cold reads are of files that the system was asked to forget (posix_fadvise DONTNEED), which needs no rights; warm ones
follow at once. Then 4 ranks load what 2 have saved under another plan, and count the bytes they read.
`--folder` needs up to 10 GB at a time; nothing is left in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.faults_data import Size, write_data
from benchmarks.rank_lines import run_ranks

DIM, NUM_TABLES = 64, 8
GIB = 1 << 30
# A row of fp32 weights, and its one accumulator of row-wise Adagrad.
ROW_BYTES = 4 * (DIM + 1)
RECIPE = """name = "speed"
seed = 1
[data]
path = "{data}"
[model]
embedding_dim = {dim}
[optimizer.sparse]
name = "rowwise_adagrad"
[train]
global_batch_size = 2048
epochs = 1000
[sharding]
types = ["{kind}"]
"""
RATES = {
    "dd": "dd",
    "dd2": "two dd at once, half each",
    "papilio": "papilio",
    "dcp": "stock DCP",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where on the disk to measure (default: the folder of temporary files)")
    parser.add_argument("--json", help="file to write all figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = round(options.gib * GIB / NUM_TABLES / ROW_BYTES)
        write_data(os.path.join(folder, "data"), Size(dict.fromkeys("abcdefgh", rows), 20_480, 2_048, 1, DIM, 1))
        found = list(_run(folder, "measure", 2, "table_wise", options.rounds))
        for kind in ("column_wise", "row_wise"):
            found += [{**entry, "kind": kind} for entry in _run(folder, "reshard", 4, kind, 1)]
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    _print_rates([entry for entry in found if entry["variant"] in RATES])
    _print_costs([entry for entry in found if entry["variant"] in ("papilio_async", "dcp_async")])
    _print_resharding([entry for entry in found if entry["variant"].endswith("_reshard")])


def _run(folder: str, job: str, num_ranks: int, kind: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Start ranks and yield what the first prints, line by line.

    Raises:
        SystemExit: a rank failed; with the end of what the ranks said.
    """
    recipe = os.path.join(folder, f"{job}.toml")
    with open(recipe, "w", encoding="utf-8") as file:
        file.write(RECIPE.format(data=os.path.join(folder, "data"), dim=DIM, kind=kind))
    for entry in run_ranks("benchmarks.checkpoint_speed_worker", [job, recipe, folder, str(rounds)], num_ranks):
        print(json.dumps(entry), file=sys.stderr, flush=True)
        yield entry


def _print_rates(found: list[dict[str, Any]]) -> None:
    rounds: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for entry in found:
        rounds[entry["round"]][entry["variant"]] = entry
    print("\n| | write, MB/s | of dd | cold read, MB/s | of dd | warm read, MB/s | of dd | extra memory a rank, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for variant, label in RATES.items():
        cells = [label]
        for key in ("write_s", "cold_read_s", "warm_read_s"):
            rates = [round_[variant]["bytes"] / round_[variant][key] for round_ in rounds.values()]
            dd_rates = [round_["dd"]["bytes"] / round_["dd"][key] for round_ in rounds.values()]
            shares = [rate / dd_rate for rate, dd_rate in zip(rates, dd_rates, strict=True)]
            cells += [f"{statistics.median(rates) / 1e6:,.0f}", f"{statistics.median(shares):.0%}"]
        extra = [max(round_[variant]["extra_bytes"]) for round_ in rounds.values() if "extra_bytes" in round_[variant]]
        cells.append(f"{statistics.median(extra) / (1 << 20):,.0f}" if extra else "")
        print("| " + " | ".join(cells) + " |")


def _print_costs(found: list[dict[str, Any]]) -> None:
    columns = ["asynchronous save", "stall, s", "written after, s", "step before, ms", "step meanwhile, ms"]
    columns += ["steps meanwhile", "cost to training in all, s", "extra memory a rank, MiB"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for variant in ("papilio_async", "dcp_async"):
        entries = [entry for entry in found if entry["variant"] == variant]
        if not entries:
            continue
        if "error" in entries[0]:
            print(f"| {variant} | {entries[0]['error']} |")
            continue

        def median(key: str, entries: list[dict[str, Any]] = entries) -> float:
            return float(statistics.median(entry[key] for entry in entries))

        extra = statistics.median(max(entry["extra_bytes"]) for entry in entries)
        print(
            f"| {variant} | {median('stall_s'):.2f} | {median('write_s'):.1f} | {median('step_s') * 1e3:.1f} "
            f"| {median('step_meanwhile_s') * 1e3:.1f} | {median('num_steps'):.0f} | {median('cost_s'):.2f} "
            f"| {extra / (1 << 20):,.0f} |"
        )


def _print_resharding(found: list[dict[str, Any]]) -> None:
    print("\n| 2 ranks, table_wise -> 4 ranks | bytes needed, MB | bytes read, MB | times | seconds |")
    print("|---|---|---|---|---|")
    for entry in found:
        needed, read = entry["needed_bytes"], entry["read_bytes"]
        label = f"{entry['kind']}: {entry['variant'].removesuffix('_reshard')} ({entry['what']})"
        print(f"| {label} | {needed / 1e6:,.0f} | {read / 1e6:,.0f} | {read / needed:.2f} | {entry['read_s']:.1f} |")


if __name__ == "__main__":
    main()
