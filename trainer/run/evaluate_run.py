"""Evaluate a run on any data set of its columns: `python -m papilio.trainer.run.evaluate_run --run R --data D`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.logging_setup import setup_logging
from papilio.sharding.config import ReplicasConfig, ShardingConfig
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.loader import load, load_newest
from papilio.trainer.checkpoint.selection import LATEST, find_checkpoint
from papilio.trainer.checks.same_data import check_data_of_run
from papilio.trainer.checks.start_checks import check_evaluation, check_num_ranks
from papilio.trainer.config import Config
from papilio.trainer.elastic.exit_codes import exit_now
from papilio.trainer.elastic.health.job_health import job_health
from papilio.trainer.evaluation import evaluate
from papilio.trainer.process_group import STALL_TIMEOUT_S, Ranks, process_group, rank_of_process
from papilio.trainer.run.folder import checkpoints_dir, load_run_config, read_run
from papilio.trainer.run.learning_alerts import diagnose
from papilio.trainer.run.summary import format_metrics
from papilio.trainer.runtime import configure_runtime
from papilio.trainer.sharded_model import build_sharded_model
from papilio.trainer.train import EXPECTED_ERRORS, fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(prog="papilio.trainer.run.evaluate_run", description=__doc__)
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--data", help="data set folder; that of the run by default")
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument("--checkpoint", default=LATEST, help="a checkpoint's name, its step, latest or best")
    known = parser.parse_args(arguments)
    setup_logging("rank", rank_of_process())
    configure_runtime()
    try:
        config = load_run_config(known.run)
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        check_evaluation(known.run, known.data, known.split, known.checkpoint, num_ranks)
        with process_group() as ranks, job_health(ranks, STALL_TIMEOUT_S):
            evaluate_run(config, known.run, known.data or config.data.path, known.split, ranks, known.checkpoint)
    except EXPECTED_ERRORS as error:
        return fail("papilio evaluate", error)
    return 0


def evaluate_run(
    config: Config, run_dir: str, data_dir: str, split: str, ranks: Ranks, checkpoint: str = LATEST
) -> None:
    """Load the run's weights, whatever world size saved them, and print metrics of `split`. Collective.

    Args:
        config: the run's.
        run_dir: its folder.
        data_dir: the data set to evaluate on.
        split: of the data set.
        ranks: who evaluates.
        checkpoint: a checkpoint's name, its step, "latest" or "best"; of the latest, should it be damaged, the one
            before.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: the data set has other columns, or independent tables do not fit the number of ranks.
    """
    check_num_ranks(config.sharding.replicas, run_dir, ranks.world_size)
    dataset = open_dataset(data_dir, verify_checksums=config.data.verify_checksums)
    dataset.open_split(split)
    check_data_of_run(dataset, read_run(run_dir)[1], run_dir)
    config = config.model_copy(update={"sharding": sharding_for_evaluation(config.sharding)})
    folder = CheckpointFolder(checkpoints_dir(run_dir, config.checkpoint))
    name = ranks.ask_first(lambda: find_checkpoint(folder, checkpoint))
    model = build_sharded_model(config, dataset, ranks)
    if checkpoint == LATEST:
        found = load_newest(folder, model, None, ranks)
        name = name if found is None else found[0]
    else:
        load(folder, name, model, None, ranks)
    values = evaluate(model.module, dataset, split, config.data, config.train, ranks, show_progress=True)
    if ranks.is_first:
        print(f"checkpoint {name} of {run_dir}\n{format_metrics({split: values}, dataset.manifest)}", flush=True)
        for finding in diagnose(values, split):
            print(f"WARNING: {finding}", flush=True)


def sharding_for_evaluation(trained: ShardingConfig) -> ShardingConfig:
    """Return what to plan with: neither the run's plan nor its wishes for single ranks, which are of other machines.

    Embeddings travel in full precision, on any device. Groups with independent tables stay: each evaluates with its
    own tables on its own slices of the batches, and the metrics are over all samples.
    """
    groups = trained.replicas if trained.replicas.independent_tables else ReplicasConfig()
    return ShardingConfig(
        hardware=trained.hardware,
        types=trained.types,
        kernels=trained.kernels,
        min_partition=trained.min_partition,
        cache_load_factor=trained.cache_load_factor,
        memory_per_rank_gib=trained.memory_per_rank_gib,
        reserve_fraction=trained.reserve_fraction,
        replicas=groups,
    )


if __name__ == "__main__":
    exit_now(main())
