#!/bin/bash
# Data data/web, written by `stratum launch slurm --prepare`: 64 tasks share the work. A restarted
# task keeps its finished shards; the last task to finish writes the manifest.
#SBATCH --job-name=prepare-web
#SBATCH --array=0-63
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --partition=cpu
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/scratch/you/stratum
#SBATCH --output=data/web/logs/%A_%a.log

set +e -uo pipefail
python=(/scratch/you/stratum/.venv/bin/python -P)

"${python[@]}" -m train.stratum prepare -cn web \
    --task "$SLURM_ARRAY_TASK_ID/64"
