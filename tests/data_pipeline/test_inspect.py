"""The page that shows what the model will see: its content, and how a browser shows it."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.batch import IGNORE, PackedBatch
from data_pipeline.cli import run_cli
from data_pipeline.corpus import Corpus, open_config
from data_pipeline.inspect import charts
from data_pipeline.inspect.__main__ import main
from data_pipeline.inspect.content import BuiltSample, pieces, unpack, visible
from data_pipeline.plan import StepPlan
from data_pipeline.tokenizer import load_tokenizer
from tests.chromium import Element, browse, parse, require_chromium
from tests.data_pipeline.inspect_corpus import EVIL, write_mixture, write_texts
from tests.data_pipeline.small_tokenizers import save_hugging_face, save_sentencepiece

# Every sample comes once, and all of them are shown.
WHOLE = ["data.datasets.photos.repeat=1", "data.datasets.captions.repeat=1"]
WHOLE += ["data.datasets.photos.weight=90", "data.datasets.captions.weight=28"]
WHOLE += ["data.pack.window_samples=500"]
SHOW_ALL = ["--samples", "500", "--steps", "3", "--packs", "3"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def corpus(config: Path) -> Corpus:
    return open_config(str(config), WHOLE)[1]


@pytest.fixture(scope="module")
def steps(corpus: Corpus) -> list[StepPlan]:
    """All of the plan."""
    return [step for step, _ in corpus.planner.steps()]


@pytest.fixture(scope="module")
def page(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    main([str(config), *SHOW_ALL, "--out", str(out), *WHOLE])
    return out


@pytest.fixture(scope="module")
def dom(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Element:
    """The page after a browser has read it; nothing may have been reported on its console."""
    require_chromium()
    output, messages = browse(page, tmp_path_factory.mktemp("browser"), "--dump-dom")
    assert messages == []
    return parse(output)


def build(corpus: Corpus, steps: list[StepPlan]) -> list[tuple[int, int, PackedBatch]]:
    """(step from 1, pack, batch) of all packs."""
    return [
        (number, pack, corpus.builder.build(plan))
        for number, step in enumerate(steps, 1)
        for pack, plan in enumerate(step.packs)
    ]


def pixels(uri: str) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG in a data URI."""
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_browser_reports_what_the_page_must_not_do(tmp_path: Path) -> None:
    require_chromium()
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><script>nothing.here()</script>")
    output, messages = browse(bad, tmp_path, "--dump-dom")
    assert "nothing is not defined" in messages[0]
    assert parse(output).find("script")


def test_packs_are_those_of_the_plan(dom: Element, corpus: Corpus, steps: list[StepPlan]) -> None:
    shown = dom.find("div", data_step="")
    assert [element.attributes["data-step"] for element in shown] == ["1", "2", "3"]
    for element, step in zip(shown, steps, strict=False):
        rows = element.find("tr", data_pack="")
        assert len(rows) == 3 < len(step.packs)
        assert "4 packs, the first 3 shown" in element.text
        for row, plan in zip(rows, step.packs, strict=False):
            batch = corpus.builder.build(plan)
            tokens, tiles = len(batch.input_ids), len(batch.tiles)
            assert int(row.attributes["data-tokens"]) == tokens == plan.tokens
            assert int(row.attributes["data-tiles"]) == tiles
            assert [cell.one("span").text for cell in row.find("td", class_="meter")][:2] == [
                f"{tokens:,}",
                f"{tiles:,}",
            ]
            assert [int(rect.attributes["width"]) for rect in row.find("rect", class_="base")] == (
                plan.lengths.tolist()
            )
        for name, values in {
            "tokens": [pack.tokens for pack in step.packs],
            "tiles": [pack.num_tiles for pack in step.packs],
            "FLOPs": [pack.flops for pack in step.packs],
        }.items():
            ratio = max(values) / (sum(values) / len(values))
            assert element.one("td", data_ratio=name).text == f"{ratio:.3f}"


def test_samples_are_those_of_the_batches(
    dom: Element, corpus: Corpus, steps: list[StepPlan]
) -> None:
    articles = {a.attributes["data-sample"]: a for a in dom.find("article")}
    good = 0
    for step, pack, batch in build(corpus, steps):
        bounds = batch.cu_seqlens.tolist()
        bad = {f"{item.shard}:{item.key}" for item in batch.bad}
        for i, sample in enumerate(batch.sample_ids):
            name = corpus.mixture.name(sample)
            if name in bad:
                assert name not in articles
                continue
            own = slice(bounds[i], bounds[i + 1])
            check_article(articles[name], batch.input_ids[own], batch.labels[own], corpus)
            assert f"step {step}, pack {pack}" in articles[name].text
            good += 1
    assert good == len(articles) == 116  # of 118; one is too long, one damaged


def check_article(article: Element, ids, labels, corpus: Corpus) -> None:  # type: ignore[no-untyped-def]
    """Tokens, supervised tokens and texts of a sample as the page shows them."""
    supervised = labels != IGNORE
    spans = article.one("div", class_="text").find("span")
    marked = [span for span in spans if "s" in span.attributes["class"].split()]

    def count(elements: list[Element]) -> int:
        return sum(int(span.attributes.get("data-n", "1")) for span in elements)

    assert count(spans) == len(ids) == int(article.attributes["data-tokens"])
    assert count(marked) == int(supervised.sum()) == int(article.attributes["data-supervised"])
    text = corpus.tokenizer.decode(ids[supervised].tolist(), skip_special=False)
    assert "".join(span.text for span in marked) == visible(text)
    context = corpus.tokenizer.special_id("<IMG_CONTEXT>")
    images = [span for span in spans if "i" in span.attributes["class"].split()]
    assert count(images) == int((ids == context).sum())
    assert len(images) == len(article.find("figure"))


def test_pictures_hold_the_tiles(dom: Element, corpus: Corpus, steps: list[StepPlan]) -> None:
    articles = {a.attributes["data-sample"]: a for a in dom.find("article")}
    several = 0
    for _, pack, batch in build(corpus, steps[:1]):
        plan = steps[0].packs[pack]
        for i, sample in enumerate(unpack(batch, plan, corpus.tokenizer)):
            if sample.reason:
                continue
            article = articles[corpus.mixture.name(batch.sample_ids[i])]
            tile = 0
            for figure, count in zip(article.find("figure"), plan.tiles[i].tolist(), strict=True):
                side = sample.tile_sides[tile]
                assert f"= {count * side**2:,}" in figure.text and f"(n = {side})" in figure.text
                shown = [
                    part
                    for image in figure.find("img")
                    for part in cut(pixels(image.attributes["src"]))
                ]
                assert np.array_equal(np.stack(shown), sample.tiles[tile : tile + count])
                tile += count
                several += count > 1
            assert tile == len(sample.tiles)
    assert several


def cut(picture: np.ndarray) -> list[np.ndarray]:
    """Tiles uint8 [3, 32, 32] of a picture, row by row."""
    return [
        picture[y : y + 32, x : x + 32].transpose(2, 0, 1)
        for y in range(0, picture.shape[0], 32)
        for x in range(0, picture.shape[1], 32)
    ]


def test_what_is_left_out_is_named(dom: Element, corpus: Corpus, steps: list[StepPlan]) -> None:
    (section,) = dom.find("section", id="left-out")
    assert "By the index: 2" in section.text
    assert "00000.tar:00003" in section.text and "the caption is empty" in section.text
    assert "Too long for any pack: 1" in section.text
    assert "photos/000000.tar:photo_6" in section.text
    assert "Failed while the packs shown were built: 1" in section.text
    assert "photos/000000.tar:photo_1" in section.text
    assert "not those that were indexed" in section.text
    drawn = [batch for _, pack, batch in build(corpus, steps[:3]) if pack < 3]
    assert len(dom.find("g", class_="bad")) == sum(len(batch.bad) for batch in drawn)


def test_totals_are_those_of_the_index(dom: Element, corpus: Corpus) -> None:
    shown = {b.attributes["data-total"]: b.text for b in dom.find("b", data_total="")}
    indexes = [dataset.index for dataset in corpus.mixture.datasets]
    assert shown == {
        "samples": f"{sum(map(len, indexes)):,}",
        "images": f"{sum(int(i.image_start[-1]) for i in indexes):,}",
        "text tokens": f"{sum(int(i.text_tokens.sum()) for i in indexes):,}",
        "supervised tokens": f"{sum(int(i.supervised_tokens.sum()) for i in indexes):,}",
        "shards": "4",
        "left out by the index": "2",
    }


def test_counts_drawn_are_those_of_the_plan(dom: Element, steps: list[StepPlan]) -> None:
    drawn = np.concatenate([s for step in steps for pack in step.packs for s in pack.sides])
    for count in (4, 16, 64):
        cell = dom.one("td", data_count=str(count))
        assert cell.text == f"{(drawn**2 == count).sum():,}"


def test_data_is_text_and_nothing_else(dom: Element, page: Path) -> None:
    assert not dom.find("script")
    assert "what the model will see" in dom.one("head").one("title").text
    shown = [a for a in dom.find("article") if "document.title" in a.text]
    assert len(shown) == 1
    assert visible(EVIL) in shown[0].one("div", class_="text").text
    assert "\u2039U+202E\u203a" in shown[0].text and "\u202e" not in dom.text
    sources = [e.attributes["src"] for e in dom.find("img")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "not an image" in dom.text and "<b>not" in dom.text
    assert "<script" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_drawn(config: Path, tmp_path: Path, dark: bool) -> None:
    require_chromium()
    page = tmp_path / "page.html"
    main([str(config), "--samples", "4", "--out", str(page)])
    shot = tmp_path / "page.png"
    options = [f"--screenshot={shot}", "--window-size=1366,1600"]
    browse(page, tmp_path, *options, *(["--force-dark-mode"] if dark else []))
    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape == (1600, 1366, 3)
    corner = picture[-1, 0].astype(int)  # the page's own colour
    assert (corner.max() < 64) if dark else (corner.min() > 192)
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours) > 1000 and counts.max() < 0.9 * counts.sum()


def test_later_steps_and_the_end_of_the_plan(
    config: Path, steps: list[StepPlan], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "later.html"
    last = len(steps)
    main([str(config), *WHOLE, "--first-step", str(last), "--steps", "5", "--out", str(out)])
    found = parse(out.read_text(encoding="utf-8")).find("div", data_step="")
    assert [element.attributes["data-step"] for element in found] == [str(last)]
    rows = found[0].find("tr", data_pack="")
    assert [int(r.attributes["data-tokens"]) for r in rows] == [p.tokens for p in steps[-1].packs]
    assert f"steps {last} to {last}" in capsys.readouterr().out


def test_texts_without_images(tmp_path: Path) -> None:
    config = write_texts(tmp_path)
    main([str(config), "--out", str(tmp_path / "page.html"), "--samples", "2"])
    found = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(found.find("article")) == 2 and not found.find("figure")
    assert {row.attributes["data-tiles"] for row in found.find("tr", data_pack="")} == {"0"}


def test_samples_are_chosen_over_datasets_images_and_counts(config: Path, tmp_path: Path) -> None:
    main([str(config), "--samples", "8", "--out", str(tmp_path / "page.html")])
    found = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    articles = found.find("article")
    assert len(articles) == 8
    text = " ".join(article.text for article in articles)
    assert "dataset photos" in text and "dataset captions" in text
    assert all(f"x {count} tokens" in text for count in (4, 16, 64))
    assert {len(article.find("figure")) for article in articles} >= {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.pack.max_tokenz=3"], "data.pack.max_tokenz: unknown key; did you mean max_tokens?"),
        (["data.pack.max_tokens=8"], "raise data.pack.max_tokens"),
        (["data.tokenizer=/nowhere.model"], "/nowhere.model does not exist"),
        (["data.prepare={format: grid, out: /nowhere}"], "data_pipeline.prepare --format grid"),
        (["model.llm.config=null"], "model.llm.config: is required"),
        ([*WHOLE, "--first-step", "999"], "the plan ends after step"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(SystemExit) as exit:
        run_cli(lambda: main([str(config), *arguments, "--out", str(out)]))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("error: ") == 1 and message in error
    assert not out.exists()


def test_as_a_command(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.inspect", str(config), "--out"]
    refused = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --out {tmp_path} is a folder")


@pytest.mark.parametrize("save", [save_sentencepiece, save_hugging_face])
@pytest.mark.parametrize(
    "text",
    [
        "What is shown?  A red cell\n",
        "Gr\u00fc\u00dfe \u4f60\u597d \U0001f600!",
        "\u00e9" * 5,
        " a",
    ],
)
def test_pieces_give_the_text_token_by_token(tmp_path: Path, save, text: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer = load_tokenizer(save(tmp_path))
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.end_of_turn_id
    prompt, answer = tokenizer.encode("user\n"), tokenizer.encode(text)
    ids = [start, *prompt, end, *answer, end]
    labels = [IGNORE] * (len(prompt) + 2) + [*answer, end]
    sample = BuiltSample(np.array(ids), np.array(labels), np.empty((0, 3, 1, 1)), [], "")
    found = pieces(sample, [], tokenizer)
    assert sum(piece.tokens for piece in found) == len(ids)
    marked = [piece for piece in found if piece.supervised]
    assert sum(piece.tokens for piece in marked) == len(answer) + 1
    assert "".join(piece.text for piece in marked) == visible(text) + "<|im_end|>"
    whole = [piece for piece in marked if piece.kind == "text" and piece.tokens == 1]
    assert all(text.isascii() is False or piece in whole for piece in marked[:-1])


def test_every_token_count_has_its_lines() -> None:
    assert charts.grid_lines(2, 2, 1) == "M1 0V2M3 0V2M0 1H4"
    assert charts.tile_lines(2, 2, 1) == "M0 0V2M2 0V2M4 0V2M0 0H4M0 2H4"


def test_a_histogram_counts_every_value() -> None:
    values = np.array([1, 1, 2, 5])
    drawing = str(charts.histogram(values, "tiles"))
    assert drawing.count("<rect") == 5
    assert "1 tiles: 2</title>" in drawing and "3 tiles: 0</title>" in drawing
    many = np.arange(1000)
    titles = str(charts.histogram(many, "tokens")).split("</title>")[:-1]
    assert sum(int(t.rsplit(": ", 1)[1]) for t in titles) == 1000
