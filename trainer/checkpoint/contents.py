"""The tensors of a checkpoint as people think of them: tables with their states, and the dense part. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from papilio.trainer.checkpoint.format import Index, SavedTensor

_TABLE = "tables."
_DENSE = "dense."
_DENSE_OPTIMIZER = "dense_optimizer."
_ROW_WISE = ".row_wise."
WEIGHT = "weight"


@dataclass(frozen=True)
class NamedTensor:
    """A tensor under the name that it has within its table, or within the dense part, and its key in the index."""

    name: str
    key: str
    tensor: SavedTensor


@dataclass(frozen=True)
class Contents:
    """All tensors of one copy of the model.

    Attributes:
        tables: by table in the order of their names, the numbers in them counted: weights first, then states.
        dense: parameters and buffers of the dense part.
        dense_optimizer: what its optimizer remembers of them.
    """

    tables: dict[str, tuple[NamedTensor, ...]]
    dense: tuple[NamedTensor, ...]
    dense_optimizer: tuple[NamedTensor, ...]

    @classmethod
    def of(cls, index: Index) -> Contents:
        """Sort the tensors of an index."""
        tables: dict[str, list[NamedTensor]] = {}
        for key, tensor in index.tensors.items():
            if key.startswith(_TABLE):
                table, name = _split_table_key(key, tensor)
                tables.setdefault(table, []).append(NamedTensor(name, key, tensor))
        return cls(
            {table: tuple(sorted(tables[table], key=_weight_first)) for table in sorted(tables, key=natural_order)},
            _under(index, _DENSE),
            _under(index, _DENSE_OPTIMIZER),
        )


def num_bytes(tensors: tuple[NamedTensor, ...]) -> int:
    """Bytes of the values of all these tensors."""
    return sum(named.tensor.num_bytes for named in tensors)


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key by which t_C2 comes before t_C10."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part)


def _split_table_key(key: str, tensor: SavedTensor) -> tuple[str, str]:
    """Return the table and the tensor's name in it: "weight", "exp_avg", "row_wise.sum"."""
    rest = key.removeprefix(_TABLE)
    # A feature may have dots in its name, and even ".row_wise." before that of its state.
    if tensor.column_starts is not None:
        table, _, state = rest.rpartition(_ROW_WISE)
        return table, f"{_ROW_WISE[1:]}{state}"
    table, _, name = rest.rpartition(".")
    return table, name


def _weight_first(named: NamedTensor) -> tuple[bool, str]:
    return named.name != WEIGHT, named.name


def _under(index: Index, prefix: str) -> tuple[NamedTensor, ...]:
    found = [NamedTensor(key.removeprefix(prefix), key, index.tensors[key]) for key in index.tensors]
    return tuple(
        sorted((named for named in found if named.key.startswith(prefix)), key=lambda n: natural_order(n.name))
    )
