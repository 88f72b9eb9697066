"""A CUDA step on fake tensors: needs a CUDA build of torch (`make cuda-trace`), no GPU."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.environments.python import python_in


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = sys.executable if torch.version.cuda else python_in("cuda", "cuda-trace")
    out = tmp_path_factory.mktemp("trace") / "results.json"
    done = subprocess.run(
        [python, "-m", "tests.training.cuda_trace", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.multiprocess
def test_a_step_of_the_3b_preset_finds_its_way_on_cuda(traced: dict[str, Any]) -> None:
    for name, found in traced.items():
        assert found["parameters"] > 3e9 and found["loss"] == ["torch.float32", "cuda"], name
        assert found["waits"] == "DynamicOutputShapeException", name  # it would have been seen
        assert found["names"]["_varlen_attn"] == 36, name  # every layer of the decoder
        assert {"projector_forward", "index_copy", "_fused_adamw_"} <= found["names"].keys(), name
