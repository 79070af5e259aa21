#!/bin/bash
# What sbatch runs on a job's first host: it starts host.sh on every host, and decides what follows when one ends.
# scripts.py puts a shebang, the #SBATCH lines and these assignments before it:
#   folder, logs        where the job's events and the hosts' output go
#   retries             how often a failure leads to another attempt
#   is_elastic, has_time_limit   1 or 0
#   srun_options        an array
#   resume, no_restart  exit statuses: saved, start me again; it would go wrong again
#   probe_timeout_s     for a host to say that it is there
#   unsaved             what is noted when the time limit came before anything was saved
# shellcheck disable=SC2154  # assigned by scripts.py

num_noted() {  # how often something was noted; 0 also where the file is missing or cannot be read
    local count
    count=$(grep -cs $'\t'"$1"$'\t' "$folder/job.events")
    echo "${count:-0}"
}
attempts=$(num_noted begins)
first_status() {  # of the hosts that did not end well in this attempt, the one that ended first; but 78 of any of them
    grep -hs $'\t'"$attempt"$'\tended\t' "$folder"/host_*.events | sort -n |
        awk -F'\t' -v no_restart="$no_restart" '$4 != 0 && (!status || $4 == no_restart) { status = $4 } END { print status }'
}
one_succeeded() { grep -qs $'\t'"$attempt"$'\tended\t0$' "$folder"/host_*.events; }
all_started() {
    ! sed -n "/^papilio: attempt $attempt on /,\$p" "$folder/job.log" 2> /dev/null | grep -q 'launch failed'
}
note() { printf '%s\t%s\t%s\t%s\n' "$(date +%s.%N)" "$attempt" "$1" "$2" >> "$folder/job.events"; }
state_of_job() {  # asked for a minute, as slurmctld may be starting anew
    local state
    for _ in $(seq 12); do
        state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p' | head -n 1)
        [ -z "$state" ] || break
        sleep 5
    done
    echo "$state"
}
lost_hosts() {
    local host index=0
    for host in $hosts; do
        grep -qs $'\t'"$attempt"$'\tended\t' "$folder/host_$index.events" ||
            timeout "$probe_timeout_s" srun --overlap --nodes=1 --ntasks=1 --nodelist="$host" true > /dev/null 2>&1 ||
            echo "$host"
        index=$((index + 1))
    done
}
requeue() {
    note requeued "$1"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
}

# Told to end: wait for the hosts, which save. Without this bash would end and Slurm kill them.
trap : TERM INT
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
while true; do
    attempt=$((attempts + 1))
    note begins "$hosts"
    echo "papilio: attempt $attempt on $hosts"
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" "${srun_options[@]}" \
        --output="$logs/host_%n.log" bash "$folder/host.sh" "$attempt" "${hosts%% *}"
    status=$? sruns=$?
    [ "$is_elastic" = 1 ] && [ "$status" -ne 0 ] && one_succeeded && status=0
    [ "$status" -eq 0 ] || status=$(first_status || true)
    # srun leaves with 0 when it could not start a host's task and the others did well.
    [ "$is_elastic" = 1 ] || [ "$sruns" -ne 0 ] || all_started || sruns=1 status=${status#0}
    status=${status:-$sruns}  # where hosts could note nothing, as on a full disk
    note ended "$status"
    [ "$status" -eq 0 ] && exit 0
    state=$(state_of_job)
    if [ "$state" != RUNNING ]; then
        note state "$state"  # for when Slurm has forgotten it
        exit "$status"
    fi
    lost=$(lost_hosts | paste -sd " " -)
    [ -z "$lost" ] || requeue "lost $lost"
    [ "$status" -ne "$resume" ] || requeue 'the ranks saved'
    # Told to end before there was anything to save, as the time limit comes: once more, but not without end.
    if [ "$has_time_limit" = 1 ] && [ "$status" -eq 143 ]; then
        tail -n 3 "$folder/job.events" | grep -qs "$unsaved" || requeue "$unsaved"
        exit "$status"
    fi
    [ -z "$lost" ] && [ "$status" -ne "$resume" ] && [ "$status" -ne "$no_restart" ] || exit "$status"
    # Neither a lost host nor ranks that saved cost a retry.
    [ "$(num_noted retried)" -lt "$retries" ] || exit "$status"
    note retried "status $status"
    attempts=$attempt
done
