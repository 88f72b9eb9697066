"""Two of the faults of `make chaos`, another two each time."""

import random
from pathlib import Path

import pytest

from tests.training.chaos import disturb
from tests.training.chaos_faults import FAULTS


@pytest.mark.multiprocess
def test_a_disturbed_run_ends_as_an_undisturbed_one(digits_corpus: Path, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # pytest shows it when the test fails
    chance = random.Random(seed)
    rows = disturb(digits_corpus, tmp_path, chance.sample(FAULTS, 2), chance)
    assert len(rows) == 2
