#!/usr/bin/env bash
# Submits the three stages of training, each to start when the one before has succeeded.
# `slurm/chain.sh --help` explains.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

usage() {
    cat <<'TEXT'
Usage, on a login node:

    slurm/chain.sh [--dry-run] [--out DIR] [sbatch options] [[STAGE:]key=value ...]

submits slurm/align.sh, slurm/pretrain.sh and slurm/finetune.sh; each waits until the one before has
ended with success (--dependency=afterok) and starts from its weights (checkpoint.init_from of the
configs). If a stage fails, Slurm removes those after it from the queue. The sbatch options (written
--name=value) and settings are those of every stage; STAGE: (align:, pretrain:, finetune:) before a
setting gives it to one. For example:

    slurm/chain.sh --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 \
        align:train.steps=4000 checkpoint.every_steps=200

    --out DIR   write to DIR/align, DIR/pretrain and DIR/finetune instead of the configs' output_dir,
                and start each from the one before there
    --dry-run   only print the three commands

Prints the ids of the three jobs; `scancel` of the first ends the chain, and each stage's log is
STAGE-<job id>.out here.

From the environment:
    ALIGN_CONFIG, PRETRAIN_CONFIG, FINETUNE_CONFIG
            other configs than stage1_align.yaml, stage2_pretrain.yaml and stage3_finetune.yaml of
            training/configs
    SITE    settings of your cluster (slurm/site.sh), read here for sbatch as well
and what slurm/pretrain.sh --help lists.
TEXT
}

dry_run='' out='' options=() settings=()
while (($#)); do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --dry-run) dry_run=1 ;;
    --out)
        (($# > 1)) || die "--out needs a folder"
        out=$2
        shift
        ;;
    --out=*) out=${1#*=} ;;
    -*)
        one_word "$@"
        options+=("$1")
        ;;
    align:*=* | pretrain:*=* | finetune:*=*) settings+=("$1") ;;
    *:*=*)
        [[ ${1%%=*} != *:* ]] || die "no stage \"${1%%:*}\" in $1: align:, pretrain: or finetune:"
        settings+=("$1")
        ;;
    *=*) settings+=("$1") ;;
    *) die "expected key=value or --option=value, found $1 (slurm/chain.sh --help explains)" ;;
    esac
    shift
done
load_site
declare -A configs=(
    [align]=${ALIGN_CONFIG:-training/configs/stage1_align.yaml}
    [pretrain]=${PRETRAIN_CONFIG:-training/configs/stage2_pretrain.yaml}
    [finetune]=${FINETUNE_CONFIG:-training/configs/stage3_finetune.yaml}
)
for stage in align pretrain finetune; do
    [[ -f ${configs[$stage]} ]] || die "no configuration at ${configs[$stage]}"
done

jobs=()
before=''
for stage in align pretrain finetune; do
    own=()
    if [[ -n $out ]]; then
        own+=("output_dir=$out/$stage")
        [[ -z $before ]] || own+=("checkpoint.init_from=$out/$before/checkpoints")
    fi
    for setting in "${settings[@]}"; do
        case $setting in
        "$stage":*) own+=("${setting#*:}") ;;
        align:* | pretrain:* | finetune:*) ;;
        *) own+=("$setting") ;;
        esac
    done
    command=(sbatch --parsable)
    # After the options, among which may be a --dependency: that is for the first stage. Without
    # --kill-on-invalid-dep a stage whose predecessor failed would wait for ever.
    command+=("${options[@]}")
    [[ -z $before ]] || command+=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    command+=("slurm/$stage.sh" "${configs[$stage]}" "${own[@]}")
    if [[ -n $dry_run ]]; then
        quoted "${command[@]}"
        jobs+=("JOB_OF_${stage^^}")
    elif job=$("${command[@]}"); then
        jobs+=("${job%%;*}") # "123;cluster"
        echo "$stage: job ${jobs[-1]}${before:+, after $before}"
    else
        ((${#jobs[@]} == 0)) || scancel "${jobs[@]}"
        die "sbatch refused $stage (its message is above)${before:+; the stages before are cancelled}"
    fi
    before=$stage
done
