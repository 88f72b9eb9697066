"""The CPU is taken where there are no GPUs, or on request; never instead of GPUs in silence."""

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError
from training import distributed
from training.config import load_config
from training.distributed import local_device, unseen_gpus
from training.preflight.rank_checks import RankReport, check_node
from training.train import main

DIGITS = "training/configs/digits.yaml"
NAMES = ("SLURM_JOB_ID", "SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


@pytest.fixture(autouse=True)
def no_gpu_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    for name in (*NAMES, "CUDA_VISIBLE_DEVICES", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "3"}, "Slurm gave the job 3 GPUs"),
        ({"SLURM_JOB_GPUS": "0,5", "CUDA_VISIBLE_DEVICES": "0,1"}, "Slurm gave the job 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "4"}, "CUDA_VISIBLE_DEVICES is 4"),
        ({"SLURM_GPUS_ON_NODE": "3", "CUDA_VISIBLE_DEVICES": ""}, ""),  # hidden on purpose
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, ""),  # the launcher of the engine
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({}, ""),
    ],
)
def test_gpus_that_the_environment_names(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (expected in unseen_gpus()) if expected else not unseen_gpus()
    if expected:
        with pytest.raises(InputError, match=rf"{expected}.*PyTorch sees none.*train\.device=cpu"):
            local_device(0)
    assert local_device(0, on_cpu=True).type == "cpu"


def test_gpus_of_the_machine_count_outside_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidiactl").touch()
    assert local_device(0).type == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(InputError, match=r"nvidia0.*PyTorch sees none"):
        local_device(0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the node's, not given to the job
    assert local_device(0).type == "cpu"


def test_the_cpu_cannot_be_had_beside_gpus_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        local_device(0, on_cpu=True)


def test_the_trainer_and_the_preflight_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")  # leaves out the checks of the file system
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([DIGITS, f"output_dir={tmp_path}"]) == 2
    assert "error: node" in (error := capsys.readouterr().err) and "train.device=cpu" in error
    report = RankReport(0, "node")
    check_node(report, load_config(DIGITS))
    assert "gave the job 2 GPUs" in report.problems[0]
    asked = RankReport(0, "node")
    check_node(asked, load_config(DIGITS, ["train.device=cpu"]))
    assert not asked.problems and asked.device == "CPU"
