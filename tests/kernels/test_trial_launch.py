"""The trial launch: what Triton itself says where it lacks something, and what to do about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import trial_launch
from kernels.dispatch import interpreting
from kernels.trial_launch import launch_obstacle, launch_one, obstacle_of

# Triton is told that there is a GPU, so that it builds its driver as it would beside one.
BESIDE_A_GPU = """
import json, os, sys, sysconfig
import torch
torch.cuda.is_available = lambda: True
from kernels.trial_launch import launch_one, obstacle_of
have, paths = dict(os.environ), sysconfig.get_paths()
for lacking in json.loads(sys.argv[1]):
    os.environ |= have | lacking
    include = {"include": lacking.get("include", paths["include"])}
    sysconfig.get_paths = lambda *args, **options: paths | include
    sysconfig.get_path = lambda name, *args: (paths | include)[name]
    print(obstacle_of(lambda: launch_one(torch.device("cpu"))))
    os.environ.pop("CC", None)
"""
LACKING = (
    ({"TRITON_LIBCUDA_PATH": ""}, "libcuda", "TRITON_LIBCUDA_PATH"),  # kept once found
    ({"CC": "/none/cc"}, "/none/cc", "install gcc, or set CC"),
    ({"PATH": "/none"}, "no C compiler", "install gcc, or set CC"),
    ({"include": "/none"}, "/none/Python.h is missing", "python3-dev"),
    ({"TRITON_CACHE_DIR": "/proc/none"}, "/proc/none", "TRITON_CACHE_DIR"),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has its driver where there is a GPU")
def test_what_triton_lacks_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").touch()
    folders = {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env = {**os.environ, **folders, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", BESIDE_A_GPU, json.dumps([what for what, *_ in LACKING])]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    told = run.stdout.splitlines()
    for line, (_, reason, remedy) in zip(told, LACKING, strict=True):
        assert line.startswith("Triton cannot launch a kernel")
        assert reason in line and remedy in line


@pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a GPU or TRITON_INTERPRET=1"
)
def test_a_launch_is_tried_once_and_its_result_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tried = []
    monkeypatch.setattr(
        trial_launch, "launch_one", lambda device: (tried.append(device), launch_one(device))
    )
    launch_obstacle.cache_clear()
    assert launch_obstacle(device) is None and launch_obstacle(device) is None
    assert tried == [device]
    launch_obstacle.cache_clear()
    monkeypatch.setattr("kernels.triton_impl.swiglu", lambda gate, value: gate)
    assert "its result is wrong" in str(obstacle_of(lambda: launch_one(device)))
