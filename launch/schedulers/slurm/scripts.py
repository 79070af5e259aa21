"""The two shell scripts of a job on Slurm: job.sh, which sbatch gets, and host.sh, which each host runs.

A plain job of N hosts with one task each, not TorchX's heterogeneous job of N components of one host: it needs no
backfill scheduler, has one state instead of N, and squeue shows it in one line. What else is different:

- environment values are exported in host.sh; `srun --export=A=1,2` would cut the value at its comma;
- srun is told the CPUs of a task, which since Slurm 22.05 it no longer takes from the job by itself;
- a host that failed lets the others end by themselves for some seconds, before srun kills them; the job's status is
  that of the host that failed first, where srun has the largest, often that of a host it killed itself;
- a host that neither ended nor answers is lost, and the job is requeued: Slurm itself notices after SlurmdTimeout only
  (300 s), and until then the surviving hosts' failure would look like the job's own;
- an elastic job (--nnodes 2:4) goes on without a host that is lost, and succeeds when its remaining hosts do;
- status 75 (saved, resume me) leads to a requeue, unless the job was cancelled; other failures to another attempt on
  the same hosts at once, as often as max_retries says, but status 78 of any host (it would go wrong again) to none. A
  requeue would wait for the 2 minutes that Slurm builds in.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from torchx import specs

from papilio.launch.schedulers.slurm.sbatch_options import UNPRINTABLE, pattern_of
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE

# The variable in which TorchX's components, and launch/start.py, find the first host; TorchX's own name for it.
FIRST_HOST = "TORCHX_RANK0_HOST"
# What the other hosts get after one has failed: to hear of it, let their ranks speak, and end by themselves.
WAIT_FOR_HOSTS_S = 10
POLLS_PER_S = 5
# For a host to say that it is there.
PROBE_TIMEOUT_S = 30
UNSAVED = "nothing was saved before the time limit"
# What TorchX fills in at submission is known here only when the job runs.
RUNTIME_VALUES = {specs.macros.app_id: "$SLURM_JOB_ID", specs.macros.replica_id: "$SLURM_NODEID"}

JOB_SCRIPT = """#!/bin/bash
# {title}
{options}
folder={folder}
logs={logs}
retries={max_retries}
num_noted() {{  # how often something was noted; 0 also where the file is missing or cannot be read
    local count
    count=$(grep -cs $'\\t'"$1"$'\\t' "$folder/job.events")
    echo "${{count:-0}}"
}}
attempts=$(num_noted begins)
first_status() {{  # of the hosts that did not end well in this attempt, the one that ended first; but 78 of any of them
    grep -hs $'\t'"$attempt"$'\tended\t' "$folder"/host_*.events | sort -n |
        awk -F'\t' '$4 != 0 && (!status || $4 == {no_restart}) {{ status = $4 }} END {{ print status }}'
}}
one_succeeded() {{ grep -qs $'\t'"$attempt"$'\tended\t0$' "$folder"/host_*.events; }}
all_started() {{
    ! sed -n "/^papilio: attempt $attempt on /,\\$p" "$folder/job.log" 2> /dev/null | grep -q 'launch failed'
}}
note() {{ printf '%s\\t%s\\t%s\\t%s\\n' "$(date +%s.%N)" "$attempt" "$1" "$2" >> "$folder/job.events"; }}
state_of_job() {{  # asked for a minute, as slurmctld may be starting anew
    local try state
    for try in $(seq 12); do
        state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\\([A-Z_]*\\).*/\\1/p' | head -n 1)
        [ -z "$state" ] || break
        sleep 5
    done
    echo "$state"
}}
lost_hosts() {{
    local host index=0
    for host in $hosts; do
        grep -qs $'\t'"$attempt"$'\tended\t' "$folder/host_$index.events" ||
            timeout {probe_timeout_s} srun --overlap --nodes=1 --ntasks=1 --nodelist="$host" true > /dev/null 2>&1 ||
            echo "$host"
        index=$((index + 1))
    done
}}
requeue() {{
    note requeued "$1"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
}}

# Told to end: wait for the hosts, which save. Without this bash would end and Slurm kill them.
trap : TERM INT
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\\n' ' ')
while true; do
    attempt=$((attempts + 1))
    note begins "$hosts"
    echo "papilio: attempt $attempt on $hosts"
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" {srun_options} \\
        --output="$logs/host_%n.log" bash "$folder/host.sh" "$attempt" "${{hosts%% *}}"
    status=$? sruns=$?
    [ {is_elastic} = 1 ] && [ $status -ne 0 ] && one_succeeded && status=0
    [ $status -eq 0 ] || status=$(first_status || true)
    # srun leaves with 0 when it could not start a host's task and the others did well.
    [ {is_elastic} = 1 ] || [ "$sruns" -ne 0 ] || all_started || sruns=1 status=${{status#0}}
    status=${{status:-$sruns}}  # where hosts could note nothing, as on a full disk
    note ended $status
    [ $status -eq 0 ] && exit 0
    state=$(state_of_job)
    if [ "$state" != RUNNING ]; then
        note state "$state"  # for when Slurm has forgotten it
        exit $status
    fi
    lost=$(lost_hosts)
    [ -z "$lost" ] || requeue "lost $(echo $lost)"
    [ $status -ne {resume} ] || requeue 'the ranks saved'
    # Told to end before there was anything to save, as the time limit comes: once more, but not without end.
    if [ {has_time_limit} = 1 ] && [ $status -eq 143 ]; then
        tail -n 3 "$folder/job.events" | grep -qs '{unsaved}' || requeue '{unsaved}'
        exit $status
    fi
    [ -z "$lost" ] && [ $status -ne {resume} ] && [ $status -ne {no_restart} ] || exit $status
    # Neither a lost host nor ranks that saved cost a retry.
    [ "$(num_noted retried)" -lt "$retries" ] || exit $status
    note retried "status $status"
    attempts=$attempt
done
"""

HOST_SCRIPT = """#!/bin/bash
# What each host of the job runs; its arguments are the attempt and the first host.
attempt=$1
export {first_host}="$2"
note() {{
    printf '%s\\t%s\\t%s\\t%s\\n' "$(date +%s.%N)" "$attempt" "$1" "$2" \\
        >> {folder}/host_"$SLURM_NODEID".events
}}
# The agent gets the signal, too, and ends after its ranks have saved.
trap : TERM INT
echo "papilio: attempt $attempt on host $SLURM_NODEID of $SLURM_NNODES, $SLURMD_NODENAME, $(date -u +%FT%TZ)"
note begins "$SLURMD_NODENAME"
run() {{  # the job's variables are not this script's: a PATH among them would take its tools away
{exports}
    exec {command}
}}
( run )
status=$?
note ended $status
[ $status -gt 128 ] && [ $status -ne 143 ] &&
    echo "papilio: error: the agent of this host was killed by SIG$(kill -l $((status - 128)))" >&2
# srun kills the other hosts when this one leaves with a failure; those that were ended without saving are done.
num_ended() {{ grep -ls $'\t'"$attempt"$'\tended\t' {folder}/host_*.events | grep -c .; }}
for _ in $(seq {num_polls}); do
    [ $status -eq 0 ] || [ $status -eq 143 ] || [ "$(num_ended)" -ge "$SLURM_NNODES" ] || sleep {poll_s}
done
exit $status
"""


@dataclass(frozen=True)
class SlurmScripts:
    """One job, as files."""

    job: str
    host: str


def quote(word: str) -> str:
    """Quote a word for the shell, but for what only the running job knows."""
    pieces = [word]
    for macro, variable in RUNTIME_VALUES.items():
        pieces = [piece for part in pieces for piece in _split(part, macro, f'"{variable}"')]
    return "".join(piece if piece in _variables() else shlex.quote(piece) for piece in pieces if piece) or "''"


def _variables() -> set[str]:
    return {f'"{variable}"' for variable in RUNTIME_VALUES.values()}


def _split(text: str, macro: str, variable: str) -> list[str]:
    if text in _variables():
        return [text]
    first, *rest = text.split(macro)
    return [first, *(piece for part in rest for piece in (variable, part))]


def resolve_role(role: specs.Role) -> specs.Role:
    """Fill in what is known at submission."""
    values = specs.macros.Values(
        img_root="", app_id=specs.macros.app_id, replica_id=specs.macros.replica_id, rank0_env=FIRST_HOST
    )
    return values.apply(role)


def render(
    role: specs.Role, *, title: str, folder: str, sbatch_options: list[str], has_time_limit: bool = False
) -> SlurmScripts:
    """Return the scripts of a job whose role was resolved; its replicas are its hosts."""
    is_elastic = role.min_replicas is not None and role.min_replicas < role.num_replicas
    srun = ["--ntasks-per-node=1", "--wait=0", "--open-mode=append", "--unbuffered"]
    srun += ["--kill-on-bad-exit=0", "--no-kill"] if is_elastic else ["--kill-on-bad-exit=1"]
    if role.resource.cpu > 0:
        srun.append(f"--cpus-per-task={role.resource.cpu}")
    job = JOB_SCRIPT.format(
        title=UNPRINTABLE.sub(" ", title),
        options="\n".join(f"#SBATCH {option}" for option in sbatch_options),
        folder=shlex.quote(folder),
        logs=shlex.quote(pattern_of(Path(folder))),
        unsaved=UNSAVED,
        has_time_limit=int(has_time_limit),
        max_retries=role.max_retries,
        is_elastic=int(is_elastic),
        probe_timeout_s=PROBE_TIMEOUT_S,
        srun_options=" ".join(srun),
        resume=RESUME_EXIT_CODE,
        no_restart=NO_RESTART_EXIT_CODE,
    )
    environment = {"PYTHONUNBUFFERED": "1", **role.env}
    host = HOST_SCRIPT.format(
        first_host=FIRST_HOST,
        exports="\n".join(f"    export {name}={quote(value)}" for name, value in environment.items()),
        folder=shlex.quote(folder),
        num_polls=WAIT_FOR_HOSTS_S * POLLS_PER_S,
        poll_s=1 / POLLS_PER_S,
        command=" ".join(quote(word) for word in [role.entrypoint, *role.args]),
    )
    return SlurmScripts(job, host)
