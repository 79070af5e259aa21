"""`papilio generate`: data with a known best AUC, as shards to train on or as raw Criteo TSV to preprocess."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generated_stats import ColumnSums, SplitTruth
from papilio.data_pipeline.generate.raw_tsv import write_tsv
from papilio.data_pipeline.generate.shapes import SHAPES, Shape
from papilio.data_pipeline.generate.synthetic import Chunk, RawRows, draw_chunk, make_teacher
from papilio.data_pipeline.generate.teacher import Teacher
from papilio.data_pipeline.manifest import MANIFEST_NAME, SPLITS, DatasetError, Manifest, ShardInfo, write_manifest
from papilio.data_pipeline.paths import join, path_manager, replace
from papilio.data_pipeline.progress import Progress
from papilio.data_pipeline.shards import Bags, Columns, write_shard
from papilio.data_pipeline.version import papilio_version

TSV_NAME = "train.txt"


def generate(options: GenerateOptions) -> Manifest:
    """Generate data; the same options give the same bytes (with one NumPy on one kind of processor).

    With format "tsv" the rows go to `train.txt`, all splits in order, and the manifest is returned but not written.

    Raises:
        DatasetError: the output folder holds a data set already.
    """
    target = join(options.output, MANIFEST_NAME if options.format == "shards" else TSV_NAME)
    if path_manager.exists(target):
        raise DatasetError(f"{target} exists already; delete {options.output} or choose another --output")
    path_manager.mkdirs(options.output)
    shape = SHAPES[options.shape]
    rows = _Rows(shape, make_teacher(shape), options.seed)
    with Progress("generating", options.num_rows, "rows", is_shown=options.show_progress) as progress:
        if options.format == "tsv":
            shards = _write_tsv(rows, options, progress)
        else:
            shards = _write_shards(rows, options, progress)
    manifest = _manifest(rows, shards, options)
    if options.format == "shards":
        write_manifest(manifest, options.output)
    return manifest


@dataclass
class _Rows:
    """The rows in order; each is drawn once and counted once, whatever the cuts between files are."""

    shape: Shape
    teacher: Teacher
    seed: int
    truths: dict[str, SplitTruth] = field(default_factory=lambda: {split: SplitTruth() for split in SPLITS})
    sums: ColumnSums = field(init=False)
    _latest: tuple[int, Chunk] | None = None

    def __post_init__(self) -> None:
        self.sums = ColumnSums(self.shape)

    def read(self, split: str, start: int, stop: int) -> Iterator[Chunk]:
        """Yield rows `start` to `stop`, which belong to `split`, in pieces."""
        size = self.shape.chunk_rows
        for number in range(start // size, -(-stop // size)):
            if self._latest is None or self._latest[0] != number:
                self._latest = number, draw_chunk(self.shape, self.teacher, self.seed, number)
            first = number * size
            piece = _slice(self._latest[1], max(start - first, 0), min(stop - first, size))
            self.truths[split].add(piece.labels, piece.probabilities)
            self.sums.add(piece)
            yield piece


def _write_shards(rows: _Rows, options: GenerateOptions, progress: Progress) -> dict[str, tuple[ShardInfo, ...]]:
    written: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for split, (first, last) in _split_bounds(options.num_rows).items():
        for start in range(first, last, options.rows_per_shard):
            pieces = list(rows.read(split, start, min(start + options.rows_per_shard, last)))
            file = f"{split}/{len(written[split]):05d}.arrow"
            info = write_shard(_concatenate(pieces), rows.shape.schema, options.output, file)
            written[split].append(info)
            progress.advance(info.num_rows)
    return {split: tuple(infos) for split, infos in written.items()}


def _write_tsv(rows: _Rows, options: GenerateOptions, progress: Progress) -> dict[str, tuple[ShardInfo, ...]]:
    path = join(options.output, TSV_NAME)
    with path_manager.open(path + ".tmp", "wb") as sink:
        for split, bounds in _split_bounds(options.num_rows).items():
            for piece in rows.read(split, *bounds):
                write_tsv(piece, sink)
                progress.advance(len(piece.labels))
    replace(path + ".tmp", path)
    return dict.fromkeys(SPLITS, ())


def _manifest(rows: _Rows, shards: dict[str, tuple[ShardInfo, ...]], options: GenerateOptions) -> Manifest:
    return Manifest(
        papilio_version=papilio_version(),
        data_schema=rows.shape.schema,
        split_rule="fraction: train/validation/test 0.9/0.05/0.05 in row order",
        splits={split: rows.truths[split].split_info(shards[split]) for split in SPLITS},
        dense_stats=rows.sums.dense_stats(),
        categorical_stats=rows.sums.categorical_stats(),
        source={
            "kind": "generated",
            "shape": rows.shape.name,
            "seed": options.seed,
            "num_rows": options.num_rows,
            "zipf_exponent": rows.shape.skew,
        },
    )


def _split_bounds(num_rows: int) -> dict[str, tuple[int, int]]:
    train_end, validation_end = round(num_rows * 0.9), round(num_rows * 0.95)
    return {"train": (0, train_end), "validation": (train_end, validation_end), "test": (validation_end, num_rows)}


def _slice(chunk: Chunk, start: int, stop: int) -> Chunk:
    raw = chunk.raw
    bags = tuple(_slice_bags(bags, start, stop) for bags in raw.bags)
    return Chunk(
        RawRows(raw.counts[:, start:stop], raw.is_missing[:, start:stop], bags),
        chunk.dense[start:stop],
        chunk.labels[start:stop],
        chunk.probabilities[start:stop],
    )


def _slice_bags(bags: Bags, start: int, stop: int) -> Bags:
    if bags.offsets is None:
        return Bags(bags.ids[start:stop])
    offsets = bags.offsets[start : stop + 1]
    return Bags(bags.ids[offsets[0] : offsets[-1]], offsets - offsets[0])


def _concatenate(pieces: list[Chunk]) -> Columns:
    columns = zip(*(piece.raw.bags for piece in pieces), strict=True)
    return Columns(
        np.concatenate([piece.labels for piece in pieces]),
        np.concatenate([piece.dense for piece in pieces]),
        tuple(_concatenate_bags(list(bags)) for bags in columns),
    )


def _concatenate_bags(pieces: list[Bags]) -> Bags:
    ids = np.concatenate([piece.ids for piece in pieces])
    if any(piece.offsets is None for piece in pieces):
        return Bags(ids)
    sizes = [np.diff(piece.offsets) for piece in pieces if piece.offsets is not None]
    offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes]), dtype=np.int64)
    return Bags(ids, offsets.astype(np.int32))
