# shellcheck shell=bash
# What the scripts of this folder share; they source it from the root of the repository.
# `slurm/pretrain.sh --help` says what it does for a user. Functions hand on what they find in variables,
# which their comments name.

# shellcheck source=slurm/resources.sh
source slurm/resources.sh

# The trainer's exit code for a wrong setting (training/exit_codes.py): no restart helps. Any other
# code than 0 means: start again. That of tasks that were asked to stop:
BAD_INPUT=2 PREEMPTED=75

# Step ids from here on are not those of srun, but of a batch script or the shell of salloc.
FIRST_SPECIAL_STEP=4294967290

die() {
    echo "error: $*" >&2
    exit 2
}

say() {
    printf '%(%H:%M:%S)T %s\n' -1 "$*"
}

# The words, quoted so that they can be pasted into a shell.
quoted() {
    local words
    printf -v words ' %q' "$@"
    echo "${words# }"
}

in_job() {
    [[ -n ${SLURM_JOB_ID:-} ]]
}

# End unless in a job that these scripts can run in. Sets `record`, what Slurm knows of the job, and
# `job`, the id that its commands take: an element of an array is ARRAY_INDEX, since the own id of one
# is that of the whole array. The record tells what is this job's: the environment may be left over
# from another job, in whose shell sbatch was run.
require_job() {
    in_job || die "not in a Slurm job: submit this script with sbatch (--help explains)"
    [[ $0 == */slurm_script ]] || ((${SLURM_STEP_ID:-$FIRST_SPECIAL_STEP} >= FIRST_SPECIAL_STEP)) ||
        die "started by srun, but this script starts the tasks itself: submit it with sbatch, or run" \
            "it in the shell of salloc"
    job=${SLURM_ARRAY_JOB_ID:-}_${SLURM_ARRAY_TASK_ID:-}
    record=
    [[ $job == _ ]] || record=$(scontrol show job --details "$job" 2>/dev/null) || true
    if [[ $record != *"JobId=$SLURM_JOB_ID "* ]]; then
        job=$SLURM_JOB_ID
        record=$(scontrol show job --details "$job") || die "Slurm does not know job $job"
    fi
    [[ $record != *HetJobId=* ]] || die "only the first part of a heterogeneous job would train: ask" \
        "sbatch for nodes of one kind, without a \":\" between options"
}

# A field of the job's record as it is now.
job_field() {
    [[ " $(scontrol show job --oneliner "$job" 2>/dev/null)" =~ \ $1=([^ ]+) ]] &&
        echo "${BASH_REMATCH[1]}"
}

# sbatch's options without a value, or whose value may be left out.
FLAGS=' --contiguous --exclusive --get-user-env --hold --ignore-pbs --no-kill --no-requeue --nice
 --overcommit --oversubscribe --parsable --propagate --quiet --reboot --requeue --spread-job
 --test-only --use-min-nodes --verbose --wait -H -k -O -Q -s -v -W '

# End unless an option of sbatch is one word, so that the next one is not taken for something else.
one_word() {
    [[ $1 != -[!-]=* ]] || die "sbatch reads $1 as the value \"${1:2}\": write ${1/=/}"
    [[ $1 != *=* && $1 != -[!-]?* && ${2:--} != -* && ${FLAGS//$'\n'/} != *" $1 "* ]] || return 0
    [[ $1 == --* ]] || die "write $1 $2 as $1$2"
    die "write $1 $2 as $1=$2"
}

load_site() {
    local site=${SITE:-slurm/site.sh}
    [[ -f $site ]] || die "no site settings at $site: unset SITE, or set it to your copy of slurm/site.sh"
    set +u # `module` and `conda activate` read variables that are not set
    # shellcheck source=slurm/site.sh
    source "$site"
    set -u
}

# Sets `python`. In a container it is the container's.
find_python() {
    python=${PYTHON:-python3}
    [[ -z ${CONTAINER:-} ]] || return 0
    [[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
    command -v "$python" >/dev/null || die "no Python at $python: create .venv, or set PYTHON"
}

# Sets `config` and `overrides` from the arguments; the config's default is `default_config`. In an
# element of a job array, %a is its index, as in the names of sbatch's --output.
take_config() {
    local word
    config=${CONFIG:-$default_config}
    if (($#)) && [[ -f $1 || $1 != *=* ]]; then
        config=$1
        shift
    fi
    overrides=("$@")
    for word in "$config" "$@"; do
        [[ $word != -* ]] || die "found $word after the script: sbatch's options stand before it"
    done
    [[ ${job:-} != *_* ]] || overrides=("${overrides[@]//%a/$SLURM_ARRAY_TASK_ID}")
    [[ -f $config ]] || die "no configuration at $config (in $PWD)"
}

# The environment of the tasks (needs take_resources).
set_environment() {
    # training.train takes its rank from what srun sets (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID),
    # unless it finds these.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE
    # Every task sees all GPUs of its node and picks its own. What sbatch was told (this job's or one
    # before) would bind them otherwise, or contradict the options of srun below.
    unset SLURM_JOB_GPUS SLURM_STEP_GPUS SLURM_GPUS_ON_NODE SLURM_GPUS SLURM_GPUS_PER_NODE
    unset SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK SLURM_GPU_BIND
    unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
    unset SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_NODE SLURM_NTASKS_PER_SOCKET SLURM_NTASKS_PER_CORE
    [[ ${SLURM_DISTRIBUTION:-} != arbitrary ]] || unset SLURM_DISTRIBUTION
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    export PYTHONUNBUFFERED=1
    export MASTER_ADDR=${hosts[0]}
    # The node of each rank, for training.preflight to name one that is silent.
    export JOB_NODES=${places[*]}
    [[ ${SLURM_DISTRIBUTION:-block} == block* ]] || unset JOB_NODES
}

# A port for each start of the tasks: that of the last may still be in use. Taken from the job every
# time, since a value left over in the shell that ran sbatch would be another job's; below the ports
# that the kernel hands out itself.
set_port() {
    local start=$1
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * start) % 10000))
}

# Sets `launcher`, what comes before the program of every task, from what take_resources sets; words
# in a dry run outside a job.
set_launcher() {
    # Without --kill-on-bad-exit the other ranks of a dead one wait in a collective until the time
    # limit. --export: sbatch --export=NONE would otherwise keep the environment from the tasks.
    launcher=(srun "--nodes=$nodes" "--ntasks=$ntasks")
    if [[ $tasks == *,* ]]; then # left to Slurm, they go where CPUs are
        launcher+=(--distribution=arbitrary "--nodelist=$(IFS=, && echo "${places[*]}")")
    else
        launcher+=("--ntasks-per-node=$tasks")
    fi
    # A step has what sbatch was asked for: so many for each task, or not all of whole nodes.
    [[ $gpus == 0 || $record == *TresPerNode=* && $record != *OverSubscribe=NO* ]] ||
        launcher+=("--gpus=$gpus")
    launcher+=("--cpus-per-task=$cpus" --kill-on-bad-exit=1 --export=ALL --label)
    [[ -n ${CONTAINER:-} ]] || return 0
    local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    if [[ $(srun --help 2>/dev/null) == *--container-image* ]]; then # pyxis
        launcher+=("--container-image=$CONTAINER" "--container-mounts=$mounts"
            "--container-workdir=$PWD")
        return 0
    fi
    local runtime
    runtime=$(command -v apptainer || command -v singularity) ||
        die "CONTAINER is set, but srun has no --container-image (pyxis) and there is no apptainer"
    launcher+=("$runtime" exec --bind "$mounts" --pwd "$PWD")
    ((gpus == 0)) || launcher+=(--nv)
    launcher+=("$CONTAINER")
}

# What srun says of a task that has failed.
TASK_ENDED='^srun: error: .*: tasks? .*: '

# Kill srun (its process id) should it not end by itself after a task has failed: it waits until every
# node has answered that the others are ended too, for ever if one is frozen. Notes that in `$scratch`.
end_stuck_srun() {
    local srun=$1 errors=$2 waited=0 most=${TASKS_END_S:-$((kill_wait + 30))}
    trap '' USR1 TERM # as in run_tasks
    # Not a pipeline, which would wait for `tail` too.
    grep -q -m1 -E "$TASK_ENDED" < <(tail --pid="$srun" -n +1 -f "$errors" 2>/dev/null) || return 0
    while kill -0 "$srun" 2>/dev/null; do
        if ((waited >= 5 * most)); then
            touch "$scratch/stuck"
            say "job $job: a node has not ended its tasks $most s after the first failed:" \
                "srun is killed"
            kill -KILL "$srun" 2>/dev/null || true
            return 0
        fi
        sleep 0.2
        waited=$((waited + 1))
    done
}

# Start the program on every rank and wait for its end, with its errors in the log. Sets `code`: 0,
# BAD_INPUT if any rank ended with it (another may have been ended for that before it could), else
# the exit code of the first rank that failed; `first` is what srun said of that one; `stuck` is not
# empty if a node did not end its tasks.
run_tasks() {
    local errors=$scratch/errors pipe=$scratch/pipe copier watcher helper
    rm -f "$pipe" "$scratch/stuck"
    : >"$errors"
    mkfifo "$pipe"
    # `scancel --full --signal` reaches every process of the script, this one too.
    (trap '' USR1 TERM && exec tee "$errors" <"$pipe" >&2) &
    copier=$!
    "$@" 2>"$pipe" &
    tasks_pid=$!
    end_stuck_srun "$tasks_pid" "$errors" &
    watcher=$!
    interrupted=1
    while ((interrupted)); do # a trap ends `wait` early
        interrupted=0 code=0
        wait "$tasks_pid" 2>/dev/null || code=$? # without bash's own word on a killed srun
    done
    tasks_pid=
    for helper in "$copier" "$watcher"; do
        while kill -0 "$helper" 2>/dev/null; do wait "$helper" || true; done
    done
    stuck=
    [[ ! -f $scratch/stuck ]] || stuck=1
    first=$(grep -m1 -E "$TASK_ENDED" "$errors") || first=
    first=${first#srun: error: }
    ((code == 0)) || ! grep -q -E "${TASK_ENDED}Exited with exit code $BAD_INPUT\$" "$errors" ||
        code=$BAD_INPUT
    ((code != 0 && code != BAD_INPUT)) || return 0
    if [[ $first =~ Exited\ with\ exit\ code\ ([0-9]+)$ ]]; then
        code=${BASH_REMATCH[1]}
    elif [[ $first == *Killed || $first == *'Out Of Memory' ]]; then
        code=137 # srun's own is the largest of all, or 1
    fi
}

# Traps: the tasks are to save and end. Only USR1 may be sent to srun; TERM makes it kill the tasks at
# once. The trainer takes a second signal for the same request.
stop_tasks() {
    interrupted=1
    stopping=$1
    say "job $job: SIG$1: asking the tasks to save and end"
    [[ -z $tasks_pid ]] || kill -USR1 "$tasks_pid" 2>/dev/null || true
}

# Ctrl-C, in a shell of salloc.
kill_tasks() {
    [[ -z $tasks_pid ]] || kill -TERM "$tasks_pid" 2>/dev/null || true
    exit 130
}

# Folders for what run_tasks and the restart loop note; the second outlives a requeue.
make_notes() {
    scratch=$(mktemp -d)
    notes=$PWD/runs/.slurm/$SLURM_JOB_ID
    keep_notes=
    tasks_pid='' stopping='' stuck='' interrupted=0
    kill_wait=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\) sec.*/\1/p') || kill_wait=
    kill_wait=${kill_wait:-30} # Slurm's own default
    mkdir -p "$notes" || die "cannot write to $notes: submit from a folder that the nodes can write to"
    # Those of jobs that were cancelled.
    find runs/.slurm -mindepth 1 -maxdepth 1 -mtime +30 -exec rm -rf {} + 2>/dev/null || true
    export PROGRESS_FILE=$notes/progress # training.checkpoint writes the newest step there
    trap 'rm -rf "$scratch"; [[ -n $keep_notes ]] || rm -rf "$notes"' EXIT
    trap 'stop_tasks USR1' USR1
    trap 'stop_tasks TERM' TERM
    trap kill_tasks INT
}

# The step of the newest checkpoint that rank 0 has noted.
progress() {
    cat "$PROGRESS_FILE" 2>/dev/null || echo 0
}

# End this script and have Slurm start it again, on nodes that work. A job that is already ending
# (cancelled, out of time, preempted) is left alone: Slurm has decided what becomes of it.
requeue_job() {
    local state step
    step=$(progress) # now: a requeue at once ends what this script runs
    state=$(job_field JobState) || state=unknown
    keep_notes=1
    if [[ $state != RUNNING ]]; then
        say "job $job: not requeued from here: Slurm is ending it ($state)"
    elif scontrol requeue "$job"; then
        say "job $job: requeued; it goes on at step $step"
    else
        keep_notes=
        say "job $job: Slurm did not requeue it; submit it again to go on at step $step"
    fi
    exit "$code"
}

# Whether Slurm is about to give the nodes to a job of higher priority: it has told the tasks (SIGTERM),
# not this script, and ends the job once the GraceTime of its partition or QOS is over.
being_preempted() {
    local at
    at=$(job_field PreemptTime) && [[ $at != None ]]
}

# Whether a start would hardly come to train before the time limit.
little_time_left() {
    local end
    end=$(job_field EndTime) && [[ $end != Unknown ]] &&
        (($(date -d "$end" +%s) - $(date +%s) < 1800))
}

# Requeue the job, without counting a failure, if its nodes are wanted.
yield_if_preempted() {
    being_preempted || return 0
    say "job $job: Slurm wants the nodes for a job of higher priority"
    requeue_job
}

# What a user cannot see from `first`: what has killed a task, and what to do.
explain_end() {
    local less="Ask sbatch for more (--mem=0: all of each node's), or hold less in memory, for example"
    less+=" with a smaller data.loader.prefetch_steps"
    case $first in
    *'Out Of Memory')
        say "job $job: the job's share of that node's host memory was too small. $less"
        ;;
    *Killed | *'exit code 137')
        say "job $job: SIGKILL that nobody here sent comes most often from the kernel, when" \
            "the node is out of host memory (\`dmesg\` there says so). $less"
        ;;
    esac
}

# The nodes of the job on which no task starts; none if the controller does not answer either.
silent_nodes() {
    local answers host
    answers=$(timeout --kill-after=5 "${NODE_CHECK_S:-30}" srun --overlap "--nodes=$nodes" \
        "--ntasks=$nodes" --ntasks-per-node=1 --cpus-per-task=1 --export=ALL \
        printenv SLURMD_NODENAME 2>/dev/null) || true
    [[ -n $answers ]] || return 0
    for host in "${hosts[@]}"; do
        grep -q -x -F "$host" <<<"$answers" || echo "$host"
    done
}

# Seconds to wait; a signal ends it.
pause() {
    sleep "$1" &
    wait $! || true
}

# Run the program of every rank until it is done (exit code 0 or BAD_INPUT), out of time (requeue), a
# node is lost (requeue), or too many starts in a row saved nothing; exits.
run_until_done() {
    local start=0 fruitless=0 before now silent advice='' most=${MAX_RESTARTS_WITHOUT_PROGRESS:-3}
    [[ ! -f $notes/fruitless ]] || fruitless=$(<"$notes/fruitless")
    while true; do
        before=$(progress)
        set_port "$start"
        run_tasks "$@"
        now=$(progress)
        ((code != 0 && code != BAD_INPUT)) || exit "$code"
        say "job $job: the tasks ended with exit code $code at step $now${first:+; first: $first}"
        yield_if_preempted
        # sbatch --signal without "B:" tells the tasks of the time limit, not this script.
        ((code != PREEMPTED)) || ! little_time_left || requeue_job
        explain_end
        [[ $now == "$before" ]] || fruitless=0
        if ((fruitless >= most)); then
            [[ -n $first ]] || advice="no task has started, and srun's line above says why: ask sbatch for it"
            say "error: $most restarts in a row saved no checkpoint: given up. Look above for the" \
                "first error; ${advice:-slurm/preflight.sh finds a bad node}" >&2
            exit "$code"
        fi
        fruitless=$((fruitless + 1))
        echo "$fruitless" >"$notes/fruitless"
        [[ -z $stopping ]] || requeue_job
        # At once the first time, then later and later: a file system may need a moment.
        ((fruitless == 1)) || pause $(((fruitless - 1) * ${RESTART_WAIT_S:-5}))
        silent=$(silent_nodes)
        if [[ -n $silent ]]; then
            say "job $job: no answer from ${silent//$'\n'/, }"
            requeue_job
        fi
        # What is left of the tasks occupies the allocation: nothing could start in it.
        [[ -z $stopping && -z $stuck ]] || requeue_job
        yield_if_preempted
        start=$((start + 1))
        say "job $job: start $((start + 1)) in this allocation, restart $fruitless of at" \
            "most $most without a checkpoint"
    done
}

# Run training.preflight on every rank. Sets `code`: 0, BAD_INPUT for a setting, else a node is bad.
run_preflight() {
    local limit=${PREFLIGHT_TIMEOUT_S:-60}
    set_port 0
    # Python ends itself in time; `timeout` is for a file system that keeps it from starting.
    run_tasks "${launcher[@]}" timeout --kill-after=5 "$((limit + 15))" \
        "$python" -m training.preflight --timeout "$limit" "$config" "${overrides[@]}"
}

# Site, Python and configuration of a stage or of preflight.sh.
prepare_stage() {
    load_site
    find_python
    take_config "$@"
}

prepare_tasks() {
    take_resources
    set_environment
    set_launcher
    echo "job $job (restart ${SLURM_RESTART_COUNT:-0}): $nodes nodes x $tasks tasks x" \
        "$cpus CPUs, rendezvous $MASTER_ADDR:$((20000 + SLURM_JOB_ID % 10000))"
    [[ $gpus == 0 || $record != *" NumTasks=${SLURM_NTASKS:-} "* || $ntasks == "$SLURM_NTASKS" ]] ||
        echo "note: $ntasks tasks, one for each GPU of the job, not the $SLURM_NTASKS of sbatch's options"
}
