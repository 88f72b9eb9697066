#!/usr/bin/env bash
# Stage 1 on Slurm: aligns the projector with the frozen backbones. `slurm/align.sh --help` explains.
#
# The log goes to the submit folder: Slurm does not create a folder for it, and a job whose log cannot
# be opened ends without a word of explanation. After a requeue it is appended to.
#SBATCH --job-name=align
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

set -euo pipefail

# Slurm runs a copy of this script from its spool folder, in the folder that --chdir names, or else in
# that where it was submitted: one of them is the repository.
[[ ${BASH_SOURCE[0]} == */slurm_script ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f slurm/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/lib.sh || ! -d training ]]; then
    echo "error: $PWD is not the root of the repository: run sbatch there" >&2
    exit 2
fi
# shellcheck source=slurm/stage.sh
source slurm/stage.sh

stage_main align "Stage 1, alignment of the projector" training/configs/stage1_align.yaml "$@"
