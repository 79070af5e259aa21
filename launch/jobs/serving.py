"""`papilio predict` and `papilio serve`: both need torch, so they run in another process than the command line's."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from papilio.launch.child_process import run_module
from papilio.launch.given_options import build_options, given_options
from papilio.launch.usage import require_files, require_folder
from papilio.trainer.elastic.bootstrap import module_command
from papilio.trainer.inference.backends.format_folder import read_format
from papilio.trainer.inference.package.format import read_package
from papilio.trainer.inference.predict_options import PredictOptions
from papilio.trainer.inference.serving.serve_options import PASSIVE_WAITS, ServeOptions


def run_predict(namespace: argparse.Namespace) -> int:
    """Score a data set or raw files; what is wrong with package, files or options is told before torch is loaded."""
    options = build_options(PredictOptions, given_options(namespace), {"inputs": "--input"})
    package = read_package(options.package)
    if options.fastest:
        read_format(package, "fastest", trusts_formats=options.trust_formats)
    require_files("--input", options.inputs)
    if options.data is not None:
        require_folder("--data", options.data, "`papilio preprocess` or `papilio generate`")
    for name, value in PASSIVE_WAITS.items():
        os.environ.setdefault(name, value)
    return run_module("papilio.trainer.inference.predict", [options.model_dump_json()])


def run_serve(namespace: argparse.Namespace) -> int:
    """Become the server: signals then reach it with nobody in between."""
    options = build_options(ServeOptions, given_options(namespace), {})
    read_package(options.package)
    sys.stdout.flush()
    command = module_command("papilio.trainer.inference.serving.main", options.model_dump_json())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # to look again where the link leads, which a start does anyway
    os.execv(sys.executable, command)
