"""Parts of the index by themselves: image sizes, remembered texts, columns that stay in memory."""

import ast
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.image_header import _jpeg_size, _png_size, read_image_size
from data_pipeline.images import image_size
from data_pipeline.index import ShardColumns, build_index, load_index
from data_pipeline.index import open_index as load_module
from data_pipeline.index.cache import ColumnsCache
from data_pipeline.index.columns import load_columns, save_columns
from data_pipeline.index.prompts import remembering
from data_pipeline.storage import Shard
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.indexes import index_of, make_index, replaced
from tests.data_pipeline.small_tokenizers import TEXTS, save_hugging_face, save_sentencepiece
from tests.data_pipeline.test_index import ordinary, write_shard


def encode(kind: str, mode: str = "RGB", size: tuple[int, int] = (37, 21), **options: Any) -> bytes:
    buffer = BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    result = Image.Exif()
    result[0x0112] = orientation
    return result


ORDINARY = [
    *(encode("PNG", mode) for mode in ("RGB", "L", "RGBA", "LA")),
    encode("PNG", dpi=(72, 72)),
    *(encode("JPEG", mode) for mode in ("RGB", "L")),
    encode("JPEG", progressive=True),
    encode("JPEG", quality=30, optimize=True, comment=b"hello"),
    encode("JPEG", size=(300, 1)),
]
LEFT_TO_PILLOW = [
    encode("PNG", exif=exif(6)),
    encode("JPEG", exif=exif(8)),
    encode("JPEG", "CMYK"),
    encode("JPEG", icc_profile=b"profile"),
    encode("PNG", "1"),
    encode("PNG", "P"),  # of one bit
    encode("PNG", "I;16"),
    encode("WEBP"),
    encode("GIF"),
]


def fast_size(data: bytes) -> tuple[int, int] | None:
    return _png_size(data) if data.startswith(b"\x89PNG") else _jpeg_size(data)


def with_text(orientation: int) -> bytes:
    """A PNG whose EXIF is in a text chunk, as ImageMagick has it."""
    info = PngImagePlugin.PngInfo()
    block = b"Exif\0\0" + exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    return encode("PNG", pnginfo=info)


def test_sizes_are_those_of_pillow() -> None:
    for data in ORDINARY:
        assert fast_size(data) == image_size(data) == read_image_size(data)
    for data in [*LEFT_TO_PILLOW, with_text(6)]:
        assert fast_size(data) is None
        assert read_image_size(data) == image_size(data)
    assert read_image_size(LEFT_TO_PILLOW[0]) == (21, 37)  # turned
    assert read_image_size(with_text(6)) == (21, 37)


@given(
    data=st.sampled_from([*ORDINARY, *LEFT_TO_PILLOW]),
    at=st.integers(0, 700),
    value=st.integers(0, 255),
    cut=st.integers(0, 700),
)
def test_damage_before_the_pixels_gives_what_pillow_gives(
    data: bytes, at: int, value: int, cut: int
) -> None:
    changed = bytearray(data)
    if at < len(changed):
        changed[at] = value
    for damaged in (bytes(changed), data[:cut]):
        found: list[tuple[int, int] | str] = []
        for function in (read_image_size, image_size):
            try:
                found.append(function(damaged))
            except InputError as error:
                found.append(str(error))
        assert found[0] == found[1]


def test_a_quantization_table_that_is_cut_short() -> None:
    data = encode("JPEG")
    damaged = data[:2] + b"\xff\xdb\0\5\0\1\2" + data[2:]
    assert fast_size(data) and fast_size(damaged) is None
    with pytest.raises(InputError, match="header is damaged"):
        read_image_size(damaged)


def test_too_many_pixels_are_refused() -> None:
    data = bytearray(encode("PNG"))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(InputError, match="too large"):
        read_image_size(bytes(data))


@pytest.mark.parametrize("save", [save_sentencepiece, save_hugging_face])
def test_remembered_texts_have_the_same_ids(save: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path))
    quick = remembering(tokenizer)
    texts = [*set(TEXTS), "", "é" * 300, "x" * 199, "x" * 201, "<img>"]
    for text in texts * 2:
        assert quick.encode(text) == tokenizer.encode(text)
        assert quick.decode(quick.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert remembering(tokenizer) is quick
    for name in ("vocab_size", "fingerprint", "source", "pad_id", "end_of_turn_id"):
        assert getattr(quick, name) == getattr(tokenizer, name)
    assert quick.special_id("<img>") == tokenizer.special_id("<img>")
    with pytest.raises(InputError, match="lone surrogate"):
        quick.encode("\ud800")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


def test_columns_are_read_when_needed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(4):
        write_shard(tmp_path / f"{k}.tar", [ordinary(10 * k + j) for j in range(3)])
    build_index(str(tmp_path), tokenizer, ChatSettings())
    seen: list[str] = []
    original = load_module.load_columns

    def load(path: Path) -> Any:
        seen.append(path.stem)
        return original(path)

    monkeypatch.setattr(load_module, "load_columns", load)
    index = load_index(str(tmp_path), tokenizer, ChatSettings())
    assert len(index) == 12 and index.images == 12 and index.shard_name(5) == "1.tar"
    assert index.fingerprint and index.totals["text_tokens"] and seen == []
    assert index.key(5) == "0012" and index.name(3) == "1.tar:0010"
    assert len(index.read_images(5)) == 0 and index.read_sample(4)["messages"]
    assert seen == ["1"]
    assert len(index.text_tokens) == 12 and sorted(seen) == ["0", "1", "2", "3"]


def test_threads_parse_columns_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's `ast`, which NumPy reads headers by, fails where threads use it at once."""
    files = [tmp_path / f"{k}.npz" for k in range(4)]
    for file in files:
        save_columns(file, {}, make_index(range(3), [[]] * 3).columns(0))
    parse, inside, most = ast.literal_eval, 0, 0

    def slow(text: str) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        inside -= 1
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", slow)
    with ThreadPoolExecutor(4) as pool:
        assert [len(columns.text_tokens) for _, columns in pool.map(load_columns, files)] == [3] * 4
    assert most == 1


def test_columns_stay_while_there_is_room() -> None:
    whole = make_index(range(60), [[]] * 60)
    loads: list[int] = []

    def load(shard: int) -> ShardColumns:
        loads.append(shard)
        return whole.columns(0)

    cache = ColumnsCache(load, 2 * whole.columns(0).nbytes + 99)
    for shard in (1, 0, 1, 2, 1):
        assert cache.get(shard) is whole.columns(0)
    assert loads == [1, 0, 2]
    cache.get(0)  # had to go: it was not used for longest
    assert loads == [1, 0, 2, 0]
    tiny = ColumnsCache(load, 1)  # less than the columns of one shard
    assert [len(tiny.get(5)) for _ in range(3)] == [60] * 3 and loads[4:] == [5]


def test_columns_from_several_threads() -> None:
    keys = [f"k{i}" for i in range(40)]
    shards = [Shard(f"{k}.tar") for k in range(8)]
    index = index_of(shards, [5] * 8, keys, text_tokens=range(40))
    index._cache._max_bytes = 3 * index.columns(0).nbytes  # so that columns come and go
    failed: list[int] = []

    def read(start: int) -> None:
        for number in range(start, start + 2000):
            i = 7 * number % 40
            if index.key(i) != f"k{i}" or index.columns(i // 5).text_tokens[i % 5] != i:
                failed.append(i)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_an_index_made_of_arrays() -> None:
    made = make_index([5, 6, 7], [[(1, 2)], [], [(3, 4), (5, 6)]])
    assert len(made) == made.images == 3 and made.image_sizes(2).tolist() == [[3, 4], [5, 6]]
    assert made.key(1) == "s1" and made.supervised_tokens.tolist() == [1, 1, 1]
    shards = [Shard("a.tar"), Shard("b.tar")]
    split = index_of(
        shards, [1, 2], text_tokens=[5, 6, 7], image_start=[0, 1, 1, 3], image_width=[1, 3, 5]
    )
    assert split.shard.tolist() == [0, 1, 1] and split.name(2) == "b.tar:2"
    assert split.columns(1).image_start.tolist() == [0, 0, 2]
    assert split.image_sizes(2).tolist() == [[3, 0], [5, 0]]
    np.testing.assert_array_equal(split.join("image_start"), [0, 1, 1, 3])
    changed = replaced(made, text_tokens=[9, 9, 9])
    assert changed.text_tokens.tolist() == [9, 9, 9] and changed.image_sizes(0).tolist() == [[1, 2]]
    assert len(index_of(text_tokens=[])) == 0
