"""A run in memory: what its parts are, how far it is, and what of that goes into checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.data_pipeline.loading.order import ReadPosition
from papilio.trainer.checkpoint.policy import Checkpoints
from papilio.trainer.config import Config
from papilio.trainer.elastic.health.job_health import JobHealth
from papilio.trainer.metrics import MetricValues
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.process_group import Ranks
from papilio.trainer.run.folder import RunFolder
from papilio.trainer.run.measurement import StepMeter
from papilio.trainer.sharded_model import ShardedModel


@dataclass
class Progress:
    """How far a run is; equal on all ranks but for the times, which are this rank's.

    Attributes:
        history: the runs of this job, from the first on: where each began, on how many ranks, and what had changed.
        data_alerts: what is wrong with the data set, whatever is trained on it.
        alerts: the same, and what the newest evaluations found.
        is_preempted: the job was asked to end before its last step.
    """

    step: int = 0
    position: ReadPosition = field(default_factory=ReadPosition)
    num_samples: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    validations: list[tuple[int, MetricValues]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    data_alerts: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    meter: StepMeter = field(default_factory=StepMeter)
    is_preempted: bool = False

    @property
    def samples_per_s(self) -> float:
        """Trained samples of all ranks per second of training, evaluation not counted."""
        return self.num_samples / self.train_s if self.train_s else math.nan

    @property
    def best_validation(self) -> tuple[int, MetricValues] | None:
        """The validation with the highest AUC and its step, the earlier of equals."""
        return max(self.validations, key=lambda found: _rank_of(found[1].auc), default=None)

    @property
    def is_best_now(self) -> bool:
        """Whether the validation of this step is the best."""
        best = self.best_validation
        return best is not None and best[0] == self.step

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return {
            "step": self.step,
            "position": self.position.to_dict(),
            "num_samples": self.num_samples,
            "train_s": self.train_s,
            "wait_s": self.wait_s,
            "validations": [(step, values.to_dict()) for step, values in self.validations],
            "history": self.history,
        }

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Progress:
        """Rebuild it from `to_dict`'s result."""
        validations = [(step, MetricValues.from_dict(values)) for step, values in tree["validations"]]
        return cls(
            step=tree["step"],
            position=ReadPosition.from_dict(tree["position"]),
            num_samples=tree["num_samples"],
            train_s=tree["train_s"],
            wait_s=tree["wait_s"],
            validations=validations,
            history=list(tree["history"]),
            meter=StepMeter(tree["step"], tree["train_s"]),
        )


@dataclass(frozen=True)
class RunState:
    """The parts of a run that its loop, its reports and its end share; on every rank, with this rank's shards.

    Attributes:
        run_dir: where the run's files are, on every rank.
        folder: writes them; on the first rank only.
        progress: the one part that the loop changes.
        num_steps: of the whole run, those before a resume with them.
        window: every rank's sum of losses since the last report before a resume; None at the start of a run.
    """

    config: Config
    dataset: Dataset
    ranks: Ranks
    health: JobHealth
    model: ShardedModel
    optimizers: Optimizers
    loader: Loader
    run_dir: str
    folder: RunFolder | None
    checkpoints: Checkpoints
    progress: Progress
    num_steps: int
    window: list[list[float]] | None = None


def _rank_of(auc: float) -> float:
    return -math.inf if math.isnan(auc) else auc
