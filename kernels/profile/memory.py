"""Memory of a call: what autograd keeps for backward, what the allocator holds, the peak."""

import gc
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.profile.baselines import Call
from kernels.profile.random_inputs import Inputs, backward


@dataclass(frozen=True)
class Memory:
    """Bytes. saved: kept by autograd, x and parameters left out. saved_x: x, where it is kept.

    held: what the allocator still holds after forward besides the result. peak: most that one
    forward and backward needs besides its inputs. The last two are None on a CPU.
    """

    saved: int
    saved_x: int
    held: int | None
    peak: int | None


def measure_memory(call: Call, inputs: Inputs, device: torch.device) -> Memory:
    """Memory of one forward and backward; the call has run before, so that nothing compiles."""
    saved, saved_x = saved_for_backward(call, inputs)
    if device.type != "cuda":
        return Memory(saved, saved_x, None, None)
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = call(inputs.x, inputs.weights)
    held = torch.cuda.memory_allocated(device) - before - out.nbytes
    backward(inputs, out)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Memory(saved, saved_x, held, peak)


def saved_for_backward(call: Call, inputs: Inputs) -> tuple[int, int]:
    """Bytes of the different storages autograd saves, without parameters: (others, that of x)."""
    parameters = {weight.untyped_storage().data_ptr() for weight in inputs.weights}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, where it is a result, would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(inputs.x, inputs.weights)
    del out
    x = found.pop(inputs.x.untyped_storage().data_ptr(), 0)
    return sum(size for pointer, size in found.items() if pointer not in parameters), x
