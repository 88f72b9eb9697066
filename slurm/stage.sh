# shellcheck shell=bash
# What align.sh, pretrain.sh and finetune.sh share; they source it. The functions of lib.sh do the work.

# shellcheck source=slurm/lib.sh
source slurm/lib.sh

# The help of a stage: what it trains and its default config.
stage_usage() {
    cat <<TEXT
Usage, from the root of the repository:

    sbatch [sbatch options] slurm/$stage.sh [CONFIG.yaml] [key=value ...]
    slurm/$stage.sh --dry-run [sbatch options] [CONFIG.yaml] [key=value ...]

$purpose: runs
\`python -m training.train CONFIG.yaml key=value ...\` with one task per GPU of the job, as many on
each node as it has there. A job without GPUs has the tasks that sbatch is asked for
(--ntasks-per-node=2), TASKS_PER_NODE on each node, or one. For example:

    sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/$stage.sh \\
        $default_config output_dir=runs/first

In a job array (sbatch --array=0-3), %a in a setting is the index of the element:
output_dir=runs/%a seed=%a.

--dry-run only prints what would be submitted, with the settings in full; in a job
(sbatch slurm/$stage.sh --dry-run ...), what would run there.

The log is $stage-<job id>.out; each line starts with the rank that printed it, so
\`grep '^[ 0]*3:' $stage-<job id>.out\` is the log of rank 3.

When a rank fails, Slurm ends the others and this script starts all of them again, in the same nodes,
from the newest checkpoint; it gives up with the exit code of the rank that failed first when
3 restarts in a row saved no checkpoint, and at once for a wrong setting (exit code 2).
120 s before the time limit (sbatch --signal=B:USR1@300: 300 s), the ranks save and Slurm puts the
job back in the queue; the same when a node no longer answers, and when a job of higher priority gets
the nodes (slurm/site.sh). A job submitted again with the same output_dir goes on, too.

    scancel --batch --signal=USR1 JOB    save now, then wait in the queue again
    scancel --signal=TERM JOB            save now, then start again in the same nodes
    scancel JOB                          end at once, without saving (so does --full --signal=TERM)

From the environment:
    CONFIG          the configuration, where none is given ($default_config)
    PYTHON          the Python to run (.venv/bin/python if there is one, else python3)
    TASKS_PER_NODE  tasks per node of a job without GPUs (1)
    SITE            settings of your cluster (slurm/site.sh)
    PREFLIGHT=1     first check every node (slurm/preflight.sh --help)
    CONTAINER       image to run in: with pyxis where srun has it, else with apptainer; Python is then
                    the image's (PYTHON, python3), and the repository is mounted
    CONTAINER_MOUNTS  further folders for it: /data:/data,/models:/models
    MAX_RESTARTS_WITHOUT_PROGRESS  restarts without a checkpoint (3)
    TASKS_END_S     seconds for all tasks to end once one has failed; then a node is taken for frozen
                    (Slurm's KillWait + 30)

Partition, account and the like are read when you submit: pass them to sbatch, or set them in
slurm/site.sh and run \`source slurm/site.sh\` before sbatch.
TEXT
}

# A dry run outside a job: what sbatch would be given, the settings, and the command of the tasks.
dry_run_outside() {
    local script=slurm/$stage.sh options=() nodes='<nodes>' tasks='<GPUs per node>' cpus='<CPUs per task>'
    local ntasks='<nodes x GPUs>' gpus=0
    while [[ ${1:-} == -* ]]; do
        one_word "$@"
        options+=("$1")
        shift
    done
    prepare_stage "$@"
    echo "sbatch $(quoted "${options[@]}" "$script" "$config" "${overrides[@]}")"
    echo "with the options of $script:"
    sed -n 's/^#SBATCH/   /p' "$script"
    echo "and from the environment:"
    env | grep '^SBATCH_' | sort | sed 's/^/    /' || echo "    (no SBATCH_ variable)"
    set_launcher
    echo "runs${CONTAINER:+, in the container,}:"
    print_run
}

# What the job would run (needs set_launcher).
print_run() {
    echo "    ${launcher[*]} $(quoted "$python" -m training.train "$config" "${overrides[@]}")"
    [[ ${PREFLIGHT:-} != 1 ]] || echo "    after training.preflight in the same way"
    echo "with the settings:"
    "$python" -m training.preflight --settings "$config" "${overrides[@]}"
}

# The whole of a stage's script: its name, what it is for, its default config, and its arguments.
stage_main() {
    local stage=$1 purpose=$2 default_config=$3 dry_run=
    shift 3
    case ${1:-} in
    -h | --help)
        stage_usage
        exit 0
        ;;
    --dry-run)
        dry_run=1
        shift
        ;;
    esac
    if [[ -n $dry_run ]] && ! in_job; then
        dry_run_outside "$@"
        exit 0
    fi
    require_job
    prepare_stage "$@"
    prepare_tasks
    if [[ -n $dry_run ]]; then
        print_run
        exit 0
    fi
    quoted "$python" -m training.train "$config" "${overrides[@]}"
    [[ $job != *_* || "$*" == *%a* ]] || echo "note: every element of this array trains the same: %a" \
        "in a setting, such as output_dir=runs/%a, is the element's index"
    make_notes
    if [[ ${PREFLIGHT:-} == 1 ]]; then
        run_preflight
        [[ -z $stopping ]] || requeue_job
        ((code == 0)) || yield_if_preempted
        ((code == 0)) || exit "$code"
    fi
    run_until_done "${launcher[@]}" "$python" -m training.train "$config" "${overrides[@]}"
}
