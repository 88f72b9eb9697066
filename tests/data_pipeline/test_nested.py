"""The nested schedule: each sample at every count in one pack, a copy with its share of loss."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.batch import PackBuilder
from data_pipeline.chat import ChatSettings
from data_pipeline.draw import TokenCountSettings
from data_pipeline.index import Index, load_index
from data_pipeline.mixture import Dataset, Mixture
from data_pipeline.plan import PackPlan, PackSettings, Planner, PlanState
from data_pipeline.stats.placed import Placed
from data_pipeline.tiling import TilingSettings
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.indexes import make_index, random_index

TWO_TILES = TilingSettings(tile_size=16, max_tiles=2)
COUNTS: dict[str, Any] = {"counts": [4, 9, 16], "probabilities": [0.2, 0.3, 0.5]}


def nested(index: Index, epochs: float | None = 1, seed: int = 0, **pack: Any) -> Planner:
    mixture = Mixture([Dataset("only", index, repeat=epochs)])
    pack = {"max_tokens": 400, "packs_per_step": 3, "window_samples": 60} | pack
    counts = TokenCountSettings(**COUNTS, schedule="nested")
    return Planner(mixture, TWO_TILES, counts, PackSettings(**pack), seed)


def samples_of(pack: PackPlan) -> Iterator[tuple[int, range]]:
    """Each different sample of a pack with the places of its copies."""
    for places in pack.samples:
        (sample,) = set(pack.sample_ids[places.start : places.stop].tolist())
        yield sample, places


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 120),
    packs_per_step=st.integers(1, 5),
    window_samples=st.integers(1, 80),
    max_tokens=st.integers(80, 500),
    max_tiles=st.sampled_from([None, 6, 30]),
    epochs=st.sampled_from([0.5, 1, 2.4]),
    seed=st.integers(0, 3),
)
def test_every_sample_is_in_one_pack_at_all_counts_that_fit_and_resumes_anywhere(
    size: int,
    packs_per_step: int,
    window_samples: int,
    max_tokens: int,
    max_tiles: int | None,
    epochs: float,
    seed: int,
) -> None:
    index = random_index(size, seed)
    limits: dict[str, Any] = {"max_tokens": max_tokens, "max_tiles": max_tiles}
    limits |= {"packs_per_step": packs_per_step, "window_samples": window_samples}
    planner = nested(index, epochs, seed, **limits)
    try:
        run = list(planner.steps())
    except ValueError as error:  # a single sample, of more tiles than a pack may have
        assert "fits into a pack" in str(error)
        return
    times: Counter[int] = Counter()
    for pack in (pack for step, _ in run for pack in step.packs):
        assert pack.tokens <= max_tokens
        assert pack.num_tiles <= (max_tiles or 10**9)
        for sample, places in samples_of(pack):
            times[sample] += 1
            tiles = int(pack.tiles[places.start].sum())
            text = int(index.text_tokens[sample])
            at = [text + tiles * side**2 for side in (2, 3, 4)]
            fits = [
                sum(at[:n]) <= max_tokens and (not max_tiles or n * tiles <= max_tiles)
                for n in (1, 2, 3)
            ]
            assert len(places) == (sum(fits) if tiles else 1)
            for copy, place in enumerate(places):
                assert set(pack.sides[place].tolist()) <= {2 + copy}
                assert pack.lengths[place] == at[copy]
                assert pack.copies[place] == len(places)
    left_out = Counter(one.sample for window in planner.windows() for one in window.left_out)
    assert sum((times + left_out).values()) == max(1, round(epochs * size))
    assert max((times + left_out).values()) - min(times[i] + left_out[i] for i in range(size)) <= 1
    for i in range(0, len(run), max(1, len(run) // 3)):
        state = PlanState.from_dict(json.loads(json.dumps(run[i][1].to_dict())))
        again = [_content(step.packs) for step, _ in planner.steps(state)]
        assert again == [_content(step.packs) for step, _ in run[i + 1 :]]


def _content(packs: tuple[PackPlan, ...]) -> list:
    return [(p.sample_ids.tolist(), p.lengths.tolist(), str(p.sides), p.flops) for p in packs]


def test_packs_of_copies_are_full_and_balanced() -> None:
    planner = nested(random_index(6000), max_tokens=2000, window_samples=3000, packs_per_step=4)
    windows = list(islice(planner.windows(), 2))
    placed = Placed.of(windows)
    measures = placed.measures(2000)
    assert measures.padding < 0.02 and measures.efficiency > 0.98
    packs = [pack for window in windows for step, _ in window.steps() for pack in step.packs]
    assert placed.per_pack(placed.tokens).ravel().tolist() == [pack.tokens for pack in packs]
    assert placed.per_pack(placed.tiles).ravel().tolist() == [pack.num_tiles for pack in packs]
    assert placed.per_pack(placed.pairs).ravel().tolist() == [
        (pack.lengths**2).sum() for pack in packs
    ]
    sides = np.concatenate([sides for pack in packs for sides in pack.sides])
    assert sorted(placed.sides.tolist()) == sorted(sides.tolist())
    assert np.bincount(sides)[2:].tolist() == [len(sides) / 3] * 3


def test_a_sample_that_fits_at_no_count_is_left_out_and_a_text_is_there_once() -> None:
    planner = nested(make_index([97, 40, 30], [[(16, 16)], [], [(16, 16)]]), max_tokens=100)
    steps = [step for step, _ in planner.steps()]
    assert [one.sample for step in steps for one in step.left_out] == [0]
    packs = [pack for step in steps for pack in step.packs]
    copies = {sample: len(places) for pack in packs for sample, places in samples_of(pack)}
    assert copies == {1: 1, 2: 2}  # 34 + 39 fit into 100, another 46 does not


def test_the_default_leaves_the_fingerprint_of_earlier_checkpoints() -> None:
    assert TokenCountSettings(**COUNTS).fingerprint() == {**COUNTS, "draw": "image"}
    changed = TokenCountSettings(**COUNTS, schedule="nested").fingerprint()
    assert changed == {**COUNTS, "draw": "image", "schedule": "nested"}


def test_a_pack_cannot_share_a_count_and_hold_all() -> None:
    with pytest.raises(ValidationError, match=r"draw=pack .*schedule=nested.* leave draw out"):
        TokenCountSettings(**COUNTS, draw="pack", schedule="nested")


def test_a_count_of_probability_zero_is_not_among_the_copies() -> None:
    counts = TokenCountSettings(counts=[4, 9, 16], probabilities=[0.4, 0, 0.6], schedule="nested")
    assert counts.shares == [0.5, 0, 0.5]
    mixture = Mixture([Dataset("only", make_index([10], [[(16, 16)]]), repeat=1)])
    pack = PackSettings(max_tokens=100, packs_per_step=1)
    ((step, _),) = Planner(mixture, TWO_TILES, counts, pack, 0).steps()
    assert [sides.tolist() for sides in step.packs[0].sides] == [[2], [4]]


@pytest.fixture(scope="module")
def builder(digits_corpus: Path) -> PackBuilder:
    tokenizer = load_tokenizer(digits_corpus / "tokenizer.model")
    chat = ChatSettings(system="")
    index = load_index(str(digits_corpus / "train"), tokenizer, chat)
    return PackBuilder(Mixture.of(index), tokenizer, chat, TilingSettings(tile_size=32))


def pack_of(builder: PackBuilder, copies: dict[int, list[int]]) -> PackPlan:
    """Samples with one tile at these sides."""
    index = builder.mixture.datasets[0].index
    ids = [sample for sample, sides in copies.items() for _ in sides]
    sides = [side for own in copies.values() for side in own]
    text = index.text_tokens[ids].astype(np.int64)
    return PackPlan(
        np.array(ids),
        text + np.square(sides),
        tuple(np.array([side]) for side in sides),
        tuple(np.ones(1, np.int64) for _ in ids),
        copies=np.array([len(own) for own in copies.values() for _ in own]),
    )


def test_copies_share_the_loss_weight_and_the_pictures_of_their_sample(
    builder: PackBuilder,
) -> None:
    batch = builder.build(pack_of(builder, {3: [2, 3, 4], 5: [2, 4]}))
    single = [builder.build(pack_of(builder, {i: [n]})) for i in (3, 5) for n in (2, 3, 4)]
    assert (batch.num_samples, batch.num_images, batch.tile_sides) == (2, 2, [2, 3, 4, 2, 4])
    bounds = batch.cu_seqlens.tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    shares = (3, 3, 3, 2, 2)
    for part, place, tile, share in zip(parts, (0, 1, 2, 3, 5), range(5), shares, strict=True):
        alone = single[place]
        assert batch.input_ids[part].equal(alone.input_ids)
        assert batch.labels[part].equal(alone.labels)
        assert batch.tiles[tile].equal(alone.tiles[0])
        assert batch.loss_weights[part].allclose(alone.loss_weights / share, rtol=1e-6, atol=0)
    assert batch.teachers is not None and batch.student_weights is not None
    assert batch.targets[batch.teachers].equal(batch.targets)
    last = [bounds[3], bounds[5]]  # where the teachers' samples end
    ends = torch.tensor([last[0]] * 3 + [last[1]] * 2)
    copy = torch.searchsorted(batch.cu_seqlens, batch.target_positions, right=True) - 1
    behind = ends[copy] - batch.target_positions[batch.teachers]
    supervised = {int(n) for n in behind}
    assert min(supervised) >= 1 and max(supervised) < 20
    is_last = (copy == 2) | (copy == 4)
    assert batch.teachers[is_last].equal(torch.arange(len(copy))[is_last])
    assert batch.student_weights.equal(batch.target_weights * ~is_last)
    total = sum(float(one.loss_weights.double().sum()) for one in (single[0], single[3]))
    assert float(batch.loss_weights.double().sum()) == pytest.approx(total, rel=1e-6)


def test_a_bad_sample_is_counted_once_and_takes_no_tiles(
    builder: PackBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = builder.mixture.read

    def broken(sample: int) -> Any:
        content, images = read(sample)
        return (content, [b"no picture"] * len(images)) if sample == 5 else (content, images)

    monkeypatch.setattr(builder.mixture, "read", broken)
    plan = pack_of(builder, {3: [2, 3], 5: [2, 3], 7: [2, 3]})
    batch = builder.build(plan)
    good = builder.build(pack_of(builder, {7: [2, 3]}))
    assert len(batch.bad) == 1 and batch.num_samples == 3 and batch.planned_tokens == plan.tokens
    assert batch.tile_sides == [2, 3, 2, 3] and batch.tiles[2:].equal(good.tiles)
    ends = batch.cu_seqlens.tolist()
    assert not batch.loss_weights[ends[2] : ends[4]].any()
    assert batch.input_ids[ends[4] :].equal(good.input_ids)
