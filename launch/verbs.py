"""The verbs of the `papilio` command: their names, help and arguments. No job is imported here, only named.

A verb's arguments are added only when that verb is asked for, so `papilio train --help` imports no options of others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

SPLITS = ("train", "validation", "test")
SCHEDULERS = ("local_cwd", "slurm", "kubernetes")


@dataclass(frozen=True)
class Verb:
    """One job of the command line.

    `job` is "module:function", imported when the verb runs; it is called with the parsed arguments and returns the
    exit status. With `takes_overrides`, arguments of the form --section.key=value are gathered in `overrides`.
    """

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    job: str
    takes_overrides: bool = False


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def _preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    from data_pipeline.preprocess_options import PreprocessOptions

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


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from data_pipeline.generate_options import GenerateOptions

    add = _options_of(parser, GenerateOptions)
    add("--shape", metavar="SHAPE")
    add("--rows", "num_rows", required=True, type=int, metavar="N")
    add("--output", required=True, metavar="DIR")
    add("--format", choices=("shards", "tsv"))
    add("--seed", type=int, metavar="S")
    add("--rows-per-shard", type=int, metavar="N")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", required=True, help="path of a recipe .toml, or the bare name of one that comes with Papilio"
    )
    _add_nproc(parser)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN_DIR", help="the run folder, as `papilio train` printed it")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (default: the one it was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which rows to evaluate on (default: test)")
    _add_nproc(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="diff OLD NEW", help="compare two plan files instead of planning")
    parser.add_argument("--recipe", help="path of a recipe .toml, or the bare name of one that comes with Papilio")
    parser.add_argument(
        "--hardware", metavar="NAME|FILE", help="profile of the hosts, or a file of `papilio calibrate`"
    )
    parser.add_argument("--num-nodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks of a host (default: the profile's)")
    parser.add_argument("--explain", metavar="TABLE", help="every option for one table: cost, memory, why it lost")
    parser.add_argument("--output", metavar="FILE", help="write the plan as JSON, for --sharding.plan and `plan diff`")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page for a browser")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of the report")
    parser.add_argument("--all", action="store_true", help="list every table and rank, however many")


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help="the profile to write, a .toml file")
    parser.add_argument("--quick", action="store_true", help="few and small measurements: to try, not to plan with")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of busy ranks to measure with (default: 1, 2, 4, ... up to the GPUs, or to twice the cores)",
    )


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--recipe", required=True, help="path of a recipe .toml, or the bare name of one that comes with Papilio")
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


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
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


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
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


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    _add_job(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _add_job(parser)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the job ends, and leave with its status"
    )
    parser.add_argument("--host", type=int, metavar="N", help="only what host N prints (default: all hosts)")


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--scheduler", choices=SCHEDULERS, help="only of this one (default: all there are here)")
    parser.add_argument("--all", action="store_true", help="however many there are")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def _preflight_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", required=True, help="path of a recipe .toml, or the bare name of one that comes with Papilio"
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


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job", nargs="?", metavar="JOB", help="a handle, as slurm://papilio/12, or an id (default: the newest job)"
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
        if not field.is_required() and field.default is not None:
            default = field.default
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            described += f" (default: {shown})"
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=described, **settings)

    return add


VERBS = (
    Verb(
        "doctor",
        "say whether this installation is sound, and the command that mends it",
        "papilio doctor",
        _doctor_arguments,
        "launch.doctor:run",
    ),
    Verb(
        "preprocess",
        "turn raw click logs or a table into a data set: columnar shards and a manifest",
        "papilio preprocess --source criteo --input day_0.gz day_1.gz --output datasets/terabyte",
        _preprocess_arguments,
        "launch.data_jobs:run_preprocess",
    ),
    Verb(
        "generate",
        "make a data set with a planted teacher, whose best possible AUC is known",
        "papilio generate --shape criteo_small --rows 1000000 --output datasets/quickstart",
        _generate_arguments,
        "launch.data_jobs:run_generate",
    ),
    Verb(
        "plan",
        "say where every table would go on given machines, what it needs and how fast it is",
        "papilio plan --recipe criteo_terabyte_dcnv2 --hardware big_basin_v100 --num-nodes 16",
        _plan_arguments,
        "launch.plan_jobs:run_plan",
        takes_overrides=True,
    ),
    Verb(
        "study",
        "measure training at several numbers of ranks, beside the plan's prediction",
        "papilio study --recipe quickstart --ranks 1 2 --output studies/quickstart",
        _study_arguments,
        "launch.study_jobs:run_study",
        takes_overrides=True,
    ),
    Verb(
        "calibrate",
        "measure this machine and write its hardware profile, for `papilio plan --hardware`",
        "papilio calibrate --output my_machine.toml",
        _calibrate_arguments,
        "launch.local_jobs:run_calibrate",
    ),
    Verb(
        "preflight",
        "ask all hosts of a job whether it would run there: names, ports, clocks, versions, data, links",
        "papilio preflight --recipe quickstart --nnodes 2",
        _preflight_arguments,
        "launch.preflight_jobs:run_preflight",
        takes_overrides=True,
    ),
    Verb(
        "train",
        "plan, train and evaluate a recipe on this machine",
        "papilio train --recipe quickstart --nproc 2 --train.epochs=2",
        _train_arguments,
        "launch.local_jobs:run_train",
        takes_overrides=True,
    ),
    Verb(
        "evaluate",
        "evaluate a trained model on one split of a data set",
        "papilio evaluate --run runs/quickstart --data datasets/quickstart --split test",
        _evaluate_arguments,
        "launch.local_jobs:run_evaluate",
    ),
    Verb(
        "checkpoint",
        "list, show, verify, prune or export the checkpoints of a run",
        "papilio checkpoint list runs/quickstart",
        _checkpoint_arguments,
        "launch.checkpoint_jobs:run_checkpoint",
    ),
    Verb(
        "launch",
        "start a job on Slurm, Kubernetes or this machine: one host or many",
        "papilio launch -s slurm train --recipe quickstart --nnodes 4 --nproc 8",
        _launch_arguments,
        "launch.scheduled_jobs:run_launch",
    ),
    Verb(
        "status",
        "say how a job does: its state, its hosts, and the first error if it failed",
        "papilio status slurm://papilio/12",
        _status_arguments,
        "launch.scheduled_jobs:run_status",
    ),
    Verb(
        "logs",
        "show what the hosts of a job print",
        "papilio logs -f slurm://papilio/12",
        _logs_arguments,
        "launch.scheduled_jobs:run_logs",
    ),
    Verb(
        "cancel",
        "tell a job to end, after its ranks have saved",
        "papilio cancel slurm://papilio/12",
        _add_job,
        "launch.scheduled_jobs:run_cancel",
    ),
    Verb(
        "list",
        "list the jobs that were launched from here",
        "papilio list",
        _list_arguments,
        "launch.scheduled_jobs:run_list",
    ),
)
