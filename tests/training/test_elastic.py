"""A checkpoint loaded on another number of ranks is the saved run, in every tensor and option."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training import elastic_scenarios as scenarios
from tests.training.elastic_scenarios import FP32, SAVED, STEPS, same
from training.zero3 import universal

pytestmark = pytest.mark.multiprocess
STEP = f"step-{SAVED:08d}"


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def saved(
    two_ranks: RankPool, digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Saved by two ranks, in a folder whose name DeepSpeed would take for a pattern."""
    folder = tmp_path_factory.mktemp("two ranks+")
    return folder / STEP, two_ranks.run(scenarios.save, digits_corpus, folder, FP32)


def assert_resumed(
    found: list[dict[str, Any]], saved: list[dict[str, Any]], loss: float = 1e-6
) -> None:
    """Every rank has the saved run's whole state, then its sample ids and, nearly, its losses."""
    for rank, result in enumerate(found):
        expected = saved[0]["state"]
        assert result["state"].keys() == expected.keys()
        wrong = [key for key in expected if not same(result["state"][key], expected[key])]
        assert not wrong, f"rank {rank}: {wrong}"
        assert result["after"] == {STEPS}  # no sub-group's Adam is ahead of the others
        assert [ids for _, ids in result["rows"]] == [ids for _, ids in saved[0]["rows"]]
        for (got, _), (wanted, _) in zip(result["rows"], saved[0]["rows"], strict=True):
            assert got == pytest.approx(wanted, rel=loss, abs=0)


def test_the_saved_run_has_what_may_get_lost(saved: tuple) -> None:
    state = saved[1][0]["state"]
    groups = [state[f"group {n} lr"] for n in range(4)]
    assert len(set(groups)) == 2
    assert {state[f"group {n} weight_decay"] for n in range(4)} == {0.0, 0.1}
    assert {v for k, v in state.items() if k.startswith("step ")} == {float(SAVED)}
    assert state["buffer projector.extra.seen"][0] > 0
    assert not any("lm_head" in key for key in state)  # tied
    sizes = [v.size for k, v in state.items() if k.startswith("master ")]
    assert {1, 7} <= set(sizes)


def test_two_ranks_to_one(one_rank: RankPool, digits_corpus: Path, saved: tuple) -> None:
    path, expected = saved
    found = one_rank.run(scenarios.resume, digits_corpus, path, FP32)
    assert_resumed(found, expected)
    # The engine had other weights before, the frozen tower's too.
    name = "weight vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not same(found[0]["before"][name], expected[0]["state"][name])
    assert np.array_equal(found[0]["rng"], expected[0]["rng"])


def test_two_ranks_to_two_is_bitwise(
    two_ranks: RankPool, digits_corpus: Path, saved: tuple
) -> None:
    path, expected = saved
    found = two_ranks.run(scenarios.resume, digits_corpus, path, FP32)
    assert_resumed(found, expected)
    assert [result["rows"] for result in found] == [result["rows"] for result in expected]


def test_two_ranks_to_four(four_ranks: RankPool, digits_corpus: Path, saved: tuple) -> None:
    path, expected = saved
    found = four_ranks.run(scenarios.resume, digits_corpus, path, FP32)
    assert_resumed(found, expected)
    states = [result["rng"] for result in found]
    assert [np.array_equal(a, b["rng"]) for a, b in zip(states, expected, strict=False)] == [1, 1]
    # Ranks that saved none have their own, which torch takes.
    assert len({state.tobytes() for state in states}) == 4
    for state in states:
        torch.Generator().set_state(torch.from_numpy(state))


def test_four_ranks_to_three(
    four_ranks: RankPool, three_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    expected = four_ranks.run(scenarios.save, digits_corpus, tmp_path, FP32)
    assert_resumed(
        three_ranks.run(scenarios.resume, digits_corpus, tmp_path / STEP, FP32), expected
    )


def test_one_rank_to_two_with_small_parameters_resident(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    resident = [*FP32, "deepspeed.param_persistence_threshold=5000"]
    expected = one_rank.run(scenarios.save, digits_corpus, tmp_path, resident)
    found = two_ranks.run(scenarios.resume, digits_corpus, tmp_path / STEP, resident)
    assert_resumed(found, expected)


def test_bf16(one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path, tmp_path: Path) -> None:
    bf16 = ["train.precision=bf16", "data.pack.packs_per_step=2", "data.pack.max_tokens=128"]
    expected = two_ranks.run(scenarios.save, digits_corpus, tmp_path, bf16)
    found = one_rank.run(scenarios.resume, digits_corpus, tmp_path / STEP, bf16)
    assert_resumed(found, expected, loss=1e-2)


def test_after_a_resharded_load_saving_and_loading_are_as_usual(
    one_rank: RankPool, digits_corpus: Path, saved: tuple, tmp_path: Path
) -> None:
    path, _ = saved
    [(before, after)] = one_rank.run(scenarios.resume_and_save, digits_corpus, path, tmp_path, FP32)
    assert before["progress"] == after["progress"] and after["progress"].step == SAVED + 1
    # A resumed run keeps the learning rates of its own settings, set anew before each step.
    wrong = [k for k, v in before["state"].items() if not same(after["state"][k], v)]
    assert [key for key in wrong if not key.endswith(" lr")] == []
    assert not (tmp_path / f"step-{SAVED + 1:08d}" / universal.FOLDER).exists()


def test_a_load_that_misses_something_is_refused(
    one_rank: RankPool, digits_corpus: Path, saved: tuple
) -> None:
    path, _ = saved
    (errors,) = one_rank.run(scenarios.faults, digits_corpus, path)
    assert errors.pop("nothing") == ""
    for name, expected in {
        "steps": "RuntimeError: Adam's step of",
        "groups": "RuntimeError: parameter group",
        "frozen": "InputError: the frozen parameter vision_model.",
        "buffers": "RuntimeError: buffer projector.extra.seen",
        "other tower": "InputError: the frozen parameter vision_model.",
        "other model": r"InputError: .* is of another model: projector.extra.gain has shape None",
        "DeepSpeed fails": "OSError",
    }.items():
        assert re.match(expected, errors[name], re.DOTALL), (name, errors[name])


class TestConversion:
    """`convert_once`, on a copy of the saved checkpoint."""

    @pytest.fixture
    def path(self, saved: tuple, one_rank: RankPool, tmp_path: Path) -> Path:
        """A copy of a checkpoint that is converted already."""
        if not universal.is_whole(saved[0] / universal.FOLDER):
            universal.convert_once(saved[0])
        return Path(shutil.copytree(saved[0], tmp_path / STEP))

    @pytest.fixture
    def no_deepspeed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, output: Path) -> None:
            raise AssertionError("converted again")

        monkeypatch.setattr(universal, "_run_deepspeed", refuse)

    @pytest.mark.usefixtures("no_deepspeed")
    def test_a_finished_one_is_reused(self, path: Path) -> None:
        assert universal.convert_once(path) == path / universal.FOLDER

    @pytest.mark.parametrize("damage", ["flipped", "missing", "planted", "unsealed"])
    @pytest.mark.usefixtures("no_deepspeed")
    def test_a_damaged_one_is_not(self, path: Path, damage: str) -> None:
        folder = path / universal.FOLDER
        file = folder / "zero" / "projector.extra.gain" / "exp_avg.pt"
        if damage == "flipped":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        elif damage == "missing":
            file.unlink()
        elif damage == "planted":
            shutil.copy(file, folder / "zero_pp_rank_0_mp_rank_01_model_states.pt")
        else:
            (folder / universal.SEAL).unlink()
        with pytest.raises(AssertionError, match="converted again"):
            universal.convert_once(path)

    @pytest.mark.usefixtures("no_deepspeed")
    def test_a_pickle_that_runs_code_is_not(self, path: Path) -> None:
        folder = path / universal.FOLDER
        file = folder / "zero" / "optimizer_state.pt"
        torch.save({"run": Planted()}, file)
        files = json.loads((folder / universal.SEAL).read_text())
        digest = universal.hashlib.sha256(file.read_bytes()).hexdigest()
        files["zero/optimizer_state.pt"] = {"bytes": file.stat().st_size, "sha256": digest}
        (folder / universal.SEAL).write_text(json.dumps(files))
        with pytest.raises(AssertionError, match="converted again"):
            universal.convert_once(path)

    def test_a_killed_one_starts_anew(self, path: Path) -> None:
        whole = sorted(universal._names(path / universal.FOLDER))
        leftover = path / f"{universal.TEMPORARY}1"
        shutil.move(path / universal.FOLDER, leftover / universal.FOLDER)
        (leftover / universal.FOLDER / universal.SEAL).unlink()
        before = {entry.name for entry in path.iterdir()} - {leftover.name}
        folder = universal.convert_once(path)
        assert sorted(universal._names(folder)) == whole
        assert {entry.name for entry in path.iterdir()} == before | {universal.FOLDER}

    def test_a_full_disk_is_refused_before(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.rmtree(path / universal.FOLDER)
        usage = shutil.disk_usage(path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match=r"(?s)GB needed on its disk.*Make room"):
            universal.convert_once(path)
        assert not list(path.glob("*universal*"))

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
    def test_only_a_kill_ends_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
    ) -> None:
        """Slurm's signals reach it too; a kill is no mistake of the user's."""
        code = f"import os; os.kill(os.getpid(), {number:d}); raise SystemExit('went on')"
        monkeypatch.setattr(universal, "CONVERT", code)
        shutil.rmtree(path / universal.FOLDER)
        killed = number == signal.SIGKILL
        error, message = (RuntimeError, "signal 9") if killed else (InputError, "went on")
        with pytest.raises(error, match=message):
            universal.convert_once(path)
        assert not list(path.glob("*universal*"))

    def test_what_deepspeed_says_is_passed_on(self, path: Path) -> None:
        shutil.rmtree(path / universal.FOLDER)
        next(path.glob("*rank_1_*optim_states.pt")).unlink()
        with pytest.raises(InputError, match=r"cannot convert .*dp_degree mismatch"):
            universal.convert_once(path)
        assert not list(path.glob("*universal*"))


class Planted:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))
