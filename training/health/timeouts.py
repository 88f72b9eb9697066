"""How long a rank waits for the others in a collective, changed while training runs."""

import warnings
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d


def set_timeout(seconds: float) -> bool:
    """Give every process group of this process a timeout for the collectives begun from now on.

    Groups made later do not inherit it: they take torch's default (gloo 30 minutes, NCCL 10), and
    the engine makes its own while it is built, so call this once the engine is there.

    Returns:
        False, with a warning, where this version of torch would not take it for some group.
    """
    refused = []
    for group in list(distributed_c10d._world.pg_map):
        try:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        except (AttributeError, RuntimeError, TypeError) as error:
            refused.append(str(error))
            continue
        if any(abs(found - seconds) > 1e-3 for found in group_timeouts(group)):
            refused.append(f"it stayed at {group_timeouts(group)}")
    if refused:
        warnings.warn(
            f"the process groups' timeout could not be set to {seconds} s ({refused[0]}); a hung "
            "rank is noticed by the watchdog only",
            stacklevel=2,
        )
    return not refused


def group_timeouts(group: Any = None) -> list[float]:
    """Seconds after which a collective of the group (None: the world) fails, per backend."""
    group = group or torch.distributed.group.WORLD
    backends = [group._get_backend(device) for device in group._device_types]
    return [backend.options._timeout.total_seconds() for backend in backends]
