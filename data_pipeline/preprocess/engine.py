"""Raw logs to a data set, in three stages that each survive being killed.

    parse_stage:       raw text  -> chunks: labels, dense inputs, per column the distinct raw ids and codes into them
    vocabulary_stage:  chunks    -> per column: vocabulary, and the id of each chunk's raw ids
    shard_stage:       both      -> shards of each split

Every finished chunk, column and shard is one file under the output, committed by its rename; the same command skips
what is there. Memory is bounded by blocks, id ranges and shards, none of which grows with the input.
Vocabularies count the training split only: an id first seen in validation or test is unknown, as it would be in use.
"""

from __future__ import annotations

import logging
import os
import zlib
from dataclasses import dataclass
from typing import Any

from papilio.data_pipeline.manifest import (
    MANIFEST_NAME,
    SPLITS,
    CategoricalStats,
    DatasetError,
    Manifest,
    ShardInfo,
    SplitInfo,
    read_manifest,
    write_manifest,
)
from papilio.data_pipeline.preprocess.bad_rows import BadRows, PreprocessError
from papilio.data_pipeline.preprocess.byte_blocks import input_num_bytes
from papilio.data_pipeline.preprocess.column_symptoms import ColumnSymptoms
from papilio.data_pipeline.preprocess.data_warnings import Found, find_warnings
from papilio.data_pipeline.preprocess.parse_stage import Parsed, content_crc32, list_tasks, parse_inputs
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.preprocess.shard_stage import (
    SHARD_BYTES,
    ShardJob,
    fixed_row_bytes,
    list_shards,
    write_split_shard,
)
from papilio.data_pipeline.preprocess.splits import SplitRule, make_split_rule
from papilio.data_pipeline.preprocess.stage_folder import STAGE_NAME, Stage, open_stage
from papilio.data_pipeline.preprocess.table_source import delimiter_of
from papilio.data_pipeline.preprocess.vocabulary_stage import ColumnTask, build_column
from papilio.data_pipeline.preprocess.work_pool import WorkPool
from papilio.data_pipeline.progress import Progress
from papilio.data_pipeline.schema import TRANSFORM_VERSION, CategoricalColumn, Schema, criteo_schema, load_schema
from papilio.data_pipeline.version import papilio_version

_logger = logging.getLogger(__name__)

# Options that do not change a byte of the output.
_FREE_OPTIONS = {"num_workers", "show_progress", "max_bad_rows", "output"}
# Of the whole process tree, for what grows with the number of workers: shards in work, large vocabularies.
_SHARED_BYTES = 600 << 20
_BYTES_PER_VOCABULARY_KEY = 24


def preprocess(options: PreprocessOptions) -> Manifest:
    """Make a data set, or continue making it; return its manifest, which is written last.

    With more than one worker, processes are spawned: call this from under `if __name__ == "__main__":`.

    Raises:
        PreprocessError: an input or a row is wrong, or the output holds other work.
        SchemaError: the schema file is wrong.
    """
    schema = resolve_schema(options)
    request = _describe_request(options, schema)
    if (finished := _finished(options, request, schema)) is not None:
        return finished
    os.makedirs(options.output, exist_ok=True)
    stage = open_stage(options.output, request)
    bad_rows = BadRows(options.max_bad_rows)
    with WorkPool(options.worker_count) as pool:
        job = _Job(options, schema, stage, pool)
        parsed = _parse(job, bad_rows, request["input_num_bytes"])
        rule = make_split_rule(options, parsed.rows_per_file)
        stats = _build_columns(job, parsed, rule)
        splits = _write_shards(job, parsed, rule)
    bad_rows.write(options.output)
    dense_stats = parsed.dense_stats(schema)
    manifest = Manifest(
        papilio_version=papilio_version(),
        data_schema=schema,
        split_rule=rule.words,
        splits=splits,
        dense_stats=dense_stats,
        categorical_stats=stats,
        source=_source(request) | {"input_crc32": parsed.input_crc32},
        num_bad_rows=len(bad_rows),
        warnings=find_warnings(Found(schema, rule.words, splits, dense_stats, stats, parsed.symptoms)),
    )
    write_manifest(manifest, options.output)
    stage.remove()
    return manifest


@dataclass(frozen=True)
class _Job:
    """What all three stages need."""

    options: PreprocessOptions
    schema: Schema
    stage: Stage
    pool: WorkPool


def resolve_schema(options: PreprocessOptions) -> Schema:
    """Return the schema of the inputs with what the options replace."""
    schema = criteo_schema() if options.schema_path is None else load_schema(options.schema_path)
    replaced: dict[str, Any] = {
        key: value
        for key in ("frequency_threshold", "num_buckets", "max_ids")
        if (value := getattr(options, key)) is not None
    }
    if options.num_buckets is not None:
        replaced["encoding"] = "hash"

    def with_options(column: CategoricalColumn) -> CategoricalColumn:
        if column.encoding != "vocabulary":
            return column
        return CategoricalColumn.model_validate(column.model_dump() | replaced)

    return schema.model_copy(update={"categorical": tuple(map(with_options, schema.categorical))})


def _describe_request(options: PreprocessOptions, schema: Schema) -> dict[str, Any]:
    """Everything that decides the bytes of the output."""
    request = options.model_dump(mode="json", exclude=_FREE_OPTIONS)
    request["transform_version"] = TRANSFORM_VERSION
    request["schema"] = schema.model_dump(mode="json")
    request["input_num_bytes"] = [input_num_bytes(path) for path in options.inputs]
    if options.source == "table":
        for path in options.inputs:
            delimiter_of(path)
    return request


def _finished(options: PreprocessOptions, request: dict[str, Any], schema: Schema) -> Manifest | None:
    """Return the manifest of a data set that this very request made of the same inputs; refuse any other."""
    output = options.output
    if not os.path.exists(os.path.join(output, MANIFEST_NAME)):
        return None
    try:
        manifest = read_manifest(output)
    except DatasetError as error:
        raise PreprocessError(f"{error} (first delete {output}, or choose another --output)") from None
    if manifest.source.get("request_crc32") != _source(request)["request_crc32"]:
        raise PreprocessError(
            f"{output} holds a data set made with other options or inputs; choose another --output, or delete it"
        )
    if "input_crc32" in manifest.source:
        with Progress("comparing inputs", None, "B", is_shown=options.show_progress, is_kept=False) as progress:
            found = content_crc32(options.inputs, options.source, schema, progress)
        if found != manifest.source["input_crc32"]:
            raise PreprocessError(
                f"{output} holds a data set made of other content of the same inputs; choose another --output, or "
                "delete it"
            )
    Stage(os.path.join(output, STAGE_NAME)).remove()
    _logger.info("%s is complete already", output)
    return manifest


def _source(request: dict[str, Any]) -> dict[str, str | int | float]:
    return {
        "kind": request["source"],
        "inputs": ", ".join(os.path.basename(path) for path in request["inputs"]),
        "num_bytes": sum(request["input_num_bytes"]),
        "request_crc32": zlib.crc32(repr(sorted(request.items())).encode()),
    }


def _parse(job: _Job, bad_rows: BadRows, input_sizes: list[int]) -> Parsed:
    inputs = job.options.inputs
    is_size_known = min(input_sizes) > 0 and not any(path.endswith((".gz", ".zst", ".parquet")) for path in inputs)
    total = sum(input_sizes) if is_size_known else None
    symptoms = ColumnSymptoms(len(job.schema.dense), len(job.schema.categorical))
    parsed = Parsed(len(job.schema.dense), len(inputs), symptoms)
    before = [_state_of(path) for path in inputs]
    with Progress("reading", total, "B", is_shown=job.options.show_progress) as progress:
        parse_inputs(
            list_tasks(inputs, job.options.source, job.schema, job.stage), parsed, bad_rows, job.pool, progress
        )
    for path, num_rows, state in zip(inputs, parsed.rows_per_file, before, strict=True):
        if _state_of(path) != state:
            raise PreprocessError(
                f"input {path} was changed while it was read; delete {job.stage.folder} and give the same command "
                "again when it is whole"
            )
        if num_rows == 0:
            raise PreprocessError(f"input {path} holds no usable row; correct it, or leave it out")
    return parsed


def _state_of(path: str) -> tuple[int, ...]:
    """What changes when a local file is written or replaced."""
    if not os.path.isfile(path):
        return ()
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _build_columns(job: _Job, parsed: Parsed, rule: SplitRule) -> dict[str, CategoricalStats]:
    tasks = [
        ColumnTask(number, column, job.stage, job.options.output, parsed.chunk_rows, rule, parsed.input_crc32)
        for number, column in enumerate(job.schema.categorical)
    ]
    most_keys = max(min(column.max_ids, sum(parsed.chunk_rows)) for column in job.schema.categorical)
    max_workers = max(1, _SHARED_BYTES // (_BYTES_PER_VOCABULARY_KEY * most_keys))
    stats = {}
    with Progress("vocabularies", len(tasks), "features", is_shown=job.options.show_progress) as progress:
        results = job.pool.map_ordered(build_column, tasks, max_workers)
        for column, column_stats in zip(job.schema.categorical, results, strict=True):
            stats[column.name] = column_stats
            progress.advance(1)
    return stats


def _write_shards(job: _Job, parsed: Parsed, rule: SplitRule) -> dict[str, SplitInfo]:
    shard_bytes = job.options.rows_per_shard * fixed_row_bytes(job.schema)
    if shard_bytes > SHARD_BYTES or any(column.multi_hot for column in job.schema.categorical):
        shard_bytes = SHARD_BYTES
    max_workers = max(1, _SHARED_BYTES // (2 * shard_bytes))
    shard_job = ShardJob(job.schema, rule, job.stage, job.options.output, parsed.input_crc32)
    tasks = list_shards(parsed.chunk_rows, job.options.rows_per_shard, shard_job)
    shards: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
    positives = dict.fromkeys(SPLITS, 0)
    with Progress("writing", sum(parsed.chunk_rows), "rows", is_shown=job.options.show_progress) as progress:
        for written in job.pool.map_ordered(write_split_shard, tasks, max_workers):
            name = SPLITS[written.split]
            shards[name].append(written.info)
            positives[name] += written.num_positives
            progress.advance(written.info.num_rows)
    return {
        name: SplitInfo(
            num_rows=sum(info.num_rows for info in shards[name]),
            num_positives=positives[name],
            shards=tuple(shards[name]),
        )
        for name in SPLITS
    }
