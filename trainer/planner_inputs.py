"""What the planner gets of a run: its tables and dense part as a Job, its ranks as a Cluster."""

from __future__ import annotations

import math
import os

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.embedding_configs import DataType, PoolingType

from papilio.data_pipeline.config import DataConfig
from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.version import papilio_version
from papilio.sharding.config import ShardingConfig
from papilio.sharding.hardware import Hardware, load_hardware
from papilio.sharding.plan_conversion import check_plan
from papilio.sharding.plan_file import PlanFile, plan_from_json, read_plan_file
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.job import Cluster, DenseWork, Job, Table
from papilio.sharding.planner.make import make_plan
from papilio.trainer.checkpoint.config import CheckpointConfig
from papilio.trainer.config import OptimizerConfig, TrainConfig
from papilio.trainer.elastic.memory_limit import memory_limit_bytes
from papilio.trainer.models.dlrm import DotInteraction
from papilio.trainer.models.interaction import LowRankCrossNet
from papilio.trainer.process_group import Ranks

HEAD = 0.01  # share of the distinct ids that `CategoricalStats.skew` measures
# What stands in for hardware that the recipe does not name: by device, or by a word of the GPU's name.
DEFAULT_PROFILES = {"cpu": "cpu_laptop", "cuda": "dgx_a100"}
GPU_PROFILES = {
    "P100": "big_basin_p100",
    "V100": "big_basin_v100",
    "A100": "dgx_a100",
    "H100": "dgx_h100",
    "H200": "dgx_h200",
    "B200": "dgx_b200",
}


def describe_job(
    model: nn.Module,
    dataset: Dataset,
    *,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    sharding: ShardingConfig,
    data: DataConfig,
    checkpoint: CheckpointConfig,
) -> Job:
    """Return what a step of this model does; the model may be on meta.

    Args:
        model: what is sharded, as training wraps it; its tables' paths in it are those of the plan.
        dataset: says how many ids a sample has.
        train: batch size and precision.
        optimizer: decides the bytes of state and the work of updates.
        sharding: precision of what ranks exchange.
        data: batches kept ready on the device.
        checkpoint: whether a save first copies the state to the host.
    """
    return Job(
        tables=tuple(_tables_of(model, dataset)),
        dense=_dense_work(model),
        num_dense_features=len(dataset.schema.dense),
        global_batch_size=train.global_batch_size,
        precision=train.precision,
        sparse_optimizer=optimizer.sparse.name,
        dense_optimizer=optimizer.dense.name,
        communication=sharding.communication,
        prefetch_batches=data.prefetch_batches,
        sparse_weight_decay=optimizer.sparse.weight_decay,
        copies_to_save=checkpoint.asynchronous,
    )


def make_cluster(config: ShardingConfig, hardware: Hardware, num_nodes: int, ranks_per_node: int) -> Cluster:
    """Return the ranks of a job in the groups that the config asks for.

    Raises:
        PlanError: the groups do not divide the ranks.
    """
    num_ranks, num_groups = num_nodes * ranks_per_node, config.replicas.num_groups
    if num_ranks % num_groups:
        divisors = [str(count) for count in range(1, num_ranks + 1) if num_ranks % count == 0]
        raise PlanError(
            f"sharding.replicas.num_groups = {num_groups} does not divide {num_ranks} ranks; possible: "
            f"{', '.join(divisors)}"
        )
    return Cluster(hardware, num_nodes, ranks_per_node, num_groups)


def plan_for_ranks(job: Job, sharding: ShardingConfig, recipe: str, ranks: Ranks) -> PlanFile:
    """Return the plan of a job on these ranks: the file's that the config names, or a new one. Collective.

    It is equal on all ranks.

    Raises:
        PlanError, PlanFileError, HardwareError: on every rank.
    """
    hardware = load_hardware(sharding.hardware or default_profile(ranks.device))
    num_nodes = ranks.world_size // ranks.local_world_size
    cluster = make_cluster(sharding, hardware, num_nodes, ranks.local_world_size)
    text, error = ranks.agree_on(_plan_or_error(job, cluster, sharding, recipe, ranks) if ranks.is_first else None)
    if error is not None:
        raise error
    plan = plan_from_json(text, "the plan of rank 0")
    check_plan(plan, job, cluster, sharding.plan or "the plan")
    return plan


def default_profile(device: torch.device) -> str:
    """Return the name of the profile nearest to the device at hand."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((found for word, found in GPU_PROFILES.items() if word in name), DEFAULT_PROFILES["cuda"])
    return DEFAULT_PROFILES[device.type]


def device_memory_bytes(device: torch.device, ranks_per_node: int) -> int:
    """Return the memory of a rank on this machine: its GPU's, or its share of the host's, or of what the job asked."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(host_bytes, memory_limit_bytes() or host_bytes) // ranks_per_node


def _plan_or_error(
    job: Job, cluster: Cluster, sharding: ShardingConfig, recipe: str, ranks: Ranks
) -> tuple[str, ValueError | None]:
    """Read or make the plan, as text; an error is returned, so that all ranks can raise it."""
    try:
        if sharding.plan is not None:
            return read_plan_file(sharding.plan).to_json(), None
        plan = make_plan(
            job,
            cluster,
            sharding,
            recipe=recipe,
            papilio_version=papilio_version(),
            memory_bytes=device_memory_bytes(ranks.device, ranks.local_world_size),
        )
        return plan.to_json(), None
    except ValueError as error:
        return "", error


def _tables_of(model: nn.Module, dataset: Dataset) -> list[Table]:
    stats = dataset.manifest.categorical_stats
    tables = []
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            for found in module.embedding_bag_configs():
                feature = found.feature_names[0]
                tables.append(
                    Table(
                        name=found.name,
                        module=path,
                        feature=feature,
                        num_embeddings=found.num_embeddings,
                        embedding_dim=found.embedding_dim,
                        pooling="mean" if found.pooling is PoolingType.MEAN else "sum",
                        pooling_factor=stats[feature].mean_ids_per_sample,
                        precision="fp16" if found.data_type is DataType.FP16 else "fp32",
                        skew_exponent=_skew_exponent(dataset, feature),
                    )
                )
    return tables


def _skew_exponent(dataset: Dataset, feature: str) -> float:
    """Return a with: the first share s of the rows gets the share s ** a of the ids.

    From the one point that the manifest knows, the share of the most frequent 1 %. Hashing scatters the frequent ids;
    where ids were given as they are, they are taken to be in order of frequency, which is the worst case.
    """
    column = next(column for column in dataset.schema.categorical if column.name == feature)
    skew = dataset.manifest.categorical_stats[feature].skew
    if column.encoding == "hash" or skew <= HEAD:
        return 1.0
    return math.log(skew) / math.log(HEAD)


def _dense_work(model: nn.Module) -> DenseWork:
    """Count the dense part's work from its modules."""
    layers = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    activations = sum(inputs + outputs for inputs, outputs in layers)
    num_interacting = interaction_dim = 0
    for module in model.modules():
        if isinstance(module, LowRankCrossNet):
            for low, high in zip(module.V_kernels, module.W_kernels, strict=True):
                layers += [(low.shape[1], low.shape[0]), (high.shape[1], high.shape[0])]
                # Of each layer: its input, the low-rank vector, the product and the sum.
                activations += 3 * low.shape[1] + low.shape[0]
        if isinstance(module, DotInteraction):
            num_interacting, interaction_dim = module.num_vectors, module.embedding_dim
            activations += num_interacting * interaction_dim + num_interacting**2
    in_tables = {id(p) for m in model.modules() if isinstance(m, EmbeddingBagCollection) for p in m.parameters()}
    return DenseWork(
        layers=tuple(layers),
        num_parameters=sum(p.numel() for p in model.parameters() if id(p) not in in_tables),
        num_interacting=num_interacting,
        interaction_dim=interaction_dim,
        activation_values=activations,
    )
