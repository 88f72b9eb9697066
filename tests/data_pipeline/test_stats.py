"""Statistics of a plan against the plan itself, counted one pack after another."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.cli import run_cli
from data_pipeline.corpus import open_config
from data_pipeline.plan import StepPlan
from data_pipeline.stats.__main__ import main
from tests.data_pipeline.inspect_corpus import write_mixture, write_texts


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_mixture(tmp_path_factory.mktemp("mixture")))


def stats(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, str]:
    """The lines of the table by their names; lines without one belong to the one before."""
    main(["plan", *arguments])
    lines: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        name = line[:13].strip() or name
        lines[name] = lines.get(name, "") + line[13:] + "\n"
    return lines


def plan(config: str, overrides: list[str], steps: int) -> list[StepPlan]:
    planner = open_config(config, overrides)[1].planner
    return [step for step, _ in islice(planner.steps(), steps)]


def test_the_numbers_are_those_of_the_plan(config: str, capsys: pytest.CaptureFixture) -> None:
    lines = stats(capsys, config, "--steps", "7", "data.pack.max_tokens=900")
    steps = plan(config, ["data.pack.max_tokens=900"], 7)
    packs = [pack for step in steps for pack in step.packs]
    assert lines["planned"].startswith("7 steps, 28 packs\n")
    samples, tokens = sum(len(p.lengths) for p in packs), sum(p.tokens for p in packs)
    images, tiles = sum(len(s) for p in packs for s in p.sides), sum(p.num_tiles for p in packs)
    assert lines["content"].strip() == (
        f"{samples:,} samples, {images:,} images, {tiles:,} tiles, {tokens:,} tokens"
    )
    assert lines["padding"].strip() == f"{100 * (1 - tokens / (900 * len(packs))):.2f} %"
    ratios = [
        max(p.tokens for p in step.packs) / (sum(p.tokens for p in step.packs) / 4)
        for step in steps
    ]
    assert f"tokens {sum(ratios) / 7:.3f} (worst step {max(ratios):.3f})" in lines["max / mean"]
    mean = sum(sum(p.flops for p in step.packs) / 4 for step in steps)
    efficiency = mean / sum(max(p.flops for p in step.packs) for step in steps)
    assert lines["efficiency"].startswith(f"{100 * efficiency:.2f} % ")
    sides = np.concatenate([s for p in packs for s in p.sides])
    for count in (4, 16, 64):
        assert f"{count} tokens {100 * (sides**2 == count).mean():.1f} %" in lines["images at"]
    assert "too long for any pack: 1; by the index: 2" in lines["left out"]
    assert "photos/000000.tar:photo_6: 2,166 tokens, 11 tiles" in lines["left out"]


def test_the_datasets_have_their_shares_and_epochs(
    config: str, capsys: pytest.CaptureFixture
) -> None:
    rows = stats(capsys, config, "--steps", "7")["datasets"].splitlines()[1:]
    steps = plan(config, [], 7)
    ids = np.concatenate([pack.sample_ids for step in steps for pack in step.packs])
    numbers = [ids >> 40 == dataset for dataset in range(2)]
    for row, name, mine, size in zip(rows, ("captions", "photos"), numbers, (28, 90), strict=True):
        share = f"{100 * mine.mean():.1f}"
        assert row.split()[:5] == [name, str(size), str(mine.sum()), share, "%"]
    # Weights 1 : 2 of windows of 80 samples: all windows up to step 7 were taken whole.
    windows = 1 + steps[-1].window
    captions, photos = (float(row.split()[-1]) for row in rows)
    assert captions * 28 + photos * 90 == pytest.approx(80 * windows, abs=1)


def test_one_epoch_by_default(config: str, capsys: pytest.CaptureFixture) -> None:
    once = ["data.datasets.photos.repeat=1", "data.datasets.captions.repeat=1"]
    lines = stats(capsys, config, *once)
    assert lines["content"].startswith("117 samples")  # 118 but for the one that is too long
    assert [row.split()[-1] for row in lines["datasets"].splitlines()[1:]] == ["1.00", "1.00"]
    endless = stats(capsys, config)
    assert "a part of an epoch" not in endless["planned"]
    windows = 2  # of 80 samples, for 118
    assert endless["planning"].split()[0] == str(80 * windows + carried(config, windows))


def carried(config: str, windows: int) -> int:
    """Samples that were planned again, less the one that fits into no pack."""
    planner = open_config(config, [])[1].planner
    found = list(islice(planner.windows(), windows))
    return sum(len(w.state.carry) for w in found) - sum(len(w.left_out) for w in found)


def test_the_histograms_are_a_picture(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "stats.png"
    # A setting behind an option, as people write it.
    lines = stats(capsys, config, "--steps", "2", "--out", str(out), "seed=5")
    assert lines["histograms"].strip() == str(out)
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert min(picture.shape[:2]) > 500 and len(np.unique(picture)) > 50


def test_texts_without_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = stats(capsys, str(write_texts(tmp_path)), "--out", str(tmp_path / "stats.png"))
    assert lines["images at"].strip() == "none"
    assert ", 0 images, 0 tiles, " in lines["content"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.pack.max_tokens=8"], "raise data.pack.max_tokens"),
        (["--out", "/proc/none/stats.png"], "cannot write /proc/none/stats.png"),
        (["--out", "stats.xyz"], "cannot write stats.xyz"),
        (["--steps", "0"], "must be at least 1, found 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    config: str, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        run_cli(lambda: main(["plan", config, *arguments]))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("error: ") == 1 and message in error


def test_both_commands_are_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "simulate" in (text := capsys.readouterr().out) and "plan" in text
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    assert "data_pipeline.stats simulate" in capsys.readouterr().out


def test_advice_where_packs_stay_part_empty(config: str, capsys: pytest.CaptureFixture) -> None:
    lines = stats(capsys, config, "data.pack.max_tokens=500")
    padding = float(lines["padding"].strip(" %\n"))
    assert f"padding is {padding:.1f} %" in lines["advice"]
    assert "data.pack.max_tokens=" in lines["advice"]
    assert "advice" not in stats(capsys, config, "data.pack.max_tokens=8192")
