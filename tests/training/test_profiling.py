"""Named phases, traces of chosen steps, and what an out-of-memory error says."""

import gzip
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training.scenarios import DIGITS, tiny_config
from tests.training.start_scenarios import Outcome, run
from training.config import load_config
from training.distributed import Ranks
from training.model.packed import PackedTokenFlex
from training.profiling import StepProfiler, phase
from training.profiling.out_of_memory import remedies
from training.profiling.phase_table import phase_times, read_trace, table

IN_A_STEP = ("data", "vision", "projector", "insert", "decoder", "loss", "backward", "optimizer")


def host(name: str, begin: float, end: float, thread: int = 1) -> dict[str, Any]:
    event = {"ph": "X", "cat": "user_annotation", "name": f"phase/{name}", "tid": thread}
    return {**event, "ts": begin, "dur": end - begin}


def kernel(name: str, launched: float, begin: float, us: float, number: int) -> list[Any]:
    args = {"correlation": number}
    launch = {"name": "cudaLaunchKernel", "cat": "cuda_runtime", "ts": launched, "dur": 1.0}
    run = {"name": name, "cat": "kernel", "ts": begin, "dur": us}
    return [{"ph": "X", "tid": 2, "args": args, **event} for event in (launch, run)]


EVENTS = [
    host("vision", 0, 100),
    host("projector", 60, 90),  # lies in vision
    host("vision", 300, 350),
    host("backward", 400, 500),
    *kernel("gemm", 10, 200, 40, 1),
    *kernel("pool", 70, 240, 7, 2),
    *kernel("gemm", 450, 460, 100, 3),  # launched by another thread
    *kernel("ncclAllGather", 310, 560, 30, 4),
    *kernel("copy", 390, 590, 10, 5),  # between phases
    {"ph": "X", "cat": "kernel", "name": "unlaunched", "ts": 900, "dur": 100, "args": {}},
    {"ph": "i", "name": "no event with a duration"},
]


def test_times_of_phases(tmp_path: Path) -> None:
    """The innermost phase counts; kernels count where they were launched, wherever they run."""
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    found = phase_times(read_trace(trace))
    assert list(found) == ["vision", "projector", "backward", "other"]
    as_rows = {n: (t.calls, t.host_us, t.gpu_us, t.collective_us) for n, t in found.items()}
    assert as_rows == {
        "vision": (2, 70 + 50, 40 + 30, 30),
        "projector": (1, 30, 7, 0),
        "backward": (1, 100, 100, 0),
        "other": (0, 1000 - 250, 10 + 100, 0),
    }
    text = table(found, steps=2).splitlines()
    assert text[1].split() == ["vision", "1", "0.06", "12.0%", "0.04", "0.01"]
    assert text[-1].split()[:3] == ["step", "0.50", "100.0%"]


def test_an_empty_trace_has_no_time() -> None:
    assert phase_times([]) == {}


def test_what_runs_again_in_backward_belongs_to_it() -> None:
    with torch.profiler.profile() as traced, phase("backward"), phase("loss"):
        torch.ones(1)
    names = [event.key for event in traced.key_averages()]
    assert "phase/backward" in names and "phase/loss" not in names


def test_an_error_knows_its_phase() -> None:
    with pytest.raises(KeyError) as caught, phase("vision"), phase("projector"):
        raise KeyError
    assert caught.value.phase == "projector"  # type: ignore[attr-defined]
    with torch.profiler.profile() as traced, phase("loss"):
        pass  # nothing is left open
    assert "phase/loss" in [event.key for event in traced.key_averages()]


@pytest.mark.multiprocess
def test_chosen_steps_are_traced(two_ranks: RankPool, digits_corpus: Path, tmp_path: Path) -> None:
    """On the ranks asked for; the losses are those of a run without."""
    length = ("train.steps=4", "data.pack.packs_per_step=4")  # two packs a rank
    plain = two_ranks.run(run, digits_corpus, tmp_path / "plain", *length)
    out = tmp_path / "traced"
    asked = ("profile.steps=[2,3]", "profile.ranks=[1]")
    traced = two_ranks.run(run, digits_corpus, out, *length, *asked)
    assert [[row["loss"] for row in rows] for _, _, rows in traced] == [
        [row["loss"] for row in rows] for _, _, rows in plain
    ]
    base = "steps-2-3-rank-1"
    names = sorted(path.name for path in (out / "profile").iterdir())
    assert names == [f"{base}.phases.txt", f"{base}.trace.json.gz"]
    found = phase_times(read_trace(out / "profile" / f"{base}.trace.json.gz"))
    assert {name: found[name].calls for name in IN_A_STEP} == {
        **dict.fromkeys(IN_A_STEP, 4),  # two steps of two packs
        "data": 2,
        "optimizer": 2,
    }
    assert found["checkpoint"].calls == 1 and found["decoder"].host_us > found["insert"].host_us
    whole = sum(time.host_us for time in found.values())
    assert found["other"].host_us < 0.5 * whole
    text = (out / "profile" / f"{base}.phases.txt").read_text()
    assert text.rstrip() in traced[1][1] and "per step" not in traced[0][1]


def test_a_stop_writes_what_was_traced(
    one_rank: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    asked = ("train.steps=9", "profile.steps=[2,8]")
    (code, said, _) = one_rank.run(Stopping(3), digits_corpus, tmp_path, *asked)[0]
    assert code == 75 and (tmp_path / "profile" / "steps-2-3-rank-0.phases.txt").exists(), said
    # Those steps are behind: the start that goes on says so.
    again = ("train.steps=9", "profile.steps=[1,2]")
    (code, said, _) = one_rank.run(run, digits_corpus, tmp_path, *again)[0]
    assert code == 0 and "profile.steps=[1, 2]" in said


class Stopping:
    """`run` with a signal in a step; a pool hands on positional arguments only."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, ranks: Ranks, corpus: Path, out: Path, *overrides: str) -> Outcome:
        return run(ranks, corpus, out, *overrides, stop=self.step)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("profile.steps=[5,3]", "profile.steps"),
        ("profile.steps=[0,3]", "profile.steps"),
        ("profile.steps=[3,20000]", "train.steps="),
        ("profile.ranks=[-1]", "profile.ranks"),
    ],
)
def test_steps_that_cannot_be_traced(digits_corpus: Path, override: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        tiny_config(digits_corpus, override)
    assert named in str(caught.value)


def test_a_rank_that_there_is_not(digits_corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(digits_corpus, "profile.steps=[1,2]", "profile.ranks=[0,2]")
    ranks = Ranks(0, 2, 0, torch.device("cpu"))
    with pytest.raises(InputError, match=r"profile\.ranks names 2.* 0 to 1"):
        StepProfiler(config.profile, tmp_path, ranks)


def out_of_memory_in(ranks: Ranks, corpus: Path, out: Path, *overrides: str) -> Outcome:
    """A run whose decoder asks for more than any machine has."""

    def decode(*args: Any) -> Any:
        return torch.empty(2**50)

    with patch.object(PackedTokenFlex, "_decode", decode):
        return run(ranks, corpus, out, *overrides)


def test_a_phase_is_told_of_its_own_layers() -> None:
    chosen = "train.gradient_checkpointing=[language_model]"
    config = load_config(DIGITS, [chosen])
    found = {phase: remedies(phase, config) for phase in ("vision", "decoder", "backward")}
    named = {phase: "train.gradient_checkpointing=true" in them for phase, them in found.items()}
    assert named == {"vision": True, "decoder": False, "backward": True}


def test_out_of_memory_says_what_to_change(
    one_rank: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    code, said, _ = one_rank.run(out_of_memory_in, digits_corpus, tmp_path / "a")[0]
    assert isinstance(code, str), said
    for text in ("rank 0", "phase decoder", "gradient_checkpointing=true", "offload_optimizer=cpu"):
        assert text in code
    assert "data.pack.max_tokens (now 256)" in code
    used = ("train.gradient_checkpointing=true", "deepspeed.offload_optimizer=cpu")
    code, _, _ = one_rank.run(out_of_memory_in, digits_corpus, tmp_path / "b", *used)[0]
    assert isinstance(code, str) and "checkpointing" not in code and "offload" not in code
