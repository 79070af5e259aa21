"""The training loop: steps, reports, evaluations, in the order a person would tell them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial

from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.trainer.checkpoint.policy import Checkpoints
from papilio.trainer.config import Config
from papilio.trainer.elastic.health.job_health import JobHealth
from papilio.trainer.elastic.health.live_view import CheckpointView
from papilio.trainer.elastic.health.live_writer import Run, RunStatus
from papilio.trainer.elastic.health.step_timer import StepTimer
from papilio.trainer.elastic.preemption import Preemption
from papilio.trainer.models.train_model import StepOutput
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.process_group import Ranks
from papilio.trainer.reporting import Reporter
from papilio.trainer.run.folder import RunFolder
from papilio.trainer.run_state import Progress
from papilio.trainer.sharded_model import ShardedModel


@dataclass(frozen=True)
class RunContext:
    """What a run has around its loop.

    Attributes:
        window: sums of the losses since the last report, of a run that goes on from a checkpoint.
    """

    dataset: Dataset
    folder: RunFolder | None
    checkpoints: Checkpoints
    preemption: Preemption
    health: JobHealth
    window: list[list[float]] | None = None


def run_training(
    model: ShardedModel,
    optimizers: Optimizers,
    loader: Loader,
    config: Config,
    ranks: Ranks,
    run: RunContext,
    progress: Progress,
) -> None:
    """Train on from where `progress` stands to the last step, evaluating and saving on the way. Collective.

    Ends early, with `progress.is_preempted`, when the job is told to.

    Raises:
        TrainingError: the loss is not finite; raised on every rank.
    """
    pipeline = TrainPipelineSparseDist(
        model.module,
        optimizers.combined,
        ranks.device,
        execute_all_batches=True,
        dmp_collection_sync_interval_batches=None,  # replicas are averaged below, where it can be seen
    )
    num_steps = total_steps(progress.step, loader, config)
    reporter = Reporter(config, ranks, run.folder, num_steps, progress.step, run.health.progress_note)
    reporter.restore(run.window)
    work = StepTimer(model.module, ranks.device, progress)
    run.health.show(work.figures, _shown(config, ranks, run, loader, reporter, progress, num_steps))
    wait_before_s = progress.wait_s
    batches = iter(loader)
    model.module.train()
    while progress.step < num_steps and not progress.is_preempted:
        begin_s = time.perf_counter()
        optimizers.set_step(progress.step)
        with work.timed(begin_s):
            output: StepOutput = pipeline.progress(batches)
        reporter.record(output, progress.step)
        progress.step += 1
        progress.position = output.position
        is_validation_due = run.dataset.has_rows("validation") and _is_validation_due(progress, num_steps, config)
        model.average_replicas(progress.step, before_use=is_validation_due)
        progress.num_samples += output.global_batch_size
        progress.train_s += time.perf_counter() - begin_s
        progress.wait_s = wait_before_s + loader.wait_s
        run.health.mark(progress.step, "training")
        is_report = reporter.report_if_due(progress)
        if is_validation_due:
            run.health.mark(progress.step, "validating")
            pipeline.detach()
            reporter.validate(model, run.dataset, progress)
        progress.is_preempted = run.preemption.is_agreed(progress.step) and progress.step < num_steps
        is_best = is_validation_due and progress.is_best_now
        reason = run.checkpoints.due(progress.step, is_report=is_report, is_best=is_best)
        if (reason and progress.step < num_steps) or progress.is_preempted:
            _save(model, run.checkpoints, reporter, progress, "preemption" if progress.is_preempted else str(reason))
    batches.close()
    pipeline.detach()
    if not progress.is_preempted:
        _end(model, reporter, run, progress)


def total_steps(num_done: int, loader: Loader, config: Config) -> int:
    """Return the steps that a run has in all: those done, and those that the loader has batches for, or max_steps."""
    return min(num_done + len(loader), config.train.max_steps or sys.maxsize)


def _shown(
    config: Config,
    ranks: Ranks,
    run: RunContext,
    loader: Loader,
    reporter: Reporter,
    progress: Progress,
    num_steps: int,
) -> Run | None:
    """Return what the first rank shows of the run while it runs."""
    if run.folder is None:
        return None
    status = partial(_run_status, config, run.checkpoints, loader, reporter, progress, num_steps)
    return Run(config.name, run.folder.path, ranks.world_size, status)


def _run_status(
    config: Config, checkpoints: Checkpoints, loader: Loader, reporter: Reporter, progress: Progress, num_steps: int
) -> RunStatus:
    """Return how far the run is; asked for by the thread that shows it."""
    position, validations, saved = progress.position, progress.validations, checkpoints.latest
    num_epochs = config.train.epochs
    return RunStatus(
        step=progress.step,
        num_steps=num_steps,
        num_samples=progress.num_samples,
        train_s=progress.train_s,
        epoch=min(position.epoch + 1, num_epochs),
        num_epochs=num_epochs,
        epoch_share=1.0 if position.epoch == num_epochs else position.sample / loader.num_samples_per_epoch,
        loss=reporter.latest_loss,
        validation_auc=validations[-1][1].auc if validations else None,
        checkpoint=CheckpointView(name=saved.name, step=saved.step, unix_s=saved.unix_s) if saved else None,
        alerts=tuple(progress.findings),
    )


def _end(model: ShardedModel, reporter: Reporter, run: RunContext, progress: Progress) -> None:
    """Save before anything else, then validate, and write into the checkpoint what came of it. Collective.

    Raises:
        SaveError: the final checkpoint could not be written.
    """
    run.health.mark(progress.step, "saving")
    if not run.checkpoints.is_saved(progress.step):
        _save(model, run.checkpoints, reporter, progress, "end")
    is_validated = any(step == progress.step for step, _ in progress.validations)
    if run.dataset.has_rows("validation") and not is_validated:
        run.health.mark(progress.step, "validating")
        reporter.validate(model, run.dataset, progress)
        run.checkpoints.amend(progress.to_dict())


def _save(model: ShardedModel, checkpoints: Checkpoints, reporter: Reporter, progress: Progress, reason: str) -> None:
    """Save a model whose losses were all finite so far; at the end, or told to end, wait: there is no other chance."""
    model.average_replicas(progress.step, before_use=True)
    reporter.check_finite()
    state = {**progress.to_dict(), "window": reporter.window()}
    checkpoints.save(progress.step, state, reason, wait=reason in ("end", "preemption"))


def _is_validation_due(progress: Progress, num_steps: int, config: Config) -> bool:
    """Whether to validate in the middle of the run; its end is validated after it is saved."""
    every = config.train.evaluate_every_steps
    is_epoch_end = progress.position.sample == 0
    return progress.step < num_steps and (is_epoch_end or (every is not None and progress.step % every == 0))
