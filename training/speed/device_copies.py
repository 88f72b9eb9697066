"""The next pack's copy to the GPU, on a stream of its own, while this pack is computed."""

import torch

from data_pipeline.loader import PackedBatch


class PackCopies:
    """Copies packs in page-locked memory to a device, one ahead; on a CPU there is nothing to copy.

    Neither call waits for the device.
    """

    def __init__(self, device: torch.device, one_ahead: bool = True) -> None:
        self._device = device
        own = one_ahead and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if own else None
        self._ahead: tuple[PackedBatch, PackedBatch] | None = None

    def begin(self, pack: PackedBatch | None) -> None:
        """Begin to copy the pack that is taken next, if it is known by now."""
        if pack is None or self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            self._ahead = pack, pack.to(self._device)

    def take(self, pack: PackedBatch) -> PackedBatch:
        """The pack on the device, for the current stream: the copy that was begun, or one now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not pack:
            return pack.to(self._device)
        assert self._stream is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in ahead[1].tensors().values():
            if tensor.is_cuda:
                tensor.record_stream(current)  # else its memory were free for the next copy
        return ahead[1]
