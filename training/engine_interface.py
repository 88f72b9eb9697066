"""What the trainer asks of an engine: everything between a model and its trained, saved shards.

`training/zero3/` is the one there is. Another one is a folder beside it that offers these,
which `train.py`, `preflight/`, `checkpoint/`, `estimate/`, `export/`, `health/` and `record/`
import by name:

    extra.check_extra               InputError for settings of the engine that cannot be used
    engine.build_engine             the model of a run, partitioned, and its optimizer: an `Engine`;
                                    rows of new tokens (`model/new_rows.py`) and adapters
                                    (`adapters/`) are put into it
    process_group.init_distributed  join the process group; returns this process's `Ranks`
    process_group.quiet_libraries   hide the start-up chatter of its libraries
    fake.join_fake_group            for estimates: be in a group whose other ranks do not exist
    fake.without_values             build models whose weights are not drawn
    fake.resident_tensors           what the engine holds between steps, by kind
    fake.around_gathers             a context around every fetch of whole parameters
    fake.offloaded                  whether optimizer and weights are on the host
    fake.OFFLOAD_OPTIMIZER          the setting that moves the optimizer there
    pickles.scan_pickle             InputError for a shard that would run code when it is opened
    saved_tensors.saved_tensors     the weights in the shards, for export: needs no engine; rows of
                                    new tokens in their places, adapters merged; or their moving
                                    average (`train.ema`), which the engine keeps in its shards
    saved_tensors.SavedTensor       one of them
    PACKAGE                         its package: for records, and to tell who waits in a collective

Nothing else outside such a folder knows which engine runs.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from training.adapters import StageAdapters


class Engine(Protocol):
    """A model that trains in parts on all ranks; every rank makes every call, in the same order.

    A step is a forward call and `backward` for each of its packs, then `step` or `skip`.
    """

    @property
    def module(self) -> nn.Module:
        """The model, to look at: its parameters may be partitioned."""

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The shape of one of the model's parameters as a whole."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with `lr` to be set before a step, `peak_lr` and `name`."""

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward pass."""

    def train(self) -> None:
        """Put the model in training mode."""

    def eval(self) -> None:
        """Put the model in evaluation mode."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a pack's gradients, averaged over ranks, to the step's sum.

        last: whether it is the step's last pack on this rank.
        """

    def step(self) -> float:
        """Clip the summed gradients, update the weights, drop the sum; returns its norm.

        Where the norm is not finite, nothing is updated.
        """

    def skip(self) -> None:
        """`step` without the update: weights, optimizer and its count of steps stay."""

    def snapshot_bytes(self) -> int:
        """About what this rank's part of a checkpoint takes.

        Raises:
            InputError: if the settings keep the optimizer where it cannot be saved from.
        """

    def snapshot(self, rng: dict[str, Any]) -> dict[str, Any]:
        """This rank's shards as of now: what `torch.save` is to write, by file name.

        All tensors are copies in host memory, which live until the next snapshot.

        Args:
            rng: this rank's random states, to be saved with them.
        """

    def frozen_hashes(self) -> dict[str, str]:
        """SHA-256 of every frozen parameter's bytes by name, whatever the number of ranks."""

    def load(self, path: Path, world_size: int, frozen: dict[str, str]) -> dict[str, Any] | None:
        """Restore everything from a checkpoint that any number of ranks saved.

        The options of the parameter groups stay those of this run.

        Args:
            path: the checkpoint's folder, its checksums and pickles verified.
            world_size: the number of ranks that saved it.
            frozen: the `frozen_hashes` it was saved with; empty if they are not known.

        Returns:
            This rank's random states; None if fewer ranks saved than there are now.

        Raises:
            InputError: if it is of another model, or cannot be loaded by as many ranks.
        """

    def load_weights(
        self,
        path: Path,
        world_size: int,
        vocabulary: int = 0,
        adapters: StageAdapters | None = None,
        apart: Collection[str] = (),
    ) -> list[str]:
        """Take only the weights of a verified checkpoint; other modules may have been frozen.

        Args:
            path: the checkpoint's folder.
            world_size: the number of ranks that saved it.
            vocabulary: tensors of as many rows here may have fewer there, whose places are the
                first; the other rows stay as they are. 0: none may.
            adapters: those it was saved with, which are merged into their matrices.
            apart: parts of the model whose adapters are the same here: they are taken as they are.

        Returns:
            What of it differs, in words: tensors that this model has not, or with more rows.

        Raises:
            InputError: if it is of another model.
        """
