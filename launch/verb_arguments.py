"""The arguments of the `papilio` command's verbs. No job is imported here, and its options only for its own verb."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

SPLITS = ("train", "validation", "test")
SCHEDULERS = ("local_cwd", "slurm", "kubernetes")


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions

    add = _options_of(parser, PreprocessOptions)
    add("--source", required=True, choices=("criteo", "table"))
    add("--input", "inputs", required=True, nargs="+", action="extend", metavar="FILE")
    add("--output", required=True, metavar="DIR")
    add("--schema", "schema_path", metavar="FILE")
    add("--frequency-threshold", type=int, metavar="N")
    add("--num-buckets", type=int, metavar="N")
    add("--max-ids", type=int, metavar="N")
    add("--split", choices=("days", "fraction", "random"))
    add("--fractions", type=float, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"))
    add("--seed", type=int, metavar="S")
    add("--max-bad-rows", type=int, metavar="N")
    add("--num-workers", type=int, metavar="N")
    add("--rows-per-shard", type=int, metavar="N")


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    from papilio.data_pipeline.generate.generate_options import GenerateOptions

    add = _options_of(parser, GenerateOptions)
    add("--shape", metavar="SHAPE")
    add("--rows", "num_rows", required=True, type=int, metavar="N")
    add("--output", required=True, metavar="DIR")
    add("--format", choices=("shards", "tsv"))
    add("--seed", type=int, metavar="S")
    add("--rows-per-shard", type=int, metavar="N")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME|FILE",
        help="path of a recipe .toml, or the bare name of one that comes with Papilio",
    )
    _add_nproc(parser)
    parser.add_argument(
        "--nnodes",
        default="1",
        metavar="N|MIN:MAX",
        help="hosts, each of which runs this same command; or the fewest and the most of an elastic job (default: 1)",
    )
    parser.add_argument(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="where the hosts meet: the first host, or the one of `papilio rendezvous`, and its port",
    )
    parser.add_argument(
        "--rdzv-id", default="train", metavar="NAME", help="the job's name, if several meet there (default: train)"
    )
    parser.add_argument(
        "--wait-s", type=int, default=900, metavar="S", help="how long hosts wait for each other (default: 900)"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="failures after which ranks start again; an hour without one clears the count (default: 3)",
    )


def rendezvous_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=29400, metavar="P", help="where it listens (default: 29400)")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN_DIR", help="the run folder, as `papilio train` printed it")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (default: the one it was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which rows to evaluate on (default: test)")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="NAME",
        help="a checkpoint's name, its step, latest or best (default: latest)",
    )
    _add_nproc(parser)


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    from papilio.trainer.run.plan_options import PlanOptions

    parser.add_argument("words", nargs="*", metavar="diff OLD NEW", help="compare two plan files instead of planning")
    add = _options_of(parser, PlanOptions)
    add("--recipe", metavar="NAME|FILE")
    add("--hardware", metavar="NAME|FILE")
    add("--num-nodes", type=int, metavar="N")
    add("--ranks-per-node", type=int, metavar="N")
    add("--explain", metavar="TABLE")
    add("--output", metavar="FILE")
    add("--html", metavar="FILE")
    add("--json", "as_json", action="store_true")
    add("--all", "show_all", action="store_true")


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help="the profile to write, a .toml file")
    parser.add_argument("--quick", action="store_true", help="few and small measurements: to try, not to plan with")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of busy ranks to measure with (default: 1, 2, 4, ... up to the GPUs, or to twice the cores)",
    )


def study_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--recipe",
        required=True,
        metavar="NAME|FILE",
        help="path of a recipe .toml, or the bare name of one that comes with Papilio",
    )
    add("--output", required=True, metavar="DIR", help="folder of the measured runs and of study.json; goes on there")
    add("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of ranks to measure (default: 1 2)")
    add("--steps", type=int, default=200, metavar="N", help="steps of each measured run (default: 200)")
    add(
        "--scaling",
        choices=("strong", "weak"),
        default="strong",
        help="strong: the global batch stays; weak: a rank's does",
    )
    add("--hardware", metavar="NAME|FILE", help="profile of the hosts, where the recipe names none")
    add("--predict-hosts", type=int, nargs="+", default=[], metavar="N", help="numbers of whole hosts to predict, too")
    add("--json", action="store_true", help="print the study as JSON instead of a table")


def checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")

    def add(action: str, summary: str) -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}."
        added = actions.add_parser(action, help=summary, description=description, allow_abbrev=False)
        added.add_argument("run", metavar="RUN", help="a run folder, or the folder of its checkpoints; also s3://...")
        return added

    which = "a checkpoint's name, its step, latest or best"
    listing = add("list", "the checkpoints of a run, newest last")
    shown = add("show", "everything about one checkpoint")
    shown.add_argument("name", nargs="?", default="latest", metavar="NAME", help=f"{which} (default: latest)")
    shown.add_argument("--all", action="store_true", help="list every table, however many")
    for each in (listing, shown):
        each.add_argument("--json", action="store_true", help="print JSON instead")
    verify = add("verify", "read every byte and hold it against its checksum; status 1 if any is damaged")
    verify.add_argument("names", nargs="*", metavar="NAME", help=f"{which} (default: latest)")
    verify.add_argument("--all", action="store_true", help="all complete ones")
    prune = add("prune", "remove old checkpoints")
    prune.add_argument("--keep-last", type=int, required=True, metavar="K", help="newest ones to keep")
    prune.add_argument("--keep-best", action="store_true", help="keep the one of the best validation AUC, too")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    export = add("export-dense", "write plain tensors, a safetensors file a table, that any tool reads")
    export.add_argument("name", nargs="?", default="latest", metavar="NAME", help=f"{which} (default: latest)")
    export.add_argument("--output", required=True, metavar="DIR", help="a new folder; also s3://...")
    export.add_argument(
        "--tables", nargs="+", default=[], metavar="PATTERN", help="tables, with * and ? (default: all); quote them"
    )
    export.add_argument("--optimizer", action="store_true", help="the optimizers' states, too")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    from papilio.trainer.inference.export.export_options import add_arguments

    add_arguments(parser)


def package_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")

    def add(action: str, summary: str) -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}."
        added = actions.add_parser(action, help=summary, description=description, allow_abbrev=False)
        added.add_argument("package", metavar="DIR", help="a package, as `papilio export` made it")
        return added

    show = add("show", "what a package is, where it came from, what was measured, and its tables")
    show.add_argument("--all", action="store_true", help="list every table, however many")
    show.add_argument("--json", action="store_true", help="print the manifest as JSON instead")
    add("verify", "read every byte and hold it against its checksum; status 1 if any is damaged")
    from papilio.trainer.inference.backends.build_options import add_arguments

    add_arguments(add("build", "build a compiled form of a package, beside its own files"))


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    from papilio.trainer.inference.predict_options import PredictOptions

    add = _options_of(parser, PredictOptions)
    add("--package", required=True, metavar="DIR")
    add("--data", metavar="DIR")
    add("--split", choices=SPLITS)
    add("--input", "inputs", nargs="+", action="extend", metavar="FILE")
    add("--source", choices=("criteo", "table"))
    add("--output", required=True, metavar="FILE")
    add("--fastest", action="store_true")
    add("--trust-formats", action="store_true")
    add("--max-bad-rows", type=int, metavar="N")
    add("--threads", type=int, metavar="N")


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    from papilio.trainer.inference.serving.serve_options import ServeOptions

    add = _options_of(parser, ServeOptions)
    add("--package", required=True, metavar="DIR")
    add("--host", metavar="ADDRESS")
    add("--exact", action="store_true")
    add("--trust-formats", action="store_true")
    for flag in ("--port", "--workers", "--threads", "--max-batch", "--max-queue", "--max-requests"):
        add(flag, type=int, metavar="N")
    add("--max-body-bytes", type=int, metavar="BYTES")
    for flag in ("--max-bag-ids", "--max-connections"):
        add(flag, type=int, metavar="N")
    for flag in ("--max-wait-ms", "--max-delay-ms"):
        add(flag, type=float, metavar="MS")
    for flag in ("--head-timeout-s", "--body-timeout-s", "--send-timeout-s", "--stall-timeout-s"):
        add(flag, type=float, metavar="S")
    for flag in ("--drain-s", "--stop-timeout-s", "--watch-s"):
        add(flag, type=float, metavar="S")


def launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-s", "--scheduler", choices=SCHEDULERS, default="local_cwd", help="where to run (default: local_cwd)"
    )
    parser.add_argument(
        "-cfg",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="settings of the scheduler, e.g. partition=gpu",
    )
    parser.add_argument("--dryrun", action="store_true", help="print what would be submitted, and submit nothing")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="show the job's output to its end, and leave with its status"
    )
    parser.add_argument("component", metavar="COMPONENT", help="what to run: train, evaluate, ...")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="its arguments and settings (`papilio launch train --help` lists them)",
    )


def status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}\n\nExit status: 0 the job waits, runs or succeeded; 1 it failed; 4 it was cancelled;\n"
        "3 nobody knows (the scheduler does not answer, or has forgotten it); 2 there is no such job, or the\n"
        "command line is wrong."
    )
    parser.add_argument(
        "job",
        nargs="?",
        metavar="JOB",
        help="a handle, as slurm://papilio/12, an id, a name, or a run folder "
        "(default: the newest job of this folder, else of any)",
    )
    parser.add_argument("-w", "--watch", action="store_true", help="draw it anew every 2 s until the job ends")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def logs_arguments(parser: argparse.ArgumentParser) -> None:
    _add_job(parser, "the newest job of this folder, else of any")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the job ends, and leave with its status"
    )
    parser.add_argument("--host", type=int, metavar="N", help="only what host N prints (default: all hosts)")


def list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--scheduler", choices=SCHEDULERS, help="only of this one (default: all there are here)")
    parser.add_argument("--all", action="store_true", help="however many there are")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def preflight_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME|FILE",
        help="path of a recipe .toml, or the bare name of one that comes with Papilio",
    )
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts of the job (default: 1)")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="ranks of a host (default: the profile's, its GPUs, or 2)"
    )
    parser.add_argument("--host", metavar="NAME|FILE", help="profile of the hosts, or a file of `papilio calibrate`")
    parser.add_argument("-s", "--scheduler", choices=SCHEDULERS, help="where the job would run (default: here)")
    parser.add_argument("-cfg", action="append", default=[], metavar="KEY=VALUE,...", help="settings of the scheduler")
    parser.add_argument(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="without a scheduler, on each host: the first host, and a free port",
    )
    parser.add_argument(
        "--index", type=int, metavar="I", help="number of this host, with --rdzv-endpoint; 0: the first"
    )
    parser.add_argument(
        "--rdzv-port", type=int, metavar="P", help="port at which the hosts meet (default: one for this job)"
    )
    parser.add_argument("--wait-s", type=float, metavar="S", help="how much later hosts may come (default: 120)")
    parser.add_argument("--read-gib", type=float, metavar="G", help="data whose checksums each host reads (default: 1)")
    parser.add_argument("--data-port", type=int, metavar="P", help="try this port between the hosts (default: any)")
    parser.add_argument("--no-links", action="store_false", dest="links", help="do not measure bandwidth")
    parser.add_argument("--json", action="store_true", help="print findings and facts as JSON")


def cancel_arguments(parser: argparse.ArgumentParser) -> None:
    _add_job(parser, "the newest job of this folder")
    parser.add_argument(
        "-y", "--yes", action="store_true", help="do not ask, where JOB is left out, a name, or not launched from here"
    )


def _add_job(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "job",
        nargs="?",
        metavar="JOB",
        help=f"a handle, as slurm://papilio/12, an id or a name (default: {default})",
    )


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="ranks on this machine (default: one for each GPU, or 2 without a GPU)"
    )


def _options_of(parser: argparse.ArgumentParser, options_type: type[BaseModel]) -> Callable[..., None]:
    """Arguments that fill a model's fields: help and default are the field's; one not given stays out of the namespace.

    The function returned takes the flag, the field if it is named otherwise, and argparse's settings.
    """

    def add(flag: str, field_name: str | None = None, **settings: Any) -> None:
        name = field_name or flag.removeprefix("--").replace("-", "_")
        field = options_type.model_fields[name]
        described = (field.description or "").replace("%", "%%")
        # A switch that is off says nothing of its default.
        if not field.is_required() and field.default is not None and field.default is not False:
            default = field.default
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            described += f" (default: {shown})"
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=described, **settings)

    return add
