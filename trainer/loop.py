"""The training loop: steps, reports, evaluations, in the order a person would tell them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from data_pipeline.dataset import Dataset
from data_pipeline.loader import Loader
from data_pipeline.order import ReadPosition
from trainer.config import Config
from trainer.evaluation import evaluate
from trainer.health import NanWatch, diagnose
from trainer.measurement import StepMeter
from trainer.metrics import MetricValues
from trainer.models.train_model import StepOutput
from trainer.optimizers import Optimizers
from trainer.progress import ProgressPrinter
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder
from trainer.sharded_model import ShardedModel


@dataclass
class Progress:
    """Where a run stands; equal on all ranks but for the times, which are this rank's."""

    step: int = 0
    position: ReadPosition = field(default_factory=ReadPosition)
    num_samples: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    validations: list[tuple[int, MetricValues]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    meter: StepMeter = field(default_factory=StepMeter)

    @property
    def samples_per_s(self) -> float:
        """Trained samples of all ranks per second of training, evaluation not counted."""
        return self.num_samples / self.train_s if self.train_s else math.nan

    @property
    def best_validation(self) -> MetricValues | None:
        """The validation with the highest AUC."""
        return max((values for _, values in self.validations), key=lambda values: values.auc, default=None)


def run_training(
    model: ShardedModel,
    optimizers: Optimizers,
    loader: Loader,
    dataset: Dataset,
    config: Config,
    ranks: Ranks,
    folder: RunFolder | None,
) -> Progress:
    """Train to the end of the last epoch (or to max_steps), evaluating on the way. Collective.

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
    num_steps = min(len(loader), config.train.max_steps or len(loader))
    progress = Progress()
    reporter = _Reporter(config, ranks, folder, num_steps)
    batches = iter(loader)
    model.module.train()
    while progress.step < num_steps:
        begin_s = time.perf_counter()
        optimizers.set_step(progress.step)
        output: StepOutput = pipeline.progress(batches)
        reporter.record(output, progress.step)
        progress.step += 1
        progress.position = output.position
        is_validation_due = _is_validation_due(progress, num_steps, config)
        model.average_replicas(progress.step, before_use=is_validation_due)
        progress.num_samples += output.global_batch_size
        progress.train_s += time.perf_counter() - begin_s
        progress.wait_s = loader.wait_s
        if reporter.is_due(progress):
            reporter.report(progress)
        if is_validation_due:
            pipeline.detach()
            values = evaluate(model.module, dataset, "validation", config, ranks, show_progress=False)
            progress.validations.append((progress.step, values))
            progress.findings = diagnose(values, "validation")
            reporter.report_validation(progress, values)
    batches.close()
    pipeline.detach()
    return progress


def _is_validation_due(progress: Progress, num_steps: int, config: Config) -> bool:
    every = config.train.evaluate_every_steps
    return (
        progress.step == num_steps
        or progress.position.sample == 0  # the end of an epoch
        or (every is not None and progress.step % every == 0)
    )


class _Reporter:
    """Measures training over windows of steps, prints and writes; the decisions to do so are equal on all ranks."""

    def __init__(self, config: Config, ranks: Ranks, folder: RunFolder | None, num_steps: int) -> None:
        self._config = config
        self._ranks = ranks
        self._folder = folder
        self._num_steps = num_steps
        self._printer = ProgressPrinter(config.train.log_every_s, is_silent=not ranks.is_first)
        self._nan_watch = NanWatch(ranks.device)
        self._loss_sum = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        self._latest_loss = math.nan

    def record(self, output: StepOutput, step: int) -> None:
        """Take in a step's outputs; nothing waits for the device."""
        self._nan_watch.watch(output.loss, step, output.position, output.global_batch_size)
        share = output.global_batch_size / self._ranks.world_size
        self._loss_sum += torch.stack([output.loss.double() * share, output.loss.new_tensor(share).double()])

    def is_due(self, progress: Progress) -> bool:
        """Whether a window of steps is full."""
        every = self._config.train.log_every_steps
        return progress.step % every == 0 or progress.step in {min(10, every), self._num_steps}

    def report(self, progress: Progress) -> None:
        """Close the window: check, measure, write, print. Collective."""
        self._nan_watch.check(self._ranks.group)
        dist.all_reduce(self._loss_sum, group=self._ranks.group)
        loss_sum, weight = self._loss_sum.tolist()
        self._loss_sum.zero_()
        self._latest_loss = loss_sum / weight
        wait_share = progress.wait_s / progress.train_s
        progress.meter.close_window(
            progress.step, progress.train_s, device=self._ranks.device, has_only_trained=not progress.validations
        )
        if self._folder is not None:
            self._folder.append(
                "train",
                progress.step,
                {
                    "logloss": self._latest_loss,
                    "samples_per_s": progress.samples_per_s,
                    "data_wait_share": wait_share,
                    "num_samples": progress.num_samples,
                    "position": progress.position.to_dict(),
                },
            )
        self._printer.print(
            "train",
            progress.step,
            self._num_steps,
            f"step {progress.step:,}/{self._num_steps:,}  logloss {self._latest_loss:.4f} (train)  "
            f"{progress.samples_per_s:,.0f} samples/s  data wait {wait_share:.1%} ",
        )

    def report_validation(self, progress: Progress, values: MetricValues) -> None:
        """Write and print an evaluation, and say loudly when the model is not learning."""
        if self._folder is not None:
            self._folder.append("validation", progress.step, _finite(values.to_dict()))
        if self._ranks.is_first:
            print(
                f"validation after step {progress.step:,}: AUC {values.auc:.4f}  NE {values.ne:.4f}  "
                f"logloss {values.logloss:.4f}  calibration {values.calibration:.3f}  ({values.num_samples:,} samples)",
                flush=True,
            )
            for finding in progress.findings:
                print(f"WARNING: NOT LEARNING: {finding}", flush=True)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: value for key, value in values.items() if not (isinstance(value, float) and math.isnan(value))}
