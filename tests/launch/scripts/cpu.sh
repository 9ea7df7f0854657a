#!/bin/bash
# Run two, written by `stratum launch slurm`. When a job's time is nearly up, Slurm sends SIGUSR1 to the training
# processes, which save and stop. Then it goes back into the queue, under the same number, until the last step is reached.
#SBATCH --job-name=two
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/scratch/you/stratum
#SBATCH --output=runs/two/logs/slurm-%j.log

set -uo pipefail
run=runs/two
export STRATUM_LOGS="$run/logs/slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
mkdir -p "$STRATUM_LOGS"
trap : TERM USR1  # signals are for the training processes; this script outlives them to decide what comes next

# Rank 0 listens on the first node, at the address by which Slurm itself reaches it: its name need not resolve.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node --oneliner "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$node}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export PYTHONUNBUFFERED=1

ranks=(srun --kill-on-bad-exit=1 --output="$STRATUM_LOGS/rank-%5t.log")
python=(/scratch/you/stratum/.venv/bin/python -P)

"${ranks[@]}" "${python[@]}" -m launch.local.rank train -cn smoke run.name=two launch.nodes=2
status=$?

# finished, again or stop; why stands in this job's log. An error is told once, with the rank that failed first. A preempted
# job whose processes end in time counts as completed for Slurm, which then does not bring it back: this script does.
preempted=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -c ' PreemptTime=[0-9]')
next=$("${python[@]}" -m launch.slurm.after_job --run "$run" --status "$status" \
    --steps 200 --restarts 3 --preempted "$preempted")
if [ "$next" = again ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
