#!/usr/bin/env bash
# From a fresh machine to a trained model: environment, main job on the text of Python's standard library.
# Uses every GPU, or two CPU ranks without one. Further flags go to launch/train.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh train "${RSO_DS_VENV:-.venv}"
export PATH="$(cd "${RSO_DS_VENV:-.venv}" && pwd)/bin:$PATH"
ranks=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
exec deepspeed --num_gpus "$ranks" launch/train.py --deepspeed ds_configs/rso.json \
  --seq-len 128 --train-tokens 1200000 --output "runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
