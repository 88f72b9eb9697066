"""A pack as it was built, taken apart again: tokens as text, tiles as pictures, labels as marks."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image

from data_pipeline.batch import IGNORE, PackedBatch
from data_pipeline.plan import PackPlan
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS
from data_pipeline.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_BYTES_OF_A_CHARACTER = 8  # tokens that may together be one character; UTF-8 takes 4
_LOSSLESS_PIXELS = 512 * 512
_MAX_PICTURE_SIDE = 1024


@dataclass(frozen=True)
class BuiltSample:
    """One sample of a built pack: K tokens, T tiles.

    input_ids, labels: int64 [K]. tiles: uint8 [T, 3, H, W]. tile_sides: n of each tile.
    reason: why it could not be used, empty for a good sample.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    tile_sides: list[int]
    reason: str

    @property
    def supervised(self) -> int:
        """Tokens with a label."""
        return int((self.labels != IGNORE).sum())


def unpack(batch: PackedBatch, plan: PackPlan, tokenizer: Tokenizer) -> list[BuiltSample]:
    """The samples of a pack, from its tensors; `plan` says only how many tiles each was given."""
    bounds = batch.cu_seqlens.tolist()
    input_ids, labels, tiles = (t.numpy() for t in (batch.input_ids, batch.labels, batch.tiles))
    context = tokenizer.special_id("<IMG_CONTEXT>")
    reasons = iter(batch.bad)
    firsts = {places.start for places in plan.samples}
    samples, tile, reason = [], 0, ""
    for i, planned in enumerate(plan.tiles):
        own = slice(bounds[i], bounds[i + 1])
        # A sample that could not be used is all padding; a good one begins with <|im_start|>.
        bad = bool((input_ids[own] == tokenizer.pad_id).all())
        end = tile if bad else tile + int(planned.sum())
        sides = batch.tile_sides[tile:end]
        assert sum(n * n for n in sides) == np.count_nonzero(input_ids[own] == context)
        if i in firsts:  # its copies are as good
            reason = next(reasons).reason if bad else ""
        samples.append(BuiltSample(input_ids[own], labels[own], tiles[tile:end], sides, reason))
        tile = end
    assert tile == len(tiles) and next(reasons, None) is None
    return samples


@dataclass(frozen=True)
class ShownPiece:
    """Text that `tokens` neighbouring tokens give, all of them supervised or none.

    kind: "text", "special" (a marker of the prompt) or "image" (a run of <IMG_CONTEXT>).
    """

    text: str
    kind: str
    supervised: bool
    tokens: int = 1


def pieces(sample: BuiltSample, image_tiles: list[int], tokenizer: Tokenizer) -> list[ShownPiece]:
    """A sample token by token; several tokens in a piece only where they make up one character.

    Args:
        image_tiles: tiles of each of its images.
    """
    specials = {tokenizer.special_id(token): token for token in SPECIAL_TOKENS}
    context = tokenizer.special_id("<IMG_CONTEXT>")

    def kind_and_label(token: tuple[int, int]) -> tuple[str, bool]:
        kind = "image" if token[0] == context else "special" if token[0] in specials else "text"
        return kind, token[1] != IGNORE

    found: list[ShownPiece] = []
    images = _image_names(sample, image_tiles)
    tokens = zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True)
    for (kind, supervised), run in groupby(tokens, kind_and_label):
        ids = [token for token, _ in run]
        if kind == "image":
            found.append(ShownPiece(next(images), kind, supervised, len(ids)))
        elif kind == "special":
            found += [ShownPiece(specials[token], kind, supervised) for token in ids]
        else:
            texts = _decode(ids, tokenizer)
            found += [ShownPiece(visible(text), kind, supervised, count) for text, count in texts]
    return found


def _image_names(sample: BuiltSample, image_tiles: list[int]) -> Iterator[str]:
    tile = 0
    for count in image_tiles:
        tokens = sample.tile_sides[tile] ** 2
        yield f"<image: {count} {'tile' if count == 1 else 'tiles'} x {tokens} tokens>"
        tile += count


def _decode(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """(text, tokens) of a run of text tokens, one token at a time where its text is whole.

    A token is decoded behind the one before it: many tokenizers drop a leading space otherwise.
    """
    before, done = 0, 0
    for end in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[before:done]) if done else ""
        text = tokenizer.decode(ids[before:end])
        whole = not text.endswith(_REPLACEMENT) or end - done >= _MAX_BYTES_OF_A_CHARACTER
        if not whole and end < len(ids):
            continue
        yield text.removeprefix(known), end - done
        before, done = done, end


def visible(text: str) -> str:
    """Text with characters that show nothing, or turn the line around, written out."""
    return text.translate(_WRITTEN_OUT)


# Controls; zero-width characters, bidirectional overrides and isolates, line separators, byte
# order mark.
_INVISIBLE = (*range(0x7F, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F))
_WRITTEN_OUT = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    **{code: f"\u2039U+{code:04X}\u203a" for code in (*_INVISIBLE, *range(0x2060, 0x206A), 0xFEFF)},
    ord("\n"): "\u21b5\n",
    ord("\t"): "\u21e5\t",
}


def picture(tiles: np.ndarray, columns: int) -> str:
    """Tiles uint8 [T, 3, H, W], row by row in a grid of so many columns, as a data URI.

    Small pictures keep every pixel (PNG); large ones are JPEG of at most 1024 pixels a side.
    """
    number, _, height, width = tiles.shape
    rows = number // columns
    grid = tiles.reshape(rows, columns, 3, height, width).transpose(0, 3, 1, 4, 2)
    image = Image.fromarray(np.ascontiguousarray(grid.reshape(rows * height, columns * width, 3)))
    buffer = io.BytesIO()
    if image.width * image.height <= _LOSSLESS_PIXELS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((_MAX_PICTURE_SIDE, _MAX_PICTURE_SIDE))
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
