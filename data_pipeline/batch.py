"""From a pack's plan to its tensors: read, check, decode, tile, tokenise."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipeline.chat import ChatSettings, expand_images, tokenize_chat
from data_pipeline.decode import image_tiles
from data_pipeline.errors import InputError
from data_pipeline.index import BadSample
from data_pipeline.loss_weighting import LossWeighting, loss_weight
from data_pipeline.mixture import Mixture
from data_pipeline.plan import PackPlan
from data_pipeline.storage import StoreError
from data_pipeline.tiling import Resample, TilingSettings, num_tiles
from data_pipeline.tokenizer import Tokenizer

IGNORE = -100
"""Label of a token that is not supervised."""


@dataclass
class PackedBatch:
    """One pack as the model takes it: L tokens of S samples, T tiles.

    Where the plan has copies of a sample, at several token counts, each counts as a sample here,
    but for `num_samples`, `num_images` and `bad`.

    input_ids: int64 [L].
    position_ids: int64 [L], from 0 in each sample.
    cu_seqlens: int32 [S+1]; sample s has the tokens cu_seqlens[s] .. cu_seqlens[s+1].
    labels: int64 [L], not shifted; IGNORE where nothing is supervised, as is every first token.
    loss_weights: float32 [L], 0 where the label is IGNORE.
    target_positions: int64 [K], the tokens before those with a label, whose states predict them.
    targets, target_weights: int64 [K], float32 [K], the labels and loss weights of these.
    image_positions: int64 [sum of n^2], where the features of the tiles go.
    tiles: uint8 [T, 3, H, W], in the order of their tokens.
    tile_sides: n of each tile (n^2 tokens), on the host.
    num_images: images that the tiles were cut from. num_samples: different samples.
    sample_ids: ids in the mixture.
    sample_datasets: number of each sample's dataset.
    sample_sides: n of each sample if its images share one, 0 for text only, -1 for several.
    max_seqlen: tokens of the longest sample.
    planned_tokens: tokens of the plan; 0 for an empty pack, else L.
    teachers: int64 [K], the place among the targets of the same token in the sample's last copy,
        that of the most image tokens. student_weights: float32 [K], `target_weights`, but 0 there.
    bad: the samples that could not be used. Each keeps its planned length, as pad tokens without
        labels, weights or tiles, so that no other sample moves.

    A pack without samples is one pad token: cu_seqlens [0, 1], nothing supervised.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    target_positions: torch.Tensor
    targets: torch.Tensor
    target_weights: torch.Tensor
    image_positions: torch.Tensor
    tiles: torch.Tensor
    tile_sides: list[int]
    num_images: int
    num_samples: int
    sample_ids: list[int]
    sample_datasets: list[int]
    sample_sides: list[int]
    max_seqlen: int
    planned_tokens: int
    bad: list[BadSample]
    teachers: torch.Tensor | None = None
    student_weights: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "PackedBatch":
        """A copy with the tensors on a device, without waiting for pinned ones to arrive."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> "PackedBatch":
        """A copy in page-locked memory, from which `to` does not block; needs CUDA."""
        pinned = {name: t.pin_memory() for name, t in self.tensors().items()}
        return replace(self, **pinned)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that `to` moves, by name."""
        return {name: v for name, v in vars(self).items() if isinstance(v, torch.Tensor)}


@dataclass(frozen=True)
class _Sample:
    """The content of one copy of a good sample, K tokens."""

    input_ids: np.ndarray
    supervised: np.ndarray
    tile_sides: list[int]


class PackBuilder:
    """Builds packs; `build` may run in several threads at once.

    Args:
        mixture: what the plan was made from.
        tokenizer, chat: those its indexes were made with.
        tiling: the planner's.
        loss_weighting: see `data_pipeline.loss_weighting`.
        reduced_jpeg: decode large photographs at a smaller scale where the tiles allow it.
        resample: what resizes pictures; see `data_pipeline.tiling.Resample`.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        chat: ChatSettings,
        tiling: TilingSettings,
        loss_weighting: LossWeighting = "sqrt",
        reduced_jpeg: bool = True,
        resample: Resample = "pillow",
    ) -> None:
        self.mixture = mixture
        self._tokenizer, self._chat, self._tiling = tokenizer, chat, tiling
        self._loss_weight = loss_weight(loss_weighting)
        self._reduced_jpeg, self._resample = reduced_jpeg, resample
        self._image_context = tokenizer.special_id("<IMG_CONTEXT>")

    def build(self, pack: PackPlan) -> PackedBatch:
        """Build one pack; see `PackedBatch` for what becomes of samples that cannot be used.

        StoreError where a store fails, which is not the sample's fault.
        """
        sample_ids = pack.sample_ids.tolist()
        # An empty pack is one token.
        cu_seqlens = np.cumsum([0, *pack.lengths.tolist()] if sample_ids else [0, 1])
        lengths = np.diff(cu_seqlens)
        input_ids = np.full(cu_seqlens[-1], self._tokenizer.pad_id, dtype=np.int64)
        labels = np.full(cu_seqlens[-1], IGNORE, dtype=np.int64)
        loss_weights = np.zeros(cu_seqlens[-1], dtype=np.float32)
        tiles = np.empty((pack.num_tiles, 3, *2 * (self._tiling.tile_size,)), np.uint8)
        tile_sides: list[int] = []
        num_images = 0
        teachers: list[np.ndarray] = [np.empty(0, np.int64)]
        bad: list[BadSample] = []
        for copies_at in pack.samples:
            sample = sample_ids[copies_at.start]
            try:
                # The room of a bad sample is the next one's.
                copies = self._read(sample, pack, copies_at, tiles[len(tile_sides) :])
            except (MemoryError, StoreError):  # no fault of the sample
                raise
            except Exception as error:  # decoders meet anything; one sample must not end the run
                bad.append(self.mixture.bad_sample(sample, _reason(error)))
                continue
            for i, content in zip(copies_at, copies, strict=True):
                own = slice(cu_seqlens[i], cu_seqlens[i + 1])
                input_ids[own] = content.input_ids
                labels[own] = np.where(content.supervised, content.input_ids, IGNORE)
                supervised = max(1, int(content.supervised.sum()))
                weight = self._loss_weight(supervised) / len(copies_at)  # mean over the copies
                loss_weights[own] = weight * content.supervised
                tile_sides += content.tile_sides
            num_images += len(pack.sides[copies_at.start])
            teachers.append(_teachers(copies) + sum(map(len, teachers)))
        features = sum(side * side for side in tile_sides)
        image_positions = np.flatnonzero(input_ids == self._image_context)
        found = len(image_positions)
        assert found == features, f"{found} <IMG_CONTEXT> for {features} image features"
        supervised_tokens = np.flatnonzero(labels != IGNORE)
        teacher, weights = np.concatenate(teachers), loss_weights[supervised_tokens]
        assert len(teacher) == len(supervised_tokens)
        is_student = teacher != np.arange(len(teacher))
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(
                np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
            ),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            labels=torch.from_numpy(labels),
            loss_weights=torch.from_numpy(loss_weights),
            target_positions=torch.from_numpy(supervised_tokens - 1),
            targets=torch.from_numpy(labels[supervised_tokens]),
            target_weights=torch.from_numpy(weights),
            image_positions=torch.from_numpy(image_positions),
            tiles=torch.from_numpy(tiles[: len(tile_sides)]),
            tile_sides=tile_sides,
            num_images=num_images,
            num_samples=len(pack.samples),
            sample_ids=sample_ids,
            sample_datasets=[self.mixture.dataset(sample) for sample in sample_ids],
            sample_sides=[_common_side(sides) for sides in pack.sides],
            max_seqlen=int(lengths.max()),
            planned_tokens=pack.tokens,
            bad=bad,
            teachers=torch.from_numpy(teacher),
            student_weights=torch.from_numpy(weights * is_student),
        )

    def _read(self, sample: int, pack: PackPlan, places: range, room: np.ndarray) -> list[_Sample]:
        """Read and decode one sample; InputError if it is not what the index says.

        Args:
            places: of its copies in the pack, which are returned.
            room: uint8 [T, 3, H, W]; the tiles of the copies are written to the beginning.
        """
        content, images = self.mixture.read(sample)
        chat = tokenize_chat(content["messages"], self._tokenizer, self._chat)
        planned = pack.tiles[places.start]
        image_tokens = [pack.sides[i] ** 2 * planned for i in places]
        for i, tokens in zip(places, image_tokens, strict=True):
            _check("tokens", len(chat.input_ids), int(pack.lengths[i]) - int(tokens.sum()))
        _check("supervised tokens", sum(chat.supervised), self.mixture.supervised_tokens(sample))
        _check("images", len(chat.image_positions), len(planned))
        sizes = self.mixture.image_sizes(sample).tolist()
        found = [num_tiles(width, height, self._tiling) for width, height in sizes]
        _check("tiles", found, planned.tolist())
        ends = np.cumsum(planned).tolist()
        for i, data in enumerate(images):
            image_tiles(
                data,
                tuple(sizes[i]),
                self._tiling,
                self._reduced_jpeg,
                resample=self._resample,
                out=room[ends[i] - found[i] : ends[i]],
            )
        count = sum(found)
        for copy in range(1, len(places)):
            room[copy * count : (copy + 1) * count] = room[:count]
        copies = []
        for i, tokens in zip(places, image_tokens, strict=True):
            input_ids, supervised = expand_images(chat, tokens.tolist(), self._image_context)
            supervised[0] = False  # nothing comes before it that could predict it
            sides = np.repeat(pack.sides[i], planned).tolist()
            copies.append(_Sample(np.array(input_ids), np.array(supervised), sides))
        return copies


def _teachers(copies: list[_Sample]) -> np.ndarray:
    """For each supervised token of the copies, the place of the last copy's among them."""
    count = int(copies[0].supervised.sum())
    last = (len(copies) - 1) * count
    return np.tile(np.arange(last, last + count), len(copies))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise InputError(
            f"{found} {what} where the index has {expected}: the index does not match the shard; "
            "run python -m data_pipeline.index again"
        )


def _common_side(sides: np.ndarray) -> int:
    """See `PackedBatch.sample_sides`."""
    unique = set(sides.tolist())
    return unique.pop() if len(unique) == 1 else -1 if unique else 0
