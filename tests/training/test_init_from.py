"""A later stage takes over exactly the weights of an earlier one, whatever either froze."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import RankPool
from tests.training import scenarios

pytestmark = pytest.mark.multiprocess
FROZEN = ["train.modules.vision_model.train=false"]


@pytest.mark.parametrize("before", [[], FROZEN], ids=["trained before", "frozen before"])
@pytest.mark.parametrize("after", [[], FROZEN], ids=["trains now", "frozen now"])
def test_every_parameter_is_taken_over(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path, before: list[str], after: list[str]
) -> None:
    fp32 = "train.precision=fp32"
    saved = two_ranks.run(scenarios.save_checkpoint, digits_corpus, tmp_path, [fp32, *before])[0]
    (found, loss), (_, other) = two_ranks.run(
        scenarios.start_from, digits_corpus, tmp_path, [fp32, *after]
    )
    assert saved.keys() == found.keys()
    for name, value in saved.items():
        assert np.array_equal(found[name], value), name
    assert loss == other


def test_another_number_of_ranks_and_tied_embeddings(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    tied = ["train.precision=fp32", "model.llm.config.tie_word_embeddings=true"]
    saved = two_ranks.run(scenarios.save_checkpoint, digits_corpus, tmp_path, tied)[0]
    found, _ = one_rank.run(scenarios.start_from, digits_corpus, tmp_path, tied)[0]
    for name, value in saved.items():
        assert np.array_equal(found[name], value), name


def test_masters_are_taken_as_they_were_saved(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    """Not as bf16 rounds them: what training has added to them may be less than that."""
    bf16 = ["train.precision=bf16", "data.pack.max_tokens=128"]
    saved = two_ranks.run(scenarios.save_checkpoint, digits_corpus, tmp_path, bf16)[0]
    found, _ = two_ranks.run(scenarios.start_from, digits_corpus, tmp_path, bf16)[0]
    rounded = [torch.tensor(value).bfloat16().float().numpy() for value in saved.values()]
    assert not all(map(np.array_equal, rounded, saved.values()))
    for name, value in saved.items():
        assert np.array_equal(found[name], value), name


def test_weights_of_another_model_are_refused_on_every_rank(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    two_ranks.run(scenarios.save_checkpoint, digits_corpus, tmp_path, [])
    wider = ["model.projector_hidden_ratio=2"]
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*has no projector\.w1.*rank 1.*has no"):
        two_ranks.run(scenarios.start_from, digits_corpus, tmp_path, wider)
