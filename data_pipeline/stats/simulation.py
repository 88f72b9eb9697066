"""The command `simulate`: plan samples of given lengths, and compare with simpler packers."""

import argparse
import io
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.balance.carry import Columns, after_carried, left_over
from data_pipeline.balance.cost import DEFAULT_COST, CostModel
from data_pipeline.balance.deal import Ints
from data_pipeline.balance.fit import best_fit
from data_pipeline.balance.packing import Packing, balance
from data_pipeline.draw import uniform_hash
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.paths import path_argument
from data_pipeline.stats.measures import Measures, SampleCosts, measure
from data_pipeline.text_table import text_table

WINDOW_SAMPLES = 20_000


@dataclass(frozen=True)
class PackBudget:
    """What packs hold, and how many make a step."""

    max_tokens: int
    packs_per_step: int
    max_tiles: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class PlannedWindow:
    """A window's samples, int64 [S] each, those that the window before left over first."""

    ids: Ints
    first: int
    packing: Packing


def planned_windows(
    windows: Iterable[tuple[Ints, Ints, Ints]],
    budget: PackBudget,
    cost: CostModel = DEFAULT_COST,
) -> Iterator[PlannedWindow]:
    """Balance windows one after another; holds one of them and what is left over.

    Args:
        windows: ids, tokens and tiles of the samples of each, int64 [S], in random order.
    """
    carried: Columns = (np.empty(0, dtype=np.int64),) * 3
    source = iter(windows)
    number, following = 0, next(source, None)
    while following is not None:
        window, following = following, next(source, None)
        first = len(carried[0])
        ids, tokens, tiles = after_carried(carried, window)
        packing = balance(
            tokens,
            tiles,
            cost.flops(tokens, tiles),
            budget.max_tokens,
            budget.packs_per_step,
            max_tiles=budget.max_tiles,
            first=first,
            last=following is None,
            seed=budget.seed + number,
        )
        yield PlannedWindow(ids, first, packing)
        carried = left_over(packing.pack, (ids, tokens, tiles))
        number += 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simulate`."""
    parser.add_argument(
        "--lengths",
        type=path_argument,
        required=True,
        metavar="FILE.npz",
        help="integer arrays `tokens` and `tiles`, one value per sample",
    )
    parser.add_argument("--max-tokens", type=int, required=True, metavar="N", help="of a pack")
    parser.add_argument("--packs-per-step", type=int, required=True, metavar="N")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="of a pack (default: no cap)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--window-samples",
        type=int,
        default=WINDOW_SAMPLES,
        metavar="N",
        help="samples planned together (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="PLAN.npz",
        help="arrays `sample`, `step`, `pack` (within the step), one row per placed sample",
    )


def run(args: argparse.Namespace) -> None:
    """Plan all samples of a file, write the plan, print how good it is."""
    budget = PackBudget(args.max_tokens, args.packs_per_step, args.max_tiles, args.seed)
    options = ("max_tokens", "packs_per_step", "window_samples", "max_tiles")
    for name in options:
        value = getattr(args, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {value}; give 1 or more")
    tokens, tiles = read_lengths(args.lengths)
    fits = tokens <= budget.max_tokens
    if budget.max_tiles is not None:
        fits &= tiles <= budget.max_tiles
    ids = np.flatnonzero(fits)
    print(f"{len(tokens)} samples, {len(tokens) - len(ids)} left out: too long for a pack")
    if not len(ids):
        raise InputError(f"none of the samples of {args.lengths} fits; raise --max-tokens")
    ids = ids[np.argsort(uniform_hash(budget.seed, "order", ids), kind="stable")]
    samples = SampleCosts(tokens, tiles, DEFAULT_COST.flops(tokens, tiles))
    started = time.process_time()
    pack, num_steps = plan_all(ids, samples, budget, args.window_samples)
    seconds = {"this planner": time.process_time() - started}
    packs = {"this planner": pack}
    for name, packer in (("best-fit", _best_fit), ("next-fit", _next_fit)):
        started = time.process_time()
        packs[name] = packer(ids, samples.tokens, budget, args.window_samples)
        seconds[name] = time.process_time() - started
    placed = np.flatnonzero(pack >= 0)
    placed = placed[np.argsort(pack[placed], kind="stable")]
    step, in_step = np.divmod(pack[placed], budget.packs_per_step)
    _write(args.out, sample=placed, step=step, pack=in_step)
    _print_table(packs, seconds, samples, budget, len(ids))
    print(f"{len(placed)} samples in {num_steps} steps: {args.out}")


def read_lengths(path: Path) -> tuple[Ints, Ints]:
    """Tokens and tiles of samples, int64 [S]; InputError if the file does not hold them."""
    wanted = "give an .npz with the integer arrays `tokens` and `tiles`, [samples] each"
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("tokens", "tiles") if name not in file]
            if missing:
                raise InputError(f"{path} has no array {missing[0]!r}, only {list(file)}; {wanted}")
            arrays = {name: file[name] for name in ("tokens", "tiles")}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: {error}; {wanted}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "iu" or array.ndim != 1:
            found = f"dtype {array.dtype}, shape {array.shape}"
            raise InputError(f"{name} of {path} has {found}; {wanted}")
        if array.size and array.min() < 0:
            place = int(np.argmax(array < 0))
            raise InputError(f"{name} of {path} is {array[place]} at sample {place}; {wanted}")
    tokens, tiles = (array.astype(np.int64) for array in arrays.values())
    if tokens.shape != tiles.shape:
        raise InputError(
            f"{path} has {len(tokens)} tokens but {len(tiles)} tiles: one of each per sample; "
            f"{wanted}"
        )
    return tokens, tiles


def plan_all(ids: Ints, samples: SampleCosts, budget: PackBudget, window: int) -> tuple[Ints, int]:
    """The pack of every sample of the file over all steps, -1 in none; and the steps."""
    starts = range(0, len(ids), window)
    parts = (ids[start : start + window] for start in starts)
    windows = ((part, samples.tokens[part], samples.tiles[part]) for part in parts)
    pack = np.full(len(samples.tokens), -1, dtype=np.int64)
    num_steps = 0
    planned = planned_windows(windows, budget)
    for part in tqdm(planned, "windows", total=len(starts), disable=None, leave=False):
        placed = part.packing.pack >= 0
        before = num_steps * budget.packs_per_step
        pack[part.ids[placed]] = before + part.packing.pack[placed]
        num_steps += part.packing.num_steps
    return pack, num_steps


def _best_fit(ids: Ints, tokens: Ints, budget: PackBudget, window: int) -> Ints:
    """Best fit in the given order, window by window; caps tokens only."""
    pack = np.full(len(tokens), -1, dtype=np.int64)
    number = 0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        pack[part] = number + best_fit(tokens[part], budget.max_tokens)
        number = int(pack[part].max()) + 1
    return pack


def _next_fit(ids: Ints, tokens: Ints, budget: PackBudget, window: int) -> Ints:
    """A pack is closed by the first sample that does not fit; caps tokens only."""
    pack = np.full(len(tokens), -1, dtype=np.int64)
    ends = np.cumsum(tokens[ids])
    start = number = 0
    while start < len(ids):
        before = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, before + budget.max_tokens, "right"))
        pack[ids[start:end]] = number
        start, number = end, number + 1
    return pack


def _write(path: Path, **arrays: Ints) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def _print_table(
    packs: dict[str, Ints],
    seconds: dict[str, float],
    samples: SampleCosts,
    budget: PackBudget,
    num_samples: int,
) -> None:
    header = ("", "padding", "tokens", "tiles", "attention", "efficiency", "samples/s")
    rows: list[tuple[str, ...]] = [header]
    per_step = budget.packs_per_step
    for name, pack in packs.items():
        num_packs = int(pack.max()) + 1
        # Whole steps: the final one is short of samples under every packer, unless it is alone.
        steps = max((num_packs - 1) // per_step, 1)
        found = measure(samples, pack, per_step, steps, budget.max_tokens)
        rate = num_samples / max(seconds[name], 1e-9)
        rows.append(_row(name, found, rate))
    print(text_table(rows))
    print(
        "tokens, tiles, attention (sum of length^2): max/mean over the packs of a step, mean over "
        "steps.\nefficiency: mean by max FLOPs over the packs of a step. samples/s: of CPU time, "
        "one core.\nThe final step is left out, where there are others: it holds what is left."
    )
    ours = packs["this planner"]
    steps = -(-(int(ours.max()) + 1) // per_step)
    found = measure(samples, ours, per_step, steps, budget.max_tokens)
    print(f"this planner, final step included: padding {found.padding:.2%}")


def _row(name: str, found: Measures, samples_per_s: float) -> tuple[str, ...]:
    return (
        name,
        f"{found.padding:.2%}",
        f"{found.tokens_max_over_mean:.3f}",
        f"{found.tiles_max_over_mean:.3f}",
        f"{found.attention_max_over_mean:.3f}",
        f"{found.efficiency:.3f}",
        f"{samples_per_s:,.0f}",
    )
