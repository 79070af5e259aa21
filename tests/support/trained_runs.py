"""Runs without training: a checkpoint written by hand, of random weights, that fits a data set."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.trainer.config_file import build_config
from papilio.trainer.run.folder import data_identity
from tests.support.checkpoints import write_checkpoint
from tests.support.reference import dcnv2_logits, dlrm_logits, pool_bags

DIM = 8
MODEL = {"embedding_dim": DIM, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [16]}
CROSS = {"architecture": "dlrm_dcnv2", "dcn_num_layers": 2, "dcn_low_rank_dim": 3}


def make_config(data, **model):
    """The config of a small model."""
    return build_config({"name": "small", "data": {"path": str(data)}, "model": {**MODEL, **model}}, source="test")


def random_weights(dataset, config, seed=0, dtype=np.float32):
    """Tensors of a checkpoint, by key."""
    generator = np.random.default_rng(seed)
    model, num_features = config.model, len(dataset.num_embeddings)
    dim, num_vectors = model.embedding_dim, num_features + 1
    rows = {name: model.table_rows.get(name, needed) for name, needed in dataset.num_embeddings.items()}
    tensors = {
        f"tables.t_{name}.weight": generator.normal(size=(n, dim)).astype(np.float32) for name, n in rows.items()
    }
    tensors = {key: values.astype(dtype) for key, values in tensors.items()}
    width = num_vectors * dim if model.architecture == "dlrm_dcnv2" else dim + num_vectors * num_features // 2
    shapes = _mlp_shapes("dense_arch", [len(dataset.schema.dense), *model.dense_arch_layer_sizes, dim])
    shapes |= _mlp_shapes("over_arch", [width, *model.over_arch_layer_sizes, 1])
    if model.architecture == "dlrm_dcnv2":
        for layer in range(model.dcn_num_layers):
            shapes[f"crossnet.W_kernels.{layer}"] = (width, model.dcn_low_rank_dim)
            shapes[f"crossnet.V_kernels.{layer}"] = (model.dcn_low_rank_dim, width)
            shapes[f"crossnet.bias.{layer}"] = (width,)
    scaled = {name: generator.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
    return tensors | {f"dense.model.{name}": values.astype(np.float32) for name, values in scaled.items()}


def write_run(
    folder, data, tensors=None, *, seed=0, rows_per_block=None, dtype=np.float32, **model
) -> tuple[str, dict]:
    """Write a run folder with one checkpoint; return the folder and the checkpoint's tensors."""
    dataset = open_dataset(str(data))
    config = make_config(data, **model)
    tensors = random_weights(dataset, config, seed, dtype) if tensors is None else tensors
    tree = config.model_dump(mode="json")
    identity = json.loads(json.dumps(data_identity(dataset)))
    write_checkpoint(Path(folder, "checkpoints"), tensors, config=tree, data=identity, rows_per_block=rows_per_block)
    Path(folder, "config.json").write_text(json.dumps({"format_version": 1, **tree}))
    return str(folder), tensors


def expected_probabilities(config, tables, tensors, dense, ids, lengths):
    """What the papers' formulas give, in float64, of tables [rows, dim] by feature; ids as a packaged model takes them.

    An id that a table has not counts as 0.
    """
    lengths_FB = np.asarray(lengths).reshape(len(tables), -1)
    bounds = np.concatenate([[0], np.cumsum(lengths_FB.sum(1))])
    pooled = []
    for number, (feature, values) in enumerate(tables.items()):
        of_feature = np.asarray(ids[bounds[number] : bounds[number + 1]])
        known = np.where((of_feature < 0) | (of_feature >= len(values)), 0, of_feature)
        mode = config.model.table_pooling.get(feature, config.model.pooling)
        bags = pool_bags(
            torch.from_numpy(np.asarray(values, np.float64)),
            torch.from_numpy(known),
            torch.from_numpy(lengths_FB[number]),
            mode,
        )
        pooled.append(bags.numpy())
    pooled_BFD = np.stack(pooled, axis=1)
    arguments = (np.asarray(dense, np.float64), pooled_BFD, _layers(tensors, "dense_arch"))
    if config.model.architecture == "dlrm_dcnv2":
        logits = dcnv2_logits(*arguments, _cross_layers(config, tensors), _layers(tensors, "over_arch"))
    else:
        logits = dlrm_logits(*arguments, _layers(tensors, "over_arch"))
    return 1 / (1 + np.exp(-logits))


def _mlp_shapes(name, sizes):
    shapes = {}
    for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
        shapes[f"{name}.{2 * layer}.weight"] = (after, before)
        shapes[f"{name}.{2 * layer}.bias"] = (after,)
    return shapes


def _layers(tensors, name):
    numbers = sorted(
        int(key.split(".")[3]) for key in tensors if key.startswith(f"dense.model.{name}.") and "bias" in key
    )
    return [
        tuple(tensors[f"dense.model.{name}.{number}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        for number in numbers
    ]


def _cross_layers(config, tensors):
    kernels = ("W_kernels", "V_kernels", "bias")
    layers = [
        [tensors[f"dense.model.crossnet.{kernel}.{layer}"].astype(np.float64) for kernel in kernels]
        for layer in range(config.model.dcn_num_layers)
    ]
    return [(w, v, bias.reshape(-1)) for w, v, bias in layers]
