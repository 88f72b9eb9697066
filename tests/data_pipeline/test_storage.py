"""Listing, sizing and reading shards: local files, a web server with faults, fsspec's memory."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from data_pipeline.errors import InputError
from data_pipeline.storage import ReadAhead, Shard, Storage, StorageSettings
from data_pipeline.storage.joined import MAX_JOINED_BYTES, cut, join_ranges
from tests.data_pipeline.http_faults import FaultyServer

CONTENT = bytes(range(256)) * 40
FAST = StorageSettings(attempts=4, backoff_s=0.001, timeout_s=5, deadline_s=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    for k in range(3):
        (folder / f"shard-{k:06d}.tar").write_bytes(CONTENT)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder.parent) as server:
        yield server


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for k in range(3):
        system.pipe_file(f"/bucket/set/{k}.tar", CONTENT)
    system.pipe_file("/bucket/set/notes.txt", b"")
    yield "memory://bucket/set"
    system.rm("/bucket", recursive=True)


def shard_at(server: FaultyServer, number: int = 0) -> Shard:
    return Shard(f"{server.url}/train/shard-{number:06d}.tar")


def test_the_parts_of_a_shards_place() -> None:
    local = Shard("some/folder/a.b.tar")
    assert (local.name, local.stem, local.folder) == ("a.b.tar", "a.b", "some/folder")
    assert not local.is_remote and local.path == Path("some/folder/a.b.tar")
    assert Shard("a.tar").folder == "."
    signed = Shard("https://host/x/0.tar?sig=secret/0")
    assert (signed.name, signed.folder) == ("0.tar", "https://host/x")
    assert signed.is_remote and str(signed) == "https://host/x/0.tar"
    assert str(Shard("https://me:secret@host:1/x@2/0.tar?q=@")) == "https://host:1/x@2/0.tar"
    question = Shard("s3://bucket/what?/0.tar")  # only HTTP has queries
    assert (question.name, question.folder) == ("0.tar", "s3://bucket/what?")
    assert sorted([Shard("b"), Shard("a")]) == [Shard("a"), Shard("b")]


def test_expand_local(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expand = Storage().expand
    a, b, c = (Shard(str(folder / f"shard-{k:06d}.tar")) for k in range(3))
    (folder / "notes.txt").write_text("")
    patterns: list[str | list[str]] = [
        str(folder),
        f"{folder}/*",
        f"{folder}/shard-{{000000..000002}}.tar",
        f"file://{folder}",
        [c.url, a.url, f"{folder}/shard-{{000001,000000}}.tar"],
    ]
    for pattern in patterns:
        assert expand(pattern) == [a, b, c]
    monkeypatch.chdir(folder)
    assert expand("shard-00000[01].tar") == [Shard(a.name), Shard(b.name)]
    assert len(expand([".", str(folder)])) == 3
    (folder.parent / "link").symlink_to(folder)
    assert len(expand([str(folder), str(folder.parent / "link")])) == 3
    (folder / "empty").mkdir()
    refused: list[tuple[str | list[str], str]] = [
        (f"{folder}/shard-{{000001..000003}}.tar", "shard-000003.tar does not exist"),
        (f"{folder}/none*.tar", "no .tar file matches"),
        (f"{folder}/notes*", "no .tar file matches"),
        (f"{folder}/notes.txt", "notes.txt is not named"),
        (f"{folder}/empty", "no .tar files in the folder"),
        (f"{folder}/{{000", "unbalanced braces"),
        ([], "no shards are given"),
    ]
    for pattern, reason in refused:
        with pytest.raises(InputError) as caught:
            expand(pattern)
        assert reason in str(caught.value)


def test_expand_remote(memory: str, server: FaultyServer) -> None:
    storage = Storage(FAST)
    everything = [Shard(f"{memory}/{k}.tar") for k in range(3)]
    for pattern in (
        memory,
        f"{memory}/",
        f"{memory}/*",
        f"{memory}/{{0..2}}.tar",
        f"{memory}/?.tar",
    ):
        assert [shard.url.replace(":///", "://") for shard in storage.expand(pattern)] == [
            shard.url for shard in everything
        ], pattern
    with pytest.raises(InputError, match=r"no \.tar file .*memory://bucket/none/"):
        storage.expand("memory://bucket/none")
    # HTTP: braces without a request, folders only where the server lists them, "?" a query.
    url = f"{server.url}/train"
    shards = storage.expand(f"{url}/shard-{{000000..000002}}.tar?sig=a/b")
    assert [shard.name for shard in shards] == [f"shard-{k:06d}.tar" for k in range(3)]
    assert server.requests == []
    assert storage.read(shards[0], 1, 2) == CONTENT[1:3]
    assert server.requests == [("/train/shard-000000.tar?sig=a/b", "bytes=1-2")]
    with pytest.raises(InputError, match="brace pattern"):
        storage.expand(url)
    server.lists = True
    assert storage.expand(url) == [shard_at(server, k) for k in range(3)]
    assert storage.expand(f"{url}/*1.tar") == [shard_at(server, 1)]


def test_stat(folder: Path, memory: str, server: FaultyServer) -> None:
    storage = Storage(FAST)
    local = Shard(str(folder / "shard-000000.tar"))
    stat = storage.stat(local)
    assert stat.bytes == len(CONTENT) and stat.version == str(local.path.stat().st_mtime_ns)
    os.utime(local.path, ns=(0, 5))
    assert storage.stat(local).version == "5"
    remote = storage.stat(shard_at(server))
    assert (remote.bytes, remote.version) == (len(CONTENT), '"v1"')
    assert server.requests[-1][1] == "bytes=0-0"  # not the whole shard
    assert storage.stat(Shard(f"{memory}/0.tar")).bytes == len(CONTENT)
    (folder / "shard-000000.tar").write_bytes(b"")
    assert storage.stat(shard_at(server)).bytes == 0
    for missing in (
        Shard(str(folder / "no.tar")),
        Shard(f"{server.url}/no.tar"),
        Shard(f"{memory}/no.tar"),
    ):
        with pytest.raises(InputError, match=r"no\.tar does not exist"):
            storage.stat(missing)
    shards = [local, shard_at(server, 1), Shard(f"{memory}/1.tar")]
    assert [stat.bytes for stat in storage.stat_all(shards)] == [0, len(CONTENT), len(CONTENT)]


def test_read(folder: Path, memory: str, server: FaultyServer) -> None:
    storage = Storage(FAST)
    shards = [
        Shard(str(folder / "shard-000001.tar")),
        shard_at(server, 1),
        Shard(f"{memory}/1.tar"),
    ]
    for shard in shards:
        for offset, size in [(0, 1), (7, 300), (0, len(CONTENT)), (len(CONTENT) - 1, 1), (5, 0)]:
            assert storage.read(shard, offset, size) == CONTENT[offset : offset + size]
        for offset in (len(CONTENT) - 3, len(CONTENT), len(CONTENT) + 99):
            with pytest.raises(InputError, match=rf"1\.tar .*4 bytes at {offset}"):
                storage.read(shard, offset, 4)
    assert server.encodings == {"identity"}  # a range of a compressed file would be another one
    with pytest.raises(InputError, match=r"none\.tar does not exist"):
        storage.read(Shard(str(folder / "none.tar")), 0, 1)


@pytest.mark.parametrize("fault", ["503", "500", "429", "reset", "short", "cut range"])
def test_failures_that_pass_are_tried_again(server: FaultyServer, fault: str) -> None:
    server.faults.extend([fault] * 3)
    assert Storage(FAST).read(shard_at(server), 3, 4000) == CONTENT[3:4003]
    assert len(server.requests) == 4
    server.requests.clear()
    server.always = fault
    with pytest.raises(InputError, match=r"bytes at 3 of .*000000\.tar.*\(tried 4 times") as caught:
        Storage(FAST).read(shard_at(server), 3, 4000)
    assert "data.storage.attempts" in str(caught.value)
    # aiohttp itself repeats a request on a connection that was reset.
    assert len(server.requests) == 4 or (fault == "reset" and 4 < len(server.requests) <= 8)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("404", "000000.tar does not exist (404)"),
        ("403", "answers 403 Forbidden"),
        ("no range", "ignores requests for a range"),
        ("shifted", "was asked for bytes 3-4002 and answers with 4-4002"),
    ],
)
def test_failures_that_stay_are_not(server: FaultyServer, fault: str, reason: str) -> None:
    server.always = fault
    with pytest.raises(InputError) as caught:
        Storage(FAST).read(shard_at(server), 3, 4000)
    assert reason in str(caught.value) and len(server.requests) == 1


@pytest.mark.parametrize("fault", ["stall", "stall in body"])
def test_a_server_that_stalls_is_left(server: FaultyServer, fault: str) -> None:
    """The server would take a minute for each answer."""
    settings = StorageSettings(attempts=2, backoff_s=0.001, timeout_s=0.2, deadline_s=30)
    server.faults.append(fault)
    assert Storage(settings).read(shard_at(server), 0, 4000) == CONTENT[:4000]
    server.always = fault
    start = time.monotonic()
    with pytest.raises(InputError, match=r"does not answer in time \(tried 2 times"):
        Storage(settings).read(shard_at(server), 0, 4000)
    server.lists = True
    deadline = StorageSettings(attempts=1000, backoff_s=0.05, timeout_s=30, deadline_s=0.5)
    for call in (
        lambda storage: storage.read(shard_at(server), 0, 4000),
        lambda storage: storage.expand(f"{server.url}/train/*.tar"),
    ):
        with pytest.raises(InputError, match=r"in time \(tried 1 times in"):
            call(Storage(deadline))
    assert time.monotonic() - start < 30


def test_an_unreachable_server_is_named() -> None:
    with FaultyServer(Path()) as gone:
        shard = shard_at(gone)
    with pytest.raises(InputError, match=r"000000\.tar .*(Connect|connect).*\(tried 4 times"):
        Storage(FAST).read(shard, 0, 1)


def test_the_wait_a_server_asks_for_is_kept_within_the_deadline(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("data_pipeline.storage.retry.time.sleep", waits.append)
    server.faults.extend(["503", "500", "500"])
    settings = StorageSettings(attempts=4, backoff_s=1.0, deadline_s=100)
    Storage(settings).read(shard_at(server), 0, 1)
    for number, wait in enumerate(waits):
        assert 0.5 * 2**number <= wait <= 1.5 * 2**number
    assert len(waits) == 3
    monkeypatch.setattr("tests.data_pipeline.http_faults.RETRY_AFTER", "7")
    server.faults.append("503")
    Storage(settings).read(shard_at(server), 0, 1)
    assert waits[3] == 7
    monkeypatch.setattr("tests.data_pipeline.http_faults.RETRY_AFTER", "700")
    server.faults.append("503")
    with pytest.raises(InputError, match=r"503 Service Unavailable \(tried 1 times"):
        Storage(settings).read(shard_at(server), 0, 1)


def test_many_threads_read_at_once(folder: Path, server: FaultyServer) -> None:
    """Some of them from a server that fails now and then."""
    storage = Storage(StorageSettings(attempts=60, backoff_s=0))
    server.faults.extend(["503", "", "reset", "", "short", ""] * 10)
    shards = [shard_at(server, k) for k in range(3)]
    shards += [Shard(str(folder / f"shard-{k:06d}.tar")) for k in range(3)]

    def read(number: int) -> bool:
        return storage.read(shards[number % 6], number, 900) == CONTENT[number : number + 900]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(600)))


def test_more_local_shards_than_stay_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k:03d}.tar" for k in range(100)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]) * 1000)
    storage = Storage()
    wrong: list[Path] = []

    def read_all() -> None:
        for k, path in enumerate(paths * 3):
            if storage.read(Shard(str(path)), 10, 900) != bytes([k % 100]) * 900:
                wrong.append(path)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    storage.forget()
    assert len(os.listdir("/proc/self/fd")) <= opened - 60  # noqa: PTH208


def test_pickled_and_forked(server: FaultyServer) -> None:
    storage = Storage(FAST)
    assert storage.read(shard_at(server), 0, 3) == CONTENT[:3]
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.settings == FAST and copy.read(shard_at(server), 0, 3) == CONTENT[:3]
    child = os.fork()
    if not child:  # its event loop is not the parent's
        os._exit(storage.read(shard_at(server), 0, 3) != CONTENT[:3])
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")]
)
def test_a_missing_driver_is_named(
    protocol: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(InputError, match=f"{protocol}://.* pip install {package}"):
        Storage().read(Shard(f"{protocol}://bucket/0.tar"), 0, 1)


def test_what_cannot_be_read_from(memory: str) -> None:
    with pytest.raises(InputError, match=r"ftp://.* s3://"):
        Storage().stat(Shard("ftp://host/0.tar"))
    wrong = StorageSettings(options={"client_kwargs": 3, "block_size": "x", "nonsense": 1})
    with pytest.raises(InputError):
        Storage(wrong).read(Shard("http://127.0.0.1:1/0.tar"), 0, 1)


def test_a_misspelt_option_is_named() -> None:
    storage = Storage(StorageSettings(options={"client_kwarg": {}}))
    with pytest.raises(InputError, match=r"options\.client_kwarg: .*mean client_kwargs\?"):
        storage.stat(Shard("https://127.0.0.1:1/a.tar"))


def test_local_shards_need_no_driver() -> None:
    code = "import sys, data_pipeline.storage; assert not {'fsspec', 'aiohttp'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_ahead_takes_one_request_per_block(server: FaultyServer) -> None:
    reader = ReadAhead(Storage(FAST), shard_at(server), len(CONTENT), block=1000)
    offset = 0
    for size in [1, 100, 950, 30, 0, 999, 1000, 512, 700, 800, 64]:
        assert reader.read(offset, size) == CONTENT[offset : offset + size]
        offset += size
    assert [asked for _, asked in server.requests] == [
        f"bytes={k * 1000}-{k * 1000 + 999}" for k in range(-(-offset // 1000))
    ]
    server.requests.clear()
    # Larger than a block: by itself. Behind the end: what is there.
    assert reader.read(6000, 3000) == CONTENT[6000:9000]
    assert reader.read(10_200, 99) == CONTENT[10_200:] and reader.read(10_240, 9) == b""
    assert reader.read(0, 10) == CONTENT[:10]  # back at the start
    assert [asked for _, asked in server.requests] == [
        "bytes=6000-8999",
        "bytes=10000-10239",
        "bytes=0-999",
    ]


def test_neighbours_are_joined() -> None:
    def joined(*ranges: tuple[int, int], gap: int = 10) -> list[tuple[int, int]]:
        reads = join_ranges(ranges, gap)
        data = [CONTENT[start : start + size] for start, size in reads]
        expected = [CONTENT[start : start + size] for start, size in ranges]
        assert cut(reads, data, ranges) == expected
        return reads

    assert joined() == []
    assert joined((5, 3)) == [(5, 3)]
    assert joined((0, 5), (15, 5), (31, 5)) == [(0, 20), (31, 5)]  # gaps of 10 and 11
    assert joined((40, 5), (0, 5), (42, 1), (0, 5), (10, 0)) == [(0, 10), (40, 5)]
    assert joined((0, 5), (5, 5), (11, 5), gap=0) == [(0, 10), (11, 5)]
    half = MAX_JOINED_BYTES // 2
    assert join_ranges([(0, half), (half, half), (2 * half, 1)], 10) == [
        (0, 2 * half),
        (2 * half, 1),
    ]
    large = [(0, 3 * half), (3 * half, 1)]
    assert join_ranges(large, 10) == large  # as it is: a member is never cut


def test_members_that_lie_together_come_in_one_request(server: FaultyServer, folder: Path) -> None:
    ranges = [(900, 300), (100, 50), (600, 20), (900, 300), (5000, 10)]
    expected = [CONTENT[offset : offset + size] for offset, size in ranges]
    local = Shard(str(folder / "shard-000000.tar"))
    for gap, asked in [
        (1000, ["bytes=100-1199", "bytes=5000-5009"]),
        (0, ["bytes=100-149", "bytes=600-619", "bytes=900-1199", "bytes=5000-5009"]),
    ]:
        storage = Storage(FAST.model_copy(update={"max_gap_bytes": gap}))
        server.requests.clear()
        server.faults.append("503")
        assert storage.read_together(shard_at(server), ranges) == expected
        assert [found for _, found in server.requests] == [asked[0], *asked]
        counts = storage.counts
        assert (counts.requests, counts.retries) == (len(asked) + 1, 1)
        assert counts.bytes - counts.bytes_unused == 380
        assert storage.read_together(local, ranges) == expected
        assert counts.requests == len(asked) + 1  # local reads are not requests


def test_retries_are_logged_ever_less(
    server: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(FAST)
    for _ in range(5):
        server.faults.append("503")
        storage.read(shard_at(server), 0, 1)
    assert storage.counts.retries == 5
    assert [message.partition(" requests")[0] for message in caplog.messages] == [
        f"storage: {count}" for count in (1, 2, 4)
    ]
    assert "503 Service Unavailable" in caplog.text
