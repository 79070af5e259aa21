"""Plan a job without running it: `python -m papilio.trainer.run.plan_run OPTIONS`, the JSON of a `PlanOptions`.

One process, no GPU, no process group; the model stays on meta.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from papilio.data_pipeline.dataset import Dataset, open_dataset
from papilio.data_pipeline.errors import PapilioError, report_error
from papilio.data_pipeline.expected import expected_dataset
from papilio.data_pipeline.logging_setup import setup_logging
from papilio.data_pipeline.manifest import MANIFEST_NAME, DatasetError
from papilio.data_pipeline.paths import join, path_manager
from papilio.data_pipeline.terminal import table_columns
from papilio.data_pipeline.version import papilio_version
from papilio.sharding.hardware import load_hardware
from papilio.sharding.plan_conversion import check_plan
from papilio.sharding.plan_file import PlanFile
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.explain import explain_table
from papilio.sharding.planner.job import Cluster, Job
from papilio.sharding.planner.make import describe_failure
from papilio.sharding.planner.planner import Planning, prepare, solve, write_plan
from papilio.sharding.planner.search import SearchFailure, Solution
from papilio.sharding.reports.explanation import format_explanation
from papilio.sharding.reports.page import plan_page
from papilio.sharding.reports.text import format_plan
from papilio.trainer.config import Config
from papilio.trainer.config_file import load_config
from papilio.trainer.models.build import build_model
from papilio.trainer.models.train_model import TrainModel
from papilio.trainer.planner_inputs import DEFAULT_PROFILES, describe_job, make_cluster
from papilio.trainer.run.plan_options import PlanOptions

META = torch.device("meta")


def main(arguments: Sequence[str]) -> int:
    """Plan, print and write as the JSON of a `PlanOptions` says; return the exit status."""
    options = PlanOptions.from_argument(arguments[0])
    setup_logging("tool")
    try:
        config = load_config(options.recipe, options.overrides)
        planning = prepare_planning(config, options.hardware, options.num_nodes, options.ranks_per_node)
        solution = solve(planning)
        if isinstance(solution, SearchFailure):
            raise PlanError(describe_failure(planning, solution, None))
        plan = write_plan(planning, solution, recipe=config.name, papilio_version=papilio_version())
        check_plan(plan, planning.job, planning.cluster, "the plan")
        _show(options, planning, solution, plan)
    except BrokenPipeError:  # as under `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PapilioError as error:
        return report_error("papilio plan", error)
    return 0


def prepare_planning(config: Config, hardware_name: str | None, num_nodes: int, ranks_per_node: int | None) -> Planning:
    """List and estimate the options of a recipe on machines that need not be here.

    Raises:
        ConfigError, DatasetError, HardwareError, PlanError: what is wrong and how to fix it.
    """
    hardware = load_hardware(hardware_name or config.sharding.hardware or DEFAULT_PROFILES["cpu"])
    if num_nodes < 1 or (ranks_per_node is not None and ranks_per_node < 1):
        raise PlanError(
            f"--num-nodes {num_nodes} and --ranks-per-node {ranks_per_node}: at least one of each is needed"
        )
    cluster = make_cluster(config.sharding, hardware, num_nodes, ranks_per_node or hardware.ranks_per_host)
    return prepare(job_on_meta(config, cluster), cluster, config.sharding)


def job_on_meta(config: Config, cluster: Cluster) -> Job:
    """Build the recipe's model on meta and describe its step."""
    dataset = _dataset_or_shape(config)
    model = build_model(config.model, dataset, META, config.seed)
    step_model = TrainModel(model, cluster.num_ranks, None, "cpu")
    return describe_job(
        step_model,
        dataset,
        train=config.train,
        optimizer=config.optimizer,
        sharding=config.sharding,
        data=config.data,
        checkpoint=config.checkpoint,
    )


def _dataset_or_shape(config: Config) -> Dataset:
    is_there = path_manager.exists(join(config.data.path, MANIFEST_NAME))
    if not is_there and config.data.shape is not None:
        return expected_dataset(config.data.shape)
    if not is_there:
        raise DatasetError(
            f"{config.data.path} is not a data set, so the sizes of the tables are not known; preprocess the data, or "
            "say what to expect: --data.shape=NAME_OR_FILE"
        )
    return open_dataset(config.data.path)


def _show(options: PlanOptions, planning: Planning, solution: Solution, plan: PlanFile) -> None:
    """Print what was asked for and write the files."""
    num_columns = table_columns()
    if options.as_json:
        print(plan.to_json(), end="")
    elif options.explain:
        reports = explain_table(planning, solution, options.explain)
        print(format_explanation(reports, plan, num_columns, show_all=options.show_all))
    else:
        print(format_plan(plan, num_columns, show_all=options.show_all))
    for path, text in ((options.output, plan.to_json), (options.html, lambda: plan_page(plan))):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text(), "utf-8")
            print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
