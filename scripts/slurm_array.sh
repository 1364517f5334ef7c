#!/usr/bin/env bash
# Seeds and methods of one task as a SLURM array, one GPU each:   sbatch scripts/slurm_array.sh rte [overrides]
# A job that is cut off by its time limit continues when it is submitted again.
#SBATCH --job-name=increlora
#SBATCH --array=0-29
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%A_%a.log
set -euo pipefail
task=$1
shift
methods=(lora adalora increlora)
seeds=(41 42 43 44 45 46 47 48 49 50)
method=${methods[SLURM_ARRAY_TASK_ID / ${#seeds[@]}]}
seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}
cd "${SLURM_SUBMIT_DIR:-.}" # sbatch runs a copy of this file
exec "${PYTHON:-python}" run.py task="$task" method="$method" budget=r2 seed="$seed" precision=bf16 \
  train.progress=false "$@"
