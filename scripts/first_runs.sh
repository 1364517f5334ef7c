#!/usr/bin/env bash
# Every method and control once: MiniLM, r2, 5 epochs, seed 41, bf16. What is finished is not run again.
#
#     scripts/first_runs.sh DATA [TASK...]      DATA holds MRPC/ and CoLA/ with GLUE's TSV files
#
# The results table of results/README.md comes from these runs: `python scripts/collect.py runs && make tables`.
set -euo pipefail
data=$1
shift
python=${PYTHON:-python}
declare -A folder=([mrpc]=MRPC [cola]=CoLA)
[ $# -gt 0 ] || set -- mrpc cola
for task in "$@"; do
  pattern="runs/minilm/r2/increlora/$task/experiment=minilm_comparison,method.dropout=0.0,precision=bf16/seed41"
  for method in increlora lora adalora uniform random_growth static_pattern shuffled_pattern houlsby pfeiffer bitfit full; do
    extra=()
    case $method in
      static_pattern | shuffled_pattern) extra+=("method.pattern='$pattern'" method.dropout=0.0) ;;
      adalora) extra+=(method.init_warmup=null method.interval=null method.final_steps=null method.dropout=0.0) ;;
      lora | increlora | uniform | random_growth) extra+=(method.dropout=0.0) ;;
    esac
    $python run.py experiment=minilm_comparison task="$task" method=$method task.data_dir="$data/${folder[$task]}" \
      precision=bf16 train.progress=false tracker=jsonl "${extra[@]}"
  done
done
