#!/usr/bin/env bash
# The measured peak of each phase of a run beside the account's, on two CPU ranks: llama-20m under ZeRO-2, ZeRO-3 and
# FSDP2, in bf16 and fp32. bash benchmarks/memory/phases.sh FOLDER, which gets a run each, with its memory.json.
set -euo pipefail
out=$1
# DeepSpeed's buckets would hold a model of this size whole.
small="--set zero_optimization.stage3_param_persistence_threshold=0 --set zero_optimization.stage3_prefetch_bucket_size=0
  --set zero_optimization.stage3_max_live_parameters=0 --set zero_optimization.stage3_max_reuse_distance=0
  --set zero_optimization.reduce_bucket_size=1000000"
for case in deepspeed-2 deepspeed-3 fsdp2-3; do
  for precision in bf16 fp32; do
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 launch/train.py --deepspeed ds_configs/rso.json \
      --engine "${case%-*}" --set "zero_optimization.stage=${case#*-}" $small --set optimizer.params.interval=2 \
      --set optimizer.params.form=two_path --model llama-20m --seq-len 128 --micro-batch 2 --global-batch 4 --max-steps 4 \
      --eval-interval 2 --eval-tokens 1024 --save-interval 2 --sample-tokens 0 --precision "$precision" --profile-memory \
      --output "$out/$case-$precision" "${@:2}" | grep -A5 "^peaks by phase" | sed "s/^/$case $precision  /"
  done
done
