"""Training on shards in stores that fail now and then is bitwise training on local ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index, check_index
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.stores import PROTOCOLS, Store, open_store
from tests.ranks import RankPool
from tests.training.mixture_scenarios import run

pytestmark = pytest.mark.multiprocess

SAME = ("step", "loss", "grad_norm", "epoch", "data_hash", "tokens", "supervised_tokens")
SETTINGS = ("train.warmup_fraction=0", "train.min_lr_fraction=1", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def undisturbed(
    one_rank: RankPool, digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Metrics of four steps on local shards."""
    out = tmp_path_factory.mktemp("local")
    rows, error = one_rank.run(run, digits_corpus, out, *SETTINGS, "train.steps=4")[0]
    assert not error
    return rows


def remote(store: Store, url: str, index_dir: Path) -> list[str]:
    """Overrides for shards in a store."""
    settings = {"attempts": 6, "backoff_s": 0.01, "timeout_s": 30, "options": store.options}
    names = [f"data.shards=[{url}]", f"data.index_dir={index_dir}"]
    return [*SETTINGS, *names, f"data.storage={json.dumps(settings)}"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_steps_and_a_resume(
    one_rank: RankPool,
    digits_corpus: Path,
    tmp_path: Path,
    undisturbed: list[dict[str, Any]],
    protocol: str,
) -> None:
    tokenizer, chat = load_tokenizer(digits_corpus / "tokenizer.model"), ChatSettings(system="")
    with open_store(protocol, digits_corpus / "train") as store:
        store.server.lists = True  # folders of a web server
        places = store.url, tmp_path / "index", store.storage()
        build_index(places[0], tokenizer, chat, 1, *places[1:])
        assert check_index(*places).differences == []
        for steps in (2, 4):
            faults = ["", "", "", "503", "", "short", "", "reset", "", ""]
            store.server.faults.extend(faults)
            overrides = remote(store, store.url, tmp_path / "index")
            rows, error = one_rank.run(
                run, digits_corpus, tmp_path / "run", *overrides, f"train.steps={steps}"
            )[0]
            assert not error and not store.server.faults
        assert sum(row["store_retries"] for row in rows) > 0 == rows[-1]["bad_samples"]
        assert not any(row["store_retries"] for row in undisturbed)
        expected = [{name: row[name] for name in SAME} for row in undisturbed]
        assert [{name: row[name] for name in SAME} for row in rows] == expected
        gone = remote(store, f"{store.elsewhere}/shard-000000.tar", tmp_path / "index")
        _, error = one_rank.run(run, digits_corpus, tmp_path / "none", *gone)[0]
        assert "not indexed" in error and store.elsewhere in error
        store.server.always = "403"
        _, error = one_rank.run(run, digits_corpus, tmp_path / "none", *overrides)[0]
        assert "the credentials are missing, expired or without the right" in error
        assert "\n" not in error and "hidden" not in error
