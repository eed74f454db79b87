#!/usr/bin/env bash
# What only a GPU can tell, on one GPU in at most eight minutes.
#
#   bash launch/install.sh train,test VENV                  once, on a fresh machine
#   RSO_DS_VENV=VENV bash benchmarks/gpu.sh OUT             every section; its results are dated files in OUT
#   RSO_DS_VENV=VENV bash benchmarks/gpu.sh OUT rates       this section only
#   bash benchmarks/gpu.sh --dry-run                        the sections and their commands; runs none
#   DEVICE=cpu bash benchmarks/gpu.sh OUT                   small sizes on the CPU, to try a change of this script
#
# A section that fails or takes too long does not stop the others: the summary names it, and the exit status is 1.
# Without a CUDA device nothing is run, and the exit status is 2. Nothing is written outside OUT but caches of the
# user's own (DeepSpeed's builds).
set -uo pipefail

usage() {
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' "$0"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
device=${DEVICE:-cuda}
venv=${RSO_DS_VENV:-.venv}
[[ $venv = /* ]] || venv=$root/$venv  # as launch/install.sh takes it
[ -x "$venv/bin/python" ] && PATH="$(cd "$venv" && pwd)/bin:$PATH"
export PATH
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"  # this checkout, whichever one the environment was made from
export PYTHONDONTWRITEBYTECODE=1                      # or the checkout would get __pycache__ folders
export DS_ACCELERATOR=$device
[ "$device" = cpu ] && export CUDA_VISIBLE_DEVICES=

dry=
out=
chosen=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=1 ;;
    -*) echo "gpu.sh: $argument is no option of it; see --help" >&2; exit 2 ;;
    *) if [ -z "$out" ]; then out=$argument; else chosen+=("$argument"); fi ;;
  esac
done
if [ -z "$out" ] && [ -z "$dry" ]; then
  echo "gpu.sh: name the folder for the results, or --dry-run; see --help" >&2
  exit 2
fi

if ! python -c 'import torch' 2> /dev/null; then
  echo "gpu.sh: python here has no torch: bash launch/install.sh train,test VENV makes an environment," \
    "RSO_DS_VENV=VENV names it" >&2
  exit 2
fi
if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: there is no CUDA device here, so nothing was run" >&2
  exit 2
fi

day=$(date +%Y-%m-%d)
if [ -z "$dry" ]; then
  mkdir -p "$out" || exit 2
  out=$(cd "$out" && pwd)
fi
cd "$root" || exit 2
sections=()
results=()
failed=()

# section NAME LIMIT COMMAND...: run COMMAND with --json OUT/NAME_DAY.json for at most LIMIT seconds.
section() {
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  sections+=("$name")
  [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $name "* ]] || return 0
  if [ -n "$dry" ]; then
    printf '%s, at most %d s:\n  ' "$name" "$limit"
    printf '%q ' "$@" --json "${out:-OUT}/${name}_$day.json"
    echo
    return 0
  fi
  echo "== $name, at most $limit s"
  timeout -k 10 "$limit" "$@" --json "$out/${name}_$day.json" 2>&1 | tee "$out/${name}_$day.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) result=ok ;;
    124 | 137) result="out of time" ;;
    *) result="failed with status $status" ;;
  esac
  [ "$status" -eq 0 ] || failed+=("$name")
  results+=("$(printf '{"section": "%s", "result": "%s", "seconds": %d, "limit": %d}' \
    "$name" "$result" $((SECONDS - began)) "$limit")")
}

# The limits add up to 425 s. With 10 s more for each section that has to be killed, and the start, that is below 480.
if [ "$device" = cuda ]; then
  matrices=() step=(--model llama-130m --vocab 32000 --batch 8 --seq-len 512 --bf16 --rounds 3 --steps 10)
  state=(--shape llama-350m --micro-batch 8 --seq-len 1024 --bf16)
  cases=()
else
  matrices=(--size 256 --megabytes 16 --seconds 0.1)
  step=(--model llama-9m --vocab 512 --batch 1 --seq-len 32 --rounds 1 --steps 2)
  state=(--shape llama-9m --vocab 512 --micro-batch 2 --seq-len 32)
  cases=(--cases default folded_coordinate zero2 zero3-folded)
fi

section rates 45 python benchmarks/speed/device_rates.py --device "$device" "${matrices[@]}"
section equivalence 145 python benchmarks/reliability/equivalence.py --device "$device" "${cases[@]}"
section memory 110 python benchmarks/memory/account.py --device "$device" "${state[@]}"
# One rank without a launcher, which a time limit would leave behind. torch's Adam: no time goes into a compiler.
section step_time 125 env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0 \
  python benchmarks/speed/step_time.py --engine zero2 --torch-adam "${step[@]}" \
  --methods AdamW "RSO two-path haar" "RSO folded haar" "RSO two-path coordinate" "RSO folded coordinate"

for name in "${chosen[@]}"; do
  if [[ " ${sections[*]} " != *" $name "* ]]; then
    echo "gpu.sh: no section is named $name; there are: ${sections[*]}" >&2
    exit 2
  fi
done
[ -n "$dry" ] && exit 0
{
  echo "["
  for i in "${!results[@]}"; do
    [ "$i" -eq $((${#results[@]} - 1)) ] && comma= || comma=,
    echo " ${results[$i]}$comma"
  done
  echo "]"
} > "$out/summary_$day.json"
echo "== summary, $out/summary_$day.json"
cat "$out/summary_$day.json"
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu.sh: not ok: ${failed[*]}" >&2
  exit 1
fi
