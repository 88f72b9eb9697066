"""What the page shows of a pack: its bar, and the samples that were chosen from it."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.batch import PackBuilder
from data_pipeline.index.columns import CAPTION_JSON, CAPTION_TEXT, CHAT
from data_pipeline.inspect.content import BuiltSample, ShownPiece, picture, pieces, unpack
from data_pipeline.mixture import Mixture, split_ids
from data_pipeline.plan import PackPlan
from data_pipeline.tiling import TilingSettings, grid_for
from data_pipeline.tokenizer import Tokenizer

_KINDS = {CHAT: "chat", CAPTION_TEXT: "caption", CAPTION_JSON: "caption in JSON"}


@dataclass(frozen=True)
class ImageView:
    """An image as the model gets it.

    grid, thumbnail: data URIs of the tiles put together and of the last tile, where it shows the
        whole image; else None.
    width, height: of the file, in pixels, upright. side: n, each tile being n x n tokens.
    """

    grid: str
    thumbnail: str | None
    width: int
    height: int
    columns: int
    rows: int
    side: int

    @property
    def tiles(self) -> int:
        """Tiles, the thumbnail included."""
        return self.columns * self.rows + (self.thumbnail is not None)


@dataclass(frozen=True)
class SampleView:
    """A sample with its content; `step` counts from 1, `pack` and `place` from 0."""

    dataset: str
    name: str
    kind: str
    step: int
    pack: int
    tokens: int
    supervised: int
    images: list[ImageView]
    pieces: list[ShownPiece]
    reason: str


@dataclass(frozen=True)
class Segment:
    """A sample in the bar of its pack; `sides`: n of each of its tiles."""

    name: str
    dataset: int
    tokens: int
    image_tokens: int
    supervised: int
    sides: list[int]
    bad: bool


@dataclass(frozen=True)
class PackView:
    """A pack as it was built; `flops` is the planner's, `samples` are by place in the pack."""

    pack: int
    tokens: int
    tiles: int
    flops: float
    segments: list[Segment]
    samples: dict[int, SampleView]
    bad: list[tuple[str, str]]


@dataclass(frozen=True)
class ViewBuilder:
    """Builds packs and keeps of them what the page shows; safe to use from several threads."""

    mixture: Mixture
    builder: PackBuilder
    tokenizer: Tokenizer
    tiling: TilingSettings

    def view(self, step: int, pack: int, plan: PackPlan, wanted: set[int]) -> PackView:
        """Build one pack; `wanted`: the places of the samples to be shown with their content."""
        batch = self.builder.build(plan)
        samples = unpack(batch, plan, self.tokenizer)
        names = [self.mixture.name(sample) for sample in batch.sample_ids]
        return PackView(
            pack=pack,
            tokens=batch.planned_tokens,
            tiles=len(batch.tiles),
            flops=plan.flops,
            segments=[
                _segment(name, dataset, sample)
                for name, dataset, sample in zip(names, batch.sample_datasets, samples, strict=True)
            ],
            samples={
                i: self._sample(step, pack, batch.sample_ids[i], plan.tiles[i], samples[i])
                for i in wanted
            },
            bad=[
                (name, sample.reason)
                for name, sample in zip(names, samples, strict=True)
                if sample.reason
            ],
        )

    def kind(self, sample: int) -> str:
        """What the text member of a sample is."""
        dataset, number = (int(part[0]) for part in split_ids(np.array([sample])))
        index = self.mixture.datasets[dataset].index
        shard = int(np.searchsorted(index.starts, number, side="right")) - 1
        return _KINDS[int(index.columns(shard).kind[number - index.starts[shard]])]

    def _sample(
        self, step: int, pack: int, sample: int, image_tiles: np.ndarray, built: BuiltSample
    ) -> SampleView:
        return SampleView(
            dataset=self.mixture.names[self.mixture.dataset(sample)],
            name=self.mixture.name(sample),
            kind=self.kind(sample),
            step=step,
            pack=pack,
            tokens=len(built.input_ids),
            supervised=built.supervised,
            images=[] if built.reason else self._images(sample, image_tiles, built),
            pieces=[] if built.reason else pieces(built, image_tiles.tolist(), self.tokenizer),
            reason=built.reason,
        )

    def _images(self, sample: int, image_tiles: np.ndarray, built: BuiltSample) -> list[ImageView]:
        views, tile = [], 0
        sizes = self.mixture.image_sizes(sample).tolist()
        for (width, height), count in zip(sizes, image_tiles.tolist(), strict=True):
            columns, rows = grid_for(width, height, self.tiling)
            cells = built.tiles[tile : tile + columns * rows]
            rest = built.tiles[tile + columns * rows : tile + count]
            views.append(
                ImageView(
                    grid=picture(cells, columns),
                    thumbnail=picture(rest, 1) if len(rest) else None,
                    width=width,
                    height=height,
                    columns=columns,
                    rows=rows,
                    side=built.tile_sides[tile],
                )
            )
            tile += count
        return views


def _segment(name: str, dataset: int, sample: BuiltSample) -> Segment:
    return Segment(
        name=name,
        dataset=dataset,
        tokens=len(sample.input_ids),
        image_tokens=sum(side * side for side in sample.tile_sides),
        supervised=sample.supervised,
        sides=sample.tile_sides,
        bad=bool(sample.reason),
    )
