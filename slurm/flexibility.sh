#!/usr/bin/env bash
# Runs an experiment's arms as Slurm job arrays. `slurm/flexibility.sh --help` explains.
#
# The log of an element goes to the submit folder; after a requeue it is appended to.
#SBATCH --job-name=flexibility
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

set -euo pipefail

# See slurm/evaluate.sh: Slurm runs a copy of this script from its spool folder.
[[ ${BASH_SOURCE[0]} == */slurm_script ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f slurm/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/lib.sh || ! -d training ]]; then
    echo "error: $PWD is not the root of the repository: run it there" >&2
    exit 2
fi
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

usage() {
    cat <<'TEXT'
Usage, on a login node, from the root of the repository:

    slurm/flexibility.sh [--dry-run] [sbatch options] CONFIG.yaml

submits the runs of an experiment (python -m training.experiments.flexibility --help) as a job array
with one run per element, one more for the runs at equal compute, which start once all of the first
have succeeded, and a job behind them that writes tables, pictures and record to the experiment's
`out`. The demo's data are written here first. The sbatch options (written --name=value) are those
of every element: one task, on one GPU where there are some. For example:

    slurm/flexibility.sh --gpus=1 --cpus-per-task=8 --time=2:00:00 training/configs/experiments/flexibility_gpu.yaml

    --dry-run   only print the commands

An element that fails is started again, and requeued before its time limit, as slurm/pretrain.sh
(--help) does; it goes on from its newest checkpoint. The same command submitted again runs what is
not done. Each log is flexibility-<array job>_<index>.out.

From the environment: PYTHON, SITE, CONTAINER, CONTAINER_MOUNTS and MAX_RESTARTS_WITHOUT_PROGRESS as
for slurm/pretrain.sh.
TEXT
}

# Submit, or print, one of the jobs: its number goes to `submitted`.
submit() {
    local name=$1
    shift
    local command=(sbatch --parsable "$@" slurm/flexibility.sh "$config")
    if [[ -n $dry_run ]]; then
        quoted "${command[@]}"
        submitted=JOB_OF_${name^^}
        return 0
    fi
    submitted=$("${command[@]}") || die "sbatch refused $name (its message is above)"
    submitted=${submitted%%;*}
    echo "$name: job $submitted"
}

# The arrays and the report, each behind the one before.
submit_all() {
    local list first all before=() submitted=
    list=$("$python" -m training.experiments.flexibility "$config" --list)
    all=$(wc -l <<<"$list")
    first=$(grep -c 'equal samples$' <<<"$list")
    submit samples "${options[@]}" "--array=0-$((first - 1))"
    before=("--dependency=afterok:$submitted" --kill-on-invalid-dep=yes)
    if ((all > first)); then
        submit compute "${options[@]}" "--array=$first-$((all - 1))" "${before[@]}"
        before=("--dependency=afterok:$submitted" --kill-on-invalid-dep=yes)
    fi
    submit report "${options[@]}" "${before[@]}" --output=flexibility-%j.out
}

dry_run='' config='' options=()
while (($#)); do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --dry-run) dry_run=1 ;;
    -*)
        one_word "$@"
        options+=("$1")
        ;;
    *)
        [[ -z $config ]] || die "found $1 behind the config: settings stand in the config itself"
        config=$1
        ;;
    esac
    shift
done
[[ -n $config ]] || die "which experiment? (slurm/flexibility.sh --help explains)"
[[ -f $config ]] || die "no configuration at $config (in $PWD)"
load_site
find_python
if [[ ${BASH_SOURCE[0]} != */slurm_script ]]; then
    submit_all
    exit 0
fi
require_job
prepare_tasks
((ntasks == 1)) || die "an element is one run in one task, found $ntasks: give sbatch --gpus=1 or --ntasks=1"
make_notes
what=(--report)
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || what=(--run "$SLURM_ARRAY_TASK_ID")
run_until_done "${launcher[@]}" "$python" -m training.experiments.flexibility "$config" "${what[@]}"
