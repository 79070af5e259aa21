"""The verbs of the `papilio` command: their names, help and arguments. No job is imported here, only named.

A verb's arguments are added only when that verb is asked for, so `papilio train --help` imports no options of others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from papilio.launch import verb_arguments as arguments


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


VERBS = (
    Verb(
        "doctor",
        "say whether this installation is sound, and the command that fixes it",
        "papilio doctor",
        arguments.doctor_arguments,
        "papilio.launch.doctor.doctor:run",
    ),
    Verb(
        "preprocess",
        "turn raw click logs or a table into a data set: columnar shards and a manifest",
        "papilio preprocess --source criteo --input day_0.gz day_1.gz --output datasets/terabyte",
        arguments.preprocess_arguments,
        "papilio.launch.jobs.data:run_preprocess",
    ),
    Verb(
        "generate",
        "make a data set with a planted teacher, whose best possible AUC is known",
        "papilio generate --shape criteo_small --rows 1000000 --output datasets/quickstart",
        arguments.generate_arguments,
        "papilio.launch.jobs.data:run_generate",
    ),
    Verb(
        "plan",
        "say where every table would go on given machines, what it needs and how fast it is",
        "papilio plan --recipe criteo_terabyte_dcnv2 --hardware big_basin_v100 --num-nodes 16",
        arguments.plan_arguments,
        "papilio.launch.jobs.plan:run_plan",
        takes_overrides=True,
    ),
    Verb(
        "study",
        "measure training at several numbers of ranks, beside the plan's prediction",
        "papilio study --recipe quickstart --ranks 1 2 --output studies/quickstart",
        arguments.study_arguments,
        "papilio.launch.jobs.study:run_study",
        takes_overrides=True,
    ),
    Verb(
        "calibrate",
        "measure this machine and write its hardware profile, for `papilio plan --hardware`",
        "papilio calibrate --output my_machine.toml",
        arguments.calibrate_arguments,
        "papilio.launch.jobs.local:run_calibrate",
    ),
    Verb(
        "preflight",
        "ask all hosts of a job whether it would run there: names, ports, clocks, versions, data, links",
        "papilio preflight --recipe quickstart --nnodes 2",
        arguments.preflight_arguments,
        "papilio.launch.jobs.preflight:run_preflight",
        takes_overrides=True,
    ),
    Verb(
        "train",
        "plan, train and evaluate a recipe on this machine, or together with others",
        "papilio train --recipe quickstart --nproc 2 --train.epochs=2",
        arguments.train_arguments,
        "papilio.launch.jobs.local:run_train",
        takes_overrides=True,
    ),
    Verb(
        "rendezvous",
        "hold the store where the hosts of a job meet, on a host that outlives them",
        "papilio rendezvous --port 29400",
        arguments.rendezvous_arguments,
        "papilio.launch.several_hosts:run_rendezvous",
    ),
    Verb(
        "evaluate",
        "evaluate a trained model on one split of a data set",
        "papilio evaluate --run runs/quickstart --data datasets/quickstart --split test",
        arguments.evaluate_arguments,
        "papilio.launch.jobs.local:run_evaluate",
    ),
    Verb(
        "checkpoint",
        "list, show, verify, prune or export the checkpoints of a run",
        "papilio checkpoint list runs/quickstart",
        arguments.checkpoint_arguments,
        "papilio.launch.jobs.checkpoint:run_checkpoint",
    ),
    Verb(
        "export",
        "make a quantized package of a trained model, if it ranks as well as the model does",
        "papilio export --run runs/quickstart --output packages/quickstart --quantize int8",
        arguments.export_arguments,
        "papilio.launch.jobs.package:run_export",
    ),
    Verb(
        "package",
        "show, verify or compile a package",
        "papilio package show packages/quickstart",
        arguments.package_arguments,
        "papilio.launch.jobs.package:run_package",
    ),
    Verb(
        "predict",
        "score a data set, or raw files, with a package",
        "papilio predict --package packages/quickstart --data datasets/quickstart --output scores.parquet",
        arguments.predict_arguments,
        "papilio.launch.jobs.serving:run_predict",
    ),
    Verb(
        "serve",
        "answer requests over HTTP with a package",
        "papilio serve --package packages/quickstart --port 8000",
        arguments.serve_arguments,
        "papilio.launch.jobs.serving:run_serve",
    ),
    Verb(
        "launch",
        "start a job on Slurm, Kubernetes or this machine: one host or many",
        "papilio launch -s slurm train --recipe quickstart --nnodes 4 --nproc 8",
        arguments.launch_arguments,
        "papilio.launch.jobs.scheduled:run_launch",
    ),
    Verb(
        "status",
        "say how a job does: its state, its ranks in one view, and the first error if it failed",
        "papilio status slurm://papilio/12",
        arguments.status_arguments,
        "papilio.launch.jobs.status:run_status",
    ),
    Verb(
        "logs",
        "show what the hosts of a job print",
        "papilio logs -f slurm://papilio/12",
        arguments.logs_arguments,
        "papilio.launch.jobs.scheduled:run_logs",
    ),
    Verb(
        "cancel",
        "tell a job to end, after its ranks have saved",
        "papilio cancel slurm://papilio/12",
        arguments.cancel_arguments,
        "papilio.launch.jobs.scheduled:run_cancel",
    ),
    Verb(
        "list",
        "list the jobs that were launched from here",
        "papilio list",
        arguments.list_arguments,
        "papilio.launch.jobs.scheduled:run_list",
    ),
)
