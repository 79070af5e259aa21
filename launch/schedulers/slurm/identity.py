"""Which job a number means: each cluster counts from 1, so that a job's number comes again on another cluster.

What is submitted is a script in a folder whose name is random, and squeue tells it: that is the surest sign. The
accounting database does not tell it in all releases; there cluster, name and the time of submission decide.
"""

from __future__ import annotations

from contextlib import suppress

from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.job_folder import JobRecord, find_records
from papilio.launch.schedulers.slurm import queries
from papilio.launch.schedulers.slurm.queries import SlurmRow


def record_here(app_id: str) -> JobRecord | None:
    """Return the newest record of this number, of this cluster where several clusters gave it."""
    found = find_records("slurm", app_id)
    if len({record.cluster for record in found}) > 1:
        with suppress(SchedulerError):
            here = queries.cluster_name()
            found = [record for record in found if record.cluster == here] or found
    return found[-1] if found else None


def other_cluster(record: JobRecord) -> str | None:
    """Say to which cluster a job belongs if that is not the one of this machine."""
    here = queries.cluster_name() if record.cluster else ""
    if not here or here == record.cluster:
        return None
    return f"it belongs to the cluster {record.cluster}, and this machine's is {here}"


def is_job(row: SlurmRow, record: JobRecord) -> bool:
    """Whether Slurm's row is the recorded job; requeued, a job counts as submitted later."""
    if row.component is not None:
        return False
    if row.command:
        return row.command == script_of(record)
    return row.name == record.name and row.submitted_s >= record.accepted_s and other_cluster(record) is None


def script_of(record: JobRecord) -> str:
    """Return the script that was submitted."""
    return f"{record.folder}/job.sh"
