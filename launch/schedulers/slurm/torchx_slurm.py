"""TorchX's own slurm scheduler, whose `torchx status`, `describe`, `list`, `log` and `cancel` work on every Slurm.

`torchx run -s slurm` takes the options and submits the job of TorchX's scheduler; `setup.cfg` registers this one in its
place. What is different:

- jobs are asked about in plain columns, first from squeue, then from the accounting database. TorchX's reads JSON,
  whose fields change with every release: on Slurm 22.05 it ends with KeyError 'job_resources' right after submitting,
  and without a database it knows no job that has ended;
- a heterogeneous job is listed once, not once for each replica; jobs of `papilio launch` are known, too;
- environment values with commas arrive whole: `srun --export=A=1,2` would cut them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torchx import specs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse
from torchx.schedulers.slurm_scheduler import SlurmBatchRequest, SlurmOpts, SlurmScheduler

from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.job_folder import find_record
from papilio.launch.schedulers.slurm.sbatch_options import FREE_TEXTS, PLAIN
from papilio.launch.schedulers.slurm.scheduler import SlurmJobs


class TorchxSlurm(SlurmScheduler):  # type: ignore[misc]
    """TorchX's submission, and our questions."""

    def __init__(self, session_name: str, docker_client: Any = None) -> None:
        """Arguments are those of TorchX's scheduler."""
        super().__init__(session_name, docker_client)
        self._jobs = SlurmJobs(session_name)

    def _submit_dryrun(self, app: specs.AppDef, cfg: SlurmOpts) -> specs.AppDryRunInfo[SlurmBatchRequest, SlurmOpts]:
        _check_texts(app.name, cfg)
        info = super()._submit_dryrun(app, cfg)
        for replica in info.request.replicas.values():
            cut = {name: replica.env.pop(name) for name, value in list(replica.env.items()) if "," in value}
            if cut:
                assignments = [f"{name}={value}" for name, value in cut.items()]
                replica.entrypoint, replica.args = "env", [*assignments, replica.entrypoint, *replica.args]
        return info

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Tell the state of a job and of its replicas."""
        return self._jobs.describe(app_id)

    def log_iter(self, app_id: str, *arguments: Any, **named: Any) -> Iterable[str]:
        """Return the lines of a replica, as they come."""
        if find_record("slurm", app_id) is not None and not self._jobs.is_heterogeneous(app_id):
            return self._jobs.log_iter(app_id, *arguments, **named)
        lines: Iterable[str] = super().log_iter(app_id, *arguments, **named)
        return lines

    def list(self, cfg: Mapping[str, Any] | None = None) -> list[ListAppResponse]:
        """Return this user's jobs."""
        return self._jobs.list(cfg)


def _check_texts(name: str, cfg: SlurmOpts) -> None:
    """Check what people write; TorchX puts it into #SBATCH lines as it is, where white space begins another option.

    Raises:
        SchedulerError: it is more than a word.
    """
    texts = {"--name": name} | {f"-cfg {key}": getattr(cfg, key, None) for key in (*FREE_TEXTS, "time", "mail_user")}
    for flag, value in texts.items():
        if value is not None and PLAIN.fullmatch(str(value)) is None:
            raise SchedulerError(
                f"{flag} {value!r}: only letters of English, digits and _ . / : = @ % + , - are taken as they are "
                "under torchx run; choose others, or use papilio launch -s slurm, which takes any"
            )


def create_scheduler(session_name: str, **parameters: Any) -> TorchxSlurm:
    """Return the scheduler, as TorchX's Runner asks for it."""
    return TorchxSlurm(session_name, parameters.get("docker_client"))
