#!/usr/bin/env bash
# Every run of the study in README.md: hours on two cores. RESULTS (convergence.jsonl) is continued if it is there.
# Data: ELTeC and WikiText-2 as jsonl or text, in the folders that the two variables name.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${RESULTS:-convergence.jsonl}
eltec=${ELTEC:-../shared/data/eltec-eng}
wikitext=${WIKITEXT:-../shared/data/wikitext-2}

R="--data $eltec --vocab 1024 --jobs 2 --results $results"
S="$R --rest 1.6e-2 --tokens-per-parameter"
python benchmarks/convergence/convergence.py run methods $R --seeds 1 --tokens-per-parameter 1 0.25 \
  --variants AdamW "RSO, h/4" "GaLore, h/4" "RSO, h/16" "GaLore, h/16"
python benchmarks/convergence/convergence.py run methods $R --tokens-per-parameter 2 \
  --variants AdamW "RSO, h/4" "GaLore, h/4"
python benchmarks/convergence/convergence.py run interval rank $S 2 --variants "interval 50" "h/2"
python benchmarks/convergence/convergence.py run methods $S 2 \
  --variants "RSO, h/16" "GaLore, h/16" "RSO of the paper, h/4" Muon "APOLLO, h/4" "LoRA, h/4" "LoRA, h/16" \
    "ReLoRA, h/4"
python benchmarks/convergence/convergence.py run why $S 2 --start 4e-3 4 \
  --variants "RSO, full rank, coordinate" "RSO, one subspace"
python benchmarks/convergence/convergence.py run methods $S 2 --batch 64 --start 4e-3 4 --variants AdamW "RSO, h/4"
python benchmarks/convergence/convergence.py run methods interval $R --rest 3.2e-2 --start 4e-3 8 --tokens-per-parameter 0.25 \
  --variants AdamW Muon "RSO, h/4" "RSO, h/16" "GaLore, h/4" "GaLore, h/16" "APOLLO, h/4" "APOLLO, h/16" \
    "LoRA, h/4" "LoRA, h/16" "ReLoRA, h/4" "ReLoRA, h/16" "RSO of the paper, h/4" "interval 50"
python benchmarks/convergence/convergence.py run methods interval carry_over rank sampler share proximal $S 1 \
  --variants AdamW "RSO, h/4" "GaLore, h/4" "interval 1" "interval 5" "interval 20" "interval 50" "interval 200" \
    "keep_second, interval 50" "project, interval 50" "reset, interval 50" "coordinate, h/4" "gaussian, h/4" \
    "shared by shape" "h/8" "proximal 0.1"
python benchmarks/convergence/convergence.py run carry_over $S 1 --start 8e-3 2 \
  --variants "reset, interval 10" "keep_second, interval 10" "project, interval 10"
python benchmarks/convergence/convergence.py run rules rank $S 1 --start 8e-3 2 \
  --variants principal "row second" "growing interval" sweep "rotate row mean" "inner warm up, interval 50" polar \
    "polar, interval 20" "main directions, 0.5" "important, coordinate" "full first step" "in/4"
python benchmarks/convergence/convergence.py run methods interval $S 0.25 --shape llama-20m --start 2e-3 8 \
  --variants AdamW "GaLore, h/4" "RSO, h/4" "interval 50"
W="--data $wikitext --vocab 1024 --jobs 2 --results $results"
python benchmarks/convergence/convergence.py run methods interval $W --tokens-per-parameter 2 --rest 1.6e-2 --start 8e-3 2 \
  --variants AdamW "RSO, h/4" "GaLore, h/4" "interval 50"
python benchmarks/convergence/convergence.py run methods $W --tokens-per-parameter 0.25 --rest 3.2e-2 \
  --variants AdamW "RSO, h/4" "GaLore, h/4"
python benchmarks/convergence/convergence.py run methods $R --tokens-per-parameter 1 --at 2e-3 1 --variants AdamW
python benchmarks/convergence/convergence.py run methods $R --tokens-per-parameter 1 --at 8e-3 1 --variants "RSO, h/4"
python benchmarks/convergence/convergence.py run interval $R --tokens-per-parameter 1 --at 2e-3 1 \
  --variants "interval 50"
for data in "$R --tokens-per-parameter 1" "$W --tokens-per-parameter 2"; do
  python benchmarks/convergence/convergence.py run interval $data --at 2e-3 8 --variants "interval 50"
  python benchmarks/convergence/convergence.py run methods $data --at 4e-3 4 --variants "RSO, h/4"
done
for seed in 0 1 2; do
  bash launch/quickstart.sh --seed $seed
  bash launch/quickstart.sh --seed $seed --set optimizer.params.dense_lr=null
  bash launch/quickstart.sh --seed $seed --set optimizer.params.interval=50 --set optimizer.params.lr=4e-3 --set optimizer.params.dense_lr=1.6e-2
  bash launch/quickstart.sh --seed $seed --set optimizer.params.interval=50 --set optimizer.params.lr=4e-3 --set optimizer.params.dense_lr=null
done
python benchmarks/convergence/convergence.py table "$results"
python benchmarks/convergence/convergence.py picture "$results" rates.svg
python benchmarks/convergence/convergence.py frontier "$results" frontier.svg
