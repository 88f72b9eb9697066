#!/usr/bin/env bash
# Pretraining on Slurm: one task per GPU on every node of the job. `slurm/pretrain.sh --help` explains.
#
# The log goes to the submit folder: Slurm does not create a folder for it, and a job whose log cannot
# be opened ends without a word of explanation. After a requeue it is appended to.
#SBATCH --job-name=pretrain
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

set -euo pipefail

usage() {
    cat <<'TEXT'
Usage, from the root of the repository:

    sbatch [sbatch options] slurm/pretrain.sh [CONFIG.yaml] [key=value ...]

runs `python -m training.train CONFIG.yaml key=value ...` with one task per GPU on every node of the
job, or TASKS_PER_NODE tasks per node (1 unless set) where the job has no GPUs. For example:

    sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 slurm/pretrain.sh \
        training/configs/digits.yaml output_dir=runs/first

The log is pretrain-<job id>.out; each line starts with the rank that printed it, so
`grep '^[ 0]*3:' pretrain-<job id>.out` is the log of rank 3. A job that Slurm requeues, or that is
submitted again with the same output_dir, goes on from its last checkpoint. When a rank fails, Slurm
ends the others; the job's exit code is the highest of all ranks (143: one that was ended).

From the environment:
    CONFIG          the configuration, where none is given (training/configs/digits.yaml)
    PYTHON          the Python to run (.venv/bin/python if there is one, else python3)
    TASKS_PER_NODE  tasks per node of a job without GPUs (1)
    SITE            settings of your cluster (slurm/site.sh)

Partition, account and the like are read when you submit: pass them to sbatch, or set them in
slurm/site.sh and run `source slurm/site.sh` before sbatch.
TEXT
}

die() {
    echo "error: $*" >&2
    exit 2
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit 0
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    usage >&2
    die "not in a Slurm job: submit this script with sbatch"
fi

# Slurm runs a copy of this script from its spool folder: only where it was submitted tells where the
# repository is.
cd "$SLURM_SUBMIT_DIR"
[[ -f slurm/pretrain.sh && -d training ]] ||
    die "$SLURM_SUBMIT_DIR is not the root of the repository: run sbatch there"

site=${SITE:-slurm/site.sh}
[[ -f $site ]] || die "no site settings at $site: unset SITE, or set it to your copy of slurm/site.sh"
set +u # `module` and `conda activate` read variables that are not set
# shellcheck source=slurm/site.sh
source "$site"
set -u

config=${CONFIG:-training/configs/digits.yaml}
if (($#)) && [[ -f $1 || $1 != *=* ]]; then
    config=$1
    shift
fi
[[ -f $config ]] || die "no configuration at $config (in $SLURM_SUBMIT_DIR)"

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ ! -x .venv/bin/python ]] || python=.venv/bin/python
fi
command -v "$python" >/dev/null || die "no Python at $python: create .venv, or set PYTHON"

nodes=$SLURM_JOB_NUM_NODES
tasks=${SLURM_GPUS_ON_NODE:-${TASKS_PER_NODE:-1}}
cpus_on_node=${SLURM_JOB_CPUS_PER_NODE%%[(,]*} # "16(x2),8" is 16 on each of the first two nodes
cpus=$((cpus_on_node / tasks))
((cpus)) || die "$cpus_on_node CPU for $tasks tasks on each node: ask sbatch for more, for example" \
    "with --cpus-per-gpu=8, --ntasks-per-node=$tasks or --exclusive"

# Taken from the job every time: a value left over in the shell that ran sbatch would be another job's.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ports the kernel hands out itself
# training.train takes its rank from what srun sets (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID), unless
# it finds these.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
# Every task sees all GPUs of its node and picks its own. What sbatch was told would bind them
# otherwise, or contradict the options of srun below.
unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU
unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export PYTHONUNBUFFERED=1

echo "job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0}): $nodes nodes x $tasks tasks x $cpus CPUs," \
    "rendezvous $MASTER_ADDR:$MASTER_PORT"
echo "$python -m training.train $config $*"

# Without --kill-on-bad-exit the other ranks of a dead one wait in a collective until the time limit.
# --export: sbatch --export=NONE would otherwise keep all of the above from the tasks.
exec srun --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
    --cpus-per-task="$cpus" --kill-on-bad-exit=1 --export=ALL --label \
    "$python" -m training.train "$config" "$@"
