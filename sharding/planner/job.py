"""What is to be planned: the tables and the dense part of one training step, and the machines that it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from papilio.sharding.config import CommunicationConfig
from papilio.sharding.hardware import Hardware, Rates

Precision = Literal["fp32", "bf16", "fp16"]
BYTES_PER_VALUE = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
# Bytes of optimizer state: (per weight, per row). FBGEMM keeps state in fp32, whatever the weights are.
SPARSE_STATE_BYTES = {
    "sgd": (0, 0),
    "adagrad": (4, 0),
    "rowwise_adagrad": (0, 4),
    "adam": (8, 0),
    "partial_rowwise_adam": (4, 4),
    "lamb": (8, 0),
}
DENSE_STATE_BYTES = {"sgd": 0, "adagrad": 4, "adam": 8, "adamw": 8}


@dataclass(frozen=True)
class Table:
    """One embedding table and the feature that looks it up.

    Attributes:
        name: t_<feature>.
        module: path of its EmbeddingBagCollection in the model.
        feature: the feature's name.
        num_embeddings: rows.
        embedding_dim: columns.
        pooling: "sum" or "mean".
        pooling_factor: mean ids of a sample.
        precision: of the weights, "fp32" or "fp16".
        skew_exponent: a of the law that the first share s of the rows gets the share s ** a of the ids. 1: ids are
            uniform. Vocabularies put the most frequent ids first, so a is small and the first rows get nearly all.
    """

    name: str
    module: str
    feature: str
    num_embeddings: int
    embedding_dim: int
    pooling: str = "sum"
    pooling_factor: float = 1.0
    precision: str = "fp32"
    skew_exponent: float = 1.0

    @property
    def weights_bytes(self) -> int:
        """Bytes of the whole table's weights."""
        return BYTES_PER_VALUE[self.precision] * self.num_embeddings * self.embedding_dim


@dataclass(frozen=True)
class DenseWork:
    """The dense part, alike on all ranks.

    Attributes:
        layers: (inputs, outputs) of each matrix product of a sample, in order.
        num_parameters: weights of the dense part.
        num_interacting: vectors that are multiplied pairwise (0: no dot interaction).
        interaction_dim: their length.
        activation_values: values per sample that the forward pass keeps for the backward pass.
    """

    layers: tuple[tuple[int, int], ...]
    num_parameters: int
    num_interacting: int
    interaction_dim: int
    activation_values: int


@dataclass(frozen=True)
class Job:
    """One training step, whatever machine it runs on.

    Attributes:
        tables: in the model's order.
        dense: the dense part.
        num_dense_features: dense inputs of a sample.
        global_batch_size: samples of a step over all ranks.
        precision: arithmetic of the dense part.
        sparse_optimizer: a key of SPARSE_STATE_BYTES.
        sparse_weight_decay: of the tables' optimizer.
        dense_optimizer: a key of DENSE_STATE_BYTES.
        communication: precision between ranks.
        prefetch_batches: batches that each rank's loader holds ready.
        copies_to_save: checkpoints are written from a copy of weights and optimizer state in host memory.
    """

    tables: tuple[Table, ...]
    dense: DenseWork
    num_dense_features: int
    global_batch_size: int
    precision: str = "fp32"
    sparse_optimizer: str = "sgd"
    dense_optimizer: str = "sgd"
    communication: CommunicationConfig = field(default_factory=CommunicationConfig)
    prefetch_batches: int = 4
    sparse_weight_decay: float = 0.0
    copies_to_save: bool = False


@dataclass(frozen=True)
class Cluster:
    """Ranks on hosts of one kind; ranks are numbered host by host.

    Attributes:
        hardware: the profile.
        num_nodes: hosts.
        ranks_per_node: ranks of a host.
        num_groups: groups that each hold all tables (2D parallelism): contiguous ranks.
    """

    hardware: Hardware
    num_nodes: int
    ranks_per_node: int
    num_groups: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return self.num_nodes * self.ranks_per_node

    @property
    def group_size(self) -> int:
        """Ranks over which one copy of the tables is spread; a plan numbers ranks from 0 to this."""
        return self.num_ranks // self.num_groups

    @property
    def group_ranks_per_node(self) -> int:
        """Ranks of a group that share a host: those that table_row_wise and its like place on one host."""
        return min(self.ranks_per_node, self.group_size)

    @property
    def rates(self) -> Rates:
        """The hardware's rates with so many ranks busy on each host."""
        return self.hardware.rates_of(self.ranks_per_node)
