"""What helps a badly filled plan: each advice is taken, and the plan is good then."""

import re

import numpy as np

from data_pipeline.balance.cost import DEFAULT_COST
from data_pipeline.balance.packing import balance
from data_pipeline.plan.pack_settings import PackSettings
from data_pipeline.settings import DataSettings
from data_pipeline.stats.advice import advice
from data_pipeline.stats.placed import Placed
from data_pipeline.tiling import TilingSettings


def advise(tokens: np.ndarray, tiles: np.ndarray, most: int = 1, **pack: int) -> str | None:
    """The advice for one window of these samples."""
    settings = PackSettings(**pack)
    flops = DEFAULT_COST.flops(tokens, tiles)
    limits = settings.max_tokens, settings.packs_per_step
    packing = balance(tokens, tiles, flops, *limits, max_tiles=settings.max_tiles)
    in_a_step = packing.pack >= 0
    placed = Placed(
        ids=np.flatnonzero(in_a_step),
        tokens=tokens[in_a_step],
        tiles=tiles[in_a_step],
        images=tiles[in_a_step],
        flops=flops[in_a_step],
        pairs=tokens[in_a_step] ** 2,
        sides=np.empty(0, np.int64),
        pack=packing.pack[in_a_step],
        num_steps=packing.num_steps,
        packs_per_step=settings.packs_per_step,
    )
    tiling = TilingSettings(tile_size=32, max_tiles=most)
    return advice(placed, DataSettings.model_construct(pack=settings, tiling=tiling))


def number_in(text: str, before: str) -> int:
    found = re.search(re.escape(before) + r"\D{0,4}([\d,]+)", text)
    assert found, text
    return int(found[1].replace(",", ""))


def samples(low: int, high: int, size: int = 6000) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles of samples of 256 tokens a tile and some text."""
    random = np.random.default_rng(0)
    tiles = random.integers(low, high, size)
    return tiles * 256 + random.integers(20, 200, size), tiles


def test_a_good_plan_needs_none() -> None:
    for low, high in ((0, 4), (4, 17)):
        assert advise(*samples(low, high), max_tokens=8192, packs_per_step=8) is None


def test_long_samples() -> None:
    many = samples(12, 32)
    pack = {"packs_per_step": 8}
    text = advise(*many, most=12, max_tokens=8192, **pack)
    assert text and "data.tiling.max_tiles below 12" in text
    assert abs(number_in(text, "a tenth has") - np.quantile(many[0], 0.9)) < 20
    assert advise(*many, max_tokens=number_in(text, "data.pack.max_tokens="), **pack) is None
    assert "max_tiles" not in str(advise(*many, max_tokens=8192, **pack))


def test_packs_full_of_tiles() -> None:
    pack = {"max_tokens": 8192, "packs_per_step": 4, "max_tiles": 12}
    text = advise(*samples(0, 4), **pack)
    assert text and "data.pack.max_tiles=12" in text
    lower = number_in(text, "lower data.pack.max_tokens to")
    assert lower < 8192 / 2
    assert advise(*samples(0, 4), **pack | {"max_tiles": 64}) is None
