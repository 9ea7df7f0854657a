#!/bin/bash
# Run big, written by `stratum launch slurm`. When a job's time is nearly up, Slurm sends SIGUSR1 to the
# training processes, which save and stop. The next job, which waits behind it, continues, until the last step is reached.
#SBATCH --job-name=big
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --partition=h100
#SBATCH --account=lab
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@900
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/scratch/you/stratum
#SBATCH --output=runs/big/logs/slurm-%j.log

trap : TERM USR1  # signals are for the training processes; this script lives on to decide what follows
stratum_logs=runs/big/logs

# In every case: after 4 starts without a new checkpoint between them, the run ends.
newest=$(cat runs/big/checkpoints/latest 2>/dev/null)
read -r seen starts 2>/dev/null < "$stratum_logs/starts"
[ "$seen" = "${newest:-none}" ] || starts=0
starts=$((starts + 1))
echo "${newest:-none} $starts" > "$stratum_logs/starts"
if [ "$starts" -gt 4 ]; then
  echo "stop: 4 starts in a row brought no new checkpoint (launch.restarts=3)" >&2
  exit 1
fi

module load cuda
set +e -uo pipefail

run=runs/big
logs="$run/logs/slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"

# Submit one more job of this run, but not before a rank has started: a script that fails earlier would submit for ever.
alive() {
  local mark
  for mark in "$logs"*/alive; do if [ -e "$mark" ]; then return 0; fi; done
  return 1
}
submit() {
  local number=""
  local options=(--parsable "$@")
  if [ -s "$run/logs/exclude" ]; then options+=("--exclude=$(cat "$run/logs/exclude")"); fi
  alive || return 1
  if number=$(timeout 60 sbatch "${options[@]}" "$run/logs/job.sh" 2> "$logs.sbatch"); then
    rm -f "$logs.sbatch" "$run/logs/no-successor"
    echo "${number%%;*}" >> "$run/logs/jobs"
    echo "${number%%;*}"
  else
    cat "$logs.sbatch" >&2
    mv "$logs.sbatch" "$run/logs/no-successor"
    return 1
  fi
}

# The next job of the chain is submitted as soon as a rank has started, so that the chain survives the loss of this node;
# see the end of the script.
mkdir -p "$logs"
{
  until alive || [ -e "$logs/ended" ]; do sleep 1; done
  submit --dependency=afterany:"$SLURM_JOB_ID" > "$logs/successor"
} &
waiter=$!

# Rank 0 listens on the first node, at the address by which Slurm reaches that node: node names need not resolve.
meet_at() {
  local address
  address=$(scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  export MASTER_ADDR="${address:-$1}"
}
meet_at "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=WARN
export PYTHONPATH=/scratch/you/stratum/runs/two/logs/code${PYTHONPATH:+:$PYTHONPATH}
container=('--container-image=registry#stratum:latest' --container-mounts=/scratch/you/stratum:/scratch/you/stratum,/data:/data --container-workdir=/scratch/you/stratum)
python=("${container[@]}" env "PYTHONPATH="/scratch/you/stratum/runs/two/logs/code"${PYTHONPATH:+:$PYTHONPATH}" python -P)
srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "${python[@]}" -m launch.slurm.environment

attempt=1
while :; do
  # Each start has its own logs, and its own port: the last start may not have released its port yet.
  export STRATUM_LOGS="$logs" MASTER_PORT=$((20000 + (SLURM_JOB_ID + 4001 * ${SLURM_RESTART_COUNT:-0} + 401 * attempt) % 12000))
  if [ "$attempt" -gt 1 ]; then STRATUM_LOGS="$logs-$attempt"; fi
  mkdir -p "$STRATUM_LOGS"
  ranks=(srun --kill-on-bad-exit=1 --output="${STRATUM_LOGS//%/%%}/rank-%5t.log" --cpus-per-task=12)
  printf '{"kind": "attempt", "time": %s}\n' "$(date +%s.%N)" >> "$stratum_logs/starts.jsonl"
  "${ranks[@]}" "${python[@]}" -m launch.local.rank train -cn nemotron_nano_12b_v2 run.name=big launch=slurm_gpu parallel.tensor=8 \
    'run.folder="my runs"' run.threads=12 2> "$STRATUM_LOGS/srun.log"
  status=$? ended=$(date +%s.%N)
  cat "$STRATUM_LOGS/srun.log" >&2

  # finished, here (again in these nodes), again or stop; the reason is in this job's log. An error is shown once, with the
  # rank that failed first. Slurm counts a preempted job whose processes end in time as completed and does not requeue it:
  # this script does.
  job=$(timeout 60 scontrol show job --oneliner "$SLURM_JOB_ID")
  next=$(srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "${python[@]}" -m launch.slurm.after_job --run "$run" --status "$status" --steps 10000 \
    --restarts 3 --save-before-end-s 900 --timeout-s 600 --ended "$ended" \
    --job "$job")
  [ "$next" = here ] || break
  attempt=$((attempt + 1))
done

touch "$logs/ended"
wait "$waiter"
successor=$(cat "$logs/successor" 2>/dev/null)
case $next in
  again)
    if [ -n "$successor" ] && [ -s "$run/logs/exclude" ]; then
      scontrol update JobId="$successor" ExcNodeList="$(cat "$run/logs/exclude")"
    elif [ -z "$successor" ] && ! submit; then
      echo "sbatch does not take the next job (see above); this job goes back into the queue instead" >&2
      scontrol update JobId="$SLURM_JOB_ID" Requeue=1 && scontrol requeue "$SLURM_JOB_ID"
    fi ;;
  finished | stop)
    if [ -n "$successor" ]; then scancel "$successor"; fi ;;
esac
exit "$status"
