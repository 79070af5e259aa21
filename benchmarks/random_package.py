"""Packages of any shape with random weights: what serving costs does not depend on what a model has learnt."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from papilio.data_pipeline.preprocess.vocabulary import save_vocabulary, vocabulary_file
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, TRANSFORM_VERSION, CategoricalColumn, Schema
from papilio.trainer.config import ModelConfig
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.encoding.request_encoder import load_request_encoder
from papilio.trainer.inference.package.format import (
    CONFIG,
    DENSE,
    SAMPLE,
    SCHEMA,
    TABLES,
    FileEntry,
    Package,
    PackageManifest,
    Precision,
    RowError,
    Source,
    TableEntry,
    describe_files,
    read_package,
    row_bytes,
    table_offsets,
    write_manifest,
)
from papilio.trainer.inference.scorer import Scorer
from papilio.trainer.models.dense_part import build_dense_part

_CHUNK_BYTES = 16 << 20
_WEIGHT_RANGE = 0.1


def make_package(
    folder: str,
    schema: Schema,
    model: ModelConfig,
    sample: Sequence[Mapping[str, Any]],
    *,
    vocabularies: Mapping[str, Sequence[int | str]] | None = None,
    precision: Precision = "int8",
    seed: int = 0,
    name: str = "random",
) -> Package:
    """Write a package whose weights are random; it is sound and passes its own sample request.

    Args:
        folder: is made.
        schema: the columns; tables of hash and identity columns have `num_fixed_rows` rows.
        model: shape of the network.
        sample: raw records of the sample request.
        vocabularies: raw values by column, for columns with exact vocabularies.
        precision: of all tables.
        seed: of the weights.
        name: of the model.
    """
    os.makedirs(folder)
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    files = [_write_vocabulary(folder, schema, feature, keys) for feature, keys in (vocabularies or {}).items()]
    tables, tables_file = _write_tables(folder, schema, model, vocabularies or {}, precision, generator)
    dense = build_dense_part(model, len(schema.dense), len(tables))
    save_file(dense.state_dict(), os.path.join(folder, DENSE))
    _write(folder, SCHEMA, json.loads(schema.model_dump_json()))
    _write(folder, CONFIG, {"model": model.model_dump(mode="json")})
    files += [DENSE, SCHEMA, CONFIG]
    described = {TABLES: tables_file, **describe_files(folder, files)}
    manifest = _manifest(schema, model, tables, name, seed).model_copy(update={"files": described})
    _write(folder, SAMPLE, _sample(Package(folder, manifest), sample))
    sample_files = describe_files(folder, [SAMPLE])
    write_manifest(manifest.model_copy(update={"files": {**manifest.files, **sample_files}}), folder)
    return read_package(folder)


def _manifest(schema: Schema, model: ModelConfig, tables: list[TableEntry], name: str, seed: int) -> PackageManifest:
    return PackageManifest(
        papilio_version="random",
        transform_version=TRANSFORM_VERSION,
        made_at="2026-11-21T00:00:00+00:00",
        name=name,
        architecture=model.architecture,
        dense_features=tuple(schema.dense_names),
        tables=tuple(tables),
        source=Source(run="none", checkpoint=f"seed_{seed}", step=0, data="none"),
        versions={},
        files={},
    )


def _sample(package: Package, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scorer = Scorer(package, load_request_encoder(package), build_flat_model(package))
    batch = scorer.encoder.encode_records(records)
    encoded = {"dense": batch.dense.tolist(), "ids": batch.ids.tolist(), "lengths": batch.lengths.tolist()}
    return {"request": {"records": list(records)}, "encoded": encoded, "probabilities": scorer.score(batch).tolist()}


def _write_vocabulary(folder: str, schema: Schema, feature: str, keys: Sequence[int | str]) -> str:
    (column,) = (column for column in schema.categorical if column.name == feature)
    file = vocabulary_file(feature, column.kind)
    os.makedirs(os.path.dirname(os.path.join(folder, file)), exist_ok=True)
    if column.kind == "string":
        save_vocabulary(pa.array([str(key).encode() for key in keys], pa.large_binary()), folder, file)
    else:
        save_vocabulary(np.array(keys, np.uint32 if column.kind == "hex" else np.int64), folder, file)
    return file


def _write_tables(
    folder: str,
    schema: Schema,
    model: ModelConfig,
    vocabularies: Mapping[str, Sequence[int | str]],
    precision: Precision,
    generator: np.random.Generator,
) -> tuple[list[TableEntry], FileEntry]:
    num_row_bytes = row_bytes(precision, model.embedding_dim)
    rows = [_num_rows(column, vocabularies) for column in schema.categorical]
    offsets = table_offsets([number * num_row_bytes for number in rows])
    crc32 = 0
    entries = []
    with open(os.path.join(folder, TABLES), "xb") as file:
        for column, number, offset in zip(schema.categorical, rows, offsets, strict=False):
            padding = bytes(offset - file.tell())
            file.write(padding)
            crc32 = _write_rows(file, number, precision, model.embedding_dim, generator, zlib.crc32(padding, crc32))
            entry = TableEntry(
                name=f"t_{column.name}",
                feature=column.name,
                rows=number,
                dim=model.embedding_dim,
                pooling=model.table_pooling.get(column.name, model.pooling),
                precision=precision,
                quantizer="minmax" if precision not in {"fp16", "fp32"} else None,
                offset=offset,
                row_bytes=num_row_bytes,
                row_error=RowError(),
            )
            entries.append(entry)
    return entries, FileEntry(num_bytes=offsets[-1], crc32=crc32)


def _num_rows(column: CategoricalColumn, vocabularies: Mapping[str, Sequence[int | str]]) -> int:
    if column.encoding == "vocabulary":
        return len(vocabularies[column.name]) + NUM_RESERVED_IDS
    return column.num_fixed_rows


def _write_rows(
    file: IO[bytes], num_rows: int, precision: Precision, dim: int, generator: np.random.Generator, crc32: int
) -> int:
    """Write random rows; return the checksum of what came before and these."""
    num_row_bytes = row_bytes(precision, dim)
    chunk_rows = max(1, _CHUNK_BYTES // num_row_bytes)
    for start in range(0, num_rows, chunk_rows):
        count = min(chunk_rows, num_rows - start)
        if precision in {"fp32", "fp16"}:
            values = generator.uniform(-_WEIGHT_RANGE, _WEIGHT_RANGE, (count, dim)).astype(np.float32)
            data = values.astype(np.float16 if precision == "fp16" else np.float32).tobytes()
        else:
            codes = generator.integers(0, 256, (count, num_row_bytes), dtype=np.uint8)
            largest = 2 ** {"int8": 8, "int4": 4, "int2": 2}[precision] - 1
            scale_and_bias = np.array([2 * _WEIGHT_RANGE / largest, -_WEIGHT_RANGE], np.float16)
            codes[:, :4] = scale_and_bias.view(np.uint8)
            data = codes.tobytes()
        file.write(data)
        crc32 = zlib.crc32(data, crc32)
    return crc32


def _write(folder: str, name: str, value: object) -> None:
    with open(os.path.join(folder, name), "x", encoding="utf-8") as file:
        json.dump(value, file)
