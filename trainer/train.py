"""Train a model: `python -m papilio.trainer.train --recipe R [--section.key=value ...]`, a process a rank."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import torch.distributed as dist

from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.data_pipeline.loading.order import ReadPosition
from papilio.data_pipeline.logging_setup import setup_logging
from papilio.data_pipeline.manifest import DatasetError
from papilio.data_pipeline.terminal import drop_what_has_no_room
from papilio.sharding.hardware import HardwareError
from papilio.sharding.plan_file import PlanFileError
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.reports.placement import describe_placement
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import CheckpointError
from papilio.trainer.checkpoint.policy import Checkpoints, RunIdentity
from papilio.trainer.checkpoint.resume import lock_folders, resume
from papilio.trainer.checkpoint.saver import SaveError, Saver
from papilio.trainer.checks.same_on_all_hosts import check_same_folder_on_all, check_same_job_on_all
from papilio.trainer.checks.start_checks import check_input, check_run, open_run_data, without_validation
from papilio.trainer.config import Config
from papilio.trainer.config_file import ConfigError, load_config
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE, exit_now
from papilio.trainer.elastic.health.failures import LostRankError, describe_join_failure, note_early_failure
from papilio.trainer.elastic.health.job_health import JobHealth, job_health
from papilio.trainer.elastic.preemption import watch_for_preemption
from papilio.trainer.evaluation import evaluate
from papilio.trainer.loop import run_training
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.process_group import Ranks, process_group, rank_of_process
from papilio.trainer.run.folder import RunFolder, checkpoints_dir, choose_run_dir, data_identity
from papilio.trainer.run.learning_alerts import TrainingError, diagnose, diagnose_labels
from papilio.trainer.run.lock import LockedError, LostLockError, RunLock
from papilio.trainer.run.measurement import compare
from papilio.trainer.run.summary import Summary, format_summary
from papilio.trainer.run.versions import package_versions
from papilio.trainer.run_state import Progress, RunState
from papilio.trainer.runtime import configure_runtime, no_garbage_collection
from papilio.trainer.sharded_model import ShardedModel, build_sharded_model, fix_gradient_buckets
from papilio.trainer.storage.api import StorageError

EXPECTED_ERRORS = (
    CheckpointError,
    ConfigError,
    DatasetError,
    dist.DistError,
    HardwareError,
    LockedError,
    LostLockError,
    LostRankError,
    PlanError,
    PlanFileError,
    SaveError,
    StorageError,
    TrainingError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(prog="papilio.trainer.train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="TOML file, or the name of a shipped recipe")
    parser.add_argument("--host", help="hardware of the hosts, where the recipe has no sharding.hardware")
    known, overrides = parser.parse_known_args(arguments)
    drop_what_has_no_room()
    setup_logging("rank", rank_of_process())
    configure_runtime()
    try:
        config = load_config(known.recipe, overrides, known.host)
        check_input(config)  # before the ranks meet: one that waits for another which left shows a traceback
        with (
            process_group(config.train.stall_timeout_s) as ranks,
            job_health(ranks, config.train.stall_timeout_s) as health,
        ):
            summary = train(config, ranks, health)
    except EXPECTED_ERRORS as error:
        return fail("papilio train", error)
    return RESUME_EXIT_CODE if summary is None else 0


def fail(prefix: str, error: Exception) -> int:
    """Say what went wrong, unless another rank has said the very same, and return the exit status.

    A lost host comes back, a full disk is emptied, a storage answers again; anything else would go wrong again.
    """
    if isinstance(error, dist.DistError):
        error = LostRankError(describe_join_failure(error))
    if note_early_failure(error):
        print(f"{prefix}: error: {error}", file=sys.stderr, flush=True)
    is_passing = error.is_passing if isinstance(error, StorageError) else isinstance(error, LostRankError | SaveError)
    return 1 if is_passing else NO_RESTART_EXIT_CODE


def train(config: Config, ranks: Ranks, health: JobHealth | None = None) -> Summary | None:
    """Train as the config says, resuming from the run's newest checkpoint if it has one, and write the run folder.

    A finished run is left as it is. Collective; returns the summary on every rank, or None when the job was asked
    to end and has saved.
    """
    dataset = open_run_data(config)
    identity = RunIdentity(config.model_dump(mode="json"), data_identity(dataset), package_versions())
    check_same_job_on_all(identity, ranks)
    _training_loader(config, dataset, ranks, ReadPosition()).check_first_batch()
    run_dir = ranks.ask_first(lambda: choose_run_dir(config.output, config.name))
    finished = ranks.ask_first(lambda: check_run(config, dataset, run_dir))
    if finished is not None:
        if ranks.is_first:
            print(finished, flush=True)
        return Summary.from_dict(finished.summary)
    checkpoints = CheckpointFolder(checkpoints_dir(run_dir, config.checkpoint))
    lock = lock_folders((run_dir, checkpoints.path), ranks)
    try:
        key = "output.run_dir" if config.checkpoint.folder is None else "checkpoint.folder"
        check_same_folder_on_all(key, checkpoints.path, ranks)
        return _train(config, dataset, ranks, health or JobHealth(), (run_dir, checkpoints, identity), lock)
    finally:
        if lock is not None:
            lock.release()


def _train(
    config: Config,
    dataset: Dataset,
    ranks: Ranks,
    health: JobHealth,
    folders: tuple[str, CheckpointFolder, RunIdentity],
    lock: RunLock | None,
) -> Summary | None:
    """Train in folders that are this job's alone. Collective; `lock` is theirs, on the first rank."""
    run_dir, checkpoints, identity = folders
    # The model on meta, its fused sparse optimizers, the plan, and the shards.
    model = build_sharded_model(config, dataset, ranks)
    optimizers = Optimizers(model.module, config.optimizer, config.schedule)
    fix_gradient_buckets(model, optimizers, dataset, ranks)
    start = resume(checkpoints, identity.config, model, optimizers, ranks)
    health.mark(start.progress.step, "loading")
    loader = _training_loader(config, dataset, ranks, start.progress.position)
    start.progress.data_alerts = _alerts_of_data(config, dataset)
    start.progress.alerts = list(start.progress.data_alerts)
    folder = _open_run_folder(config, dataset, model, ranks, run_dir, identity, start.progress)
    saver = Saver(checkpoints, config.checkpoint, model, optimizers, ranks, lock)
    saver.latest = start.saved
    run = RunState(
        config=config,
        dataset=dataset,
        ranks=ranks,
        health=health,
        model=model,
        optimizers=optimizers,
        loader=loader,
        run_dir=run_dir,
        folder=folder,
        checkpoints=Checkpoints(saver, config.checkpoint, identity, ranks),
        progress=start.progress,
        # The loader has the batches that are still to come.
        num_steps=min(start.progress.step + len(loader), config.train.max_steps or sys.maxsize),
        window=start.window,
    )
    try:
        if folder is not None:
            print(_describe_start(run, folder), flush=True)
        with no_garbage_collection(), watch_for_preemption(ranks) as preemption:
            run_training(run, preemption)
        health.is_saved = run.progress.is_preempted
        health.mark(run.progress.step, "ending")
        summary = None if run.progress.is_preempted else _finish(run)
        saver.close()
        if summary is None and folder is not None:
            print(_describe_stop(run, folder), flush=True)
        return summary
    except BaseException:
        saver.abandon()
        raise
    finally:
        if folder is not None:
            folder.close()


def _training_loader(config: Config, dataset: Dataset, ranks: Ranks, start: ReadPosition) -> Loader:
    return Loader(
        dataset,
        "train",
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        start=start,
        num_epochs=config.train.epochs,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pin_memory=ranks.device.type == "cuda",
    )


def _alerts_of_data(config: Config, dataset: Dataset) -> list[str]:
    """Return what is wrong with the data set, whatever is trained on it."""
    train = dataset.manifest.splits["train"]
    unmeasured = without_validation(dataset, config.checkpoint)
    return [*diagnose_labels(train.num_rows, train.num_positives), *([] if unmeasured is None else [unmeasured])]


def _open_run_folder(
    config: Config,
    dataset: Dataset,
    model: ShardedModel,
    ranks: Ranks,
    run_dir: str,
    identity: RunIdentity,
    progress: Progress,
) -> RunFolder | None:
    """Open the run folder on the first rank. Collective: a disk that is full by now is an error on all ranks."""
    opened: list[RunFolder] = []

    def open_folder() -> None:
        validated = [step for step, _ in progress.validations]
        opened.append(RunFolder(run_dir, config, dataset, identity.versions, progress.step, validated))
        opened[0].write_plan(model.plan.to_json())

    ranks.ask_first(open_folder)
    return opened[0] if opened else None


def _describe_start(run: RunState, folder: RunFolder) -> str:
    """Say what is about to be trained, and what is wrong with its data."""
    config, ranks = run.config, run.ranks
    lines = [
        f"{config.name}: {config.model.architecture}, {run.model.num_parameters:,} weights on {ranks.world_size} "
        f"rank(s) ({ranks.device.type}, {config.train.precision}); {run.num_steps:,} steps of "
        f"{config.train.global_batch_size:,} samples from {config.data.path}",
        describe_placement(run.model.plan),
        f"run folder: {folder.path}",
    ]
    if not run.dataset.has_rows("test"):
        lines.append(f"data set {run.dataset.folder} has no rows in split test: no metrics of it at the end")
    return "\n".join([*lines, *(f"WARNING: {finding}" for finding in run.progress.alerts)])


def _describe_stop(run: RunState, folder: RunFolder) -> str:
    latest = run.checkpoints.latest
    return (
        f"stopped after step {run.progress.step:,} and saved as {latest.name if latest is not None else None}; start "
        f"the job again with --output.run_dir={folder.path} to resume"
    )


def _finish(run: RunState) -> Summary:
    """Measure the test split of a run that is saved, and sum up. Collective."""
    dataset, model, ranks, progress = run.dataset, run.model, run.ranks, run.progress
    comparison = compare(model.plan, progress.meter, ranks)
    final = {"validation": progress.validations[-1][1]} if dataset.has_rows("validation") else {}
    if dataset.has_rows("test"):
        data, train = run.config.data, run.config.train
        final["test"] = evaluate(model.module, dataset, "test", data, train, ranks, show_progress=False)
    progress.alerts = [*progress.data_alerts]
    progress.alerts += [finding for split, values in final.items() for finding in diagnose(values, split)]
    best = progress.best_validation
    summary = Summary(
        run_dir=run.run_dir,
        world_size=ranks.world_size,
        device=ranks.device.type,
        num_parameters=model.num_parameters,
        num_steps=progress.step,
        num_samples=progress.num_samples,
        train_s=progress.train_s,
        samples_per_s=progress.samples_per_s,
        data_wait_share=progress.wait_s / progress.train_s if progress.train_s else math.nan,
        final=final,
        best_validation_auc=best[1].auc if best is not None else None,
        best_validation_step=best[0] if best is not None else None,
        findings=tuple(progress.alerts),
        comparison=comparison,
        checkpoint_stalls_s=tuple(run.checkpoints.stalls_s),
    )
    if run.folder is not None:
        if "test" in final:
            run.folder.append("test", progress.step, final["test"].to_dict())
        run.folder.write_summary(summary.to_dict())
        print(format_summary(summary, dataset.manifest), flush=True)
    return summary


if __name__ == "__main__":
    exit_now(main())
