"""Starts of a small run as the command makes them, run on every rank of a pool."""

import io
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS
from tests.training.scenarios import tiny_config
from training import train as program
from training.checkpoint import MANIFEST, read_manifest
from training.distributed import Ranks
from training.health.preemption import SIGNALS
from training.metrics import read_metrics

Outcome = tuple[int | str, str, list[dict[str, Any]]]
"""The exit code, "crash" or the error; what it said; the rows of metrics.jsonl."""

TINY = (
    "data.eval_shards=[]",
    "train.log_every=100",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
    "model.vision.config.hidden_size=32",
    "model.vision.config.intermediate_size=48",
    "model.llm.config.hidden_size=32",
    "model.llm.config.intermediate_size=48",
    "data.pack.max_tokens=256",
)


def run(
    ranks: Ranks,
    corpus: Path,
    out: Path,
    *overrides: str,
    crash: int = 0,
    stop: int = 0,
) -> Outcome:
    """Train; `crash` ends it within that step, `stop` asks it to stop there as Slurm does."""
    said, code = io.StringIO(), None
    real = program.train_step

    def step(*args: Any) -> Any:
        if args[3] == crash:
            raise KeyboardInterrupt  # nothing catches it
        if args[3] == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        config = tiny_config(corpus, *TINY, f"output_dir={out}", *overrides)
        stepping = patch.object(program, "train_step", step)
        with stepping, redirect_stdout(said), redirect_stderr(said):
            code = program.train(config, ranks)
    except InputError as error:
        code = str(error)
    except KeyboardInterrupt:
        code = "crash"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, said.getvalue(), read_metrics(out / "metrics.jsonl")


@dataclass(frozen=True)
class Starting:
    """`run` with these; a pool hands on positional arguments only."""

    crash: int = 0
    stop: int = 0

    def __call__(self, ranks: Ranks, corpus: Path, out: Path, *overrides: str) -> Outcome:
        return run(ranks, corpus, out, *overrides, crash=self.crash, stop=self.stop)


def as_older(path: Path, copy: Path, with_fingerprints: bool = False) -> Path:
    """A copy of a checkpoint as an earlier version wrote it, which noted less."""
    shutil.copytree(path, copy)
    manifest = read_manifest(copy)
    seed = {"seed": manifest.fingerprints["seed"]}
    kept = manifest.fingerprints if with_fingerprints else seed
    (copy / MANIFEST).write_bytes(replace(manifest, run={}, fingerprints=kept).to_json())
    return copy


def with_more_tokens(model: Path, folder: Path, count: int) -> Path:
    """A sentencepiece model with as many more tokens behind the others."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    for number in range(count):
        proto.pieces.add(piece=f"<new{number}>", score=0.0, type=4)  # user-defined
    (folder / "larger.model").write_bytes(proto.SerializeToString())
    return folder / "larger.model"


def without_markers(model: Path, folder: Path) -> Path:
    """A sentencepiece model without the special tokens, as other projects' are."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    for number, piece in enumerate(proto.pieces):
        if piece.piece in SPECIAL_TOKENS:
            piece.piece = f"<unused{number}>"
    (folder / "plain.model").write_bytes(proto.SerializeToString())
    return folder / "plain.model"
