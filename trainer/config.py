"""The whole of a run's configuration: one frozen tree, read from a recipe, saved with every run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from papilio.data_pipeline.config import DataConfig
from papilio.data_pipeline.local_path import check_local_path
from papilio.sharding.config import ShardingConfig
from papilio.trainer.checkpoint.config import CheckpointConfig

Pooling = Literal["sum", "mean"]
TablePrecision = Literal["fp32", "fp16"]
SparseOptimizerName = Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"]
DenseOptimizerName = Literal["sgd", "adagrad", "adam", "adamw"]


def table_name(feature: str) -> str:
    """Name of the table that a feature looks up.

    A table is a module, whose name may hold no dot: user.id is looked up in t_user%2Eid. No two features share one.
    """
    escaped = re.sub("%(?=25|2E)", "%25", feature)
    return f"t_{escaped.replace('.', '%2E')}"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Shape of the network; tables have one row per id of the data set unless `table_rows` says more."""

    architecture: Literal["dlrm", "dlrm_dcnv2"] = Field("dlrm", description="Interaction: pairwise dots, or DCNv2.")
    embedding_dim: int = Field(16, ge=4, multiple_of=4, description="Columns of every table (FBGEMM: multiples of 4).")
    dense_in_features: int | None = Field(
        None, ge=1, description="Dense inputs of the data set; stated, it is checked, else it is read from the data."
    )
    dense_arch_layer_sizes: tuple[int, ...] = Field((512, 256, 64), description="Hidden layers of the bottom MLP.")
    over_arch_layer_sizes: tuple[int, ...] = Field((512, 256), description="Hidden layers of the top MLP.")
    dcn_num_layers: int = Field(3, ge=1, description="Cross layers (dlrm_dcnv2).")
    dcn_low_rank_dim: int = Field(512, ge=1, description="Rank of a cross layer's matrices (dlrm_dcnv2).")
    pooling: Pooling = Field("sum", description="How a bag's rows become one vector.")
    table_pooling: dict[str, Pooling] = Field(default_factory=dict, description="Pooling of single features, by name.")
    table_rows: dict[str, int] = Field(
        default_factory=dict, description="Rows of single features' tables, by feature name; not fewer than its ids."
    )
    table_precision: TablePrecision = Field(
        "fp32",
        description="Precision of the tables' weights; what they give is fp32. Updates of fp16 weights are rounded "
        "stochastically on a GPU, to nearest on a CPU, where those below half a unit in the last place are lost.",
    )


class SparseOptimizerConfig(_Section):
    """Optimizer of the tables, fused into the backward pass by FBGEMM (data_parallel tables: the same, as a step)."""

    name: SparseOptimizerName = "rowwise_adagrad"
    learning_rate: float = Field(0.02, gt=0)
    eps: float = Field(1e-8, gt=0, description="Added to the root of the accumulated squares (not for sgd).")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty; FBGEMM honours it on a GPU only.")


class DenseOptimizerConfig(_Section):
    """Optimizer of the MLPs and cross layers."""

    name: DenseOptimizerName = "adagrad"
    learning_rate: float = Field(0.02, gt=0)
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment (not for sgd).")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (adamw: decoupled).")


class OptimizerConfig(_Section):
    """Both optimizers."""

    sparse: SparseOptimizerConfig = SparseOptimizerConfig()
    dense: DenseOptimizerConfig = DenseOptimizerConfig()


class ScheduleConfig(_Section):
    """Factor on both learning rates, a pure function of the step: warm-up, plateau, polynomial decay to the floor."""

    warmup_steps: int = Field(0, ge=0, description="Steps of linear rise from 1/warmup_steps to 1.")
    decay_start_step: int | None = Field(None, ge=0, description="First step of the decay; none without it.")
    decay_steps: int = Field(1, ge=1, description="Length of the decay, in steps.")
    decay_power: float = Field(2.0, gt=0, description="Power of the remaining share of the decay (2: DLRM's).")
    floor: float = Field(0.0, ge=0, le=1, description="Factor after the decay.")


class TrainConfig(_Section):
    """The loop."""

    global_batch_size: int = Field(2048, ge=1, description="Samples of a step over all ranks, whatever their number.")
    epochs: int = Field(1, ge=1, description="Passes over the training split.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps, even in the middle of an epoch.")
    evaluate_every_steps: int | None = Field(
        None, ge=1, description="Evaluate on the validation split every so many steps, besides the end of each epoch."
    )
    eval_batch_size: int = Field(16384, ge=1, description="Samples of an evaluation batch over all ranks.")
    log_every_s: float = Field(2.0, ge=0, description="Seconds between progress lines.")
    log_every_steps: int = Field(100, ge=1, description="Steps between entries of metrics.jsonl and TensorBoard.")
    stall_timeout_s: float = Field(
        600.0, gt=0, description="End the job, naming the ranks that did not arrive, after so long without a step."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of the dense part; optimizers and the loss stay fp32."
    )


class OutputConfig(_Section):
    """Where the run folder goes."""

    runs_dir: str = Field("runs", description="Parent of run folders named <name>-<UTC time>.")
    run_dir: str | None = Field(None, description="The run folder itself, instead of a new one under runs_dir.")
    tensorboard: bool = Field(True, description="Write TensorBoard events.")


class Config(_Section):
    """A recipe with its overrides applied."""

    name: str = Field(description="Name of the run; its folder begins with it.", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0, lt=2**31, description="Decides initial weights and the order of the samples.")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _check_layers(self) -> Config:
        layers = [*self.model.dense_arch_layer_sizes, *self.model.over_arch_layer_sizes]
        if any(size < 1 for size in layers):
            raise ValueError("model: layer sizes must be positive")
        return self

    @model_validator(mode="after")
    def _check_paths(self) -> Config:
        for key, path in (
            ("data.path", self.data.path),
            ("data.shape", self.data.shape),
            ("output.runs_dir", self.output.runs_dir),
            ("output.run_dir", self.output.run_dir),
            ("sharding.plan", self.sharding.plan),
            ("sharding.hardware", self.sharding.hardware),
        ):
            if path is not None:
                check_local_path(path, key)
        return self
