"""The kernels' table of a trace, and the page of a run, looked at in a browser."""

import base64
import gzip
import json
from pathlib import Path

import pytest
import torch

import kernels.profile.__main__ as command
from kernels.profile.cases import Case, parse_shape
from kernels.profile.html_report import Report, write_page
from kernels.profile.kernel_table import summary, traced
from kernels.profile.plots import draw
from kernels.profile.providers import PROVIDERS
from kernels.profile.random_inputs import backward, make_inputs
from kernels.profile.roofline import Peaks
from kernels.profile.run_tables import kernel_table
from tests.chromium import browse, parse, require_chromium
from tests.kernels.test_profile_run import H200, content_of, recorded, write_json

CPU = torch.device("cpu")
CASE = Case((12,), (1.0,))  # 9216 rows


def op(number: int, name: str, dims, kinds=None) -> dict:
    kinds = kinds or ["c10::BFloat16"] * len(dims)
    args = {"External id": number, "Input Dims": dims, "Input type": kinds}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": 0, "dur": 1, "tid": 1, "args": args}


def kernel(name: str, start: float, us: float, number: int = 0, cat: str = "kernel") -> dict:
    args = {"External id": number}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": us, "tid": 7, "args": args}


def gpu_trace() -> list[dict]:
    """Two calls, each after an idle GPU: pool + norm, a product, a silu, and what is not known."""
    events = [
        op(1, "tokenflex::projector_forward", [[64, 729, 1152]]),
        op(2, "aten::addmm", [[3456], [9216, 1152], [1152, 3456]]),
        op(3, "aten::silu", [[9216, 3456]]),
        {"ph": "M", "name": "process_name"},
        kernel("nobody's", -50, 1),  # of what ran before
    ]
    for start in (0, 10_000):
        events += [
            kernel("spin_kernel(long)", start, 1000),
            kernel("pool_norm_kernel", start + 1010, 50, 1),
            kernel("nvjet_tst_128x256", start + 1065, 100, 2),
            kernel("elementwise<silu>", start + 1165, 40, 3),
            kernel("Memcpy HtoD", start + 1170, 5, 1, "gpu_memcpy"),  # meanwhile
            kernel("opaque", start + 1220, 10, 1),
        ]
    return events[:4] + events[5:]


def test_the_table_of_a_gpu_trace():
    found = summary(gpu_trace(), CASE, H200, calls=2)
    rows = {row["name"]: row for row in found["kernels"]}
    assert [row["name"] for row in found["kernels"]][:2] == [
        "nvjet_tst_128x256",
        "pool_norm_kernel",
    ]
    assert found["busy_us"] == 205 and "spin_kernel(long)" not in rows
    assert all(row["launches"] == 1 for row in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)

    flops = 2 * 9216 * 1152 * 3456
    product = rows["nvjet_tst_128x256"]
    assert product["us"] == 100 and product["share"] == pytest.approx(100 / 205)
    assert product["tflops"] == pytest.approx(flops / 100e-6 / 1e12) and product["gb_per_s"] is None
    assert product["roof"] == pytest.approx(flops / H200.flops / 100e-6)
    pooled, x = 9216 * 1152 * 2, 64 * 729 * 1152 * 2
    assert rows["pool_norm_kernel"]["gb_per_s"] == pytest.approx((x + 2 * pooled) / 50e-6 / 1e9)
    assert rows["pool_norm_kernel"]["roof"] == pytest.approx((x + 2 * pooled) / 4.3e12 / 50e-6)
    silu = 2 * 9216 * 3456 * 2
    assert rows["elementwise<silu>"]["gb_per_s"] == pytest.approx(silu / 40e-6 / 1e9)
    for name in ("opaque", "Memcpy HtoD"):
        assert {rows[name][key] for key in ("gb_per_s", "tflops", "roof")} == {None}
    # Between the spin and the first launch, before the product, and before the last.
    assert found["gap_us"] == pytest.approx(10 + 5 + 15) and found["gaps"] == 3


def test_this_ops_kernels_are_known_by_name():
    m, c, f, d = CASE.rows, 1152, 3456, 2048
    moved = {"swiglu_kernel": 3 * m * f, "swiglu_backward_kernel": 6 * m * f}
    moved |= {"norm_backward_kernel": 4 * m * c, "norm_kernel": 2 * m * c}
    products = {"_dual_gemm": 4 * m * f * c, "_gate_gemm": 2 * m * f * d}
    events = [kernel(name, 10 * i, 1) for i, name in enumerate(moved | products)]
    rows = {row["name"]: row for row in summary(events, CASE, H200, 1)["kernels"]}
    for name, elements in moved.items():
        assert rows[name]["gb_per_s"] == pytest.approx(2 * elements / 1e-6 / 1e9), name
    for name, flops in products.items():
        assert rows[name]["tflops"] == pytest.approx(flops / 1e-6 / 1e12), name
    (frozen,) = summary([kernel("norm_backward_kernel", 0, 1)], CASE, H200, 1, frozen=True)[
        "kernels"
    ]
    assert frozen["gb_per_s"] == pytest.approx(2 * 3 * m * c / 1e-6 / 1e9)


def test_what_other_kernels_move_is_read_off_their_op():
    """Not of a kernel without an op, as in a graph; an op of Inductor is given its result, too."""
    names = {"aten::mul": 3, "aten::sum": 2, "triton_poi_fused_mul_0": 2, "tokenflex::f": None}
    ops = [op(i + 1, name, [[9216, 3456]] * 2) for i, name in enumerate(names)]
    unnumbered = op(0, "aten::add", [[9216, 3456]] * 2)
    del unnumbered["args"]["External id"]
    launches = [kernel(f"of {name}", 10 * i, 1, i + 1) for i, name in enumerate(names)]
    graph = kernel("of nothing", 90, 1) | {"args": {}}
    rows = summary([*ops, unnumbered, *launches, graph], CASE, H200, 1)["kernels"]
    moved = {row["name"].removeprefix("of "): row["gb_per_s"] for row in rows}
    for name, tensors in (names | {"nothing": None}).items():
        expected = tensors and pytest.approx(tensors * 9216 * 3456 * 2 / 1e-6 / 1e9)
        assert moved[name] == expected, name


def test_kernels_of_next_to_no_time_are_one_line():
    events = [kernel(f"copy{i}", 10 * i, us) for i, us in enumerate((1000, 1, 1, 1))]
    found = summary(events, CASE, H200, 1)
    text = str(kernel_table({"case": "c", "providers": {"save": {"kernels": found}}}, "save"))
    lines = [line.split() for line in text.splitlines()]
    assert ["3", "others", "3", "3.0", "0.3%", "-", "-", "-"] in lines and "copy1" not in text


def test_a_kernel_on_what_fits_in_l2_has_no_roof():
    small = parse_shape("T=1,n=2")
    (row,) = summary([kernel("pool_norm_kernel", 0, 50)], small, H200, 1)["kernels"]
    assert row["gb_per_s"] > 0 and row["roof"] is None
    (row,) = summary([kernel("pool_norm_kernel", 0, 50)], small, H200.past_l2, 1)["kernels"]
    assert row["roof"] > 0


def test_the_time_of_an_op_is_its_own():
    """On a CPU: what nested ops take is theirs, what no op takes is the gap."""

    def cpu(name, start, us, dims=()):
        return op(0, name, list(dims), ["float"] * len(dims)) | {"ts": start, "dur": us}

    events = [
        {"ph": "X", "cat": "user_annotation", "name": "one call", "ts": 0, "dur": 100, "tid": 1},
        cpu("aten::linear", 10, 60),
        cpu("aten::addmm", 20, 40, [[8], [4, 16], [16, 8]]),
        cpu("aten::copy_", 22, 5, [[4, 16]]),
        cpu("aten::mul", 80, 10, [[4, 16]]),
        cpu("aten::zeros", 200, 50),  # after the call
    ]
    found = summary(events, CASE, Peaks(1e12, 1e12), 1)
    times = {row["name"]: row["us"] for row in found["kernels"]}
    assert times == {"aten::linear": 20, "aten::addmm": 35, "aten::copy_": 5, "aten::mul": 10}
    assert (found["busy_us"], found["gap_us"], found["gaps"]) == (70, 30, 0)
    rates = {row["name"]: row["tflops"] for row in found["kernels"]}
    assert rates.pop("aten::addmm") == pytest.approx(2 * 4 * 16 * 8 / 35e-6 / 1e12)
    assert set(rates.values()) == {None}


@pytest.mark.parametrize("name", ["save", "eager_grouped"])
def test_a_trace_of_a_real_run_has_the_products(name, tmp_path):
    case = parse_shape("T=2,n=2/3,C=24,F=40,D=16,grid=6x7,dtype=fp32")
    given, call = make_inputs(case, CPU), PROVIDERS[name].build(case, CPU)

    def run():
        backward(given, call(given.x, given.weights))

    path = tmp_path / "deep" / "trace.json.gz"
    found = traced(run, case, CPU, Peaks(1e12, 1e10), path=path)
    rows = [row for row in found["kernels"] if row["tflops"] is not None]
    # 3 forward and 6 backward, once for each side where eager code groups by side.
    sides = 2 if name == "eager_grouped" else 1
    assert sum(row["launches"] for row in rows) == 9 * sides
    done = sum(row["tflops"] * 1e12 * row["us"] / 1e6 for row in rows)
    assert done == pytest.approx(3 * 2 * case.rows * 40 * (2 * 24 + 16))
    with gzip.open(path) as file:
        assert json.load(file)["traceEvents"]
    text = str(kernel_table({"case": "c", "providers": {name: {"kernels": found}}}, name))
    assert "TFLOP/s" in text and "between them" in text


def gpu_content(save_ms: float = 1.0) -> dict:
    """A run on a GPU as it would be in the file: two cases and a sweep, with kernels."""
    cases = [CASE, Case((8, 12, 16), (0.2, 0.3, 0.5))]
    swept = [Case((12,), (1.0,), tiles=t) for t in (1, 4, 16, 64, 256)]
    records = []
    for case in (*cases, *(c for c in swept if c != CASE)):
        part = case.tiles / 64 * save_ms
        times = {"eager_grouped": 1.25 * part, "compile": 1.1 * part, "save": part + 0.02}
        record = recorded(case, times, again=1.02)
        record["gpu"] = {"clocks.sm": [1410, 1700, 1980], "throttled": ["power cap"]}
        found = summary(gpu_trace(), case, H200, 2)
        record["providers"]["save"]["kernels"] = found
        for name, host in (("eager_grouped", 0.3), ("compile", 0.15), ("save", 0.1)):
            record["providers"][name]["timings"]["both"]["host_ms"] = host
        records.append(record)
    records[0]["failed"] = {"fused": "RuntimeError: <no> kernel"}
    names = [case.name for case in swept]
    sweep = {"key": "T", "rest": "n=12,pool=adaptive", "values": [1, 4, 16, 64, 256]}
    content = content_of(*records, command="python -m kernels.profile")
    target = {"case": CASE.name, "what": "speed", "at_least": True, "limit": 2.0, "measured": 1.1}
    return content | {"sweeps": [sweep | {"cases": names}], "targets": [target], "failures": {}}


def test_the_pictures_of_a_run_on_a_gpu(tmp_path):
    drawn = draw(gpu_content(), tmp_path)
    names = ["speedup", "parts", "sweep-T-time", "sweep-T-speedup", "sweep-T-host"]
    assert [path.stem for path in drawn] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert [path.stem for path in draw(content_of(), tmp_path)] == []


def test_the_pictures_of_a_run_of_forward_alone(tmp_path):
    """And a provider that failed in the first case of a sweep is drawn all the same."""
    content = gpu_content()
    for record in content["cases"]:
        for found in record["providers"].values():
            found["timings"] = {"forward": found["timings"]["both"]}
    first = next(r for r in content["cases"] if r["case"].startswith("T=1,"))
    del first["providers"]["compile"]
    stems = [path.stem for path in draw(content, tmp_path)]
    assert stems == ["speedup", "parts", "sweep-T-time", "sweep-T-speedup", "sweep-T-host"]


def seen(page: Path, folder: Path):
    html, messages = browse(page, folder, "--dump-dom", "--window-size=1600,1200")
    assert not messages
    return parse(html)


def test_the_page_in_a_browser(tmp_path):
    require_chromium()
    content = gpu_content()
    commands = ["ncu --kernel-name 'regex:^(a|b)$' python -m kernels.profile"]
    report = Report("run", content, draw(content, tmp_path), commands)
    write_page(page := tmp_path / "report.html", [report])
    shown = seen(page, tmp_path)
    images = shown.find("img")
    assert [image.attributes["alt"] for image in images] == [
        *("speedup", "parts", "sweep-T-time", "sweep-T-speedup", "sweep-T-host")
    ]
    for image, path in zip(images, report.pictures, strict=True):
        data = image.attributes["src"].removeprefix("data:image/png;base64,")
        assert base64.b64decode(data) == path.read_bytes()
    text = shown.text
    for part in (CASE.name, "NOT MET", "throttled: power cap", "A/A, save timed again", *commands):
        assert part in text
    assert "RuntimeError: <no> kernel" in text and "elementwise<silu>" in text  # as text, not tags
    assert "machine, versions, settings" in text and "H200" in text
    assert len(shown.find("details")) == len(content["cases"])
    assert "http" not in page.read_text().replace(
        "https://ui.perfetto.dev", ""
    )  # nothing is loaded


def test_two_runs_side_by_side_in_a_browser(tmp_path):
    require_chromium()
    for name, content in (("old", gpu_content()), ("new", gpu_content(1.2))):
        write_json(tmp_path / f"{name}.json", content)
    files = [str(tmp_path / f"{name}.json") for name in ("old", "new")]
    line = ["--compare", *files, "--fail-above=5%", f"--out={tmp_path / 'out'}"]
    assert command.main(line) == 1
    shown = seen(tmp_path / "out" / "compare.html", tmp_path)
    columns = shown.one("main").find("section")
    assert [column.one("h2").text for column in columns] == ["old: H200", "new: H200"]
    assert [len(column.find("img")) for column in columns] == [5, 5]
    first = shown.find("table")[0]
    assert "SLOWER by more than 5%" in first.text and first.text.count(CASE.name) == 3
