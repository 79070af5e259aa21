"""From the config and the data set's columns to a model, its tables on meta and its dense part on the device."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType, PoolingType

from papilio.data_pipeline.dataset import Dataset
from papilio.trainer.config import ModelConfig, table_name
from papilio.trainer.config_file import ConfigError
from papilio.trainer.models.dcn import DLRMDCNv2
from papilio.trainer.models.dlrm import DLRM

POOLING_TYPES = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


def table_configs(config: ModelConfig, num_embeddings: Mapping[str, int]) -> list[EmbeddingBagConfig]:
    """One table a feature.

    Args:
        config: dims, pooling, precision, and rows that differ from the data's.
        num_embeddings: rows that each feature's ids need, in feature order.

    Raises:
        ConfigError: an entry of table_rows or table_pooling names no feature, or has fewer rows than the ids need.
    """
    _check_features("model.table_rows", config.table_rows, num_embeddings)
    _check_features("model.table_pooling", config.table_pooling, num_embeddings)
    for feature, rows in config.table_rows.items():
        if rows < num_embeddings[feature]:
            raise ConfigError(
                f"model.table_rows.{feature} = {rows}, but the data set has {num_embeddings[feature]} ids; give at "
                "least as many rows, or preprocess with hashing (num_buckets) or a higher frequency threshold"
            )
    return [
        EmbeddingBagConfig(
            name=table_name(feature),
            feature_names=[feature],
            num_embeddings=config.table_rows.get(feature, rows),
            embedding_dim=config.embedding_dim,
            pooling=POOLING_TYPES[config.table_pooling.get(feature, config.pooling)],
            data_type=DATA_TYPES[config.table_precision],
        )
        for feature, rows in num_embeddings.items()
    ]


def build_model(config: ModelConfig, dataset: Dataset, dense_device: torch.device, seed: int) -> nn.Module:
    """Build the model that the recipe names for a data set's columns.

    The dense part's initial weights depend on `seed` alone. Tables stay on meta: sharding allocates them.

    Raises:
        ConfigError: the recipe does not fit the data set.
        DatasetError: it has no dense column.
    """
    num_dense = len(dataset.schema.dense)
    dataset.require_dense_columns()
    if config.dense_in_features not in {None, num_dense}:
        raise ConfigError(
            f"model.dense_in_features = {config.dense_in_features}, but data set {dataset.folder} has {num_dense} "
            "dense columns; leave it out, or use other data"
        )
    shared = _shared_arguments(config, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODEL_BUILDERS[config.architecture](config, shared)
    for name, child in model.named_children():
        if name != "embedding_bag_collection":
            child.to(dense_device)
    return model


# By architecture: from the config and the arguments that all architectures share.
MODEL_BUILDERS: dict[str, Callable[[ModelConfig, dict[str, Any]], nn.Module]] = {
    "dlrm": lambda config, shared: DLRM(**shared),
    "dlrm_dcnv2": lambda config, shared: DLRMDCNv2(
        **shared, num_layers=config.dcn_num_layers, low_rank_dim=config.dcn_low_rank_dim
    ),
}


def _shared_arguments(config: ModelConfig, dataset: Dataset) -> dict[str, Any]:
    tables = table_configs(config, dataset.num_embeddings)
    return {
        "embedding_bag_collection": EmbeddingBagCollection(tables, device=torch.device("meta")),
        "feature_names": dataset.schema.categorical_names,
        "dense_in_features": len(dataset.schema.dense),
        "dense_arch_layer_sizes": config.dense_arch_layer_sizes,
        "over_arch_layer_sizes": config.over_arch_layer_sizes,
        "embedding_dim": config.embedding_dim,
    }


def _check_features(key: str, entries: Mapping[str, object], known: Mapping[str, int]) -> None:
    for feature in entries:
        if feature not in known:
            nearest = difflib.get_close_matches(feature, list(known), n=1)
            fix = f"did you mean {nearest[0]}?" if nearest else f"features: {', '.join(known)}"
            raise ConfigError(f"{key}.{feature}: the data set has no such feature; {fix}")
