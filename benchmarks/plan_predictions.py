"""Predicted against measured: step time, memory and the choice of the plan, on this machine after `papilio calibrate`.

    python -m benchmarks.plan_predictions [--hardware FILE] [--ranks 1 2 4] [--json FILE]

Without --hardware the machine is calibrated first. Then models of 8 to 100 tables, none of which calibration knows, are
trained on 1, 2 and 4 ranks under each sharding type, the plans of a model taking turns: medians over windows of steps
after a warm-up. Memory is measured in processes of their own. Last, the plan that the planner chooses is held against
the best of many plans of small models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from benchmarks.plan_prediction_models import brute_force_shapes, can_replicate, study_shapes
from papilio.data_pipeline.logging_setup import setup_logging
from papilio.sharding.config import ShardingConfig, TableConstraint
from papilio.sharding.hardware import load_hardware
from papilio.sharding.planner.job import Cluster
from papilio.trainer.calibration.calibrate import time_in_turn
from papilio.trainer.calibration.synthetic import PlannedShape, Shape, SyntheticTraining, plan_shape
from papilio.trainer.process_group import Ranks, process_group
from papilio.trainer.run.measurement import process_memory_bytes
from papilio.trainer.runtime import configure_runtime, no_garbage_collection

MANY_RANK_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard")
MIXED_TYPES = ("table_wise", "row_wise", "column_wise")
NUM_MIXTURES = 5
# Models of study_shapes() whose memory is measured, each under these types.
MEMORY_SHAPES, MEMORY_TYPES = (0, 3), ("table_wise", "row_wise")
MEMORY_STEPS = 20


@dataclass(frozen=True)
class Record:
    """One measured plan; `error` says why there is none."""

    num_ranks: int
    model: int
    plan: str
    predicted: float
    measured: float
    error: str = ""

    @property
    def log_ratio(self) -> float:
        """0 where the prediction is right."""
        return math.log(self.predicted / self.measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", help="profile of this machine (default: calibrate first)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--studies", nargs="+", choices=tuple(STUDIES), default=list(STUDIES))
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window-s", type=float, default=0.2)
    parser.add_argument("--models", type=int, nargs="+", help="numbers of the models (default: all)")
    parser.add_argument("--json", help="file for all that was measured")
    parser.add_argument("--worker", choices=tuple(STUDIES), help=argparse.SUPPRESS)
    parser.add_argument("--plan", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.hardware is None:
            options.hardware = os.path.join(folder, "this_machine.toml")
            command = [sys.executable, "-m", "papilio.launch.cli", "calibrate", "--output", options.hardware]
            subprocess.run(command, check=True)
        begin_s = time.perf_counter()
        found = {name: _study(name, options, folder) for name in options.studies}
        print(f"measured in {time.perf_counter() - begin_s:.0f} s\n")
    if options.json:
        Path(options.json).write_text(json.dumps({name: list(map(asdict, rows)) for name, rows in found.items()}))
    for name, rows in found.items():
        print(STUDIES[name][1](rows), end="\n\n", flush=True)


def _study(name: str, options: argparse.Namespace, folder: str) -> list[Record]:
    """Run a study on each number of ranks; memory in fresh processes for each plan."""
    records: list[Record] = []
    plans = [f"{shape}:{kind}" for shape in MEMORY_SHAPES for kind in MEMORY_TYPES] if name == "memory" else [""]
    for num_ranks in options.ranks if name != "best" else [n for n in options.ranks if n > 1]:
        for plan in plans:
            output = Path(folder, "records.json")
            output.unlink(missing_ok=True)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
            command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "benchmarks.plan_predictions"]
            command += ["--worker", name, "--plan", plan, "--hardware", options.hardware, "--json", str(output)]
            command += [f"--windows={options.windows}", f"--window-s={options.window_s}"]
            command += ["--models", *map(str, options.models)] if options.models else []
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
            if done.returncode or not output.is_file():
                print(f"{name} {plan} on {num_ranks} ranks failed", file=sys.stderr)
                continue
            records += [Record(**row) for row in json.loads(output.read_text())]
    return records


def _work(options: argparse.Namespace) -> None:
    setup_logging("rank")
    configure_runtime()
    with process_group() as ranks:
        cluster = Cluster(load_hardware(options.hardware), 1, ranks.world_size)
        records = STUDIES[options.worker][0](options, cluster, ranks)
        if ranks.is_first:
            Path(options.json).write_text(json.dumps(list(map(asdict, records))))


def measure_steps(options: argparse.Namespace, cluster: Cluster, ranks: Ranks) -> list[Record]:
    """Each model under each type that can run."""
    records = []
    for number, shape in enumerate(study_shapes()):
        if options.models and number not in options.models:
            continue
        types = ["table_wise"] if ranks.world_size == 1 else list(MANY_RANK_TYPES)
        types += ["data_parallel"] if can_replicate(shape) else []
        plans = {kind: _of_type(kind) for kind in types}
        records += _measure(shape, number, plans, options, cluster, ranks)
    return records


def measure_choice(options: argparse.Namespace, cluster: Cluster, ranks: Ranks) -> list[Record]:
    """Small models under the plan that the planner chooses, each type alone, and mixtures."""
    records = []
    generator = random.Random(0)
    for number, shape in enumerate(brute_force_shapes()):
        plans = {"chosen": ShardingConfig(min_partition=4)}
        plans |= {kind: _of_type(kind) for kind in MANY_RANK_TYPES}
        for index in range(NUM_MIXTURES):
            constraints = tuple(
                TableConstraint.model_validate({"tables": (f"t_{name}",), "types": (generator.choice(MIXED_TYPES),)})
                for name in shape.features
            )
            plans[f"mixture {index}"] = ShardingConfig(min_partition=4, constraints=constraints)
        records += _measure(shape, number, plans, options, cluster, ranks)
    return records


def measure_memory(options: argparse.Namespace, cluster: Cluster, ranks: Ranks) -> list[Record]:
    """One model under one type: bytes of the rank that needs most."""
    number, _, kind = options.plan.partition(":")
    shape = study_shapes()[int(number)]
    planned = plan_shape(shape, _of_type(kind), cluster)
    if planned is None:
        return []
    SyntheticTraining(shape, planned.plan, ranks).run(MEMORY_STEPS)
    measured = [0] * ranks.world_size
    dist.all_gather_object(measured, process_memory_bytes(ranks.device), group=ranks.group)
    rank = max(range(len(measured)), key=measured.__getitem__)
    predicted = planned.plan.ranks[rank].memory.device_bytes
    return [Record(ranks.world_size, int(number), kind, predicted, measured[rank])]


def _measure(
    shape: Shape,
    number: int,
    configs: dict[str, ShardingConfig],
    options: argparse.Namespace,
    cluster: Cluster,
    ranks: Ranks,
) -> list[Record]:
    """Measure a model's plans in turn; a plan that cannot be built is told of and left out."""
    trainings: dict[str, tuple[PlannedShape, SyntheticTraining]] = {}
    for name, config in configs.items():
        planned = plan_shape(shape, config, cluster)
        if planned is not None:
            trainings[name] = (planned, SyntheticTraining(shape, planned.plan, ranks))
    with no_garbage_collection():
        seconds = time_in_turn(
            [training for _, training in trainings.values()],
            ranks,
            num_windows=options.windows,
            window_s=options.window_s,
        )
    records = []
    for (name, (planned, training)), measured_s in zip(trainings.items(), seconds, strict=True):
        training.close()
        records.append(Record(ranks.world_size, number, name, planned.plan.step.total_s, measured_s))
        if ranks.is_first:
            found = records[-1]
            print(
                f"{ranks.world_size} rank(s), model {number}, {name}: measured {1e3 * found.measured:.2f} ms, "
                f"predicted {1e3 * found.predicted:.2f} ({math.expm1(found.log_ratio):+.0%})",
                flush=True,
            )
    return records


def _of_type(kind: str) -> ShardingConfig:
    kernels = ("dense",) if kind == "data_parallel" else ("fused",)
    return ShardingConfig.model_validate(
        {"types": (kind,), "kernels": kernels, "min_partition": 4, "memory_per_rank_gib": 64}
    )


def steps_table(records: Sequence[Record]) -> str:
    """Geometric mean and worst errors, by sharding type and number of ranks."""
    lines = [
        "| sharding type | ranks | models | mean error | worst | bias |",
        "|---|---|---|---|---|---|",
    ]
    for plan in dict.fromkeys(record.plan for record in records):
        for num_ranks in sorted({record.num_ranks for record in records}):
            found = [record for record in records if (record.plan, record.num_ranks) == (plan, num_ranks)]
            if found:
                lines.append(f"| {plan} | {num_ranks} | {len(found)} | {_errors(found)} |")
    for num_ranks in sorted({record.num_ranks for record in records}):
        found = [record for record in records if record.num_ranks == num_ranks]
        lines.append(f"| all | {num_ranks} | {len(found)} | {_errors(found)} |")
    lines.append(f"| **all** | all | {len(records)} | {_errors(records)} |")
    worst = sorted(records, key=lambda record: -abs(record.log_ratio))[:5]
    lines += ["", "Worst: " + "; ".join(map(_describe, worst))]
    return "\n".join(["## Step time, predicted against measured", "", *lines])


def memory_table(records: Sequence[Record]) -> str:
    """Peak memory of the fullest rank."""
    lines = ["| model | sharding type | ranks | measured MiB | predicted MiB | error |", "|---|---|---|---|---|---|"]
    for record in records:
        lines.append(
            f"| {record.model} | {record.plan} | {record.num_ranks} | {record.measured / 2**20:.0f} | "
            f"{record.predicted / 2**20:.0f} | {math.expm1(record.log_ratio):+.1%} |"
        )
    lines.append(f"| all | | | | | mean {_mean_error(records):.1%} |")
    return "\n".join(["## Peak memory of the fullest rank", "", *lines])


def choice_table(records: Sequence[Record]) -> str:
    """The chosen plan against the best of those tried."""
    lines = [
        "| model | ranks | plans | chosen ms | best ms | best plan | chosen over best |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, num_ranks in dict.fromkeys((record.model, record.num_ranks) for record in records):
        found = [record for record in records if (record.model, record.num_ranks) == (model, num_ranks)]
        chosen = next(record for record in found if record.plan == "chosen")
        best = min(found, key=lambda record: record.measured)
        lines.append(
            f"| {model} | {num_ranks} | {len(found)} | {1e3 * chosen.measured:.2f} | {1e3 * best.measured:.2f} | "
            f"{best.plan} | {chosen.measured / best.measured - 1:+.1%} |"
        )
    return "\n".join(["## The planner's choice against brute force", "", *lines, "", steps_table(records)])


def _errors(records: Sequence[Record]) -> str:
    worst = max(records, key=lambda record: abs(record.log_ratio))
    bias = math.expm1(statistics.fmean(record.log_ratio for record in records))
    return f"{_mean_error(records):.1%} | {math.expm1(worst.log_ratio):+.0%} | {bias:+.1%}"


def _mean_error(records: Iterable[Record]) -> float:
    """exp(mean |ln(predicted / measured)|) - 1."""
    return math.expm1(statistics.fmean(abs(record.log_ratio) for record in records))


def _describe(record: Record) -> str:
    return (
        f"model {record.model}, {record.plan}, {record.num_ranks} rank(s): measured {1e3 * record.measured:.1f} ms, "
        f"predicted {1e3 * record.predicted:.1f}"
    )


Measurement = Callable[[argparse.Namespace, Cluster, Ranks], list[Record]]
STUDIES: dict[str, tuple[Measurement, Callable[[Sequence[Record]], str]]] = {
    "steps": (measure_steps, steps_table),
    "memory": (measure_memory, memory_table),
    "best": (measure_choice, choice_table),
}

if __name__ == "__main__":
    main()
