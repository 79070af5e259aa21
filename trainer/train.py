"""Train a model: `python -m trainer.train --recipe R [--section.key=value ...]`, one process a rank (torchrun)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.loader import Loader
from data_pipeline.manifest import DatasetError
from data_pipeline.version import papilio_version
from sharding.hardware import HardwareError
from sharding.plan_file import PlanFileError
from sharding.planning.errors import PlanError
from sharding.reports.placement import describe_placement
from trainer.checkpoint import checkpoint_dir, save_weights
from trainer.config import Config
from trainer.config_file import ConfigError, load_config
from trainer.evaluation import evaluate
from trainer.health import TrainingError, diagnose
from trainer.install import InstallError, check_install
from trainer.loop import Progress, run_training
from trainer.measurement import compare
from trainer.optimizers import Optimizers
from trainer.ranks import Ranks, process_group
from trainer.run_folder import RunFolder, choose_run_dir
from trainer.runtime import configure_runtime, no_garbage_collection
from trainer.sharded_model import ShardedModel, build_sharded_model
from trainer.storage import write_json
from trainer.summary import Summary, format_summary

EXPECTED_ERRORS = (
    ConfigError,
    DatasetError,
    HardwareError,
    InstallError,
    PlanError,
    PlanFileError,
    TrainingError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(prog="trainer.train", description=__doc__)
    parser.add_argument("--recipe", required=True, help="TOML file, or the name of a shipped recipe")
    known, overrides = parser.parse_known_args(arguments)
    configure_runtime()
    try:
        check_install()
        config = load_config(known.recipe, overrides)
        with process_group() as ranks:
            train(config, ranks)
    except EXPECTED_ERRORS as error:
        print(f"papilio train: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def train(config: Config, ranks: Ranks) -> Summary:
    """Train as the config says and write the run folder. Collective; returns the summary on every rank."""
    dataset = open_dataset(config.data.path, verify_checksums=config.data.verify_checksums)
    loader = _training_loader(config, dataset, ranks)
    loader.check_first_batch()
    run_dir = ranks.agree_on(choose_run_dir(config.output, config.name) if ranks.is_first else None)
    model = build_sharded_model(config, dataset, ranks)
    optimizers = Optimizers(model.module, config.optimizer, config.schedule)
    folder = RunFolder(run_dir, config, dataset) if ranks.is_first else None
    if folder is not None:
        folder.write_plan(model.plan.to_json())
        print(_opening(config, loader, model, ranks, run_dir), flush=True)
    try:
        with no_garbage_collection():
            progress = run_training(model, optimizers, loader, dataset, config, ranks, folder)
        return _finish(model, dataset, config, ranks, folder, progress, run_dir)
    finally:
        if folder is not None:
            folder.close()


def _training_loader(config: Config, dataset: Dataset, ranks: Ranks) -> Loader:
    return Loader(
        dataset,
        "train",
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        num_epochs=config.train.epochs,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pin_memory=ranks.device.type == "cuda",
    )


def _opening(config: Config, loader: Loader, model: ShardedModel, ranks: Ranks, run_dir: str) -> str:
    num_steps = min(len(loader), config.train.max_steps or len(loader))
    return (
        f"{config.name}: {config.model.architecture}, {model.num_parameters:,} weights on {ranks.world_size} rank(s) "
        f"({ranks.device.type}, {config.train.precision}); {num_steps:,} steps of "
        f"{config.train.global_batch_size:,} samples from {config.data.path}\n"
        f"{describe_placement(model.plan)}\n"
        f"run folder: {run_dir}"
    )


def _finish(
    model: ShardedModel,
    dataset: Dataset,
    config: Config,
    ranks: Ranks,
    folder: RunFolder | None,
    progress: Progress,
    run_dir: str,
) -> Summary:
    """Save the weights, measure the test split, and sum up. Collective."""
    facts = {"step": progress.step, "position": progress.position.to_dict(), "papilio_version": papilio_version()}
    save_weights(model, checkpoint_dir(run_dir), ranks, facts)
    comparison = compare(model.plan, progress.meter, ranks)
    final = {"validation": progress.validations[-1][1]}
    if dataset.manifest.splits.get("test") and dataset.manifest.splits["test"].num_rows:
        final["test"] = evaluate(model.module, dataset, "test", config, ranks, show_progress=False)
    best_step, best = max(progress.validations, key=lambda found: found[1].auc)
    summary = Summary(
        run_dir=run_dir,
        world_size=ranks.world_size,
        device=ranks.device.type,
        num_parameters=model.num_parameters,
        num_steps=progress.step,
        num_samples=progress.num_samples,
        train_s=progress.train_s,
        samples_per_s=progress.samples_per_s,
        data_wait_share=progress.wait_s / progress.train_s,
        final=final,
        best_validation_auc=best.auc,
        best_validation_step=best_step,
        findings=tuple(diagnose(final["validation"], "validation")),
        comparison=comparison,
    )
    if folder is not None:
        if "test" in final:
            folder.append("test", progress.step, final["test"].to_dict())
        write_json(folder.file("summary.json"), summary.to_dict())
        print(format_summary(summary, dataset.manifest), flush=True)
    return summary


if __name__ == "__main__":
    sys.exit(main())
