"""S3, Google Cloud Storage, the Hub and HTTP, each with the faults that its users meet."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index import build_index, check_index, load_index
from data_pipeline.storage import Shard
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece
from tests.data_pipeline.stores import PROTOCOLS, Store, open_store
from tests.data_pipeline.test_index import ordinary, write_shard
from tests.data_pipeline.test_index_remote import assert_same_content

CHAT = ChatSettings()
PATTERN = "shard-{000000..000002}.tar"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for k in range(3):
        samples = [ordinary(number) for number in range(4 * k, 4 * k + 4)]
        write_shard(folder / f"shard-{k:06d}.tar", samples)
    return folder


@pytest.fixture(scope="module", params=PROTOCOLS)
def kept(request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    with open_store(request.param, folder) as store:
        yield store


@pytest.fixture
def store(kept: Store) -> Iterator[Store]:
    kept.server.requests.clear()
    yield kept
    kept.server.always = ""
    kept.server.faults.clear()


def first(store: Store) -> Shard:
    return Shard(f"{store.url}/shard-000000.tar")


def test_index_check_and_read_despite_faults(
    store: Store, folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    build_index(str(folder), tokenizer, CHAT, 1, tmp_path / "local")
    local = load_index(str(folder), tokenizer, CHAT, tmp_path / "local")
    pattern, storage = f"{store.url}/{PATTERN}", store.storage()
    place = tmp_path / "remote", storage
    store.server.faults.extend(["", "503", "", "short", "reset", "", "500"])
    build_index(pattern, tokenizer, CHAT, 1, *place)
    assert check_index(pattern, *place).differences == []
    remote = load_index(pattern, tokenizer, CHAT, *place)
    store.server.faults.extend(["503", "", "", "reset", "short", ""])
    assert_same_content(remote, local)
    # Some requests are repeated or dispensable inside of a driver.
    assert not store.server.faults and 2 <= storage.counts.retries <= 7


def test_size_and_version_are_those_of_the_store(store: Store, folder: Path) -> None:
    stats = [store.storage().stat(first(store)) for _ in range(2)]
    assert stats[0] == stats[1] and stats[0].version
    assert stats[0].bytes == (folder / "shard-000000.tar").stat().st_size
    if first(store).protocol == "hf":  # not of the place that it redirects to
        assert stats[0].version == '"shard-000000.tar"'


def test_a_folder_is_listed(store: Store) -> None:
    store.server.lists = True
    names = [f"shard-{k:06d}.tar" for k in range(3)]
    assert [shard.name for shard in store.storage().expand(store.url)] == names
    (shard,) = store.storage().expand(f"{store.url}/*1.tar")
    assert shard == Shard(f"{store.url}/shard-000001.tar")
    store.server.faults.append("503")
    storage = store.storage()
    assert len(storage.expand(f"{store.url}/*.tar")) == 3


@pytest.mark.parametrize("fault", ["503", "short", "reset"])
def test_a_listing_is_whole(store: Store, fault: str) -> None:
    """Whichever of its requests fails, no shard is left out."""
    store.server.lists = True
    pattern = f"{store.url}/*.tar"
    for place in range(4):
        store.server.faults.extend([*[""] * place, fault, fault])
        assert len(store.storage().expand(pattern)) == 3, place
        store.server.faults.clear()


@pytest.mark.parametrize("fault", ["503", "429", "500", "short", "reset", "stall", "stall in body"])
def test_a_failure_that_passes_is_a_counted_retry(store: Store, folder: Path, fault: str) -> None:
    content = (folder / "shard-000000.tar").read_bytes()
    # Only what stalls needs a short wait; a busy machine may take longer for an answer.
    storage = store.storage(timeout_s=0.5 if "stall" in fault else 10, attempts=9)
    storage.read(first(store), 0, 1)  # opens what is opened once, however long it takes
    before = replace(storage.counts)
    # aiohttp itself repeats a request on a connection that was reset.
    store.server.faults.extend([fault] * (2 if fault == "reset" else 1))
    assert storage.read(first(store), 3, 4000) == content[3:4003]
    after = storage.counts
    assert (after.retries - before.retries, after.requests - before.requests) == (1, 2)
    assert after.bytes - before.bytes == 4000


@pytest.mark.parametrize("kept", ["s3"], indirect=True)
def test_a_client_that_is_long_in_building_is_no_store_that_does_not_answer(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be built anew by every attempt, and no attempt would ever end."""
    import s3fs

    set_session = s3fs.S3FileSystem.set_session

    async def slow(self: object, *args: object, **kwargs: object) -> object:
        await asyncio.sleep(0 if getattr(self, "_s3", None) else 2)
        return await set_session(self, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "set_session", slow)
    storage = store.storage(timeout_s=1.5, attempts=2)
    content = (folder / "shard-000000.tar").read_bytes()
    assert storage.read(first(store), 3, 4000) == content[3:4003]


@pytest.mark.parametrize("fault", ["503", "short", "reset", "stall", "stall in body"])
def test_a_failure_that_stays_is_one_error(store: Store, fault: str) -> None:
    store.storage().read(first(store), 0, 1)
    storage = store.storage(timeout_s=0.5 if "stall" in fault else 10)
    store.server.always = fault
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        storage.read(first(store), 3, 4000)
    message = str(caught.value)
    assert message.startswith(f"the 4000 bytes at 3 of {first(store)} cannot be read: ")
    assert fault != "503" or "503" in message  # no retries of a driver's own hide it
    assert "(tried 4 times in" in message and "data.storage.attempts" in message
    assert "\n" not in message and "hidden" not in message
    assert time.monotonic() - start < 15
    assert storage.counts.retries == 3


def test_a_stall_ends_at_the_deadline(store: Store) -> None:
    storage = store.storage(attempts=1000, timeout_s=30, deadline_s=0.7)
    store.server.always = "stall"
    start = time.monotonic()
    for call in (
        lambda: storage.read(first(store), 0, 4000),
        lambda: storage.stat(first(store)),
    ):
        with pytest.raises(InputError, match=r"does not answer in time \(tried 1 times"):
            call()
    assert time.monotonic() - start < 15


REMEDIES = {
    "http": "a signed one expires",
    "s3": "renew the AWS credentials",
    "gs": "gcloud auth application-default login",
    "hf": "hf auth login or set HF_TOKEN",
}


@pytest.mark.parametrize("fault", ["expired", "403"])
def test_refused_credentials_are_one_clear_error(store: Store, fault: str) -> None:
    protocol = first(store).protocol
    store.server.always = "401" if protocol == "http" and fault == "expired" else fault
    for call in (
        lambda storage: storage.read(first(store), 3, 4000),
        lambda storage: storage.stat(first(store)),
        lambda storage: storage.expand(f"{store.url}/*.tar"),
    ):
        storage = store.storage()
        with pytest.raises(InputError) as caught:
            call(storage)
        message = str(caught.value)
        assert store.url in message and REMEDIES[protocol] in message, message
        assert "\n" not in message and "hidden" not in message
        assert storage.counts.retries == 0 and storage.counts.requests == 1


def test_what_is_not_there_is_named(store: Store) -> None:
    for url in (f"{store.url}/none.tar", f"{store.elsewhere}/shard-000000.tar"):
        for call in (
            lambda storage, url: storage.read(Shard(url), 0, 1),
            lambda storage, url: storage.stat(Shard(url)),
        ):
            storage = store.storage()
            with pytest.raises(InputError) as caught:
                call(storage, url)
            message = str(caught.value)
            assert message.startswith(f"the shard {url} does not exist"), message
            assert "check the names of the file and of the bucket" in message
            assert storage.counts.retries == 0
    with pytest.raises(InputError, match=r"no \.tar file matches|does not exist"):
        store.storage().expand(store.elsewhere)


def test_reads_past_the_end(store: Store, folder: Path) -> None:
    size = (folder / "shard-000000.tar").stat().st_size
    for offset in (size - 3, size + 99):
        storage = store.storage()
        with pytest.raises(InputError, match=r"000000\.tar (ends inside|is shorter than it was)"):
            storage.read(first(store), offset, 4)
        assert storage.counts.retries == 0


def test_a_sample_is_one_request(
    store: Store, folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pattern, storage = f"{store.url}/{PATTERN}", store.storage()
    build_index(pattern, tokenizer, CHAT, 1, tmp_path, storage)
    index = load_index(pattern, tokenizer, CHAT, tmp_path, storage)
    before = replace(storage.counts)
    together = [index.read(i) for i in range(len(index))]
    assert storage.counts.requests - before.requests == len(index) and not storage.counts.retries
    unused = storage.counts.bytes_unused - before.bytes_unused
    assert together == [(index.read_sample(i), index.read_images(i)) for i in range(len(index))]
    columns = [index.columns(shard) for shard in range(3)]
    members = [
        [
            (c.text_offset[row], c.text_size[row]),
            *zip(c.image_offset[own], c.image_bytes[own], strict=True),
        ]
        for c in columns
        for row in range(4)
        for own in [slice(c.image_start[row], c.image_start[row + 1])]
    ]
    spans = [max(o + size for o, size in sample) - min(sample)[0] for sample in members]
    used = sum(size for sample in members for _, size in sample)
    assert unused == sum(spans) - used > 0


def test_a_parquet_file_is_read_where_it_lies(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    table = pa.table({"a": np.arange(200_000), "b": ["text"] * 200_000})
    pq.write_table(table, folder / "0.parquet", row_group_size=50_000)
    (folder / "0.parquet").rename(folder / "0.tar")  # of the names that the stores here hold
    with open_store("hf", folder) as store:
        storage = store.storage()
        (url,) = storage.glob(f"{store.url}/*")
        assert url == f"{store.url}/0.tar"
        store.server.faults.extend(["", "503"])
        with storage.open(url) as file:
            read = pq.ParquetFile(file)
            assert read.read_row_group(2).equals(table.slice(100_000, 50_000))
        size = (folder / "0.tar").stat().st_size
        assert storage.counts.bytes < size + (2 << 20) and storage.counts.retries == 1
        with pytest.raises(InputError, match=r"none\.parquet does not exist"):
            storage.open(f"{store.url}/none.parquet")
    with storage.open(str(folder / "0.tar")) as file:
        assert file.read() == (folder / "0.tar").read_bytes()
