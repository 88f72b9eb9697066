"""Every launch configuration compiles with other versions of Triton; spills are those recorded."""

import json

import pytest

from tests.environments.python import python_in
from tests.kernels.compile_matrix import ENVIRONMENTS, RECORD, compile_with, summary
from tests.kernels.test_compile import sound


@pytest.mark.multiprocess
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_no_more_is_beyond_a_limit_than_recorded(environment):
    version, found = compile_with(python_in(environment, "kernel-checks"))
    recorded = json.loads(RECORD.read_text())
    assert version in recorded
    assert found["configurations"] == recorded[version]["configurations"]
    assert set(found["beyond_a_limit"]) <= set(recorded[version]["beyond_a_limit"])


def test_the_record_has_three_versions_and_only_small_spills():
    recorded = json.loads(RECORD.read_text())
    assert [version.rpartition(".")[0] for version in recorded] == ["3.6", "3.7", "3.8"]
    assert not recorded["3.7.1"]["beyond_a_limit"]  # what requirements.txt pins
    for found in recorded.values():
        assert all("spills, stack 8" in line for line in found["beyond_a_limit"])


def test_a_spill_is_named_in_the_summary():
    found = summary([sound(), sound(kernel="swiglu", spill_loads=3, stack_bytes=16)])
    assert found["configurations"] == 2
    assert found["beyond_a_limit"] == ["swiglu bf16 sm_80 rows>=1: 3 spills, stack 16"]
