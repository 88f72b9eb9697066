"""Exit codes of the trainer, which slurm/pretrain.sh acts on. Any other code is a crash."""

OK = 0
BAD_INPUT = 2  # a setting or the data: starting again would end the same way
PREEMPTED = 75  # asked to stop, state saved: start again
STUCK = 76  # a rank hung and was ended: start again
