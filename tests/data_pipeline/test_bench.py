"""The benchmarks run, compare like with like, and leave a record that says where it was made."""

import importlib
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.bench import bench_loader as loader
from data_pipeline.bench import bench_prepare
from data_pipeline.bench.__main__ import main
from data_pipeline.bench.photos import make_photo
from data_pipeline.errors import InputError
from tests.data_pipeline.pictures import cut_tiles, decode_rgb

ROOT = Path(__file__).parents[2]


def test_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "bench.json"
    main(["loader", "--quick", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["command"] == f"python -m data_pipeline.bench loader --quick --out {out}"
    assert set(record) == {"command", "date", "hardware", "versions", "commit", "results"}
    assert record["hardware"]["cores"] >= 1 and record["hardware"]["cpu"]
    assert record["versions"]["webdataset"] == "1.0.2"
    assert set(record["results"]) == {"loader"}
    found = record["results"]["loader"]
    assert len(found["samples_per_s"]) == len(found["webdataset_samples_per_s"]) == 2
    assert min(found["samples_per_s"] + found["webdataset_samples_per_s"]) > 0
    assert found["cpu_ms_per_sample"] > 0 < found["webdataset_cpu_ms_per_sample"]
    times = found["cpu_ms_per_large_photo"]
    assert set(times) == set(found["cpu_ms_per_photo"]) and min(times.values()) > 0
    printed = capsys.readouterr().out
    assert printed.startswith("loader\n") and "cpu_ms_per_large_photo: usual way" in printed
    assert printed.endswith(f"written to {out}\n")


def test_remote(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    main(["remote", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())["results"]["remote"]
    each, together = found["each member"], found["members together"]
    assert each["requests_per_sample"] == 1.9  # every tenth sample has no image
    assert together["requests_per_sample"] == 1
    assert each["unused_share"] == 0 < together["unused_share"] < 0.02
    # Between a text and its image lie a header, and padding before it.
    assert 512 <= together["unused_bytes_per_sample"] < 4 * 512
    assert min(each["samples_per_s"], together["samples_per_s"]) > 0


def test_prepare(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    main(["prepare", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())["results"]["prepare"]
    for name in ("LLaVA JSON", "messages JSONL", "parquet with pictures", "folder"):
        rates = found[name]["here"]
        assert rates["entries_per_s"] > 0 < rates["MB_per_s"], name
        assert rates["entries_per_cpu_s_without_start"] > rates["entries_per_cpu_s"], name
        assert "ratio" not in found[name]


def test_prepare_beside_another_checkout(tmp_path: Path) -> None:
    """Ratios of wall time, of CPU time, and of that without start-up; none if it cannot read it."""
    here = {"start": (1.0, 1.0), "whole": (3.0, 2.0)}
    there = {"start": (2.0, 1.5), "whole": (6.0, 5.5)}
    found = bench_prepare._rates({"here": here, "against": there}, 12, 6_000_000)
    assert found["here"]["entries_per_s"] == 4 and found["here"]["MB_per_s"] == 2
    assert list(found["ratio"].values()) == [2.0, 3.0, 4.0]
    (tmp_path / "data.json").write_text("[]")
    assert bench_prepare._run(ROOT, "llava", tmp_path / "data.json", tmp_path / "out") is None
    unread = bench_prepare._rates({"here": here, "against": {**here, "whole": None}}, 1, 1)
    assert unread["against"] == "not read" and "ratio" not in unread


def test_both_sides_cut_the_same_tiles() -> None:
    for size in ((640, 480), (480, 640), (384, 384)):
        data = make_photo(*size, seed=1)
        expected = cut_tiles(decode_rgb(data), loader.TILING)
        np.testing.assert_array_equal(loader.their_tiles(data), expected)


def test_photos_are_like_photographs() -> None:
    """Of the asked size, each another, and as large a file as a camera's: 1 to 4 bit per pixel."""
    data = make_photo(1600, 1200, seed=1)
    assert data == make_photo(1600, 1200, seed=1) != make_photo(1600, 1200, seed=2)
    assert Image.open(BytesIO(data)).size == (1600, 1200)
    assert 1 < 8 * len(data) / (1600 * 1200) < 4


def test_unknown_and_missing_benchmarks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"'speed'.* planner, index"):
        main(["speed"])
    load = importlib.import_module

    def without_startup(name: str) -> object:
        if name == "data_pipeline.bench.bench_startup":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name)

    monkeypatch.setattr(importlib, "import_module", without_startup)
    with pytest.raises(InputError, match=r"startup .*data_pipeline\.bench\.bench_startup"):
        main(["loader", "startup", "--out", str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())
