"""What is told of a job on Slurm: its state, its hosts' states, and why, from Slurm's rows and the job's folder."""

from __future__ import annotations

from collections.abc import Mapping

from torchx import specs
from torchx.schedulers.api import DescribeAppResponse
from torchx.specs import AppState

from papilio.launch.schedulers.job_folder import (
    CANCEL_EVENTS,
    JobRecord,
    last_event,
    meaning_of,
    read_events,
    why_unreadable,
)
from papilio.launch.schedulers.slurm import queries
from papilio.launch.schedulers.slurm.queries import SlurmRow

REASONS: Mapping[str, str] = {
    "BeginTime": "Slurm holds back a job that was requeued",
    "PartitionConfig": "it asks for more hosts or time than the partition has: cancel it",
    "PartitionNodeLimit": "it asks for more hosts or time than the partition has: cancel it",
    "PartitionTimeLimit": "it asks for more time than the partition has: cancel it",
    "Priority": "others are before it",
    "ReqNodeNotAvail": "hosts that it needs are down or reserved",
    "Resources": "it waits for hosts",
}
STATES: Mapping[str, AppState] = {
    "BOOT_FAIL": AppState.FAILED,
    "CANCELLED": AppState.CANCELLED,
    "COMPLETED": AppState.SUCCEEDED,
    "COMPLETING": AppState.RUNNING,
    "CONFIGURING": AppState.PENDING,
    "DEADLINE": AppState.FAILED,
    "FAILED": AppState.FAILED,
    "NODE_FAIL": AppState.FAILED,
    "OUT_OF_MEMORY": AppState.FAILED,
    "PENDING": AppState.PENDING,
    "PREEMPTED": AppState.FAILED,
    "REQUEUED": AppState.PENDING,
    "REQUEUE_FED": AppState.PENDING,
    "REQUEUE_HOLD": AppState.PENDING,
    "RESIZING": AppState.RUNNING,
    "REVOKED": AppState.FAILED,
    "RUNNING": AppState.RUNNING,
    "SIGNALING": AppState.RUNNING,
    "SPECIAL_EXIT": AppState.PENDING,
    "STAGE_OUT": AppState.RUNNING,
    "STOPPED": AppState.RUNNING,
    "SUSPENDED": AppState.PENDING,
    "TIMEOUT": AppState.FAILED,
}
# Minutes after its end, where there is no database.
FORGOTTEN = "Slurm has forgotten it"


def describe_job(row: SlurmRow, record: JobRecord) -> DescribeAppResponse:
    """Describe a job of ours that Slurm remembers."""
    state = STATES.get(row.state, AppState.UNKNOWN)
    names = queries.host_names(row.hosts) if state == AppState.RUNNING else []
    return _response(record, state, _message(row, record), names)


def _waiting(row: SlurmRow) -> str:
    """Say why a job waits; Slurm says None before it has looked at it."""
    if row.reason in ("None", ""):
        return row.state
    return f"{row.state}: {row.reason}" + (f", {REASONS[row.reason]}" if row.reason in REASONS else "")


def _message(row: SlurmRow, record: JobRecord) -> str:
    ended = last_event(read_events(record.folder), "ended")
    if row.state == "PENDING":
        when = "" if row.start in ("N/A", "Unknown", "") else f", expected to start {row.start}"
        return f"{_waiting(row)}{when}"
    if not row.has_ended or row.state == "COMPLETED":
        return row.state
    if ended is not None:
        return f"{row.state}, {meaning_of(ended.details[0])}"
    if row.state == "CANCELLED" or last_event(read_events(record.folder), "begins") is not None:
        return row.state
    return f"{row.state}, its first host wrote nothing into its folder: do all hosts see it? -cfg jobs_dir=FOLDER"


def describe_by_folder(record: JobRecord, why: str = FORGOTTEN) -> DescribeAppResponse:
    """Describe a job of which only the folder knows, and say why."""
    state, message = _state_by_folder(record)
    return _response(record, state, f"{why}; {message}", [])


def _state_by_folder(record: JobRecord) -> tuple[AppState, str]:
    unreadable = why_unreadable(record.folder)
    if unreadable is not None:
        return AppState.UNKNOWN, unreadable
    events = read_events(record.folder)
    last = last_event(events, "begins", "ended", "requeued", "retried")
    # The job itself notes why Slurm ended it; who was cancelled while it waited could note nothing.
    slurms = last_event(events, "state")
    state = slurms.details[0] if slurms is not None and last is not None and slurms.attempt == last.attempt else ""
    is_cancelled = state == "CANCELLED" or bool(read_events(record.folder, CANCEL_EVENTS))
    if last is None or last.what != "ended":
        if is_cancelled:
            return AppState.CANCELLED, "it was cancelled"
        return AppState.UNKNOWN, "its folder does not say how it ended"
    status = last.details[0]
    if status == "0":
        return AppState.SUCCEEDED, f"it ended with {meaning_of(status)}"
    if is_cancelled:
        return AppState.CANCELLED, f"it was cancelled, {meaning_of(status)}"
    return AppState.FAILED, f"it ended with {meaning_of(status)}" + (
        f", {state}" if state not in ("", "RUNNING") else ""
    )


def _response(record: JobRecord, state: AppState, message: str, names: list[str]) -> DescribeAppResponse:
    """Put a description together; hosts whose names Slurm no longer tells are those of the last attempt."""
    events = read_events(record.folder)
    begun = last_event(events, "begins")
    if begun is None:
        num_restarts = 0
    else:
        num_restarts = begun.attempt - 1
        names = names or begun.details[0].split()
    replicas = [
        specs.ReplicaStatus(
            id=host, role=record.role, state=_host_state(record, host, state, num_restarts + 1), hostname=name
        )
        for host, name in enumerate(names or [""] * record.num_hosts)
    ]
    return DescribeAppResponse(
        app_id=record.app_id,
        state=state,
        num_restarts=num_restarts,
        msg=message,
        metadata={"folder": record.folder},
        roles=[specs.Role(name=record.role, image="", num_replicas=len(replicas))],
        roles_statuses=[specs.RoleStatus(record.role, replicas)],
    )


def _host_state(record: JobRecord, host: int, state: AppState, attempt: int) -> AppState:
    """State of one host: as the host itself noted it in this attempt, or else the job's."""
    ended = last_event(read_events(record.folder, f"host_{host}.events"), "ended")
    if state in (AppState.PENDING, AppState.CANCELLED) or ended is None or ended.attempt != attempt:
        return state
    return AppState.SUCCEEDED if ended.details[0] == "0" else AppState.FAILED


def describe_components(app_id: str, rows: list[SlurmRow]) -> DescribeAppResponse:
    """Describe a job of TorchX's own slurm scheduler: one component, named ROLE-REPLICA, for each replica."""
    roles: dict[str, specs.Role] = {}
    statuses: dict[str, specs.RoleStatus] = {}
    for row in rows:
        role, _, replica = row.name.rpartition("-")
        if not role or not replica.isdigit():
            role, replica = row.name, str(row.component or 0)
        roles.setdefault(role, specs.Role(name=role, image="", num_replicas=0)).num_replicas += 1
        status = specs.ReplicaStatus(
            id=int(replica), role=role, state=STATES.get(row.state, AppState.UNKNOWN), hostname=row.hosts
        )
        statuses.setdefault(role, specs.RoleStatus(role, [])).replicas.append(status)
    state = together([STATES.get(row.state, AppState.UNKNOWN) for row in rows])
    message = rows[0].state if rows[0].state != "PENDING" else _waiting(rows[0])
    return DescribeAppResponse(
        app_id=app_id, state=state, msg=message, roles=list(roles.values()), roles_statuses=list(statuses.values())
    )


def together(states: list[AppState]) -> AppState:
    """Return the state of a whole: ended only when every part has; then failure comes before cancellation."""
    unfinished = [state for state in states if not specs.is_terminal(state)]
    order = [AppState.RUNNING, AppState.PENDING] if unfinished else [AppState.FAILED, AppState.CANCELLED]
    return next((state for state in order if state in states), (unfinished or states)[0])
