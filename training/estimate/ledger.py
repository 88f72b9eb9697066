"""Which storages are alive, of which kind, and what the most was: tensor accounting.

The same ledger counts an engine on fake tensors and a real one, which is how the estimate is held
against a measurement.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import registration

_OWN_OPS = {
    torch.ops.tokenflex.projector_forward.default: registration.projector_forward,
    torch.ops.tokenflex.projector_backward.default: registration.projector_backward,
}
_GATHERS = ("c10d._allgather_base_", "c10d.allgather_into_tensor_coalesced_")
_SCATTERS = ("c10d._reduce_scatter_base_", "c10d.reduce_scatter_tensor_coalesced_")


class Ledger(TorchDispatchMode):
    """Counts bytes of live storages by kind: the `phase` in which they were made, unless told.

    totals: bytes by kind now. peak: the most at one time since `forget`; at_peak: by kind then.
    peaks: the most by phase. gathered, reduced: bytes of whole tensors in collectives.

    On fake tensors a number read from one (`.item()`) is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self._live: dict[int, tuple[int, str]] = {}
        self.totals: Counter[str] = Counter()
        self.total = 0
        self.forget()

    def forget(self) -> None:
        """Begin anew to look for a peak, and to count traffic."""
        self.peak, self.at_peak = self.total, Counter(self.totals)
        self.peaks: dict[str, int] = {}
        self.gathered = self.reduced = 0

    def label(self, tensor: Tensor, kind: str) -> None:
        """Say what a storage is, also one that was made before."""
        storage = tensor.untyped_storage()
        self._add(tensor)
        size, before = self._live[storage._cdata]
        self._live[storage._cdata] = (size, kind)
        self.totals[before] -= size
        self.totals[kind] += size

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is made inside is of this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def follow(self, module: nn.Module, phase: str, after: str) -> None:
        """Let the forward pass of a module be a phase, and what comes next another one."""
        module.register_forward_pre_hook(lambda *_: setattr(self, "phase", phase))
        module.register_forward_hook(lambda *_: setattr(self, "phase", after))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func is torch.ops.aten._local_scalar_dense.default and fake:
            return _one(args[0].dtype)
        if func in _OWN_OPS:  # opaque otherwise: what it makes inside would not be seen
            with self:
                out = _OWN_OPS[func]._init_fn(*args, **kwargs)
        elif tensors and not fake:  # what lies on the host may decide a shape
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        self._count_traffic(str(func), tensors)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _count_traffic(self, name: str, tensors: list[Tensor]) -> None:
        if name.startswith(_GATHERS):
            self.gathered += max(tensor.nbytes for tensor in tensors)
        elif name.startswith(_SCATTERS):
            self.reduced += max(tensor.nbytes for tensor in tensors)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = (size, self.phase)
        self.totals[self.phase] += size
        self.total += size
        weakref.finalize(storage, self._drop, key)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.total)
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, Counter(self.totals)

    def _drop(self, key: int) -> None:
        size, kind = self._live.pop(key, (0, self.phase))
        self.totals[kind] -= size
        self.total -= size


def _one(dtype: torch.dtype) -> float | int | bool:
    if dtype is torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1
