#!/bin/bash
# What each host of a job runs; its arguments are the attempt and the first host.
# scripts.py puts a shebang and these before it:
#   folder              where events are noted
#   num_polls, poll_s   how long the other hosts get after this one has failed
#   run                 a function: exports the job's variables and becomes the agent; they are not this script's, since a
#                       PATH among them would take its tools away
# shellcheck disable=SC2154  # assigned by scripts.py

attempt=$1
export TORCHX_RANK0_HOST="$2"
note() {
    printf '%s\t%s\t%s\t%s\n' "$(date +%s.%N)" "$attempt" "$1" "$2" \
        >> "$folder"/host_"$SLURM_NODEID".events
}
# The agent gets the signal, too, and ends after its ranks have saved.
trap : TERM INT
echo "papilio: attempt $attempt on host $SLURM_NODEID of $SLURM_NNODES, $SLURMD_NODENAME, $(date -u +%FT%TZ)"
note begins "$SLURMD_NODENAME"
( run )
status=$?
note ended $status
[ $status -gt 128 ] && [ $status -ne 143 ] &&
    echo "papilio: error: the agent of this host was killed by SIG$(kill -l $((status - 128)))" >&2
# srun kills the other hosts when this one leaves with a failure; those that were ended without saving are done.
num_ended() { grep -ls $'\t'"$attempt"$'\tended\t' "$folder"/host_*.events | grep -c .; }
for _ in $(seq "$num_polls"); do
    [ $status -eq 0 ] || [ $status -eq 143 ] || [ "$(num_ended)" -ge "$SLURM_NNODES" ] || sleep "$poll_s"
done
exit $status
