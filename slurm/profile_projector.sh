#!/usr/bin/env bash
# Profiles the projector's kernels on one GPU. `slurm/profile_projector.sh --help` explains.
#
# The log goes to the submit folder, as that of slurm/pretrain.sh.
#SBATCH --job-name=profile
#SBATCH --output=%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1

set -euo pipefail

# Slurm runs a copy of this script from its spool folder, in the folder that --chdir names, or else in
# that where it was submitted: one of them is the repository.
[[ ${BASH_SOURCE[0]} == */slurm_script ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f slurm/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/lib.sh || ! -d kernels ]]; then
    echo "error: $PWD is not the root of the repository: run sbatch there" >&2
    exit 2
fi
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

usage() {
    cat <<'TEXT'
Usage, from the root of the repository:

    sbatch [sbatch options] slurm/profile_projector.sh [options of kernels.profile]

runs `python -m kernels.profile` with these options on one GPU. For example:

    sbatch --gres=gpu:h100:1 --cpus-per-task=8 slurm/profile_projector.sh
    sbatch slurm/profile_projector.sh --shape T=64,n=12 --out runs/profile-n12
    sbatch --time=20 slurm/profile_projector.sh --resume --out runs/profile   # again: goes on

The log is profile-<job id>.out; its last lines name the files with the results (by default in
runs/profile-<time>). Ask for a whole node (--exclusive) where other jobs on it would disturb the
times. Without a GPU (--gres=none) nothing is timed: what can be calculated is printed.
`python -m kernels.profile --help` lists the options.

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
load_site
unset CONTAINER # not for this script
find_python

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1

echo "job $SLURM_JOB_ID on $(hostname): $python -m kernels.profile $*"
exec "$python" -m kernels.profile "$@"
