"""Checkpoints under faults: kills inside a save, damaged files, a full disk, a second job."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.cli import run_cli
from data_pipeline.errors import InputError
from data_pipeline.plan import PlanState
from tests.ranks import RankPool
from tests.training import checkpoint_scenarios as scenarios
from tests.training.kill_in_save import PHASES
from training.checkpoint import finished, read_manifest, verify_files
from training.checkpoint.__main__ import main
from training.checkpoint.folder_layout import Manifest, candidates
from training.checkpoint.lock import FolderLock
from training.checkpoint.pruning import to_prune
from training.checkpoint.verify import share
from training.zero3.pickles import scan_pickle

pytestmark = pytest.mark.multiprocess
OPTIM_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def saved(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """Checkpoints of steps 2 and 5, and each rank's state when the last was saved."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    results = two_ranks.run(scenarios.save_steps, folder, [1, 2, 5], {})
    assert [name for name, _ in results] == ["step-00000005"] * 2
    return folder, [state for _, state in results]


@pytest.fixture
def copy(saved: tuple[Path, list], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`python -m training.checkpoint` in this process: exit status and all that it printed."""

    def run(*args: object) -> tuple[int, str]:
        try:
            run_cli(lambda: sys.exit(main([str(arg) for arg in args])))
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_what_is_published_is_the_state_at_the_call_not_after_the_next_steps(
    two_ranks: RankPool, saved: tuple[Path, list]
) -> None:
    folder, states = saved
    assert [path.name for path in finished(folder)] == ["step-00000002", "step-00000005"]  # keep 2
    for rank, (error, name, place, state) in enumerate(two_ranks.run(scenarios.resume, folder)):
        assert (error, name, place["step"]) == ("", "step-00000005", 5)
        assert place["plan"] == PlanState(0, 5, ("data",), (5,)).to_dict()
        assert all(torch.equal(a, b) for a, b in zip(state, states[rank], strict=True))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per phase of a save in which a rank has killed itself."""
    out = tmp_path_factory.mktemp("phases")
    command = [sys.executable, "-m", "tests.training.kill_in_save", "--phases", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_of_a_save_leaves_a_whole_checkpoint(
    two_ranks: RankPool, killed: Path, phase: str
) -> None:
    folder = killed / phase / "checkpoints"
    unfinished = {"half a shard", "before the marker", "before the manifest", "before the rename"}
    assert any(folder.glob("tmp-step-*")) == (phase in unfinished)  # it died where it should
    assert any(folder.glob("tmp-old-*")) == (phase == "inside pruning")
    if phase == "before latest":
        assert (folder / "latest").read_text() == "step-00000001"
    for error, name, place, state in two_ranks.run(scenarios.resume, folder):
        assert (error, name, place["step"]) == ("", f"step-{PHASES[phase]:08d}", PHASES[phase])
        assert torch.all(state[0] == PHASES[phase])
    assert two_ranks.run(scenarios.save_steps, folder, [7], {})[0][0] == "step-00000007"
    assert not any(folder.glob("tmp-*"))


def truncate(path: Path) -> None:
    os.truncate(path / OPTIM_1, 5000)


def flip(path: Path, name: str = OPTIM_1) -> None:
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)


def change_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    changed = re.sub(r'("taken": \[\s*)5', r"\g<1>6", text)
    assert changed != text
    (path / "manifest.json").write_text(changed)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, rf"{OPTIM_1} .*5000 bytes"),
        (flip, f"{OPTIM_1} is damaged"),
        (lambda path: (path / OPTIM_1).unlink(), f"{OPTIM_1} is missing"),
        (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), r"manifest\.json cannot be read"),
        (change_manifest, r"manifest\.json is damaged"),
    ],
    ids=["truncated", "bit flipped", "shard missing", "no manifest", "half a manifest", "edited"],
)
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(
    two_ranks: RankPool,
    copy: Path,
    damage: Callable[[Path], None],
    expected: str,
) -> None:
    damage(copy / "step-00000005")
    named = two_ranks.run(scenarios.resume, copy, str(copy / "step-00000005"))
    for error, *_ in named:  # named explicitly, it is an error on every rank
        assert "checkpoint.resume=" in error
        assert re.search(expected, error), error
    started = time.monotonic()
    for error, name, place, _ in two_ranks.run(scenarios.resume, copy):
        assert (error, name, place["step"]) == ("", "step-00000002", 2)
    assert time.monotonic() - started < 10
    assert (copy / "bad-step-00000005").is_dir() and len(candidates(copy)) == 1


def test_a_bit_flipped_in_a_file_only_rank_1_verifies_is_bad_for_both(
    two_ranks: RankPool, copy: Path
) -> None:
    files = read_manifest(copy / "step-00000005").files
    name = next(iter(share(files, 1, 2)))
    assert name not in share(files, 0, 2)
    flip(copy / "step-00000005", name)
    for error, *_ in two_ranks.run(scenarios.resume, copy, str(copy / "step-00000005")):
        assert f"{name} is damaged" in error and "found by rank 1" in error
    assert [r[1] for r in two_ranks.run(scenarios.resume, copy)] == ["step-00000002"] * 2


def test_without_a_whole_checkpoint_a_run_does_not_start_anew(
    two_ranks: RankPool, copy: Path
) -> None:
    for path in finished(copy):
        flip(path)
    for error, *_ in two_ranks.run(scenarios.resume, copy):
        assert "no whole checkpoint" in error and error.count("is damaged") == 2
    assert two_ranks.run(scenarios.resume, copy / "none")[0][:2] == ("", None)


@pytest.mark.parametrize("content", ["", "step-00000077", "step-00000002", None])
def test_latest_is_only_a_hint(two_ranks: RankPool, copy: Path, content: str | None) -> None:
    (copy / "latest").unlink()
    if content is not None:
        (copy / "latest").write_text(content)
    (copy / "tmp-step-00000009").mkdir()
    assert [r[1] for r in two_ranks.run(scenarios.resume, copy)] == ["step-00000005"] * 2


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


def plant(file: Path, proof: Path) -> None:
    torch.save({"module": Evil(proof)}, file)


def listed(path: Path) -> None:
    """Make the manifest agree with the files, as one who plants a file would."""
    manifest = read_manifest(path)
    files = {
        name: {
            "bytes": (path / name).stat().st_size,
            "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(),
        }
        for name in manifest.files
    }
    changed = Manifest(**{**vars(manifest), "files": files})
    (path / "manifest.json").write_bytes(changed.to_json())


def test_a_malicious_pickle_is_named_and_not_run(
    two_ranks: RankPool, copy: Path, tmp_path: Path
) -> None:
    bad, proof = copy / "step-00000005", tmp_path / "proof"
    plant(bad / OPTIM_1, proof)
    listed(bad)
    for error, *_ in two_ranks.run(scenarios.resume, copy, str(bad)):
        assert OPTIM_1 in error and "posix.mkdir" in error
    assert [r[1] for r in two_ranks.run(scenarios.resume, copy)] == ["step-00000002"] * 2
    assert not proof.exists()
    torch.load(copy / "bad-step-00000005" / OPTIM_1, weights_only=False)
    assert proof.exists()  # it would have run


def test_a_planted_extra_shard_is_refused(two_ranks: RankPool, copy: Path, tmp_path: Path) -> None:
    plant(copy / "step-00000005" / "zero_pp_rank_2_mp_rank_00_optim_states.pt", tmp_path / "proof")
    for error, *_ in two_ranks.run(scenarios.resume, copy, str(copy / "step-00000005")):
        assert "rank_2_mp_rank_00_optim_states.pt is not in the manifest" in error


def legacy(file: Path) -> None:
    torch.save({"x": Evil(file)}, file, _use_new_zipfile_serialization=False)


def plain_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Evil(file)))


def protocol_4(file: Path) -> None:
    torch.save({"x": Evil(file)}, file, pickle_protocol=4)


def two_pickles(file: Path) -> None:
    torch.save({"x": 1}, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(file.stem + "/DATA.pkl", pickle.dumps(Evil(file)))


def behind_bytes(file: Path) -> None:
    torch.save({"x": 1}, file)
    file.write_bytes(pickle.dumps(Evil(file)) + file.read_bytes())


@pytest.mark.parametrize("write", [legacy, plain_pickle, protocol_4, two_pickles, behind_bytes])
def test_the_scan_refuses_what_it_cannot_see_through(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt"):
        scan_pickle(tmp_path / "x.pt")


def test_the_scan_accepts_what_the_trainer_writes(tmp_path: Path) -> None:
    state = {dtype: torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.int64)}
    torch.save({"state": state, "p": torch.nn.Parameter(torch.ones(1))}, tmp_path / "x.pt")
    scan_pickle(tmp_path / "x.pt")


def test_a_full_disk_is_a_warning_once_and_stops_the_run_the_second_time(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for failing, results in (
        ([3], two_ranks.run(scenarios.full_disk, folder, [2, 3, 4], [3], 1)),
        ([6, 7], two_ranks.run(scenarios.full_disk, folder, [5, 6, 7], [6, 7], 1)),
    ):
        for errors, stop in results:  # of both ranks, whichever had the full disk
            assert [step for step, error in errors if error] == failing[:1]
            assert all("rank 1: [Errno 28]" in error for _, error in errors if error)
            assert bool(stop) == (len(failing) > 1)
            assert not stop or "second in a row" in stop
        assert not any(folder.glob("tmp-*"))
    assert [path.name for path in finished(folder)] == ["step-00000004", "step-00000005"]
    assert (folder / "latest").read_text() == "step-00000005"
    assert two_ranks.run(scenarios.resume, folder)[0][1] == "step-00000005"


def test_what_follows_a_published_checkpoint_cannot_make_it_a_failed_one(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    assert two_ranks.run(scenarios.refuse_latest, tmp_path / "c") == [[None] * 4] * 2
    assert [path.name[-1] for path in finished(tmp_path / "c")] == ["3", "4"]  # pruned all the same


def test_a_real_full_file_system_leaves_the_last_checkpoint_whole(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]  # two and a half
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    try:
        # Once a size is known a save is not begun; before that, writing fails.
        for steps, cause in (([1, 2, 3, 4], "MB free in"), ([5, 6], "No space left")):
            for errors, stop in two_ranks.run(scenarios.full_disk, folder / "c", steps, [], None):
                assert "second in a row" in stop and cause in stop
                assert cause in str(errors[-1][1])
            assert [path.name[-1] for path in finished(folder / "c")] == ["1", "2"]
            assert not any((folder / "c").glob("tmp-*"))
            assert two_ranks.run(scenarios.resume, folder / "c")[1][1] == "step-00000002"
        message = two_ranks.run(scenarios.no_space, folder / "c")
        assert all("checkpoint.keep + 1" in text and "free" in text for text in message)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_keep_and_keep_every(two_ranks: RankPool, tmp_path: Path) -> None:
    steps = [2, 3, 4, 5, 6, 7]
    two_ranks.run(scenarios.save_steps, tmp_path / "c", steps, {"keep_every_steps": 4})
    assert [path.name[-1] for path in finished(tmp_path / "c")] == ["4", "6", "7"]
    for step in (1, 3):  # what resumes have set aside
        (tmp_path / "c" / f"bad-step-0000000{step}").mkdir()
    two_ranks.run(scenarios.save_steps, tmp_path / "c", [8], {"background": False})
    assert [path.name[-1] for path in finished(tmp_path / "c")] == ["7", "8"]
    assert [path.name[-1] for path in (tmp_path / "c").glob("bad-*")] == ["3"]


def test_the_same_step_is_saved_once(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(scenarios.save_steps, tmp_path / "c", [3, 3], {}, True)
    assert [path.name for path in finished(tmp_path / "c")] == ["step-00000003"]


def test_progress_is_written_for_the_launcher(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(scenarios.with_progress_file, tmp_path / "c", tmp_path / "progress")
    assert (tmp_path / "progress").read_text() == "2\n"


HOLD = """
import sys, time
from pathlib import Path
from training.checkpoint.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_job_is_refused_and_a_dead_one_is_not_in_the_way(
    two_ranks: RankPool,
    tmp_path: Path,
    cli: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = {**os.environ, "SLURM_JOB_ID": "4711"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=env
    )
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    for said in two_ranks.run(scenarios.enter, tmp_path):
        assert f"in use by process {holder.pid}" in said and "Slurm job 4711" in said
    code, said = cli("prune", tmp_path, "--keep", 1)
    assert code == 2 and "in use by" in said
    monkeypatch.setenv("SLURM_JOB_ID", "4711")  # an earlier start of this job: it may start again
    monkeypatch.setattr("training.checkpoint.lock.WAIT_FOR_SAME_JOB_S", 0.1)
    with pytest.raises(TimeoutError, match=f"in use by process {holder.pid}"):
        FolderLock(tmp_path).acquire()
    monkeypatch.delenv("SLURM_JOB_ID")
    holder.kill()
    holder.wait()
    assert two_ranks.run(scenarios.enter, tmp_path) == ["entered", "entered"]


def test_a_requeued_job_waits_for_its_own_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.checkpoint.lock.WAIT_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    text = HOLD.replace("sleep(60)", "sleep(1)")
    holder = subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ
    )
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    holder.wait()


def test_a_background_save_returns_before_anything_is_written(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """How much time that saves, bench_checkpoint measures."""
    for before, published in two_ranks.run(scenarios.save_with_the_disk_held_up, tmp_path):
        assert before == 0 and published == "step-00000001"


def test_the_command_runs(copy: Path) -> None:
    command = [sys.executable, "-m", "training.checkpoint", "list", str(copy)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["2", "5"]
    assert "finished, latest" in shown.splitlines()[2]


def test_list_and_verify_say_what_is_broken(
    copy: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    code, said = cli("verify", copy)
    assert code == 0 and said.count("whole") == 2
    flip(copy / "step-00000002")
    (copy / "step-00000005" / "manifest.json").unlink()
    (copy / "bad-step-00000009").mkdir()
    code, said = cli("verify", copy)
    assert code == 1 and f"{OPTIM_1} is damaged" in said
    assert "manifest.json is missing" in said and "2 of 2 broken" in said
    code, said = cli("list", copy)
    assert code == 0 and "damaged: " in said and "bad-step-00000009: damaged, set aside" in said
    code, said = cli("verify", copy / "step-00000002")
    assert code == 1 and "step-00000002: broken" in said
    assert cli("verify", copy / "nothing")[0] == 2


def test_prune_keeps_what_it_is_told(copy: Path, cli: Callable[..., tuple[int, str]]) -> None:
    for step in (1, 3, 4):
        shutil.copytree(copy / "step-00000002", copy / f"step-{step:08d}")
    assert [path.name[-1] for path in to_prune(copy, 1, 2)] == ["1", "3"]
    code, said = cli("prune", copy, "--keep", 1, "--keep-every", 2, "--dry-run")
    assert code == 0 and "would remove step-00000001" in said and len(finished(copy)) == 5
    assert cli("prune", copy, "--keep", 1, "--keep-every", 2)[0] == 0
    assert [path.name[-1] for path in finished(copy)] == ["2", "4", "5"]
    assert not any(copy.glob("tmp-*"))
    assert cli("prune", copy, "--keep", 0)[0] == 2


def test_verify_files_names_the_first_bad_one(copy: Path) -> None:
    path = copy / "step-00000005"
    verify_files(path, read_manifest(path).files)
    flip(path)
    with pytest.raises(InputError, match=OPTIM_1):
        verify_files(path, read_manifest(path).files)
