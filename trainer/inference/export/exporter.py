"""From a run to a package: choose precisions, quantize, certify, and only then give the folder its name."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from papilio.data_pipeline.dataset import Dataset, open_dataset
from papilio.data_pipeline.manifest import MANIFEST_NAME
from papilio.data_pipeline.paths import join, path_manager
from papilio.data_pipeline.progress import Progress
from papilio.trainer.checkpoint.selection import find_checkpoint, find_folder
from papilio.trainer.checks.same_data import check_data_of_run
from papilio.trainer.inference.export import gate, precision_search
from papilio.trainer.inference.export.export_options import AUTO, ExportOptions, parse_precision, tables_by_pattern
from papilio.trainer.inference.export.gate import GateResult
from papilio.trainer.inference.export.held_out import HeldOut
from papilio.trainer.inference.export.trained_model import TrainedModel, open_trained_model
from papilio.trainer.inference.package.format import (
    MANIFEST,
    REPORT,
    REPORT_PAGE,
    Package,
    PackageError,
    TableEntry,
    read_package,
    write_manifest,
)
from papilio.trainer.inference.package.table_writer import TableChoice
from papilio.trainer.inference.package.writer import add_encoding, vocabulary_bytes, with_files, write_model
from papilio.trainer.storage.api import write_json, write_text
from papilio.trainer.storage.local_files import free_local_bytes, make_local_folder, remove_local_folder, sync_folder
from papilio.trainer.storage.locked_folder import is_left_over, locked_folder

logger = logging.getLogger(__name__)
# What a disk may lack after all, for reports, the sample and the file system's own records.
SPARE_BYTES = 16 << 20
# Below this share of a table's rows a coarse scale is not worth a line.
COARSE_SHARE = 0.01
MAX_NAMED = 3
_LEFTOVER = re.compile(r"(.+)\.[0-9a-f]{8}\.tmp")
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class _Export:
    """What is exported, as it goes through all steps."""

    run: str
    output: str
    options: ExportOptions
    model: TrainedModel
    dataset: Dataset
    fixed: Mapping[str, TableChoice]

    @property
    def is_all_fp32(self) -> bool:
        """Whether the package is the model in fp32 itself, whatever else is chosen."""
        return all(self.fixed.get(table) == _FP32 for table in self.model.tables)

    @property
    def has_reference(self) -> bool:
        """Whether the model is written in fp32 as well, to be compared with."""
        return self.options.has_gate and not self.is_all_fp32


_FP32 = TableChoice("fp32")


def export_package(run: str, output: str, options: ExportOptions) -> Package:
    """Make a package of a run's checkpoint; `output` has its name only once all is written and certified.

    Args:
        run: a run folder, or the folder of its checkpoints; also s3://...
        output: a folder that is not there yet, or is empty, on a local disk.
        options: what to make.

    Raises:
        PackageError: the options do not fit the model, or the gate's threshold is not reached (`gate.GateError`).
        CheckpointError, ConfigError, DatasetError, StorageError: something cannot be read as it is.
    """
    output = require_new(output)
    checkpoints = find_folder(run)
    model = open_trained_model(checkpoints, find_checkpoint(checkpoints, options.checkpoint))
    fixed = choose_by_pattern(model, options)
    dataset = _open_dataset(model, options)
    check_data_of_run(dataset, model.marker.data, run)
    export = _Export(run, output, options, model, dataset, fixed)
    _require_space(export)
    with _temporary_folder(output) as folder:
        package = _make(export, folder)
        os.replace(package.folder, output)
    sync_folder(os.path.dirname(output))
    return read_package(output)


def require_new(output: str) -> str:
    """Return the absolute path of a folder that can be written.

    Raises:
        PackageError: it is in use, is not on a local disk, or is a file.
    """
    if "://" in output:
        raise PackageError(
            f"--output {output}: a package is mapped into memory, so it is made on a local disk; copy the folder from "
            "there once it is whole"
        )
    output = os.path.abspath(output)
    if os.path.isfile(output):
        raise PackageError(f"--output {output} is a file; give the name of a new folder")
    if os.path.isdir(output) and os.listdir(output):
        what = "is a package already" if MANIFEST in os.listdir(output) else "is not empty"
        raise PackageError(f"--output {output} {what}; choose another folder, or remove it")
    return output


def choose_by_pattern(model: TrainedModel, options: ExportOptions) -> dict[str, TableChoice]:
    """Return how tables are stored as far as the user says: all of them, or with "auto" those of --table.

    Raises:
        PackageError: a pattern fits no table.
    """
    tables = list(model.tables)
    precisions = (
        {} if options.quantize == AUTO else dict.fromkeys(tables, parse_precision("--quantize", options.quantize))
    )
    precisions |= tables_by_pattern(options.tables, tables)
    return {table: TableChoice(precision, options.quantizer) for table, precision in precisions.items()}


def _open_dataset(model: TrainedModel, options: ExportOptions) -> Dataset:
    path = options.data or str(model.marker.data["path"])
    if options.data is None and not path_manager.exists(join(path, MANIFEST_NAME)):
        raise PackageError(
            f"the run was trained on data set {path}, which is not there; its vocabularies and held-out samples are "
            "needed: name the data set with --data"
        )
    return open_dataset(path)


def _make(export: _Export, folder: str) -> Package:
    """Write and certify a package in a folder of its own under `folder`, the manifest last."""
    model, options = export.model, export.options
    reference = None
    if export.has_reference:
        reference = _write("fp32", export, dict.fromkeys(model.tables, _FP32), join(folder, "reference"))
    choices = dict(export.fixed)
    if options.quantize == AUTO and reference is not None:
        assert options.size_budget is not None
        choices = precision_search.choose(
            reference,
            HeldOut.for_search(export.dataset),
            size_budget=options.size_budget,
            fixed=export.fixed,
            quantizer=options.quantizer,
        )
    package = add_encoding(_write("quantize", export, choices, join(folder, "package")), export.dataset)
    _warn_of_coarse_scales(package.manifest.tables)
    if options.has_gate:
        held_out = HeldOut.for_gate(export.dataset)
        result = gate.check(reference or package, package, held_out, min_auc_ratio=options.min_auc_ratio)
        package = _add_reports(package, result)
    _sync_files(package)
    write_manifest(package.manifest, package.folder)
    return package


def _write(what: str, export: _Export, choices: Mapping[str, TableChoice], folder: str) -> Package:
    total = sum(table.fp32_bytes for table in export.model.tables.values())
    with Progress(what, total, "B", is_shown=True, is_kept=False) as progress:
        return write_model(export.model, export.dataset, choices, folder, run=export.run, on_bytes=progress.advance)


def _add_reports(package: Package, result: GateResult) -> Package:
    write_json(package.path(REPORT), result.report)
    write_text(package.path(REPORT_PAGE), result.page)
    manifest = package.manifest.model_copy(update={"certified": result.summary})
    certified = Package(package.folder, manifest, package.checked)
    return with_files(certified, [REPORT, REPORT_PAGE])


def _sync_files(package: Package) -> None:
    """Flush all files to the disk: after a power cut, a manifest must not stand for what was lost."""
    for name in package.manifest.files:
        with open(package.path(name), "rb") as file:
            os.fsync(file.fileno())
        sync_folder(os.path.dirname(package.path(name)))


def _require_space(export: _Export) -> None:
    """Make sure that the disk has room for the package and what is written on the way.

    Raises:
        PackageError: it has not, or a vocabulary is missing.
    """
    tables = export.model.tables.values()
    fp32_bytes = sum(table.fp32_bytes for table in tables)
    if export.options.size_budget is not None:
        num_bytes = int(export.options.size_budget * fp32_bytes)
    else:
        num_bytes = sum(export.fixed[table.name].num_bytes(table.rows, table.dim) for table in tables)
    dense_bytes = sum(named.tensor.num_bytes for named in export.model.dense)
    needed = num_bytes + dense_bytes + vocabulary_bytes(export.dataset) + SPARE_BYTES
    also = ""
    if export.has_reference:
        needed += fp32_bytes + dense_bytes
        also = f", {fp32_bytes:,} of them for the fp32 model that it is compared with, for a while"
    free = free_local_bytes(export.output)
    if free < needed:
        raise PackageError(
            f"exporting {export.model.name} needs {needed:,} bytes{also}; {export.output} has {free:,} free; choose an "
            "--output on another disk"
        )


def _warn_of_coarse_scales(tables: tuple[TableEntry, ...]) -> None:
    """Tell of tables whose rows span so little that fp16 holds their scale with few digits."""
    coarse = [table for table in tables if table.row_error.num_coarse_rows > COARSE_SHARE * table.rows]
    if not coarse:
        return
    coarse.sort(key=lambda table: -table.row_error.num_coarse_rows)
    named = ", ".join(
        f"{table.name} ({table.row_error.num_coarse_rows / table.rows:.0%} of its rows)" for table in coarse[:MAX_NAMED]
    )
    more = f" and {len(coarse) - MAX_NAMED} more" if len(coarse) > MAX_NAMED else ""
    logger.info(
        "rows of %s%s span so little that their scale, which is fp16, is a coarse one, as of ids never trained; where "
        "they count, keep such tables in fp16 (--table NAME=fp16)",
        named,
        more,
    )


@contextmanager
def _temporary_folder(output: str) -> Iterator[str]:
    """Make a folder beside `output`, removed in the end; those of exports that were killed go, too."""
    make_local_folder(os.path.dirname(output))
    _sweep(output)
    with locked_folder(f"{output}.{secrets.token_hex(4)}.tmp") as folder:
        yield folder


def _sweep(output: str) -> None:
    """Remove what killed exports to this output left behind, and tell of what those to others did."""
    parent, base = os.path.split(output)
    for name in os.listdir(parent):
        path, match = join(parent, name), _LEFTOVER.fullmatch(name)
        if match is None or not os.path.isdir(path) or not is_left_over(path):
            continue
        if match[1] == base:
            logger.info("removing %s, which an export that was cut off left behind", path)
            with suppress(OSError):  # not ours to remove, and in nobody's way
                remove_local_folder(path)
        elif set(os.listdir(path)) <= {"package", "reference"}:
            logger.info(
                "%s was left behind by an export that was cut off; one to %s removes it", path, join(parent, match[1])
            )
