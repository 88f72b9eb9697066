"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.ranks import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Without a GPU kernels run in Triton's interpreter, to be chosen before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Not 200 ms for an example: beside other tests one takes longer now and then, whatever it does.
hypothesis.settings.register_profile("side by side", deadline=None)
hypothesis.settings.load_profile("side by side")
# A shell in the background (nohup, &) has these ignored, and processes of tests would inherit it.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # ignored here still, but not by them


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def digits_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small digits corpus with its index: train/, eval/, tokenizer.model."""
    from data_pipeline.chat import ChatSettings
    from data_pipeline.index import build_index
    from data_pipeline.prepare.demo_corpus import prepare_demo
    from data_pipeline.tokenizer import load_tokenizer

    out = tmp_path_factory.mktemp("corpus") / "digits"
    prepare_demo("digits", out, train_samples=240, eval_samples=24, seed=0)
    tokenizer = load_tokenizer(out / "tokenizer.model")
    for part in ("train", "eval"):
        build_index(str(out / part), tokenizer, ChatSettings(system=""))
    return out
