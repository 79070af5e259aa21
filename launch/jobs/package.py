"""`papilio export` and `papilio package`: the first in a process of its own, since quantizing needs torch."""

from __future__ import annotations

import argparse
import json
import os
import time

from papilio.data_pipeline.progress import Progress
from papilio.data_pipeline.terminal import table_columns
from papilio.launch.child_process import run_module
from papilio.launch.jobs import package_text as text
from papilio.launch.usage import UsageError
from papilio.trainer.inference.backends.format_folder import verify_formats
from papilio.trainer.inference.export.export_options import options_of
from papilio.trainer.inference.package.format import (
    PackageError,
    PackageManifest,
    read_manifest,
    read_package,
    verify_package,
)
from papilio.trainer.inference.serving.serve_options import PASSIVE_WAITS


def run_export(namespace: argparse.Namespace) -> int:
    """Export a run; options that do not go together are told before any process starts."""
    try:
        options_of(namespace)
    except PackageError as error:
        raise UsageError(str(error)) from None
    for name, value in PASSIVE_WAITS.items():
        os.environ.setdefault(name, value)
    return run_module("papilio.trainer.inference.export.export_run", _arguments(namespace))


def run_package(namespace: argparse.Namespace) -> int:
    """Do what `papilio package ACTION DIR` asks for."""
    return {"show": _show, "verify": _verify, "build": _build}[namespace.action](namespace)


def _arguments(namespace: argparse.Namespace) -> list[str]:
    words = []
    for flag in ("run", "output", "quantize", "size_budget", "quantizer", "data", "min_auc_ratio", "checkpoint"):
        value = getattr(namespace, flag)
        if value is not None:
            words.append(f"--{flag.replace('_', '-')}={value}")
    words += [f"--table={choice}" for choice in namespace.table]
    return words + ["--no-gate"] * namespace.no_gate


def _show(namespace: argparse.Namespace) -> int:
    """Print what a package is; of its tables, nothing is read."""
    package = read_package(namespace.package)
    if namespace.json:
        print(json.dumps(package.manifest.model_dump(mode="json"), indent=1))
        return 0
    columns = table_columns()
    sections = [text.describe(package, text.utc_now(), columns)]
    sections.append(text.describe_tables(package.manifest.tables, columns, show_all=namespace.all))
    print(text.joined(sections))
    return 0


def _verify(namespace: argparse.Namespace) -> int:
    """Read every byte of a package and of what was built of it; print what is damaged, and the verdict last."""
    begin_s, folder = time.perf_counter(), namespace.package
    manifest: PackageManifest = read_manifest(folder)
    problems = []
    with Progress("verify", manifest.num_bytes, "B", is_shown=True, is_kept=False) as progress:
        for _, problem in verify_package(folder, progress.advance):
            problems += [problem] if problem is not None else []
    # Only a package that is whole can say whether its formats were made of it.
    of_formats = {} if problems else {f: p for f, p in verify_formats(read_package(folder)) if p is not None}
    for problem in [*problems, *(f"{folder}/{file} {problem}" for file, problem in of_formats.items())]:
        print(f"  {problem}")
    found = text.reading(manifest, time.perf_counter() - begin_s)
    if problems:
        remedy = "export it again, or copy it again from where it is whole"
        print(f"{folder}  DAMAGED: {found}; nothing of it can be trusted: {remedy}")
    elif of_formats:
        damaged = ", ".join(sorted({"/".join(file.split("/")[:2]) for file in of_formats}))
        remedy = "build it again (`papilio package build`), or remove it"
        print(f"{folder}  DAMAGED: {damaged}, which nothing opens; {remedy}. Its other files are whole: {found}")
    else:
        print(f"{folder}  sound: {found}")
    return 1 if problems or of_formats else 0


def _build(namespace: argparse.Namespace) -> int:
    """Build a format; what cannot be is told before any process starts."""
    read_package(namespace.package)
    words = [namespace.package]
    for flag in ("format", "data", "dense", "threads"):
        value = getattr(namespace, flag)
        if value is not None:
            words.append(f"--{flag}={value}")
            if flag != "format" and namespace.format != "fastest":
                raise UsageError(f"--{flag} is for --format fastest, not for --format {namespace.format}")
    if namespace.threads is not None and namespace.threads < 1:
        raise UsageError(f"--threads {namespace.threads}: at least one thread is needed")
    return run_module("papilio.trainer.inference.backends.build_format", words)
