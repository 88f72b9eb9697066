"""Indexing and reading shards on a web server, and an index that lies elsewhere."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index import Index, build_index, check_index, load_index
from data_pipeline.index.__main__ import main
from data_pipeline.index.columns import COLUMNS
from data_pipeline.storage import ReadAhead, Storage, StorageSettings
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.http_faults import FaultyServer
from tests.data_pipeline.small_tokenizers import save_sentencepiece
from tests.data_pipeline.test_index import make_sample, ordinary, picture, write_shard

CHAT = ChatSettings()
FAST = Storage(StorageSettings(attempts=4, backoff_s=0.001, timeout_s=5, deadline_s=20))
PATTERN = "shard-{000000..000002}.tar"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(3):
        samples = [ordinary(number) for number in range(4 * k, 4 * k + 4)]
        write_shard(tmp_path / "train" / f"shard-{k:06d}.tar", samples)
    return tmp_path / "train"


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        yield server


def build_and_load(
    patterns: str, tokenizer: Tokenizer, index_dir: Path | None, workers: int = 1
) -> Index:
    build_index(patterns, tokenizer, CHAT, workers, index_dir, FAST)
    return load_index(patterns, tokenizer, CHAT, index_dir, FAST)


def assert_same_content(a: Index, b: Index) -> None:
    assert a.fingerprint == b.fingerprint and len(a) == len(b) == 12
    for name in [*COLUMNS, "keys"]:
        assert a.join(name).tolist() == b.join(name).tolist(), name
    for i in range(len(a)):
        assert a.read_sample(i) == b.read_sample(i) and a.read_images(i) == b.read_images(i)


@pytest.mark.parametrize("workers", [1, 2])
def test_over_http_despite_faults(
    folder: Path, server: FaultyServer, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    local = build_and_load(str(folder), tokenizer, None)
    pattern = f"{server.url}/{PATTERN}"
    server.faults.extend(["503", "", "reset", "short", ""] * 2)
    remote = build_and_load(pattern, tokenizer, tmp_path / "index", workers)
    server.faults.extend(["500", "", "short"] * 5)
    assert_same_content(remote, local)
    assert all(asked for _, asked in server.requests)  # never a whole shard
    assert not list(tmp_path.glob("index/*/partial"))


def test_a_remote_shard_is_one_pass_of_large_reads(
    folder: Path,
    server: FaultyServer,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern = f"{server.url}/shard-000001.tar"
    size = (folder / "shard-000001.tar").stat().st_size
    for block in (8 << 20, 5000):
        monkeypatch.setattr(ReadAhead.__init__, "__defaults__", (block,))
        server.requests.clear()
        build_and_load(pattern, tokenizer, tmp_path / f"{block}")
        content = [asked for _, asked in server.requests if asked != "bytes=0-0"]
        ends = [(start, min(start + block, size) - 1) for start in range(0, size, block)]
        assert content == [f"bytes={first}-{last}" for first, last in ends]
    server.requests.clear()
    build_index(pattern, tokenizer, CHAT, 1, tmp_path / "5000", FAST)
    assert {asked for _, asked in server.requests} == {"bytes=0-0"}  # unchanged: not read again


def test_small_blocks_give_the_same_index(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large members do: most samples lie across the border of two blocks."""
    expected = build_and_load(str(folder), tokenizer, None)
    for block in (600, 1024, 5000):
        monkeypatch.setattr(ReadAhead.__init__, "__defaults__", (block,))
        assert_same_content(build_and_load(str(folder), tokenizer, tmp_path / f"{block}"), expected)


def test_in_a_store_that_lists(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    local = build_and_load(str(folder), tokenizer, None)
    system = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        system.pipe_file(f"/index-test/train/{path.name}", path.read_bytes())
    try:
        remote = build_and_load("memory://index-test/train", tokenizer, tmp_path / "index")
        assert_same_content(remote, local)
    finally:
        system.rm("/index-test", recursive=True)


def test_a_remote_index_needs_a_place(
    server: FaultyServer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = f"{server.url}/{PATTERN}"
    for call in (build_index, load_index):
        with pytest.raises(InputError, match=r"beside its shards.*--index-dir"):
            call(pattern, tokenizer, CHAT)
    with pytest.raises(InputError, match=r"remote.*--tokenizer"):
        main([pattern, "--index-dir", "x"])


def test_a_shard_that_is_gone_or_ignores_ranges(
    folder: Path, server: FaultyServer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pattern, place = f"{server.url}/{PATTERN}", tmp_path / "index"
    build_index(pattern, tokenizer, CHAT, 1, place, FAST)
    (folder / "shard-000001.tar").rename(tmp_path / "away.tar")
    for call in (
        lambda: build_index(pattern, tokenizer, CHAT, 1, place, FAST),
        lambda: load_index(pattern, tokenizer, CHAT, place, FAST),
    ):
        with pytest.raises(InputError, match=r"shard-000001\.tar does not exist"):
            call()
    (tmp_path / "away.tar").rename(folder / "shard-000001.tar")
    index = load_index(pattern, tokenizer, CHAT, place, FAST)
    server.always = "no range"
    with pytest.raises(InputError, match="ignores requests for a range"):
        index.read_images(5)
    # Another size than when it was indexed.
    server.always = ""
    write_shard(folder / "shard-000001.tar", [ordinary(1)])
    with pytest.raises(InputError, match=r"shard-000001\.tar has .* bytes, but its index .*run: "):
        load_index(pattern, tokenizer, CHAT, place, FAST)


def test_an_index_folder_for_local_shards(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """For folders that cannot be written; equal names in several folders do not meet."""
    place = tmp_path / "deep" / "index"
    write_shard(
        tmp_path / "b" / "train" / "shard-000000.tar", [make_sample("b", {"0.png": picture(3, 4)})]
    )
    patterns = [str(folder), str(tmp_path / "b" / "train")]
    build_index(patterns, tokenizer, CHAT, 1, place)
    assert not (folder / "index").exists()
    index = load_index(patterns, tokenizer, CHAT, place)
    assert len(index) == 13 and index.key(0) == "b" and index.image_sizes(0).tolist() == [[3, 4]]
    assert len(list(place.glob("train-*/manifest.json"))) == 2
    with pytest.raises(InputError, match=f"not indexed; run: .* --index-dir {tmp_path / 'other'}"):
        load_index(patterns, tokenizer, CHAT, tmp_path / "other")
    # The same from the command line, and relative to another folder.
    main([*patterns, "--tokenizer", tokenizer.source, "--index-dir", str(place), "--workers", "1"])
    main([*patterns, "--check", "--index-dir", str(place), "--workers", "1"])
    (tmp_path / "in the way").write_text("")
    with pytest.raises(InputError, match=r"cannot write an index .* to .*in the way"):
        build_index(patterns, tokenizer, CHAT, 1, tmp_path / "in the way")


def test_shares_are_published_together(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = build_and_load(str(folder), tokenizer, tmp_path / "whole")
    common = [str(folder), "--tokenizer", tokenizer.source, "--workers", "1"]
    main([*common, "--share", "1/2"])
    assert [p.name for p in folder.glob("index/partial/*")] == ["shard-000001.npz"]
    assert "run without --share to publish" in capsys.readouterr().out
    with pytest.raises(InputError, match="not indexed"):
        load_index(str(folder), tokenizer, CHAT)
    main([*common, "--share", "0/2"])
    main([*common, "--share", "0/2"])  # again: nothing to do, nothing lost
    finished = {p.name: p.stat().st_mtime_ns for p in folder.glob("index/partial/*")}
    assert len(finished) == 3
    main(common)
    published = {p.name: p.stat().st_mtime_ns for p in folder.glob("index/*.npz")}
    assert published == finished  # moved, not made again
    assert not (folder / "index" / "partial").exists()
    assert_same_content(load_index(str(folder), tokenizer, CHAT), whole)
    for wrong in ("2/2", "-1/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            main([*common, f"--share={wrong}"])
    with pytest.raises(InputError, match=r"share .*2/2.* 0/2 \.\. 1/2"):
        build_index(str(folder), tokenizer, CHAT, share=(2, 2))


def test_more_shares_than_shards(folder: Path, tokenizer: Tokenizer) -> None:
    for part in range(5):
        build_index(str(folder), tokenizer, CHAT, share=(part, 5))
    assert len(build_and_load(str(folder), tokenizer, None)) == 12


def test_check_over_http(
    folder: Path, server: FaultyServer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pattern, place = f"{server.url}/{PATTERN}", tmp_path / "index"
    build_index(pattern, tokenizer, CHAT, 1, place, FAST)
    server.faults.extend(["503", "short"])
    assert check_index(pattern, place, FAST).differences == []
    shutil.copy(folder / "shard-000002.tar", folder / "shard-000001.tar")
    differences = check_index(pattern, place, FAST).differences
    assert {d.shard for d in differences} == {f"{server.url}/shard-000001.tar"}
    server.always = "404"
    assert len(check_index(pattern, place, FAST).differences) == 3
