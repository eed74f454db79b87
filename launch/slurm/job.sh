# Sourced by the job files of this folder: environment, look at the nodes, run, requeue. Parameters are environment
# variables, given before sbatch: RANKS_PER_NODE=2 sbatch --nodes=2 launch/slurm/torchrun.sbatch ...

: "${VENV:=.venv}"                   # virtual environment, on a file system that all nodes see; "" for none
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-}}}"  # one rank a GPU
: "${NETWORK_INTERFACE:=}"           # such as ib0 or eth0 (ip -br addr); "": NCCL and gloo choose
: "${RUN_IN:=env}"                   # what Python runs in: apptainer exec --nv --bind $PWD image.sif
: "${SRUN_FLAGS:=}"                  # such as --container-image=IMAGE --container-mounts=$PWD (enroot with pyxis)
: "${RESTARTS:=3}"                   # of a crashed run, inside the job
: "${REQUEUES:=100}"                 # of the job, after a signal or an interruption
: "${DOCTOR:=1}"                     # 0: start without looking at the nodes first

set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1
[ -n "$VENV" ] && { [ -x "$VENV/bin/python" ] || { echo "VENV=$VENV has no bin/python in $PWD" >&2; exit 1; }; }
[ -n "$VENV" ] && PATH="$(cd "$VENV" && pwd)/bin:$PATH"
[[ "$RANKS_PER_NODE" =~ ^[1-9][0-9]*$ ]] ||
    { echo "RANKS_PER_NODE is '$RANKS_PER_NODE': ask for --gpus-per-node, or set it, as RANKS_PER_NODE=8 sbatch ..." >&2; exit 1; }
export PATH RANKS_PER_NODE
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Rank 0's node. The port is of this job, so that two jobs on one node do not meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( SLURM_CPUS_ON_NODE > RANKS_PER_NODE ? SLURM_CPUS_ON_NODE / RANKS_PER_NODE : 1 ))}
# srun does not take this over from sbatch since SLURM 22.05.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
if [ -n "$NETWORK_INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
# One file a node beside the job's own: torchrun-17.n1.log, and sweep-17_3.n1.log of an array.
mkdir -p logs
NODE_LOG="logs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
[ -n "${SLURM_ARRAY_JOB_ID:-}" ] || NODE_LOG+=$SLURM_JOB_ID
NODE_LOG+=".%N.log"

say() { echo "$(date +%FT%T) job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $*"; }

# Ranks get SIGUSR1 (scancel signals steps, not this script), finish their step, save and leave.
asked_to_stop=
on_signal() {
    asked_to_stop=$1
    say "SIG$1: asking the ranks to save"
    [ "$1" = USR1 ] && scancel --signal=USR1 "$SLURM_JOB_ID"
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

# wait_for PID: its status, also if a signal interrupts the wait.
wait_for() {
    local status=0
    while kill -0 "$1" 2>/dev/null; do wait "$1"; status=$?; done
    wait "$1" 2>/dev/null || { local last=$?; [ "$last" -ne 127 ] && status=$last; }
    return "$status"
}

# check_nodes TRAIN_FLAGS...: one process a node; ends the job if something must be mended first.
check_nodes() {
    [ "$DOCTOR" = 0 ] && return
    local flags=()
    while [ $# -gt 0 ]; do
        case $1 in
            --deepspeed | --output) flags+=("$1" "$2"); shift ;;
            --deepspeed=* | --output=*) flags+=("$1") ;;
        esac
        shift
    done
    say "looking at the nodes"
    # shellcheck disable=SC2086
    srun --ntasks-per-node=1 --ntasks="$SLURM_NNODES" $SRUN_FLAGS $RUN_IN python -m rso_ds.cli doctor "${flags[@]}" ||
        { say "what failed above must be mended first (DOCTOR=0 skips this check)"; exit 1; }
}

# metrics_of COMMAND...: the file to which launch/train.py, started by it, writes a line after its first step.
metrics_of() {
    local output=runs/rso
    while [ $# -gt 0 ] && [ "$1" != launch/train.py ]; do shift; done
    while [ $# -gt 0 ]; do
        case $1 in
            --output) output=$2 ;;
            --output=*) output=${1#*=} ;;
        esac
        shift
    done
    echo "$output/metrics.jsonl"
}

# run COMMAND...: again after a crash, requeued after a signal; never returns.
run() {
    local attempt status metrics began
    metrics=$(metrics_of "$@")
    began=$(mktemp)
    for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
        touch "$began"
        say "running on $SLURM_JOB_NODELIST (attempt $attempt): $*"
        "$@" &
        wait_for $!
        status=$?
        say "ended with status $status"
        [ "$status" -eq 0 ] && exit 0
        if [ -n "$asked_to_stop" ] || [ "$status" -eq 85 ]; then
            if [ "${SLURM_RESTART_COUNT:-0}" -ge "$REQUEUES" ]; then
                say "not requeued: that happened REQUEUES=$REQUEUES times already"
                exit "$status"
            fi
            say "requeueing"
            # Once the job is requeued, SLURM ends this script.
            trap - TERM USR1
            scontrol requeue "$SLURM_JOB_ID" && { sleep 120 & wait; }
            exit "$status"
        fi
        # A wrong flag or too little memory would be no better the next time.
        if ! [ "$metrics" -nt "$began" ] || tail -n 1 "$metrics" | grep -q '"step": 0,'; then
            say "not started again: it failed before its first step"
            exit "$status"
        fi
    done
    exit "$status"
}
