"""slurm/index.sh: its help, what it refuses, and shards divided among tasks on a real cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.chat import ChatSettings
from data_pipeline.index import load_index
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece
from tests.data_pipeline.test_index import ordinary, write_shard
from tests.slurm.cluster import ROOT, Cluster

INDEX = "slurm/index.sh"


def test_help_and_a_start_outside_a_job() -> None:
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    shown = subprocess.run([ROOT / INDEX, "--help"], capture_output=True, text=True, env=outside)
    assert shown.returncode == 0 and shown.stdout.startswith("Usage")
    refused = subprocess.run([ROOT / INDEX, "x"], capture_output=True, text=True, env=outside)
    assert refused.returncode == 2
    assert "not in a Slurm job" in refused.stderr and "sbatch" in refused.stderr


@pytest.mark.slurm
def test_tasks_share_the_shards_and_the_index_is_published(
    cluster: Cluster, tmp_path: Path
) -> None:
    model = save_sentencepiece(tmp_path)
    train = tmp_path / "train"
    for k in range(5):
        write_shard(train / f"{k}.tar", [ordinary(4 * k + j) for j in range(4)])
    broken = train / "9.tar"
    broken.symlink_to(tmp_path / "nowhere.tar")
    environment = {"PYTHON": sys.executable}

    def submit(*options: str) -> int:
        arguments = (INDEX, train, "--tokenizer", model, *options)
        return cluster.submit(*arguments, options=["--exclusive"], env=environment)

    # A shard that is not there: a task fails, what the other finished is kept.
    ended = cluster.wait(submit(), timeout=120, state="FAILED")
    assert ended.exit_code == 2 and "9.tar does not exist" in ended.log
    assert "2 nodes x 1(x2) tasks, 2 processes per task" in ended.log  # one for each CPU
    assert "nothing is published" in ended.log and "share 0/2 is done" in ended.log
    assert not (train / "index" / "manifest.json").exists()

    # A broken shard, strictly: the others are kept, nothing is published.
    broken.unlink()
    broken.write_bytes(b"")
    ended = cluster.wait(submit("--strict"), timeout=120, state="FAILED")
    assert ended.exit_code == 2 and "9.tar is empty" in ended.log
    assert "share 0/2 is done" in ended.log and "share 1/2 is done" in ended.log
    assert not (train / "index" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in train.glob("index/partial/[0-4].npz")}
    assert len(kept) == 5

    # Otherwise it is left out, and the job says that this was much.
    ended = cluster.wait(submit(), timeout=120, state="FAILED")
    assert ended.exit_code == 1 and "9.tar is empty" in ended.log
    assert "--max-bad-fraction" in ended.log and "6 shards, 20 samples" in ended.log
    [bad] = load_index(str(train), load_tokenizer(model), ChatSettings()).bad
    assert bad.shard == "9.tar" and "is empty" in bad.reason

    broken.unlink()
    log = cluster.wait(submit(), timeout=120).log
    assert "share 0/2 is done" in log and "share 1/2 is done" in log
    assert "5 shards, 20 samples" in log and f"index: {train}/index/manifest.json" in log
    published = {path.name: path.stat().st_mtime_ns for path in train.glob("index/[0-4].npz")}
    assert published == {path.name: time for path, time in kept.items()}
    index = load_index(str(train), load_tokenizer(model), ChatSettings())
    assert [len(index.read_images(i)) for i in range(20)] == [i % 3 for i in range(20)]
