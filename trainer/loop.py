"""The training loop: steps, reports, evaluations and saves, in the order in which they happen."""

from __future__ import annotations

import time
from functools import partial

from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from papilio.trainer.elastic.health.live_view import CheckpointView
from papilio.trainer.elastic.health.live_writer import Run, RunStatus
from papilio.trainer.elastic.health.step_timer import StepTimer
from papilio.trainer.elastic.preemption import Preemption
from papilio.trainer.models.train_model import StepOutput
from papilio.trainer.reporting import Reporter
from papilio.trainer.run_state import RunState


def run_training(run: RunState, preemption: Preemption) -> None:
    """Train from where the run's progress stands to its last step, evaluating and saving on the way. Collective.

    Ends early, with `run.progress.is_preempted`, when the job is told to.

    Raises:
        TrainingError: the loss is not finite; raised on every rank.
    """
    model, loader, progress = run.model, run.loader, run.progress
    pipeline = TrainPipelineSparseDist(
        model.module,
        run.optimizers.combined,
        run.ranks.device,
        execute_all_batches=True,
        dmp_collection_sync_interval_batches=None,  # replicas are averaged below, where it can be seen
    )
    reporter = Reporter(run)
    work = StepTimer(model.module, run.ranks.device, progress)
    run.health.show(work.figures, _shown(run, reporter))
    wait_before_s = progress.wait_s
    batches = iter(loader)
    model.module.train()
    while progress.step < run.num_steps and not progress.is_preempted:
        begin_s = time.perf_counter()
        run.optimizers.set_step(progress.step)
        with work.timed(begin_s):
            output: StepOutput = pipeline.progress(batches)
        reporter.record(output, progress.step)
        progress.step += 1
        progress.position = output.position
        is_validation_due = _is_validation_due(run)
        model.average_replicas(progress.step, before_use=is_validation_due)
        progress.num_samples += output.global_batch_size
        progress.train_s += time.perf_counter() - begin_s
        progress.wait_s = wait_before_s + loader.wait_s
        run.health.mark(progress.step, "training")
        is_report = reporter.report_if_due()
        if is_validation_due:
            run.health.mark(progress.step, "validating")
            # The pipeline has hooked the model's forward, for batches that it fetched ahead.
            pipeline.detach()
            reporter.validate()
        # All branches below depend on values that are equal on all ranks: saving is collective.
        progress.is_preempted = preemption.is_agreed(progress.step) and progress.step < run.num_steps
        is_best = is_validation_due and progress.is_best_now
        reason = run.checkpoints.due(progress.step, is_report=is_report, is_best=is_best)
        if (reason and progress.step < run.num_steps) or progress.is_preempted:
            _save(run, reporter, "preemption" if progress.is_preempted else str(reason))
    batches.close()
    pipeline.detach()
    if not progress.is_preempted:
        _end(run, reporter)


def _shown(run: RunState, reporter: Reporter) -> Run | None:
    """Return what the first rank shows of the run while it runs."""
    if run.folder is None:
        return None
    return Run(run.config.name, run.folder.path, run.ranks.world_size, partial(_run_status, run, reporter))


def _run_status(run: RunState, reporter: Reporter) -> RunStatus:
    """Return how far the run is; asked for by the thread that shows it."""
    progress, num_epochs = run.progress, run.config.train.epochs
    position, validations, saved = progress.position, progress.validations, run.checkpoints.latest
    return RunStatus(
        step=progress.step,
        num_steps=run.num_steps,
        num_samples=progress.num_samples,
        train_s=progress.train_s,
        epoch=min(position.epoch + 1, num_epochs),
        num_epochs=num_epochs,
        epoch_share=1.0 if position.epoch == num_epochs else position.sample / run.loader.num_samples_per_epoch,
        loss=reporter.latest_loss,
        validation_auc=validations[-1][1].auc if validations else None,
        checkpoint=CheckpointView(name=saved.name, step=saved.step, unix_s=saved.unix_s) if saved else None,
        alerts=tuple(progress.alerts),
    )


def _end(run: RunState, reporter: Reporter) -> None:
    """Save before anything else, then validate, and write into the checkpoint what came of it. Collective.

    Raises:
        SaveError: the final checkpoint could not be written.
    """
    progress = run.progress
    run.health.mark(progress.step, "saving")
    if not run.checkpoints.is_saved(progress.step):
        _save(run, reporter, "end")
    is_validated = any(step == progress.step for step, _ in progress.validations)
    if run.dataset.has_rows("validation") and not is_validated:
        run.health.mark(progress.step, "validating")
        reporter.validate()
        run.checkpoints.amend(progress.to_dict())


def _save(run: RunState, reporter: Reporter, reason: str) -> None:
    """Save a model whose losses were all finite so far; at the end, or preempted, wait: there is no other chance."""
    run.model.average_replicas(run.progress.step, before_use=True)
    reporter.check_finite()
    state = {**run.progress.to_dict(), "window": reporter.window()}
    run.checkpoints.save(run.progress.step, state, reason, wait=reason in ("end", "preemption"))


def _is_validation_due(run: RunState) -> bool:
    """Whether to validate in the middle of the run; its end is validated after it is saved."""
    progress, every = run.progress, run.config.train.evaluate_every_steps
    if not run.dataset.has_rows("validation") or progress.step >= run.num_steps:
        return False
    is_epoch_end = progress.position.sample == 0
    return is_epoch_end or (every is not None and progress.step % every == 0)
