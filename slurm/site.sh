# shellcheck shell=bash
# Settings of your cluster: remove the "#" from a line to set it. The scripts of this folder source this
# file inside the job. sbatch reads its own settings earlier, so for those marked (submit) also run
# `source slurm/site.sh` in the shell that you call sbatch from; an option given to sbatch wins.
# To keep your settings outside the repository, copy this file and set SITE to the copy.

# (submit) Partition (queue) with the nodes to train on; `sinfo` lists them.
#export SBATCH_PARTITION=gpu

# (submit) Account (project) that is charged.
#export SBATCH_ACCOUNT=my-project

# (submit) Quality of service, where your site uses it.
#export SBATCH_QOS=normal

# (submit) Time limit. A longer one waits longer in the queue; a job that reaches its limit saves and
# goes back into the queue, so a short limit works too.
#export SBATCH_TIMELIMIT=24:00:00

# (submit) Kind of node, where a partition has several (the features that `sinfo -o "%N %f"` lists).
#export SBATCH_CONSTRAINT=h100

# (submit) When and how the job hears of its time limit, instead of 120 s before it: a save of a large
# model takes longer. B: tells the batch script; without it, the tasks, which works too.
#export SBATCH_SIGNAL=B:USR1@300

# Preemption (a job of higher priority takes the nodes) needs no setting here: the ranks save and the job
# is requeued, whether Slurm sends SIGTERM to the ranks, its default, or the signal above to the script
# (SlurmctldParameters=preempt_send_user_signal), and with PreemptMode REQUEUE or CANCEL. A save must
# fit into the GraceTime of the partition (`scontrol show partition`) or QOS (`sacctmgr show qos
# format=name,gracetime`); with none, Slurm kills at once and the job goes on from its last checkpoint:
# by itself with REQUEUE, when you submit it again with CANCEL.

# Network interface between the nodes (`ip -brief address` lists them; "ib" also matches ib0, ib1).
# NCCL carries the GPUs' traffic and gloo the CPUs'; both guess, and a wrong guess hangs at the start.
#export NCCL_SOCKET_IFNAME=ib
#export GLOO_SOCKET_IFNAME=ib0

# InfiniBand adapters that NCCL may use, where a node has others too (`ibv_devices` lists them).
#export NCCL_IB_HCA=mlx5

# What NCCL prints: INFO shows which network it chose.
#export NCCL_DEBUG=WARN

# Container to train in, and folders it needs besides the repository (`slurm/pretrain.sh --help`): an
# image name or file for pyxis/enroot, a .sif file for apptainer.
#export CONTAINER=/shared/images/trainer.sif
#export CONTAINER_MOUNTS=/shared/data:/shared/data

# Restarts in a row that may fail before a checkpoint is saved, until the job gives up.
#export MAX_RESTARTS_WITHOUT_PROGRESS=3

# Check every node before training (slurm/preflight.sh --help): a minute at most, seconds as a rule.
#export PREFLIGHT=1

# Where Hugging Face models and tokenizers are cached: a folder that every node sees.
#export HF_HOME=/shared/huggingface

# Compute nodes without internet: fail at once for a model that is not in that cache.
#export HF_HUB_OFFLINE=1

# Software modules, where the system's compiler or CUDA is too old.
#module load gcc cuda
