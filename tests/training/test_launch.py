"""Which rank and GPU a process is given: srun, torchrun, what contradicts itself or is shared."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from data_pipeline.errors import InputError
from training.distributed import (
    FIRST_SPECIAL_STEP,
    Ranks,
    claim_device,
    launched_ranks,
    local_device,
    rank_from_environment,
)
from training.preflight.phases import Board

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    foreign = ("SLURM", "MASTER", "OMPI", "PMI", "RANK", "WORLD_SIZE", "LOCAL_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    monkeypatch.setattr(os, "environ", kept | variables)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        (SRUN | MEETING, (2, 3, 1)),
        (SRUN | MEETING | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
        (SRUN | MEETING | {"PMI_SIZE": "3", "PMI_RANK": "2"}, (2, 3, 1)),
        (SRUN | {"SLURM_STEP_ID": str(FIRST_SPECIAL_STEP)}, (0, 1, 0)),  # the shell of salloc
    ],
)
def test_the_place_of_a_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int, int]
) -> None:
    set_environment(monkeypatch, variables)
    assert rank_from_environment() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "8"} | MEETING, "8 ranks but RANK not set"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE 1"),
        (SRUN, "3 ranks but MASTER_ADDR and MASTER_PORT not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2: mpirun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '', expected a number"),
        (SRUN | MEETING | {"MASTER_PORT": "$PORT"}, r"MASTER_PORT is '\$PORT', expected a number"),
    ],
)
def test_a_contradiction_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    set_environment(monkeypatch, variables)
    with pytest.raises(InputError, match=f"{message}.*torchrun.*slurm/"):
        rank_from_environment()


def test_a_rank_alone_meets_nobody_where_a_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {"MASTER_ADDR": "another-node", "MASTER_PORT": "29500"}
    set_environment(monkeypatch, elsewhere)
    launched_ranks(on_cpu=True)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and os.environ["MASTER_PORT"] != "29500"
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # torchrun's store is there already
    set_environment(monkeypatch, elsewhere | agent)
    launched_ranks(on_cpu=True)
    assert elsewhere.items() <= os.environ.items()


@pytest.mark.parametrize(
    ("visible", "local_rank", "variables", "device"),
    [
        (2, 1, {}, 1),
        (1, 1, {"SLURM_GPUS_ON_NODE": "2"}, 0),  # --gpus-per-task: each its own
        (1, 1, {"SLURM_GPUS_ON_NODE": "1"}, None),
        (1, 1, {}, None),
        (1, 0, {"SLURM_NODEID": "2"}, 0),  # alone on its node
        (1, 1, {"SLURM_GPUS_ON_NODE": "2", "LOCAL_WORLD_SIZE": "2"}, None),  # torchrun's
    ],
)
def test_no_two_ranks_of_a_node_take_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
    visible: int,
    local_rank: int,
    variables: dict[str, str],
    device: int | None,
) -> None:
    set_environment(monkeypatch, SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"} | variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if device is None:
        with pytest.raises(InputError, match="local rank 1 has no GPU: 1 visible"):
            local_device(local_rank)
    else:
        assert local_device(local_rank) == torch.device("cuda", device)


def test_a_gpu_that_another_rank_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it came about: CUDA_VISIBLE_DEVICES, --gpu-bind, two launchers on one node."""
    gpu = SimpleNamespace(name="H100", uuid="GPU-7")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        claim_device(Ranks(0, 2, 0, torch.device("cpu")))
        claim_device(Ranks(0, 2, 0, torch.device("cuda", 0)))
        with pytest.raises(
            InputError, match=r"rank 1: H100 GPU-7 .*DEVICES is 5.*one rank per GPU"
        ):
            claim_device(Ranks(1, 2, 0, torch.device("cuda", 0)))
        gpu.name = "H100 MIG 1g.10gb"
        claim_device(Ranks(1, 2, 0, torch.device("cuda", 0)))
    finally:
        dist.destroy_process_group()


def test_a_preflight_alone_needs_no_port_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may listen there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        set_environment(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        board = Board(0, 1, 10.0)
        board.put("start", 1)
        assert board.get("start", 1.0) == 1
