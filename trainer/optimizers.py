"""Optimizers: fused sparse ones inside the backward pass, one dense one, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from papilio.sharding.runtime.table_shards import data_parallel_weights
from papilio.trainer.config import (
    DenseOptimizerConfig,
    OptimizerConfig,
    ScheduleConfig,
    SparseOptimizerConfig,
    TablePrecision,
)
from papilio.trainer.config_file import ConfigError

SPARSE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torchrec.optim.SGD,
    "adagrad": torchrec.optim.Adagrad,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adam": torchrec.optim.Adam,
    "partial_rowwise_adam": torchrec.optim.PartialRowWiseAdam,
    "lamb": torchrec.optim.LAMB,
}
# FBGEMM 1.6 to 1.8: the others fail with "not supported in CPU mode".
CPU_SPARSE_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
# A row without an id in the batch has no gradient; these leave it as it is, also when they see all rows. The others
# would move it by its momentum, while FBGEMM moves only the rows that a batch names.
DATA_PARALLEL_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")


def check_sparse_optimizer(config: SparseOptimizerConfig, device: torch.device) -> None:
    """Refuse what the device's kernels would not do, or would silently ignore.

    Raises:
        ConfigError: naming the key and what is possible.
    """
    if device.type != "cpu":
        return
    if config.name not in CPU_SPARSE_OPTIMIZERS:
        raise ConfigError(
            f"optimizer.sparse.name = {config.name!r}: FBGEMM has no CPU kernel for it; on a CPU use one of "
            f"{', '.join(CPU_SPARSE_OPTIMIZERS)}, or train on a GPU"
        )
    if config.weight_decay:
        raise ConfigError(
            f"optimizer.sparse.weight_decay = {config.weight_decay}: FBGEMM's CPU kernels ignore it silently; set it "
            "to 0, or train on a GPU"
        )


def check_data_parallel_tables(
    tables: Sequence[str], sparse: SparseOptimizerConfig, table_precision: TablePrecision
) -> None:
    """Refuse data_parallel tables (names) which would not be trained as the other tables are.

    Raises:
        ConfigError: naming a table, the reason and the fixes.
    """
    if not tables:
        return
    reason = None
    if sparse.name not in DATA_PARALLEL_OPTIMIZERS:
        reason = (
            f"optimizer.sparse.name = {sparse.name!r} changes only the rows that a batch names, and there is no "
            f"dense optimizer that does; use one of {', '.join(DATA_PARALLEL_OPTIMIZERS)}"
        )
    elif sparse.weight_decay:
        reason = (
            f"optimizer.sparse.weight_decay = {sparse.weight_decay} decays only the rows that a batch names, a dense "
            "optimizer all of them; set it to 0"
        )
    elif table_precision != "fp32":
        reason = (
            f"model.table_precision = {table_precision!r} would keep their gradients and optimizer state "
            "in that precision too; use fp32"
        )
    if reason is not None:
        raise ConfigError(
            f"the plan makes {len(tables)} table(s) data_parallel ({', '.join(tables[:3])}"
            f"{', ...' if len(tables) > 3 else ''}), but {reason}, or leave data_parallel out of sharding.types"
        )


def fuse_sparse_optimizer(tables: EmbeddingBagCollection, config: SparseOptimizerConfig) -> None:
    """Mark the tables' parameters so that sharding builds TBE kernels which update them in the backward pass."""
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    if config.name != "sgd":
        arguments["eps"] = config.eps
    if config.weight_decay:
        arguments["weight_decay"] = config.weight_decay
    apply_optimizer_in_backward(SPARSE_OPTIMIZERS[config.name], tables.parameters(), arguments)


class Optimizers:
    """The optimizers of a sharded model as one, with the schedule applied at each step.

    Attributes:
        combined: what a train pipeline zeroes and steps.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, schedule: ScheduleConfig) -> None:
        replicated = data_parallel_weights(model)
        dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
        self.dense = KeyedOptimizerWrapper(
            {name: parameter for name, parameter in dense_parameters.items() if name not in replicated},
            lambda params: _make_dense(params, config.dense),
        )
        self.sparse = make_sparse_optimizer(model, config.sparse)
        self._is_row_wise = config.sparse.name == "rowwise_adagrad"
        self._replicated = [part for _, part in self.sparse.optimizers if isinstance(part, KeyedOptimizerWrapper)]
        self.combined = CombinedOptimizer([self.sparse, self.dense])
        self._rates = [(self.sparse, config.sparse.learning_rate), (self.dense, config.dense.learning_rate)]
        self._schedule = schedule

    def set_step(self, step: int) -> float:
        """Set the learning rates of step `step` (from 0) and return their common factor."""
        factor = learning_rate_factor(self._schedule, step)
        for optimizer, learning_rate in self._rates:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
        return factor

    def table_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of a data_parallel table by name, as a fused optimizer's: [rows] or [rows, dim]."""
        for optimizer in self._replicated:
            state = optimizer.state.get(weight, {})
            return {
                name: values.view(-1) if self._is_row_wise else values for name, values in state.items() if values.dim()
            }
        return {}

    def replicated_state(self) -> list[dict[str, torch.Tensor]]:
        """Return the state of each data_parallel table, the count of steps with it."""
        return [state for optimizer in self._replicated for state in optimizer.state.values()]


def make_sparse_optimizer(model: nn.Module, config: SparseOptimizerConfig) -> CombinedOptimizer:
    """Return the optimizer of all tables: fused in most, and for data_parallel ones the same formula at the step."""
    replicated = data_parallel_weights(model)
    if not replicated:
        return model.fused_optimizer
    stepped = KeyedOptimizerWrapper(replicated, lambda params: _make_data_parallel(params, config))
    return CombinedOptimizer([model.fused_optimizer, stepped])


def learning_rate_factor(schedule: ScheduleConfig, step: int) -> float:
    """Return the factor on the learning rates at step `step` (from 0).

    Linear warm-up, then 1, then floor + (1 - floor) * (share of the decay still to come) ** power, then the floor
    (the polynomial decay of the DLRM authors' LRPolicyScheduler).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay_start_step is None or step < schedule.decay_start_step:
        return 1.0
    remaining = max(0.0, 1 - (step - schedule.decay_start_step) / schedule.decay_steps)
    return float(schedule.floor + (1 - schedule.floor) * remaining**schedule.decay_power)


def _make_data_parallel(parameters: Iterable[nn.Parameter], config: SparseOptimizerConfig) -> torch.optim.Optimizer:
    match config.name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=config.learning_rate)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=config.learning_rate, eps=config.eps)
        case "rowwise_adagrad":
            rowwise = torchrec.optim.RowWiseAdagrad
            return rowwise(parameters, lr=config.learning_rate, eps=config.eps)  # type: ignore[no-any-return]
        case other:
            raise AssertionError(f"check_data_parallel_tables refuses {other}")


def _make_dense(parameters: Iterable[nn.Parameter], config: DenseOptimizerConfig) -> torch.optim.Optimizer:
    parameters = list(parameters)
    rate, decay, eps = config.learning_rate, config.weight_decay, config.eps
    match config.name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, fused=True)
        case "adagrad":
            # PyTorch has a fused Adagrad for CPUs only.
            is_fused = all(parameter.device.type == "cpu" for parameter in parameters)
            return torch.optim.Adagrad(parameters, lr=rate, weight_decay=decay, eps=eps, fused=is_fused)
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, eps=eps, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, eps=eps, fused=True)
