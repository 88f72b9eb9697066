# shellcheck shell=bash
# What a job has been given: GPUs, CPUs and tasks of every node. lib.sh sources this file.
# shellcheck disable=SC2034,SC2154 # variables of lib.sh

# A line per node of what Slurm writes as "16(x2),8": 16, 16, 8.
per_node() {
    local part count
    for part in ${1//,/ }; do
        count=1
        [[ ! $part =~ \(x([0-9]+)\) ]] || count=${BASH_REMATCH[1]}
        for (( ; count; count--)); do echo "${part%%(*}"; done
    done
}

# Sets `shares` to the GPUs that the job has on each of `hosts`, as its record says. A Slurm before 20.02
# does not say it there: then as on the first node.
take_gpus() {
    local list count host
    declare -A found=()
    while read -r list count; do
        for host in $(scontrol show hostnames "$list"); do found[$host]=$count; done
    done < <(awk '/^ +Nodes=.* GRES=/ { # Nodes=n[1-2] CPU_IDs=0-7 Mem=0 GRES=gpu:a100:2(IDX:0,1),nic:1
        gres = $NF; gsub(/^GRES=|\([^)]*\)/, "", gres); count = 0
        for (i = split(gres, kinds, ","); i; i--)
            if (kinds[i] ~ /^gpu:/) count += substr(kinds[i], match(kinds[i], /[0-9]+$/))
        if (count) print substr($1, 7), count
    }' <<<"$record")
    [[ $record == *' GRES='* ]] || count=${SLURM_GPUS_ON_NODE:-}
    shares=()
    for host in "${hosts[@]}"; do shares+=("${found[$host]:-${count:-0}}"); done
}

# The numbers' sum.
total() {
    local IFS=+
    echo $(($*))
}

# Sets `cpus`, of each task: as many as every node has for each of its `shares`.
take_cpus() {
    local on_node each i
    mapfile -t on_node < <(per_node "$SLURM_JOB_CPUS_PER_NODE")
    cpus=${on_node[0]}
    for i in "${!shares[@]}"; do
        ((shares[i])) || die "no GPU on node ${hosts[i]}, but on others of the job: ask sbatch for the" \
            "same on each, with --gpus-per-node"
        each=$((on_node[i] / shares[i]))
        ((each || ${SLURM_OVERCOMMIT:-0})) || die "${on_node[i]} CPU for ${shares[i]} tasks on each" \
            "node such as ${hosts[i]}: ask sbatch for more, for example with --cpus-per-gpu=8," \
            "--cpus-per-task=8 or --exclusive"
        ((cpus <= each)) || cpus=$each
    done
    ((cpus)) || cpus=1
}

# Sets, from the job (needs require_job), `nodes`, `hosts`, `shares` (the tasks on each), `tasks` (the
# same on each, or "2,1"), `ntasks` (on all), `gpus` (on all), `cpus` (of each task) and `places` (the
# host of each rank).
take_resources() {
    local i rank
    nodes=$SLURM_JOB_NUM_NODES
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    take_gpus
    gpus=$(total "${shares[@]}")
    [[ ${TASKS_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] || die "TASKS_PER_NODE is $TASKS_PER_NODE: give a number"
    if ((gpus == 0)); then
        mapfile -t shares < <(per_node "$SLURM_TASKS_PER_NODE")
        # Where sbatch was not told how many, Slurm means as many as there are CPUs.
        [[ -z ${TASKS_PER_NODE:-} && $record == *" NumTasks=$(total "${shares[@]}") "* ]] ||
            mapfile -t shares < <(per_node "${TASKS_PER_NODE:-1}(x$nodes)")
    fi
    take_cpus
    ntasks=$(total "${shares[@]}")
    tasks=${shares[0]}
    [[ ${shares[*]} =~ ^$tasks(\ $tasks)*$ ]] || tasks=$(IFS=, && echo "${shares[*]}")
    places=()
    for i in "${!hosts[@]}"; do
        for ((rank = 0; rank < shares[i]; rank++)); do places+=("${hosts[i]}"); done
    done
}
