#!/bin/bash
# Run big, written by `stratum launch slurm`. When a job's time is nearly up, Slurm sends SIGUSR1 to the training
# processes, which save and stop. The next job, which waits behind it, goes on, until the last step is reached.
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

set -uo pipefail
run=runs/big
export STRATUM_LOGS="$run/logs/slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
mkdir -p "$STRATUM_LOGS"
trap : TERM USR1  # signals are for the training processes; this script outlives them to decide what comes next

# The next job of the chain waits from now on, so that not even the loss of this node ends the run; see the end of the script.
successor=$(sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID" "$run/logs/job.sh") && echo "$successor" >> "$run/logs/jobs"

# Rank 0 listens on the first node, at the address by which Slurm itself reaches it: its name need not resolve.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node --oneliner "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$node}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=WARN
module load cuda

ranks=(srun --kill-on-bad-exit=1 --output="$STRATUM_LOGS/rank-%5t.log" --cpus-per-task=12)
python=(/scratch/you/stratum/.venv/bin/python -P)

"${ranks[@]}" "${python[@]}" -m launch.local.rank train -cn nemotron_nano_12b_v2 run.name=big launch=slurm_gpu parallel.tensor=8 \
    'run.folder="my runs"' run.threads=12
status=$?

# finished, again or stop; why stands in this job's log. An error is told once, with the rank that failed first. A preempted
# job whose processes end in time counts as completed for Slurm, which then does not bring it back: this script does.
preempted=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -c ' PreemptTime=[0-9]')
next=$("${python[@]}" -m launch.slurm.after_job --run "$run" --status "$status" \
    --steps 10000 --restarts 3 --preempted "$preempted")
if [ "$next" != again ] && [ -n "$successor" ]; then scancel "$successor"; fi
exit "$status"
