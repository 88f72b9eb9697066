"""Exit codes of the trainer, which slurm/pretrain.sh acts on, and how a rank ends with one."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from training.side_outputs import unfailing_console

OK = 0
CRASH = 1  # as any code that is not named here
BAD_INPUT = 2  # a setting or the data: starting again would end the same way
OUT_OF_MEMORY = 12  # of training.gpu_record: the GPU has too little for what was measured
PREEMPTED = 75  # asked to stop, state saved: start again
STUCK = 76  # a rank hung and was ended: start again


def run_rank(main: Callable[[], int]) -> NoReturn:
    """End this process with the code that `main()` returns, or that of a crash if it raises.

    The interpreter is not torn down: a thread of gloo that frees a tensor just then aborts a run
    that ended well (pytorch/pytorch#190489), and one that waits for a file system that hangs would
    keep the process.
    """
    unfailing_console()
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = CRASH
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "SLURM_STEP_ID" in os.environ:
        time.sleep(1)  # srun may drop the last words of a task while it ends the others
    os._exit(code)
