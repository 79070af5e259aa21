"""The tensors of a training state under canonical keys, to save and to load; the same for every plan.

Weights, and optimizer state with a value for each weight, load exactly into any plan. Row-wise states (row-wise
Adagrad's sum of mean squared gradients) have a value for each row of each block of columns, since FBGEMM trains blocks
of columns apart. Under other blocks, a new block gets the mean of the old ones that it overlaps, weighted by the
columns that they share. For merged blocks this is exactly the sum that the whole would have had with the same
gradients: the mean square over a row is the weighted mean of those over its blocks. Of a block that is split, each
part starts from the whole's. From there on the optimizer is another one, as for any job with these blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from papilio.sharding.runtime.table_shards import (
    TableLayout,
    TableShard,
    data_parallel_weights,
    local_table_shards,
    set_optimizer_step,
    table_layouts,
)
from papilio.trainer.checkpoint.format import CheckpointError, Index
from papilio.trainer.checkpoint.pieces import Piece, Pieces
from papilio.trainer.optimizers import Optimizers


@dataclass(frozen=True)
class ModelState:
    """What to save: tensors by key, and the first column of each block of columns, by table."""

    tensors: dict[str, Pieces]
    column_starts: dict[str, tuple[int, ...]]

    def in_blocks(self) -> ModelState:
        """Return the same values, cut into blocks to write."""
        return ModelState({key: pieces.in_blocks() for key, pieces in self.tensors.items()}, self.column_starts)

    def snapshot(self, reuse: ModelState | None = None) -> ModelState:
        """Return a copy in host memory that training does not change, in that of an earlier copy if there is one."""
        old = reuse.tensors if reuse is not None else {}
        copies = {key: pieces.snapshot(old.get(key)) for key, pieces in self.tensors.items()}
        return ModelState(copies, self.column_starts)


def model_state(model: nn.Module, optimizers: Optimizers) -> ModelState:
    """Return this rank's part of the weights and the optimizers' state. Views: training changes them."""
    layouts = table_layouts(model)
    state = ModelState({}, {table: layout.column_starts for table, layout in layouts.items()})
    for table, shards in _shards_by_table(model, optimizers).items():
        weights = [Piece((shard.row, shard.column), shard.weight) for shard in shards]
        layout = layouts[table]
        shape = (layout.num_rows, layout.dim)
        state.tensors[weight_key(table)] = Pieces(shape, shards[0].weight.dtype, weights)
        for name, example in shards[0].states.items():
            if example.dim() == 1:
                pieces = [_row_wise_piece(shard, name, layout.column_starts) for shard in shards]
                blocks = (layout.num_rows, len(layout.column_starts))
                state.tensors[row_wise_key(table, name)] = Pieces(blocks, example.dtype, pieces)
            else:
                pieces = [Piece((shard.row, shard.column), shard.states[name]) for shard in shards]
                state.tensors[state_key(table, name)] = Pieces(shape, example.dtype, pieces)
    for key, values in (*_dense(model), *_dense_optimizer(optimizers)):
        state.tensors[key] = _whole(values)
    return state


class LoadTargets:
    """Where to load a checkpoint to: the memory of the model itself, but for states under other blocks of columns."""

    def __init__(self, model: nn.Module, optimizers: Optimizers | None, index: Index) -> None:
        """Without `optimizers` the weights alone are loaded.

        Raises:
            CheckpointError: the checkpoint lacks what the model has, or has it in another shape.
        """
        self._index = index
        self.tensors: dict[str, Pieces] = {}
        self.regrouped: list[str] = []
        self._regroupings: list[_Regrouping] = []
        layouts = table_layouts(model)
        for table, shards in _shards_by_table(model, optimizers).items():
            self._add_table(table, shards, layouts[table], with_states=optimizers is not None)
        for key, values in _dense(model):
            self._add(key, _whole(values))
        if optimizers is not None:
            self._make_dense_state(optimizers)
            for key, values in _dense_optimizer(optimizers):
                self._add(key, _whole(values))

    def finish(self) -> None:
        """Compute what could not be read straight into its place; after everything was read."""
        for regrouping in self._regroupings:
            regrouping.compute()

    def _add(self, key: str, pieces: Pieces) -> None:
        saved = self._index.tensors.get(key)
        if saved is None:
            raise CheckpointError(
                f"the checkpoint has no {key}, which this model has: it was saved by another model or optimizer; "
                "use the recipe that it was trained with"
            )
        if saved.shape != tuple(pieces.shape):
            raise CheckpointError(
                f"{key} was saved with shape {list(saved.shape)}, this model has {list(pieces.shape)}; use the recipe "
                "and the data set that it was trained with"
            )
        self.tensors[key] = pieces

    def _add_table(self, table: str, shards: list[TableShard], layout: TableLayout, *, with_states: bool) -> None:
        shape = (layout.num_rows, layout.dim)
        weights = [Piece((shard.row, shard.column), shard.weight) for shard in shards]
        self._add(weight_key(table), Pieces(shape, shards[0].weight.dtype, weights))
        for name, example in shards[0].states.items() if with_states else ():
            if example.dim() == 2:
                pieces = [Piece((shard.row, shard.column), shard.states[name]) for shard in shards]
                self._add(state_key(table, name), Pieces(shape, example.dtype, pieces))
            else:
                self._add_row_wise(table, name, shards, layout)

    def _add_row_wise(self, table: str, name: str, shards: list[TableShard], layout: TableLayout) -> None:
        key = row_wise_key(table, name)
        saved = self._index.tensors.get(key)
        starts, dtype = layout.column_starts, shards[0].states[name].dtype
        if saved is None or saved.column_starts is None or saved.column_starts == starts:
            pieces = [_row_wise_piece(shard, name, starts) for shard in shards]
            self._add(key, Pieces((layout.num_rows, len(starts)), dtype, pieces))
            return
        # Shards of the same rows may need the same old blocks: they are read once, for all of them.
        by_row: dict[int, list[TableShard]] = {}
        for shard in shards:
            by_row.setdefault(shard.row, []).append(shard)
        old_blocks = tuple(itertools.pairwise((*saved.column_starts, layout.dim)))
        regroupings = [_Regrouping(of_rows, name, old_blocks) for of_rows in by_row.values()]
        pieces = [regrouping.piece for regrouping in regroupings]
        self._add(key, Pieces((layout.num_rows, len(old_blocks)), dtype, pieces))
        self._regroupings += regroupings
        self.regrouped.append(table)

    def _make_dense_state(self, optimizers: Optimizers) -> None:
        """Make the state that an optimizer has after its first step."""
        for name, parameter in optimizers.dense.params.items():
            prefix = f"dense_optimizer.{name}."
            state = optimizers.dense.state[parameter]
            for key, saved in self._index.tensors.items():
                if key.startswith(prefix) and key.removeprefix(prefix) not in state:
                    dtype = getattr(torch, saved.dtype)
                    state[key.removeprefix(prefix)] = torch.zeros(saved.shape, dtype=dtype, device=parameter.device)


class _Regrouping:
    """Row-wise states of shards of the same rows, out of those of other blocks of columns (see the head of this file).

    Attributes:
        piece: where to read the old blocks to, [rows, blocks from the first needed to the last].
    """

    def __init__(self, shards: Sequence[TableShard], name: str, old_blocks: Sequence[tuple[int, int]]) -> None:
        """`old_blocks` are (first column, end)."""
        # shares[shard, block]: columns of the shard that are the old block's, over those of the shard.
        shares = torch.zeros(len(shards), len(old_blocks), dtype=torch.float64)
        for place, shard in enumerate(shards):
            begin, end = shard.column, shard.column + shard.weight.shape[1]
            for block, (start, stop) in enumerate(old_blocks):
                shares[place, block] = max(0, min(end, stop) - max(begin, start)) / (end - begin)
        needed = shares.any(0).nonzero().flatten()
        first, last = int(needed[0]), int(needed[-1])
        self._states = [shard.states[name] for shard in shards]
        self._shares = shares[:, first : last + 1]
        values = torch.empty(len(self._states[0]), last + 1 - first, dtype=self._states[0].dtype)
        self.piece = Piece((shards[0].row, first), values)

    def compute(self) -> None:
        for state, shares in zip(self._states, self._shares, strict=True):
            state.copy_((self.piece.values.double() * shares).sum(1))


def set_step(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """Tell every optimizer that counts its steps where it stands; what it counts is the job's steps."""
    set_optimizer_step(model, step)
    for state in optimizers.replicated_state():
        if "step" in state:
            state["step"].fill_(step)


def weight_key(table: str) -> str:
    """Key of a table's weights."""
    return f"tables.{table}.weight"


def state_key(table: str, state: str) -> str:
    """Key of an optimizer's state of a table, with a value for each weight."""
    return f"tables.{table}.{state}"


def row_wise_key(table: str, state: str) -> str:
    """Key of an optimizer's state of a table, with a value for each row of each block of columns."""
    return f"tables.{table}.row_wise.{state}"


def _shards_by_table(model: nn.Module, optimizers: Optimizers | None) -> dict[str, list[TableShard]]:
    by_table: dict[str, list[TableShard]] = {}
    for shard in local_table_shards(model):
        states = shard.states
        if shard.parameter is not None and optimizers is not None:
            states = optimizers.table_state(shard.weight)
        by_table.setdefault(shard.table, []).append(replace(shard, states=states))
    return by_table


def _row_wise_piece(shard: TableShard, name: str, starts: tuple[int, ...]) -> Piece:
    return Piece((shard.row, starts.index(shard.column)), shard.states[name].view(-1, 1))


def _whole(values: torch.Tensor) -> Pieces:
    return Pieces(values.shape, values.dtype, [Piece((0,) * values.dim(), values)])


def _dense(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    replicated = data_parallel_weights(model)
    for name, values in model.state_dict().items():
        if type(values) in (torch.Tensor, nn.Parameter) and name not in replicated:
            yield f"dense.{name}", values


def _dense_optimizer(optimizers: Optimizers) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in optimizers.dense.params.items():
        for state, values in optimizers.dense.state[parameter].items():
            yield f"dense_optimizer.{name}.{state}", values
