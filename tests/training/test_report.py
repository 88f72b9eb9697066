"""The page of a run: what it says, of runs that go on, are broken, or lie side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError
from tests.chromium import Element, browse, parse, require_chromium
from tests.training.scenarios import tiny_config
from training.config import save_config
from training.report.__main__ import main

EVIL = "<script>document.title = 'run'</script>"


def make_run(folder: Path, steps: int = 30, rate: float = 0.5, **settings: Any) -> Path:
    """A run's folder as the trainer leaves it, without its checkpoints."""
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "loss": 3 / step**rate,
            "loss_16": 2 / step**rate,
            "loss_64": 4 / step**rate,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "samples": 8.0,
            "images": 9.0,
            "tokens": 1000.0,
            "padding": 0.25,
            "data_wait": 0.5 if step == 1 else 0.0,
            "step_s": 4.0 if step == 1 else 1.0,
            "tokens_per_s": 1000.0,
            "images_per_s": 9.0,
            "memory_gib": 1.5,
            "bad_samples": float(step == 3),
            "too_long": 0,
            "store_retries": 0.0,
            "skipped_steps": 2,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = [
        {"detail": detail, "num_image_tokens": count, "accuracy": count / 100, "loss": 1.5}
        for detail in ("k=1", "all")
        for count in (16, 64)
    ]
    evaluation = {"step": steps, "accuracy": 0.4, "loss": 1.5, "results": results}
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    config = {"seed": 0, "train": {"steps": 60}, **settings}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "starts").mkdir()
    start = {"time": "now", "step": 0, "machine": "a machine", "versions": {"torch": "2"}}
    (folder / "starts" / "0001.json").write_text(json.dumps(start))
    (folder / "profile").mkdir()
    (folder / "profile" / "steps-3-5-rank-0.phases.txt").write_text("phase  ms\ndecoder  7\n")
    return folder


def summary(page: Element) -> dict[str, list[str]]:
    rows = page.one("section", id="summary").find("tr", data_row="")
    return {row.attributes["data-row"]: [cell.text for cell in row.find("td")[1:]] for row in rows}


def test_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # just being written
    main([str(run)])
    assert str(run / "report.html") in capsys.readouterr().out
    page = parse((run / "report.html").read_text())
    found = summary(page)
    assert found["steps"] == ["30 of 60"] and found["state"] == ["not known"]
    assert found["samples"] == ["240"] and found["tokens"] == ["30,000"]
    assert found["tokens/s"] == [f"{30_000 / (4 + 29):,.0f}"]
    # Shares of the time, not means over steps.
    assert found["data wait"] == [f"{100 * 0.5 * 4 / 33:.1f} %"] and found["padding"] == ["25.0 %"]
    assert found["bad samples"] == ["1"] and found["skipped steps"] == ["2"]
    assert found["accuracy"] == ["40.0 %"] and found["machine"] == ["a machine"]
    assert "MFU" not in found  # nothing is made up
    table = page.one("section", id="accuracy").one("table")
    assert [cell.text for cell in table.find("td")] == [
        *("k=1", "16.0 %", "64.0 %"),
        *("all", "16.0 %", "64.0 %"),
    ]
    assert "decoder  7" in page.one("section", id="time").text


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", 20, seed=7)]
    out = tmp_path / "new" / "both.html"
    main([*map(str, runs), "--out", str(out)])
    page = parse(out.read_text())
    assert summary(page)["steps"] == ["30 of 60", "20 of 60"]
    names = [cell.text for cell in page.one("section", id="summary").find("th")]
    assert names == ["", "a/run", "b/run"]
    (lines,) = page.one("section", id="settings").find("ul")
    assert [line.text for line in lines.find("li")] == ["seed: 0 -> 7"]


def test_pages_in_a_browser(tmp_path: Path) -> None:
    """One picture per question, all of which load; nothing of a run is taken for markup."""
    require_chromium()
    run = make_run(tmp_path / EVIL.replace("/", "+"), note=EVIL)
    main([str(run), "--out", str(tmp_path / "page.html")])
    dom, console = browse(tmp_path / "page.html", tmp_path, "--dump-dom")
    page = parse(dom)
    assert console == [] and page.find("script") == []
    assert page.one("title").text.startswith("<script>")  # as text
    pictures = page.find("img")
    assert len(pictures) >= 9 and all(
        picture.attributes["src"].startswith("data:image/png;base64,") for picture in pictures
    )


def test_a_finished_run_has_its_checkpoints_and_goodput(
    one_rank: Any, digits_corpus: Path, tmp_path: Path
) -> None:
    """Of a real run, stopped and gone on."""
    from tests.training.start_scenarios import Starting, run

    held_out = f"data.eval_shards=[{digits_corpus / 'eval'}]"
    length = ("train.steps=4", "profile.steps=[1,1]", held_out, "eval.max_samples=6")
    one_rank.run(Starting(stop=2), digits_corpus, tmp_path, *length)
    one_rank.run(run, digits_corpus, tmp_path, *length)
    main([str(tmp_path), "--samples", "2"])
    page = parse((tmp_path / "report.html").read_text())
    found = summary(page)
    assert found["state"] == ["finished"] and found["steps"] == ["4 of 4"]
    assert "torch" in found["versions"][0] and found["machine"] != [""]
    rows = page.one("section", id="time").one("tbody").find("tr")
    assert [row.find("td")[-1].text for row in rows] == ["preempted", "finished", ""]
    saved = page.one("section", id="checkpoints").one("tbody").find("tr")
    assert [row.find("td")[0].text for row in saved] == ["2", "4"]
    samples = page.one("section", id="samples").find("article")
    assert len(samples) == 2
    for sample in samples:
        reference = sample.one("span", class_="chip").text
        figures = sample.find("figure")
        assert [figure.attributes["data-count"] for figure in figures] == ["4", "16", "64"]
        for figure in figures:
            answer = figure.one("figcaption").one("span")
            assert (answer.text.strip() == reference) == (answer.attributes["class"] == "")
            assert figure.one("img").attributes["src"].startswith("data:image/png")


def test_samples_of_a_run_without_held_out_shards(digits_corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    save_config(tiny_config(digits_corpus, "data.eval_shards=[]"), run / "config.yaml")
    with pytest.raises(InputError, match=r"data\.eval_shards"):
        main([str(run), "--samples", "2"])


@pytest.mark.parametrize("kind", ["no folder", "no metrics", "too many"])
def test_bad_input(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    runs = [str(folder)]
    if kind == "no metrics":
        folder.mkdir()
    if kind == "too many":
        runs = [str(make_run(tmp_path / str(number))) for number in range(9)]
    with pytest.raises(InputError) as caught:
        main(runs)
    expected = {"no folder": "output_dir", "no metrics": "metrics.jsonl", "too many": "9 runs"}
    assert expected[kind] in str(caught.value)
