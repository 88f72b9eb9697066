#!/usr/bin/env bash
# Indexes shards on several nodes. `slurm/index.sh --help` explains.
#
# The log goes to the submit folder, as that of slurm/pretrain.sh.
#SBATCH --job-name=index
#SBATCH --output=%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1

set -euo pipefail

# Slurm runs a copy of this script from its spool folder, in the folder that --chdir names, or else in
# that where it was submitted: one of them is the repository.
[[ ${BASH_SOURCE[0]} == */slurm_script ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f slurm/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/lib.sh || ! -d data_pipeline ]]; then
    echo "error: $PWD is not the root of the repository: run sbatch there" >&2
    exit 2
fi
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

usage() {
    cat <<'TEXT'
Usage, from the root of the repository:

    sbatch [sbatch options] slurm/index.sh SHARDS... [options of data_pipeline.index]

indexes shards, divided among the tasks of the job, and publishes the index. For example, on 4 nodes
with 32 processes each:

    sbatch --nodes=4 --cpus-per-task=32 slurm/index.sh /data/train --tokenizer Qwen/Qwen2.5-7B-Instruct
    sbatch --nodes=4 --cpus-per-task=32 slurm/index.sh 's3://bucket/set/{00000..01023}.tar' \
        --index-dir /data/index/set --tokenizer Qwen/Qwen2.5-7B-Instruct

All nodes must see the folder of the index. The log is index-<job id>.out. Exit code 0: the index is
published; 1: so it is, but more than --max-bad-fraction was left out; 2: a setting is wrong, or with
--strict a shard. After that, or a time limit, submit the same again: what
is finished is kept. No GPU is needed. `python -m data_pipeline.index --help` lists the options.

From the environment:
    PYTHON  the Python to run (.venv/bin/python if there is one, else python3)
    SITE    settings of your cluster (slurm/site.sh)

Partition, account and the like are read when you submit: pass them to sbatch, or set them in
slurm/site.sh and run `source slurm/site.sh` before sbatch.
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit 0
fi
require_job
(($#)) || die "no shards: slurm/index.sh --help explains"
load_site
unset CONTAINER # not for this script
find_python

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mapfile -t shares < <(per_node "$SLURM_TASKS_PER_NODE")
take_cpus
workers=${SLURM_CPUS_PER_TASK:-$cpus}

index=("$python" -m data_pipeline.index --workers "$workers" "$@")
echo "job $SLURM_JOB_ID on $SLURM_JOB_NUM_NODES nodes x $SLURM_TASKS_PER_NODE tasks, $workers processes per task: $(quoted "${index[@]}")"
code=0
# A failed task does not end the others: what they finish is kept.
# shellcheck disable=SC2016 # the rank is known in the task only
srun --cpus-per-task="$workers" --kill-on-bad-exit=0 --export=ALL --label \
    bash -c 'exec "$@" --share "$SLURM_PROCID/$SLURM_NTASKS"' index "${index[@]}" || code=$?
if ((code)); then
    say "error: a task failed (above), so that nothing is published; submit again once it is mended" >&2
    exit "$code"
fi
exec "${index[@]}"
