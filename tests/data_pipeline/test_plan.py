"""The plan: what is in it, that it repeats exactly, and that it can be taken up anywhere."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.draw import TokenCountSettings
from data_pipeline.errors import InputError
from data_pipeline.index import Index
from data_pipeline.mixture import Dataset, Mixture, split_ids
from data_pipeline.plan import (
    EvaluationPlan,
    PackPlan,
    PackSettings,
    Planner,
    PlanState,
    StepPlan,
    count_steps,
    same_window,
)
from data_pipeline.tiling import TilingSettings
from tests.data_pipeline.indexes import make_index, random_index

ONE_TILE = TilingSettings(tile_size=16)
TWO_TILES = TilingSettings(tile_size=16, max_tiles=2)
DRAWS = ["image", "sample", "pack"]


def make_planner(
    data: Index | Mixture, *, seed: int = 0, tiling: TilingSettings = ONE_TILE, **changes: Any
) -> Planner:
    mixture = data if isinstance(data, Mixture) else Mixture.of(data)
    counts = {"counts": [4, 9, 16], "probabilities": [0.2, 0.3, 0.5]}
    counts |= {name: changes.pop(name) for name in list(changes) if name in ("draw", *counts)}
    pack = {"max_tokens": 100, "packs_per_step": 4, "window_samples": 50} | changes
    return Planner(mixture, tiling, TokenCountSettings(**counts), PackSettings(**pack), seed)


def once(index: Index, epochs: float = 1) -> Mixture:
    """A mixture that ends after so many epochs."""
    return Mixture([Dataset("only", index, repeat=epochs)])


def three(sizes: Sequence[int] = (60, 100, 37), repeats: Sequence[float | None] = (1, 2, 3)):
    """Three weighted datasets, each ending after its number of epochs."""
    return Mixture(
        [
            Dataset(f"d{n}", random_index(size, n, shard_sizes=[size // 3, size - size // 3]), w, r)
            for n, (size, w, r) in enumerate(zip(sizes, (5.0, 3.0, 2.0), repeats, strict=True))
        ]
    )


def all_steps(planner: Planner) -> list[StepPlan]:
    """The steps of a plan that ends."""
    return [step for step, _ in planner.steps()]


def sides_by_sample(steps: Sequence[StepPlan]) -> dict[int, list[int]]:
    return {
        int(sample): sides.tolist()
        for step in steps
        for pack in step.packs
        for sample, sides in zip(pack.sample_ids, pack.sides, strict=True)
    }


def as_tuple(step: StepPlan) -> tuple:
    """A step in a form that compares."""
    packs = [
        (
            pack.sample_ids.tolist(),
            pack.lengths.tolist(),
            [sides.tolist() for sides in pack.sides],
            [tiles.tolist() for tiles in pack.tiles],
        )
        for pack in step.packs
    ]
    return step.window, step.step, step.epochs, packs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    repeats=st.lists(st.sampled_from([0.5, 1, 2, 3.3]), min_size=3, max_size=3),
    packs_per_step=st.integers(1, 6),
    window_samples=st.integers(1, 70),
    max_tokens=st.integers(70, 300),
    draw=st.sampled_from(DRAWS),
    seed=st.integers(0, 3),
)
def test_every_sample_comes_as_often_as_asked_and_resumes_anywhere(
    sizes: list[int],
    repeats: list[float],
    packs_per_step: int,
    window_samples: int,
    max_tokens: int,
    draw: str,
    seed: int,
) -> None:
    mixture = Mixture(
        [
            Dataset(f"d{n}", random_index(size, seed + n), 1.0 + n, repeats[n])
            for n, size in enumerate(sizes)
        ]
    )
    planner = make_planner(
        mixture,
        seed=seed,
        tiling=TWO_TILES,
        packs_per_step=packs_per_step,
        window_samples=window_samples,
        max_tokens=max_tokens,
        draw=draw,
    )
    run = list(planner.steps())
    assert all(len(step.packs) == packs_per_step for step, _ in run)
    # Only the last step may have empty packs.
    assert all(pack.tokens for step, _ in run[:-1] for pack in step.packs)
    packs = [pack for step, _ in run for pack in step.packs]
    assert all(pack.tokens <= max_tokens for pack in packs)
    times = Counter(int(i) for pack in packs for i in pack.sample_ids)
    left_out = Counter(one.sample for window in planner.windows() for one in window.left_out)
    for number, dataset in enumerate(mixture.datasets):
        assert dataset.limit == max(1, round(repeats[number] * len(dataset.index)))
        whole, more = divmod(dataset.limit, len(dataset.index))
        counts = [
            times[(number << 40) + i] + left_out[(number << 40) + i]
            for i in range(len(dataset.index))
        ]
        assert sorted(counts) == [whole] * (len(counts) - more) + [whole + 1] * more
    assert run[-1][1].carry == ()
    for i in range(0, len(run), max(1, len(run) // 4)):
        state = PlanState.from_dict(json.loads(json.dumps(run[i][1].to_dict())))
        again = list(planner.steps(state))
        assert [as_tuple(step) for step, _ in again] == [as_tuple(step) for step, _ in run[i + 1 :]]
        assert [after for _, after in again] == [after for _, after in run[i + 1 :]]


def test_resumes_from_every_state_of_three_datasets_one_of_which_ends() -> None:
    planner = make_planner(three(repeats=(1, None, None)), tiling=TWO_TILES)
    run = list(islice(planner.steps(), 150))
    before = [step for step, _ in run if step.epochs[0] < 1]
    assert 10 < len(before) < 140, "the first dataset must end on the way"
    assert any(after.carry for _, after in run)
    for i, (_, state) in enumerate(run[:-1]):
        step, after = next(planner.steps(state))
        assert as_tuple(step) == as_tuple(run[i + 1][0])
        assert after == run[i + 1][1]


@pytest.mark.parametrize("draw", DRAWS)
def test_what_was_carried_over_once_is_placed_in_the_next_window(draw: str) -> None:
    planner = make_planner(random_index(500), draw=draw, packs_per_step=6, window_samples=120)
    before: set[tuple[int, int, int]] = set()
    carried = 0
    for window in islice(planner.windows(), 25):
        left = set(window.following.carry)
        assert window.num_steps and not left & before
        before, carried = left, carried + len(left)
    assert carried > 100


def test_one_dataset_goes_on_epoch_after_epoch() -> None:
    planner = make_planner(random_index(90), window_samples=40)
    steps = [step for step, _ in takewhile(lambda item: item[0].epoch < 4, planner.steps())]
    times = Counter(int(i) for step in steps for p in step.packs for i in p.sample_ids)
    assert set(times) == set(range(90)) and set(times.values()) <= {3, 4, 5}


def test_datasets_come_by_their_weights_until_one_ends() -> None:
    planner = make_planner(three(sizes=(600, 300, 300), repeats=(1, None, None)))
    taken = np.zeros(3)
    state = PlanState(datasets=("d0", "d1", "d2"), taken=(0, 0, 0))
    while state.taken[0] < 600:
        quotas = planner.quotas(state)
        assert quotas.sum() == 50 or taken[0] + quotas[0] == 600
        taken += quotas
        counts = zip(state.taken, quotas.tolist(), strict=True)
        state = replace(state, window=state.window + 1, taken=tuple(a + b for a, b in counts))
    assert np.allclose(taken / taken.sum(), [0.5, 0.3, 0.2], atol=0.01)
    after = sum(planner.quotas(replace(state, window=w)) for w in range(100))
    assert after[0] == 0 and np.allclose(after / after.sum(), [0, 0.6, 0.4], atol=0.01)


def test_a_share_smaller_than_a_sample_per_window_is_still_given() -> None:
    mixture = Mixture(
        [Dataset("a", random_index(100), 999.0), Dataset("b", random_index(100), 1.0)]
    )
    planner = make_planner(mixture)
    state = PlanState(datasets=("a", "b"), taken=(0, 0))
    quotas = sum(planner.quotas(replace(state, window=window)) for window in range(2000))
    assert 60 <= quotas[1] <= 140  # 100 expected: 0.05 in each of 2000 windows


def test_a_dataset_draws_the_same_whatever_comes_with_it() -> None:
    alone = make_planner(once(random_index(60, 0)), draw="image")
    both = Mixture(
        [
            Dataset("other", random_index(40, 1), repeat=1),
            Dataset("only", random_index(60, 0), repeat=1),
        ]
    )
    drawn = sides_by_sample(all_steps(make_planner(both, draw="image")))
    for sample, sides in sides_by_sample(all_steps(alone)).items():
        assert drawn[(1 << 40) + sample] == sides


def test_packs_are_what_the_index_says() -> None:
    index = random_index(120, shard_sizes=[50, 0, 70])
    steps = all_steps(make_planner(once(index), tiling=TWO_TILES, max_tokens=400))
    for pack in (pack for step in steps for pack in step.packs):
        for sample, length, sides, tiles in zip(
            pack.sample_ids, pack.lengths, pack.sides, pack.tiles, strict=True
        ):
            first, last = index.image_start[sample : sample + 2]
            widths = index.image_width[first:last]
            expected = [3 if width == 32 else 1 for width in widths]  # two and a thumbnail, or one
            assert tiles.tolist() == expected
            assert length == index.text_tokens[sample] + sum(
                t * n * n for t, n in zip(expected, sides.tolist(), strict=True)
            )
        assert pack.tokens == pack.lengths.sum()
        assert pack.num_tiles == sum(int(tiles.sum()) for tiles in pack.tiles)


def second_epoch(planner: Planner) -> list[StepPlan]:
    """The second epoch of 400 samples in windows of 50."""
    return [step for step in all_steps(planner) if step.epochs[0] >= 1]


@pytest.mark.parametrize("draw", DRAWS)
def test_counts_follow_the_probabilities(draw: str) -> None:
    index = make_index([10] * 6000, [[(16, 16)]] * 6000)
    planner = make_planner(once(index), draw=draw, window_samples=6000)
    observed = Counter(sides[0] for sides in sides_by_sample(all_steps(planner)).values())
    expected = {2: 1200, 3: 1800, 4: 3000}
    assert set(observed) == set(expected)
    chi_square = sum((observed[n] - expected[n]) ** 2 / expected[n] for n in expected)
    assert chi_square < 13.8  # 2 degrees of freedom: one seed in a thousand is above


@pytest.mark.parametrize("draw", DRAWS)
def test_counts_and_order_change_with_seed_and_epoch(draw: str) -> None:
    index = random_index(400)
    plans = [
        all_steps(make_planner(once(index), draw=draw)),
        second_epoch(make_planner(once(index, 2), draw=draw)),
        all_steps(make_planner(once(index), draw=draw, seed=1)),
    ]
    orders = [[int(i) for s in plan for p in s.packs for i in p.sample_ids] for plan in plans]
    counts = [sides_by_sample(plan) for plan in plans]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        same = np.mean([counts[i][k][:1] == counts[j][k][:1] for k in counts[i] if counts[i][k]])
        assert same == pytest.approx(0.38, abs=0.09)  # .2^2 + .3^2 + .5^2
        assert orders[i] != orders[j]
        ranks = [np.argsort(order[:300]) for order in (orders[i], orders[j])]
        assert abs(np.corrcoef(*ranks)[0, 1]) < 0.2


def test_draw_image_differs_within_a_sample() -> None:
    index = make_index([5] * 300, [[(16, 16)] * 3] * 300)
    sides = sides_by_sample(all_steps(make_planner(once(index), draw="image")))
    same = np.mean([len(set(s)) == 1 for s in sides.values()])
    assert same == pytest.approx(0.2**3 + 0.3**3 + 0.5**3, abs=0.06)


def test_draw_sample_shares_one_count_among_the_images_of_a_sample_only() -> None:
    index = make_index([5] * 300, [[(16, 16)] * 3] * 300)
    steps = all_steps(make_planner(once(index), draw="sample"))
    assert all(len(set(sides)) == 1 for sides in sides_by_sample(steps).values())
    assert any(len({s[0] for s in pack.sides}) > 1 for step in steps for pack in step.packs)


def test_draw_pack_shares_one_count_among_all_images_of_a_pack() -> None:
    planner = make_planner(once(random_index(400)), draw="pack")
    drawn = Counter()
    texts_beside_images = 0
    for step in all_steps(planner):
        for pack in step.packs:
            sides = {n for image_sides in pack.sides for n in image_sides.tolist()}
            assert len(sides) <= 1
            drawn.update(sides)
            texts_beside_images += bool(sides) and any(not len(s) for s in pack.sides)
    assert set(drawn) == {2, 3, 4}
    assert texts_beside_images > 10


def test_a_sample_too_long_for_its_draw_is_capped_at_the_largest_that_fits() -> None:
    # 90 + 16 does not fit into 100, 90 + 9 does; 95 only with 4; 40 with anything.
    index = make_index([90, 95, 40] * 100, [[(16, 16)]] * 300)
    planner = make_planner(once(index))
    sides = sides_by_sample(all_steps(planner))
    capped = Counter(n for i, (n,) in sides.items() if i % 3 == 0)
    assert set(capped) == {2, 3} and capped[3] > 65  # those drawn at 3 and at 4: 80 of 100
    assert {n for i, (n,) in sides.items() if i % 3 == 1} == {2}
    assert {n for i, (n,) in sides.items() if i % 3 == 2} == {2, 3, 4}


def test_only_the_images_above_the_cap_are_capped() -> None:
    index = make_index([68] * 200, [[(16, 16)] * 3] * 200)  # room for 32: 9 each, or 16 + 9 + 4
    drawn = [sorted(s) for s in sides_by_sample(all_steps(make_planner(once(index)))).values()]
    assert [2, 3, 4] in drawn and [2, 2, 4] in drawn  # 29 and 24 fit as they are
    assert [3, 4, 4] not in drawn and [2, 4, 4] not in drawn and [3, 3, 4] not in drawn
    assert [2, 3, 3] in drawn and [3, 3, 3] in drawn


def test_capping_in_a_shared_pack_keeps_one_count_per_pack() -> None:
    # 40 + 4 * 16 does not fit into 100; at 9 there is room for a small sample, even one at 16.
    index = make_index([40, 5] * 100, [[(16, 16)] * 4, [(16, 16)]] * 100)
    packs = [p for step in all_steps(make_planner(once(index), draw="pack")) for p in step.packs]
    filled = [p for p in packs if p.tokens]
    assert all(len({n for sides in p.sides for n in sides.tolist()}) == 1 for p in filled)
    assert not any(4 in sides for p in packs for sides in p.sides if len(sides) == 4)


def test_samples_that_never_fit_are_left_out_and_named() -> None:
    index = make_index([97, 20, 101, 96], [[(16, 16)], [(16, 16)], [], [(16, 16)]])
    steps = all_steps(make_planner(once(index, 2)))
    left_out = [(one.sample, one.tokens, one.tiles) for step in steps for one in step.left_out]
    assert sorted(left_out) == [(0, 101, 1)] * 2 + [(2, 101, 0)] * 2  # once per epoch
    assert set(sides_by_sample(steps)) == {1, 3}


def test_what_was_left_out_is_said_once() -> None:
    planner = make_planner(once(make_index([200] + [30] * 39, [[]] * 40)), packs_per_step=1)
    run = list(planner.steps())
    assert [len(step.left_out) for step, _ in run] == [1] + [0] * (len(run) - 1)
    for _, state in run[:-1]:
        assert all(not step.left_out for step, _ in planner.steps(state))


def test_what_the_end_of_the_data_left_out_is_said() -> None:
    """Two windows of two samples: one fills two packs, the other fits into none."""
    index = make_index([100, 100, 200, 200], [[]] * 4)
    last = []
    for seed in range(30):
        planner = make_planner(once(index), packs_per_step=1, window_samples=2, seed=seed)
        windows = [(w.num_steps, [one.sample for one in w.left_out]) for w in planner.windows()]
        if len(windows) == 2:
            last.append((windows[-1][0], sorted(windows[-1][1])))
            *_, (_, end) = planner.steps()
            assert [len(w.left_out) for w in planner.windows(end)] == [2]
        else:
            assert [(steps, sorted(left_out)) for steps, left_out in windows] == [(2, [2, 3])]
    assert set(map(str, last)) == {"(0, [2, 3])"}


def test_too_many_tiles_are_left_out_and_packs_keep_to_their_limit() -> None:
    index = make_index([5] * 40, [[(16, 16)] * (1 + i % 4) for i in range(40)])
    planner = make_planner(once(index), max_tiles=3, draw="image")
    steps = all_steps(planner)
    assert {one.sample for step in steps for one in step.left_out} == set(range(3, 40, 4))
    assert max(pack.num_tiles for step in steps for pack in step.packs) == 3


def test_a_count_of_probability_zero_is_not_used_to_cap() -> None:
    index = make_index([90, 10], [[(16, 16)], [(16, 16)]])
    steps = all_steps(make_planner(once(index), counts=[4, 16], probabilities=[0, 1]))
    assert [(one.sample, one.tokens) for one in steps[0].left_out] == [(0, 106)]


@pytest.mark.parametrize("repeat", [None, 1])
def test_nothing_to_plan_is_an_error(repeat: float | None) -> None:
    mixture = Mixture([Dataset("a", make_index([150, 200], [[], []]), repeat=repeat)])
    with pytest.raises(InputError, match=r"\b2 samples .*\b100 tokens.* 150"):
        next(make_planner(mixture).steps())


def test_fewer_samples_than_a_step_wait_for_the_next_epochs() -> None:
    planner = make_planner(make_index([30], [[]]), packs_per_step=3, max_tokens=100)
    steps = [step for step, _ in islice(planner.steps(), 3)]
    for step in steps:
        assert [pack.sample_ids.tolist() for pack in step.packs] == [[0, 0, 0]] * 3
    ended = all_steps(make_planner(once(make_index([30], [[]])), packs_per_step=3))
    assert sorted(len(pack.sample_ids) for pack in ended[0].packs) == [0, 0, 1] and len(ended) == 1


def test_packs_are_full_and_balanced() -> None:
    planner = make_planner(
        random_index(8000), max_tokens=400, window_samples=4000, tiling=TWO_TILES
    )
    steps = [step for step, _ in islice(planner.steps(), 60)]
    tokens = np.array([[pack.tokens for pack in step.packs] for step in steps])
    tiles = np.array([[pack.num_tiles for pack in step.packs] for step in steps])
    assert tokens.mean() > 0.985 * 400
    assert (tiles.max(axis=1) / tiles.mean(axis=1)).mean() < 1.2
    assert abs(np.corrcoef(np.arange(60), tiles.mean(axis=1))[0, 1]) < 0.4


@pytest.mark.parametrize("side", [2, 4])
def test_evaluation_packs_hold_every_sample_once_at_one_side(side: int) -> None:
    index = random_index(100)
    packs = EvaluationPlan(Mixture.of(index), ONE_TILE, 100).packs(side)
    ids = [pack.sample_ids.tolist() for pack in packs]
    assert sorted(i for pack in ids for i in pack) == list(range(100))
    assert ids == sorted(sorted(pack) for pack in ids)
    assert all(n == side for pack in packs for sides in pack.sides for n in sides)
    for pack in packs:
        assert pack.tokens == sum(
            index.text_tokens[i] + side**2 * (index.image_start[i + 1] - index.image_start[i])
            for i in pack.sample_ids
        )
        assert pack.tokens <= 100
    assert len(packs) < sum(pack.tokens for pack in packs) / 100 * 1.2 + 1


def test_a_sample_too_long_for_evaluation_is_scored_in_a_pack_of_its_own() -> None:
    index = make_index([30, 95, 40, 120], [[], [(16, 16)], [], []])
    packs = EvaluationPlan(Mixture.of(index), ONE_TILE, 100).packs(4)
    assert [(pack.sample_ids.tolist(), pack.tokens) for pack in packs] == [
        ([0, 2], 70),
        ([1], 111),
        ([3], 120),
    ]


def test_a_limited_evaluation_takes_the_same_samples_of_every_kind() -> None:
    mixture = Mixture.of(random_index(120))
    few, more, every = (
        EvaluationPlan(mixture, ONE_TILE, 100, limit).samples for limit in (24, 60, 500)
    )
    assert (len(few), len(more), every) == (24, 60, list(range(120)))
    assert set(few) < set(more) and few == sorted(few)
    assert few == EvaluationPlan(mixture, ONE_TILE, 100, 24).samples
    # Kinds that alternate, or come one after the other, each have their share.
    assert all(sum(sample % 3 == kind for sample in few) >= 3 for kind in range(3))
    assert all(sum(sample // 40 == kind for sample in few) >= 3 for kind in range(3))


def test_the_empty_pack() -> None:
    pack = PackPlan.empty()
    assert (len(pack.sample_ids), pack.sides, pack.tokens, pack.num_tiles) == (0, (), 0, 0)


@pytest.mark.parametrize(
    "state",
    [
        PlanState(window=3),
        PlanState(0, 999, ("data",), (0,)),
        PlanState(1, 0, ("other",), (50,)),
        PlanState(1, 0, ("data", "more"), (50, 50)),
        PlanState(1, 0, ("data",), (50,), ((0, 0, 10_000),)),
    ],
)
def test_a_state_of_another_plan_is_an_error(state: PlanState) -> None:
    with pytest.raises(InputError, match=r"saved place in the data"):
        next(make_planner(random_index(300)).steps(state))


GOOD = {"window": 0, "step": 0, "datasets": ["a"], "taken": [3], "carry": [[0, 1, 2]]}


@pytest.mark.parametrize(
    "change",
    [
        None,
        [],
        {"more": 1},
        {"window": -1},
        {"window": True},
        {"step": "1"},
        {"datasets": "a"},
        {"datasets": [1]},
        {"taken": [1, 2]},
        {"taken": [-1]},
        {"carry": 3},
        {"carry": "123"},
        {"carry": [1]},
        {"carry": [[0, 1]]},
        {"carry": [[0, 1, 2.0]]},
        {"carry": [[1, 0, 0]]},
    ],
)
def test_a_damaged_state_is_an_error(change: Any) -> None:
    PlanState.from_dict(GOOD)
    with pytest.raises(InputError, match="plan state"):
        PlanState.from_dict(GOOD | change if isinstance(change, dict) else change)


def epochs_of(mixture: Mixture, epochs: float | None) -> Planner:
    counts = TokenCountSettings(counts=[4, 9], probabilities=[0.5, 0.5])
    pack = PackSettings(max_tokens=100, packs_per_step=4, window_samples=50)
    return Planner(mixture, ONE_TILE, counts, pack, seed=3, epochs=epochs)


def test_the_steps_of_epochs_are_counted_from_any_place() -> None:
    mixture = three(repeats=(1, 2, 0.5))
    planner = epochs_of(mixture, 1.5)
    assert planner.limits == [90, 300, 28]
    run = list(planner.steps())
    times = Counter(int(i) for step, _ in run for p in step.packs for i in p.sample_ids)
    ends = [sum(n for i, n in times.items() if i >> 40 == d) for d in range(3)]
    assert ends == planner.limits
    assert count_steps(planner, PlanState()) == len(run)
    assert all(count_steps(planner, at) == len(run) - n for n, (_, at) in enumerate(run, 1))


def test_another_end_changes_only_the_windows_it_shortens() -> None:
    mixture = three(repeats=(None, None, None))
    mixture = Mixture([replace(d, weight=None) for d in mixture.datasets])
    longer = [as_tuple(step) for step, _ in epochs_of(mixture, 3).steps()]
    shorter = epochs_of(mixture, 1)
    run = [(PlanState(), None), *((state, step) for step, state in shorter.steps())]
    same = [same_window(shorter, state, 3) for state, _ in run[:-1] if state.step]
    after = [n for n, (state, _) in enumerate(run[:-1]) if state.step]
    assert True in same and False in same
    for n, equal in zip(after, same, strict=True):
        assert equal == (as_tuple(run[n + 1][1]) == longer[n])
    state = next(state for state, _ in run if state.step)
    assert same_window(epochs_of(mixture, None), state, 1) == same[0]


@pytest.mark.parametrize("repeats", [(None, 1, 1), (2, None, None)])
def test_epochs_of_weights_that_never_end_are_refused(repeats: Any) -> None:
    mixture = three(repeats=repeats)
    endless = ", ".join(d.name for d in mixture.datasets if d.repeat is None)
    with pytest.raises(InputError, match=rf"train\.epochs=2, but {endless} .*repeat.*train\.steps"):
        epochs_of(mixture, 2)
    alone = Mixture([replace(mixture.datasets[0], weight=2.0, repeat=None)])
    assert epochs_of(alone, 2).limits == [120]


def test_a_new_window_keeps_what_did_not_change() -> None:
    old = three(repeats=(None, None, None))
    planner = make_planner(old)
    states = (state for step, state in planner.steps() if step.window > 1)
    state = next(state for state in states if {0, 2} <= {d for d, _, _ in state.carry})
    kept = [old.datasets[2], replace(old.datasets[0], weight=1.0)]
    mixture = Mixture([*kept, Dataset("new", random_index(50, 9), 4.0)])
    moved = state.moved_to(mixture, frozenset({"d0", "d2"}))
    assert (moved.window, moved.step) == (state.window + 1, 0)
    assert moved.taken == (state.taken[2], state.taken[0], 0)
    carried = [({0: "d0", 2: "d2"}[d], e, s) for d, e, s in state.carry if d != 1]
    assert [(mixture.names[d], e, s) for d, e, s in moved.carry] == carried and carried
    steps = [step for step, _ in islice(make_planner(mixture).steps(moved), 30)]
    seen = {int(d) for step in steps for p in step.packs for d in split_ids(p.sample_ids)[0]}
    assert seen == {0, 1, 2}
