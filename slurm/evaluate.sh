#!/usr/bin/env bash
# Evaluates an exported model: one task per GPU on every node of the job. `slurm/evaluate.sh --help`
# explains.
#
# The log goes to the submit folder, as that of slurm/pretrain.sh; after a requeue it is appended to.
#SBATCH --job-name=evaluate
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60

set -euo pipefail

# Slurm runs a copy of this script from its spool folder, in the folder that --chdir names, or else in
# that where it was submitted: one of them is the repository.
[[ ${BASH_SOURCE[0]} == */slurm_script ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f slurm/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/lib.sh || ! -d training ]]; then
    echo "error: $PWD is not the root of the repository: run sbatch there" >&2
    exit 2
fi
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

usage() {
    cat <<'TEXT'
Usage, from the root of the repository:

    sbatch [sbatch options] slurm/evaluate.sh MODEL SHARDS... [options of training.evaluate]

runs `python -m training.evaluate` with these arguments, with one task per GPU of the job, or, in one
without GPUs, the tasks that slurm/pretrain.sh would start. For example:

    sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 slurm/evaluate.sh \
        exported/mine data/mine/eval --num-image-tokens 16 36 64 100 144 196 256 400

The log is evaluate-<job id>.out; each line starts with the rank that printed it. Results go to --out
(runs/evaluation-<name of MODEL>), which all nodes must see; its last lines name the files.

Every sample's result is on disk at once. When a rank fails, all start again in the same nodes and
compute what is missing, until 3 restarts in a row compute nothing; 60 s before the time limit
(sbatch --signal=B:USR1@120: 120 s) Slurm puts the job back in the queue. A job submitted again with
the same --out goes on, too. Exit code 2 is a wrong setting, never started again.
`python -m training.evaluate --help` lists the options.

From the environment: PYTHON, TASKS_PER_NODE, SITE, CONTAINER, CONTAINER_MOUNTS and
MAX_RESTARTS_WITHOUT_PROGRESS as for slurm/pretrain.sh (--help).

Partition, account and the like are read when you submit: pass them to sbatch, or set them in
slurm/site.sh and run `source slurm/site.sh` before sbatch.
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit 0
fi
require_job
load_site
find_python
prepare_tasks
make_notes
run_until_done "${launcher[@]}" "$python" -m training.evaluate "$@"
