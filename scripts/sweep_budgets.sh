#!/usr/bin/env bash
# IncreLoRA and LoRA over budgets and seeds, the loop in plain sight; what is finished is not run again.
#
#     scripts/sweep_budgets.sh TASK [overrides]      e.g. scripts/sweep_budgets.sh rte precision=bf16
#
# `python scripts/sweep.py figure4_budgets` does the same with a queue, retries and a summary.
set -euo pipefail
task=$1
shift
python=${PYTHON:-python}
for budget in ${BUDGETS:-r2 r4 r8}; do
  for seed in ${SEEDS:-41 42 43 44 45}; do
    for method in ${METHODS:-lora increlora}; do
      $python "$(dirname "$0")/../run.py" task="$task" budget="$budget" method="$method" seed="$seed" "$@"
    done
  done
done
