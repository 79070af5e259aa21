"""`papilio predict`: scores rows of a data set, or raw files, to a Parquet file. Little memory, whatever the input.

    python -m papilio.trainer.inference.predict '{"package": "pkg/", "data": "clicks/", "output": "scores.parquet"}'

Of a data set the columns are row (within the split, from 0), label and probability. Of raw files they are file, line
(from 1), label and probability, in the files' order; a malformed row has no probability.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import DatasetError
from papilio.data_pipeline.preprocess.bad_rows import BadRow, PreprocessError
from papilio.data_pipeline.preprocess.byte_blocks import input_num_bytes
from papilio.data_pipeline.progress import Progress
from papilio.trainer.checks.same_data import check_data_of_package
from papilio.trainer.inference.encoding.raw_rows import RawRows, read_raw_rows
from papilio.trainer.inference.encoding.request_encoder import EncodedBatch
from papilio.trainer.inference.export.held_out import HeldOut
from papilio.trainer.inference.package.format import PackageError
from papilio.trainer.inference.package.sample_check import load_checked_scorer
from papilio.trainer.inference.predict_options import PredictOptions
from papilio.trainer.inference.score_file import new_score_file
from papilio.trainer.inference.scorer import Formats, Scorer, split_batch

BATCH_ROWS = 2048
_MAX_NAMED = 3
_NOT_FINITE = "its score is not a finite number; its dense values are too large"
_PROBABILITY = {"label": pa.uint8(), "probability": pa.float32()}


class PredictError(ValueError):
    """Rows that cannot be scored as asked; the message says which, and what to do."""


EXPECTED_ERRORS = (DatasetError, PackageError, PredictError, PreprocessError)


@dataclass
class Scored:
    """What was done so far."""

    num_rows: int = 0
    num_ids: int = 0
    num_unknown_ids: int = 0
    bad_rows: list[str] = field(default_factory=list)
    num_bad_rows: int = 0

    def add_bad_row(self, row: BadRow, path: str, allowed: int) -> None:
        """Count a malformed row.

        Raises:
            PredictError: it is one more than allowed.
        """
        if self.num_bad_rows == allowed:
            raise PredictError(
                f"{row.describe(path)}. Correct the file, or raise --max-bad-rows (now {allowed}) to leave the scores "
                "of malformed rows empty"
            )
        self.num_bad_rows += 1
        if len(self.bad_rows) < _MAX_NAMED:
            self.bad_rows.append(row.describe(path))


def predict(options: PredictOptions) -> Scored:
    """Score what the options name.

    Raises:
        PackageError, DatasetError, PreprocessError: something cannot be read as it is.
        PredictError: too many rows are malformed.
    """
    for path in options.inputs:
        input_num_bytes(path)
    formats = Formats("always" if options.fastest else "never", options.trust_formats)
    scorer = load_checked_scorer(options.package, formats=formats)
    return _of_dataset(options, scorer) if options.data is not None else _of_files(options, scorer)


def _of_dataset(options: PredictOptions, scorer: Scorer) -> Scored:
    assert options.data is not None
    dataset = open_dataset(options.data)
    try:
        check_data_of_package(scorer.package, dataset)
    except PackageError as error:
        raise PredictError(f"{error}, or score its raw files with --input") from None
    rows = HeldOut(dataset, options.split)
    num_rows, scored = rows.num_rows, Scored()
    columns = {"row": pa.int64(), **_PROBABILITY}
    with (
        Progress("scoring", num_rows, "rows", is_shown=options.show_progress, is_kept=False) as progress,
        new_score_file(options.output, columns) as file,
    ):
        for block in rows.blocks():
            batch = EncodedBatch(block.dense.numpy(), block.ids.numpy(), block.lengths.numpy())
            scores = _score(scorer, batch)
            if not np.isfinite(scores).all():
                first = scored.num_rows + int(np.argmin(np.isfinite(scores)))
                raise PredictError(f"data set {options.data}, row {first} of {options.split}: {_NOT_FINITE}")
            row = np.arange(scored.num_rows, scored.num_rows + len(scores))
            file.write({"row": row, "label": block.labels, "probability": scores})
            scored.num_rows += len(scores)
            scored.num_ids += len(batch.ids)
            # Of a data set, row 0 of a table is the unknown one, too.
            scored.num_unknown_ids += int(np.count_nonzero(batch.ids == 0))
            progress.advance(len(scores))
    return scored


def _of_files(options: PredictOptions, scorer: Scorer) -> Scored:
    assert options.source is not None
    sizes = [input_num_bytes(path) for path in options.inputs]
    is_plain = min(sizes) > 0 and not any(path.endswith((".gz", ".zst", ".parquet")) for path in options.inputs)
    scored = Scored()
    columns = {"file": pa.dictionary(pa.int32(), pa.string()), "line": pa.int64(), **_PROBABILITY}
    with (
        Progress(
            "scoring", sum(sizes) if is_plain else None, "B", is_shown=options.show_progress, is_kept=False
        ) as progress,
        new_score_file(options.output, columns) as file,
    ):
        for path in options.inputs:
            for rows in read_raw_rows(path, options.source, scorer.encoder):
                scores = _score(scorer, rows.batch)
                is_finite = np.isfinite(scores)
                too_large = [BadRow(line, "(row)", _NOT_FINITE, b"") for line in rows.lines[~is_finite].tolist()]
                for bad_row in sorted([*rows.bad_rows, *too_large], key=lambda row: row.line):
                    scored.add_bad_row(bad_row, path, options.max_bad_rows)
                file.write(_columns_of(path, rows, scores))
                scored.num_rows += rows.batch.num_rows
                scored.num_ids += len(rows.batch.ids)
                scored.num_unknown_ids += rows.batch.num_unknown_ids
                progress.advance(rows.num_bytes)
    return scored


def _columns_of(path: str, rows: RawRows, scores: NDArray[np.float32]) -> dict[str, pa.Array]:
    """Return the columns of sound and malformed rows, in the order of their lines."""
    bad_lines = np.array([row.line for row in rows.bad_rows], np.int64)
    lines = np.concatenate([rows.lines, bad_lines])
    order = pa.array(np.argsort(lines, kind="stable"))
    none = pa.nulls(len(bad_lines), pa.float32())
    sound_labels = pa.nulls(len(scores), pa.uint8()) if rows.labels is None else pa.array(rows.labels, pa.uint8())
    labels = pa.concat_arrays([sound_labels, none.cast(pa.uint8())])
    file = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(lines), np.int32)), pa.array([path]))
    probabilities = pa.concat_arrays([pa.array(scores, pa.float32(), mask=~np.isfinite(scores)), none])
    return {
        "file": file,
        "line": pa.array(lines).take(order),
        "label": labels.take(order),
        "probability": probabilities.take(order),
    }


def _score(scorer: Scorer, batch: EncodedBatch) -> NDArray[np.float32]:
    parts = [scorer.score(part) for part in split_batch(batch, BATCH_ROWS)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def describe(scored: Scored, output: str, seconds: float) -> list[str]:
    """Say what was scored, how fast, and what is to be known about it."""
    share = scored.num_unknown_ids / max(scored.num_ids, 1)
    rate = scored.num_rows / max(seconds, 1e-9)
    lines = [f"{output}: {scored.num_rows:,} rows in {seconds:.1f} s, {rate:,.0f} a second"]
    lines.append(f"  {share:.2%} of their {scored.num_ids:,} ids are unknown to the model and share row 0")
    if scored.num_bad_rows:
        rest = scored.num_bad_rows - len(scored.bad_rows)
        lines.append(f"  {scored.num_bad_rows:,} malformed rows have no score: {'; '.join(scored.bad_rows)}")
        lines[-1] += f"; and {rest:,} more" if rest else ""
    return lines


def main(arguments: Sequence[str]) -> int:
    """Score as the JSON of a `PredictOptions` says, and say what came of it; return the exit status."""
    logging.basicConfig(format="%(message)s", force=True)  # fbgemm_gpu set up its own
    logging.getLogger("papilio.data_pipeline").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _leave_in_order)
    options = PredictOptions.model_validate_json(arguments[0])
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    begin_s = time.perf_counter()
    try:
        scored = predict(options)
    except EXPECTED_ERRORS as error:
        print(f"papilio predict: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("papilio predict: error: interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print("\n".join(describe(scored, options.output, time.perf_counter() - begin_s)))
    return 0


def _leave_in_order(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through all `finally`s, which remove what was begun."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
