#!/usr/bin/env bash
# Checks the nodes of a job before training on them. `slurm/preflight.sh --help` explains.
#SBATCH --job-name=preflight
#SBATCH --output=%x-%j.out
#SBATCH --time=5

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

    sbatch [sbatch options] slurm/preflight.sh [CONFIG.yaml] [key=value ...]

checks what training with this config would need, with one task per GPU on every node of the job:
every rank computes on its own GPU, output_dir can be written to, is shared by all nodes and has room,
the index of data.shards can be read, the nodes' clocks agree, and an all-reduce runs (its bandwidth is
printed). For example:

    sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 slurm/preflight.sh \
        training/configs/digits.yaml output_dir=runs/first

The log is preflight-<job id>.out. Exit code 0: all is well; 1: a node is bad, and its name is in the
error (sbatch --exclude=NODE leaves it out); 2: a setting is wrong. It ends within PREFLIGHT_TIMEOUT_S
(60) s even where a node hangs. `PREFLIGHT=1 sbatch slurm/pretrain.sh ...` does the same before training.

From the environment: CONFIG, PYTHON, TASKS_PER_NODE, SITE, CONTAINER and CONTAINER_MOUNTS as for
slurm/pretrain.sh (--help).
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit 0
fi
require_job
default_config=training/configs/digits.yaml
prepare_stage "$@"
prepare_tasks
make_notes
run_preflight
exit "$code"
