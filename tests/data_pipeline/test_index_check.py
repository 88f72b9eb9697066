"""--check: every difference between shards and their index is reported, and nothing written."""

import os
import shutil
from pathlib import Path

import pytest

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index import build_index, check_index
from data_pipeline.index.__main__ import main
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece
from tests.data_pipeline.test_index import Sample, make_sample, ordinary, picture, write_shard

CHAT = ChatSettings()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


def samples_of(shard: int) -> list[Sample]:
    return [ordinary(number) for number in range(4 * shard, 4 * shard + 4)]


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    for k in range(3):
        bad = {"__key__": "bad", "json": b"{"}
        write_shard(tmp_path / "train" / f"{k}.tar", [*samples_of(k), bad])
    build_index(str(tmp_path / "train"), tokenizer, CHAT)
    return tmp_path / "train"


def found(shards: Path, workers: int = 1) -> list[tuple[str, str, str]]:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [shards, *shards.rglob("*")]}

    before = written()
    report = check_index(str(shards), workers=workers)
    assert written() == before
    return sorted((Path(d.shard).name, d.key, d.what) for d in report.differences)


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_nothing_differs(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for workers in (1, 2):
        report = check_index(str(shards), workers=workers)
        assert (report.shards, report.samples, report.differences) == (3, 12, [])
        assert report.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    os.utime(shards / "0.tar", ns=(0, 1))  # the time is no difference
    main([str(shards), "--check"])
    assert "3 shards, 12 samples" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_changed_bytes_are_found(shards: Path, workers: int) -> None:
    overwrite(shards / "0.tar", b"What is 0002?", b"What is 9999?")
    image = samples_of(1)[1]["1.png"]  # of sample 0005, which has two
    overwrite(shards / "1.tar", image, image[:-20] + bytes(20))
    assert found(shards, workers) == [
        ("0.tar", "0002", "the text ('json') has other bytes than when it was indexed"),
        ("1.tar", "0005", "image 1 ('1.png') has other bytes than when it was indexed"),
    ]


def test_another_shard_of_the_same_name(shards: Path) -> None:
    """One sample gone, one more, one with another text, one moved."""
    one, two, _, four = samples_of(2)
    two["json"] = two["json"].replace(b"What is", b"What was")
    write_shard(shards / "2.tar", [one, two, make_sample("more", {"0.png": picture(3, 3)}), four])
    differences = found(shards)
    assert {shard for shard, _, _ in differences} == {"2.tar"}
    by_key = {key: what for _, key, what in differences}
    assert "its index was made for" in by_key[""]
    assert by_key["0009"].startswith("the text ('json') has ")
    assert by_key["0009"].endswith("when it was indexed")
    assert by_key["more"] == "is in the shard, but not in its index"
    assert by_key["0010"] == "is in the index, but not in the shard"
    assert "0008" not in by_key and "bad" not in by_key


def test_a_moved_or_doubled_member(shards: Path) -> None:
    write_shard(shards / "0.tar", samples_of(0)[::-1])
    differences = [entry for entry in found(shards) if entry[1]]
    assert {key for _, key, _ in differences} == {"0000", "0001", "0002", "0003"}
    assert any("is no longer at byte" in what for _, _, what in differences)
    write_shard(shards / "0.tar", [*samples_of(0), samples_of(0)[0]])
    assert ("0.tar", "0000") in [
        (shard, key) for shard, key, what in found(shards) if "two members" in what
    ]


def test_a_truncated_shard(shards: Path) -> None:
    path = shards / "1.tar"
    os.truncate(path, path.stat().st_size // 2)
    differences = found(shards)
    whole = [what for _, key, what in differences if not key]
    assert any("its index was made for" in what for what in whole)
    assert any("is truncated" in what for what in whole)
    lost = {key for _, key, what in differences if key}
    assert "0007" in lost and lost < {"0004", "0005", "0006", "0007"}


def test_shards_that_are_not_listed_or_gone(shards: Path) -> None:
    write_shard(shards / "more.tar", [ordinary(1)])
    (shards / "0.tar").unlink()
    (shards / "index" / "2.npz").write_bytes(b"")
    assert [(name, what.partition(" ")[0]) for name, _, what in found(shards)] == [
        ("0.tar", "is"),
        ("2.tar", str(shards / "index" / "2.npz")),
        ("more.tar", "is"),
    ]
    # A subset says nothing about shards that are still there.
    assert [d.shard for d in check_index(str(shards / "1.tar")).differences] == [
        str(shards / "0.tar")
    ]


def test_exit_status_and_a_missing_index(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(shards / "0.tar", b"What is 0001?", b"What is 9999?")
    overwrite(shards / "0.tar", b"What is 0002?", b"What is 9999?"[::-1])
    with pytest.raises(InputError, match=r"^2 differences .*\b1 of 3 shards"):
        main([str(shards), "--check", "--workers", "1"])
    printed = capsys.readouterr().out
    assert f"{shards}/0.tar:0001: the text" in printed
    shutil.rmtree(shards / "index")
    with pytest.raises(InputError, match="are not indexed"):
        main([str(shards), "--check"])
