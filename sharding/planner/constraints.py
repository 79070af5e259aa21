"""What the recipe asks for, resolved for each table: options to choose from, ranks allowed, tables kept together."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from papilio.sharding.config import ShardingConfig, TableConstraint
from papilio.sharding.patterns import matches
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.geometry import COLUMN_MULTIPLE, COLUMN_TYPES
from papilio.sharding.planner.job import SPARSE_STATE_BYTES, Cluster, Job, Table
from papilio.sharding.planner.options import UVM_KERNELS, Option, Span, enumerate_options

# A table's fields that a constraint may set, with the key of the global setting they replace.
# Types whose ranks each pool a part of a bag, so that partial sums travel.
ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")
INT8_COLUMNS = 32
# Sparse optimizers that do the same with a dense gradient: a row without an id has none, and stays.
DENSE_TWINS = ("sgd", "adagrad", "rowwise_adagrad")
_FIELDS = ("types", "kernels", "ranks", "min_partition", "cache_load_factor")


@dataclass(frozen=True)
class Item:
    """Tables that are placed as one: usually one, several where a constraint keeps them together.

    Attributes:
        tables: in the model's order.
        choices: each an option for every table.
        ranks: those that may hold shards; None: all.
    """

    tables: tuple[Table, ...]
    choices: tuple[tuple[Option, ...], ...]
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Rules:
    types: tuple[str, ...]
    kernels: tuple[str, ...]
    ranks: tuple[int, ...] | None
    min_partition: int
    cache_load_factor: float
    column_multiple: int = COLUMN_MULTIPLE
    asks_for_columns: bool = False  # a constraint names a type that cuts columns
    constraint: int | None = None  # the last one that matched
    group: int | None = None  # the constraint that keeps it together with others


def resolve_constraints(config: ShardingConfig, job: Job, cluster: Cluster) -> list[Item]:
    """Apply the constraints and list each table's options.

    Raises:
        PlanError: a constraint matches no table, contradicts another, or leaves a table without any option.
    """
    _check_communication(job, cluster)
    _check_constraints(config.constraints, job.tables, cluster)
    rules = {table.name: _rules_of(table, config) for table in job.tables}
    tables = {table.name: table for table in job.tables}
    for name, rule in rules.items():
        rules[name] = _without_what_cannot_be(rule, tables[name], job, cluster)
    is_int8 = "int8" in (job.communication.forward, job.communication.backward)
    if is_int8 and cluster.group_size > 1:
        rules = {table.name: _for_int8(rules[table.name], table) for table in job.tables}
    items, grouped = [], set()
    for table in job.tables:
        group = rules[table.name].group
        if group is None:
            items.append(_single_item(table, rules[table.name], cluster))
        elif group not in grouped:
            grouped.add(group)
            members = [member for member in job.tables if rules[member.name].group == group]
            items.append(_group_item(members, rules, group, cluster))
    return items


def _check_communication(job: Job, cluster: Cluster) -> None:
    for direction in ("forward", "backward"):
        if cluster.hardware.device == "cpu" and getattr(job.communication, direction) == "bf16":
            raise PlanError(
                f"sharding.communication.{direction} = 'bf16': gloo cannot send it, and TorchRec would take fp16 "
                "without a word; set fp16, int8 or fp32"
            )


def _check_constraints(constraints: Sequence[TableConstraint], tables: Sequence[Table], cluster: Cluster) -> None:
    names = [table.name for table in tables]
    for number, constraint in enumerate(constraints):
        for pattern in constraint.tables:
            if not any(matches(name, pattern) for name in names):
                nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                fix = f"the nearest is {nearest[0]}" if nearest else f"tables: {shown}"
                raise PlanError(f"sharding.constraints[{number}]: no table matches {pattern!r}; {fix}")
        wrong = [rank for rank in constraint.ranks or () if rank not in range(cluster.group_size)]
        if wrong:
            raise PlanError(
                f"sharding.constraints[{number}].ranks: there is no rank {wrong[0]}; tables are spread over ranks 0 to "
                f"{cluster.group_size - 1}"
            )


def _rules_of(table: Table, config: ShardingConfig) -> _Rules:
    rules = _Rules(config.types, config.kernels, None, config.min_partition, config.cache_load_factor)
    for number, constraint in enumerate(config.constraints):
        if any(matches(table.name, pattern) for pattern in constraint.tables):
            overrides = {name: getattr(constraint, name) for name in _FIELDS if getattr(constraint, name) is not None}
            rules = replace(rules, constraint=number, **overrides)
            if constraint.types is not None:
                rules = replace(rules, asks_for_columns=not set(COLUMN_TYPES).isdisjoint(constraint.types))
            if constraint.keep_together:
                if rules.group is not None:
                    raise PlanError(
                        f"sharding.constraints[{number}].keep_together: table {table.name} is kept together with "
                        f"others by sharding.constraints[{rules.group}] already; merge the two constraints"
                    )
                rules = replace(rules, group=number)
    return rules


def _for_int8(rules: _Rules, table: Table) -> _Rules:
    """Keep shards to whole groups of 32 columns, which FBGEMM quantizes together; others fail on some batch sizes.

    Raises:
        PlanError: the table itself is not of such a width.
    """
    if table.embedding_dim % INT8_COLUMNS:
        raise PlanError(
            f"sharding.communication is int8, which packs {INT8_COLUMNS} columns together, but table {table.name} has "
            f"{table.embedding_dim}; make model.embedding_dim a multiple of {INT8_COLUMNS}, or send fp16"
        )
    return replace(rules, column_multiple=INT8_COLUMNS)


def _without_what_cannot_be(rules: _Rules, table: Table, job: Job, cluster: Cluster) -> _Rules:
    """Leave out the types that the job's communication, replicas or optimizer rule out.

    Raises:
        PlanError: none is left.
    """
    why: dict[str, str] = {}
    if "int8" in (job.communication.forward, job.communication.backward):
        why |= dict.fromkeys(ROW_TYPES, "sharding.communication is int8, which partial sums cannot travel in")
    if cluster.num_groups > 1:
        why["data_parallel"] = "sharding.replicas has groups, which average only sharded tables"
    if table.num_embeddings == 1:
        # TorchRec takes the one rank's shard for a whole column block and fails on the optimizer's state.
        why["grid_shard"] = "it has a single row"
    if job.sparse_weight_decay:
        why["data_parallel"] = "optimizer.sparse.weight_decay would reach rows of a replica that were not looked up"
    if table.precision == "fp16":
        why["data_parallel"] = "model.table_precision is fp16, in which a replica would keep its gradient and state too"
    if job.sparse_optimizer not in DENSE_TWINS:
        why["data_parallel"] = (
            f"optimizer.sparse.name = {job.sparse_optimizer!r} updates only the rows looked up, which a replica's "
            "dense gradient does not tell"
        )
    kernels = rules.kernels
    if cluster.num_groups > 1:
        # Averaging reads the host's copy of the weights, while the cache may hold newer rows.
        kernels = tuple(kernel for kernel in kernels if kernel != "fused_uvm_caching")
        if not kernels:
            raise PlanError(
                f"table {table.name}: sharding.replicas has groups, which do not average tables behind a cache; "
                "use the kernels fused or fused_uvm"
            )
    left = tuple(name for name in rules.types if name not in why)
    if SPARSE_STATE_BYTES[job.sparse_optimizer][1] and not rules.asks_for_columns:
        # The optimizer's number of a row would be one for each block of columns: another update rule.
        left = tuple(name for name in left if name not in COLUMN_TYPES) or left
    if not left:
        where = "sharding" if rules.constraint is None else f"sharding.constraints[{rules.constraint}]"
        raise PlanError(
            f"{where}: table {table.name} may only be {', '.join(rules.types)}, but {why[rules.types[0]]}; allow "
            "table_wise"
        )
    return replace(rules, types=left, kernels=kernels)


def _single_item(table: Table, rules: _Rules, cluster: Cluster) -> Item:
    options = _options_of(table, rules, cluster)
    if rules.ranks is not None:
        options = [option for option in options if _may_be_on(option, rules.ranks, cluster)]
    if not options:
        raise PlanError(_why_none(table, rules, cluster))
    if set(rules.types) <= set(COLUMN_TYPES):
        _check_min_partition(table, rules, cluster)
    return Item((table,), tuple((option,) for option in options), rules.ranks)


def _check_min_partition(table: Table, rules: _Rules, cluster: Cluster) -> None:
    """Refuse a table that may only be cut by columns and that `min_partition` keeps in one piece.

    Raises:
        PlanError: with the largest value that cuts it.
    """
    narrow = replace(rules, min_partition=1)
    cuts = [o.shard_columns for o in _options_of(table, narrow, cluster) if o.num_column_shards > 1]
    if cuts and max(cuts) < rules.min_partition:
        where = "sharding" if rules.constraint is None else f"sharding.constraints[{rules.constraint}]"
        raise PlanError(
            f"{where}: table {table.name} may only be {', '.join(rules.types)}, but min_partition = "
            f"{rules.min_partition} leaves its {table.embedding_dim} columns in one piece; set min_partition to "
            f"{max(cuts)} or less, or allow table_wise"
        )


def _group_item(members: list[Table], rules: dict[str, _Rules], group: int, cluster: Cluster) -> Item:
    whole = {
        table.name: {o.kernel: o for o in _options_of(table, rules[table.name], cluster) if _is_whole(o)}
        for table in members
    }
    without = [name for name, options in whole.items() if not options]
    if without:
        raise PlanError(
            f"sharding.constraints[{group}].keep_together: table {without[0]} may not be table_wise "
            f"(types: {', '.join(rules[without[0]].types)}), so it cannot be kept whole on one rank; allow table_wise"
        )
    kernels = [kernel for kernel in next(iter(whole.values())) if all(kernel in options for options in whole.values())]
    if not kernels:
        raise PlanError(f"sharding.constraints[{group}].keep_together: its tables have no kernel in common")
    allowed = [set(rules[table.name].ranks or range(cluster.group_size)) for table in members]
    ranks = tuple(sorted(set.intersection(*allowed)))
    if not ranks:
        raise PlanError(f"sharding.constraints[{group}].keep_together: its tables have no allowed rank in common")
    choices = tuple(tuple(whole[table.name][kernel] for table in members) for kernel in kernels)
    return Item(tuple(members), choices, ranks)


def _is_whole(option: Option) -> bool:
    return option.span is Span.RANK and option.num_column_shards == 1


def _options_of(table: Table, rules: _Rules, cluster: Cluster) -> list[Option]:
    return enumerate_options(
        table,
        cluster,
        types=rules.types,
        kernels=rules.kernels,
        min_partition=min(rules.min_partition, table.embedding_dim),
        cache_load_factor=rules.cache_load_factor,
        column_multiple=rules.column_multiple,
    )


def _may_be_on(option: Option, ranks: tuple[int, ...], cluster: Cluster) -> bool:
    """Whether the option can keep to `ranks`."""
    if option.span is Span.EACH_RANK:
        return set(ranks) == set(range(cluster.group_size))
    if option.span is Span.RANK:
        return option.num_column_shards <= len(set(ranks))
    per_host = cluster.group_ranks_per_node
    counts = [sum(rank // per_host == host for rank in set(ranks)) for host in range(cluster.group_size // per_host)]
    if option.span is Span.RANKS_OF_HOST:
        return max(counts) >= option.num_column_shards
    return sum(count == per_host for count in counts) >= option.num_column_shards


def _why_none(table: Table, rules: _Rules, cluster: Cluster) -> str:
    where = "sharding" if rules.constraint is None else f"sharding.constraints[{rules.constraint}]"
    asked = f"types {', '.join(rules.types)}, kernels {', '.join(rules.kernels)}"
    if cluster.hardware.device == "cpu" and all(kernel in UVM_KERNELS for kernel in rules.kernels):
        return f"{where}: table {table.name}: {', '.join(rules.kernels)} need a GPU; on a CPU the kernel is fused"
    if rules.ranks is not None and _options_of(table, rules, cluster):
        per_host = cluster.group_ranks_per_node
        return (
            f"{where}: table {table.name} cannot keep to ranks {', '.join(map(str, rules.ranks))} with {asked}: "
            f"data_parallel and row_wise use every rank, table_row_wise and grid_shard every rank of a host "
            f"({per_host}); allow table_wise or column_wise, or leave ranks out"
        )
    return f"{where}: table {table.name} has no option with {asked} on {cluster.group_size} rank(s); allow fused"
