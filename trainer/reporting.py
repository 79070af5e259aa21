"""What a run says of itself while it trains: losses over windows of steps, validations, on a terminal and in files."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from papilio.trainer.evaluation import evaluate
from papilio.trainer.models.train_model import StepOutput
from papilio.trainer.run.learning_alerts import NanWatch, diagnose
from papilio.trainer.run.progress_lines import ProgressPrinter
from papilio.trainer.run_state import RunState


class Reporter:
    """Measures training over windows of steps, prints and writes; the decisions to do so are equal on all ranks."""

    def __init__(self, run: RunState) -> None:
        self._run = run
        self._ranks = run.ranks
        self._has_evaluated = False
        self._printer = ProgressPrinter(
            run.config.train.log_every_s, is_silent=not run.ranks.is_first, num_done=run.progress.step
        )
        self._nan_watch = NanWatch(run.ranks.device)
        # Sum of losses and number of samples since the last report, on the device: nothing waits for it in a step.
        self._loss_sum = torch.zeros(2, dtype=torch.float64, device=run.ranks.device)
        self.latest_loss = math.nan
        self._restore(run.window)

    def record(self, output: StepOutput, step: int) -> None:
        """Take in a step's outputs; nothing waits for the device."""
        self._nan_watch.watch(output.loss, step, output.position, output.global_batch_size)
        share = output.global_batch_size / self._ranks.world_size
        self._loss_sum += torch.stack([output.loss.double() * share, output.loss.new_tensor(share).double()])

    def report_if_due(self) -> bool:
        """Report if a window of steps is full, and return whether it was. Collective."""
        every, step = self._run.config.train.log_every_steps, self._run.progress.step
        is_due = step % every == 0 or step in {min(10, every), self._run.num_steps}
        if is_due:
            self.report()
        return is_due

    def check_finite(self) -> None:
        """Stop if a loss since the last report was not finite. Collective.

        Raises:
            TrainingError: names the batch; raised on every rank.
        """
        self._nan_watch.check(self._ranks.group)

    def window(self) -> list[list[float]]:
        """Return the ranks' sums of losses, and of samples over ranks, since the last report. Collective."""
        return self._ranks.gather(self._loss_sum.tolist())

    def report(self) -> None:
        """Close the window: check, measure, write, print. Collective."""
        run, progress = self._run, self._run.progress
        self.check_finite()
        dist.all_reduce(self._loss_sum, group=self._ranks.group)
        loss_sum, weight = self._loss_sum.tolist()
        self._loss_sum.zero_()
        self.latest_loss = loss_sum / weight
        wait_share = progress.wait_s / progress.train_s
        progress.meter.close_window(
            progress.step, progress.train_s, device=self._ranks.device, has_only_trained=not self._has_evaluated
        )
        if run.folder is not None:
            run.folder.append(
                "train",
                progress.step,
                {
                    "logloss": self.latest_loss,
                    "samples_per_s": progress.samples_per_s,
                    "data_wait_share": wait_share,
                    "num_samples": progress.num_samples,
                    "position": progress.position.to_dict(),
                },
            )
        self._printer.print(
            "train",
            progress.step,
            run.num_steps,
            f"step {progress.step:,}/{run.num_steps:,}  logloss {self.latest_loss:.4f} (train)  "
            f"{progress.samples_per_s:,.0f} samples/s  data wait {wait_share:.1%}  "
            f"{run.health.progress_note()}".rstrip()
            + " ",
        )

    def validate(self) -> None:
        """Evaluate on the validation split, write, print, and say loudly when the model is not learning. Collective."""
        run, progress = self._run, self._run.progress
        data, train = run.config.data, run.config.train
        values = evaluate(run.model.module, run.dataset, "validation", data, train, run.ranks, show_progress=False)
        self._has_evaluated = True
        progress.validations.append((progress.step, values))
        found = diagnose(values, "validation")
        progress.alerts = [*progress.data_alerts, *found]
        if run.folder is not None:
            run.folder.append("validation", progress.step, values.to_dict())
        if run.ranks.is_first:
            print(
                f"validation after step {progress.step:,}: AUC {values.auc:.4f}  NE {values.ne:.4f}  "
                f"logloss {values.logloss:.4f}  calibration {values.calibration:.3f}  ({values.num_samples:,} samples)",
                flush=True,
            )
            for finding in found:
                print(f"WARNING: {finding}", flush=True)

    def _restore(self, window: list[list[float]] | None) -> None:
        """Resume from the sums of a checkpoint; on another number of ranks the first has them all."""
        if window is None:
            return
        if len(window) == self._ranks.world_size:
            self._loss_sum.copy_(torch.tensor(window[self._ranks.rank], dtype=torch.float64))
        elif self._ranks.is_first:
            self._loss_sum.copy_(torch.tensor(window, dtype=torch.float64).sum(0))
