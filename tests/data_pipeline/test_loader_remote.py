"""Training's loader on a store that fails: retries are counted, and no sample is to blame."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.loader import StepLoader
from data_pipeline.storage import Storage, StorageSettings, StoreError, StoreOutage
from tests.data_pipeline.http_faults import FaultyServer
from tests.data_pipeline.test_loader import Corpus, take

QUICK = StorageSettings(attempts=3, backoff_s=0.001, timeout_s=5, deadline_s=20)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def server(corpus: Corpus) -> Iterator[FaultyServer]:
    with FaultyServer(corpus.folder / "shards") as server:
        yield server


def remote_loader(corpus: Corpus, server: FaultyServer, **settings: float) -> StepLoader:
    corpus.index = corpus.load()
    corpus.index.storage = Storage(QUICK)
    corpus.index.shards = corpus.index.storage.expand(f"{server.url}/{{0,1}}.tar")
    return corpus.loader(**settings)


def test_retries_are_counted_by_step(corpus: Corpus, server: FaultyServer) -> None:
    loader = remote_loader(corpus, server, threads=1, prefetch_steps=1)
    server.faults.extend(["503", "", "500", "503"])
    batches = take(loader, 6)
    assert batches[0].store_retries == 3 and not server.faults
    assert sum(batch.store_retries for batch in batches[2:]) == 0
    assert not any(pack.bad for batch in batches for pack in batch.packs)
    server.faults.append("503")
    assert sum(batch.store_retries for batch in take(loader, 3)) == 1


@pytest.mark.parametrize("fault", ["503", "short", "401", "404", "no range"])
def test_a_store_that_keeps_failing_ends_the_run(
    corpus: Corpus, server: FaultyServer, fault: str
) -> None:
    """However many bad samples are allowed."""
    loader = remote_loader(corpus, server, max_bad_fraction=1.0)
    steps = loader.steps()
    next(steps)
    server.always = fault
    with pytest.raises(StoreError) as caught:
        list(islice(steps, 20))
    steps.close()
    message = str(caught.value)
    assert server.url in message and "\n" not in message
    outage = fault in ("503", "short")  # which may be over when the run is started again
    assert isinstance(caught.value, StoreOutage) == outage
    assert outage == ("tried 3 times" in message)


def test_a_shard_that_was_cut_is_the_samples_fault(own_corpus: Corpus) -> None:
    with FaultyServer(own_corpus.folder / "shards") as server:
        loader = remote_loader(own_corpus, server, max_bad_fraction=1.0)
        shard = own_corpus.folder / "shards/0.tar"
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)
        bad = [bad for batch in take(loader, 8) for pack in batch.packs for bad in pack.bad]
    assert bad and {sample.shard for sample in bad} == {"0.tar"}


@pytest.fixture
def own_corpus(tmp_path: Path) -> Corpus:
    """For tests that damage it."""
    return Corpus(tmp_path)
