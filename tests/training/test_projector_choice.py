"""`train.projector_impl: auto` is settled once, for all ranks alike, before training starts."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training.scenarios import tiny_config
from training import checkpoint, run
from training.distributed import Ranks
from training.health import Monitor
from training.model import projector_choice
from training.model.projector_choice import choose_projector
from training.preflight import rank_checks
from training.preflight.phases import judge
from training.preflight.rank_checks import RankReport, check_projector
from training.run import Run
from training.start import start

NO_COMPILER = "there is no C compiler; install gcc"
GPU = torch.device("cuda", 0)


def chosen(ranks: Ranks, setting: str, lacking: list[int]) -> tuple[str, str]:
    """What ranks with a GPU each choose where Triton launches on all but some."""
    beside_gpu = Ranks(ranks.rank, ranks.world_size, ranks.local_rank, GPU)
    obstacle = NO_COMPILER if ranks.rank in lacking else None
    with patch.object(projector_choice, "triton_obstacle", lambda device: obstacle):
        try:
            return choose_projector(setting, beside_gpu, torch.bfloat16)
        except InputError as error:
            return "error", str(error)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("setting", "lacking", "expected", "told"),
    [
        ("auto", [], "triton", ()),
        ("auto", [1], "torch", ("rank 1: ", NO_COMPILER)),
        ("auto", [0, 1], "torch", ("rank 0 and 1 more: ", NO_COMPILER)),
        ("torch", [1], "torch", ()),
        ("triton", [], "triton", ()),
        ("triton", [1], "error", ("train.projector_impl", "rank 1: ", NO_COMPILER, "auto")),
    ],
)
def test_all_ranks_choose_what_each_can_run(
    two_ranks: RankPool, setting: str, lacking: list[int], expected: str, told: tuple[str, ...]
) -> None:
    first, second = two_ranks.run(chosen, setting, lacking)
    assert first == second and first[0] == expected
    assert all(part in first[1] for part in told) and bool(told) == bool(first[1])


def started(ranks: Ranks, corpus: Path, out: Path) -> tuple[str, list[str]]:
    """What a start gives the model's projector where the ranks chose another than the config."""
    config = tiny_config(corpus, f"output_dir={out}", "train.steps=1")
    said: list[str] = []
    with (
        patch.object(run, "choose_projector", lambda *_: ("torch", f"rank 7: {NO_COMPILER}")),
        patch.object(Run, "say", lambda self, text: said.append(text)),
        checkpoint.Saver(config.output_dir / "checkpoints", config.checkpoint, ranks) as saver,
        Monitor(config, ranks, None) as monitor,
    ):
        engine, _ = start(Run(config, ranks, monitor.files), saver, monitor)
        projector: Any = engine.module.projector
        return projector.impl, [text for text in said if NO_COMPILER in text]


@pytest.mark.multiprocess
def test_the_model_runs_what_was_chosen_and_the_reason_is_told_once(
    one_rank: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    impl, said = one_rank.run(started, digits_corpus, tmp_path / "run")[0]
    assert impl == "torch" and len(said) == 1
    assert said[0].startswith("warning") and "rank 7" in said[0]


@pytest.mark.parametrize(
    ("setting", "obstacle", "notes", "problems"),
    [
        ("auto", NO_COMPILER, 1, 0),
        ("triton", NO_COMPILER, 0, 1),
        ("torch", NO_COMPILER, 0, 0),
        ("auto", None, 0, 0),
    ],
)
def test_the_preflight_names_the_node_that_cannot_launch(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    obstacle: str | None,
    notes: int,
    problems: int,
) -> None:
    monkeypatch.setattr(rank_checks, "triton_obstacle", lambda device: obstacle)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    report = RankReport(0, "node-7", device="a GPU")
    check_projector(report, GPU, setting)
    assert (len(report.notes), len(report.problems)) == (notes, problems)
    status, lines = judge("nodes", {0: vars(report)}, 1)
    told = [*lines, *capsys.readouterr().out.splitlines()]
    assert (status == 0) == (problems == 0)
    named = [line for line in told if "node-7" in line and NO_COMPILER in line]
    assert len(named) == notes + problems
    on_cpu = RankReport(0, "node-7")
    check_projector(on_cpu, torch.device("cpu"), setting)
    assert not on_cpu.notes and not on_cpu.problems
