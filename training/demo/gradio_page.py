"""The page: image, question, a slider over the token counts; one answer, or several compared."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training.demo.answers import Answers
from training.generate import LoadedModel
from training.generate.comparison import HEAD

_MARK = "\u25cf"
_COMPARED = 3  # counts that are chosen to begin with
# So many pixels from the sides the slider's knob stands at its ends; a digit more takes 7.
_TRACK = (25, 27)
_STYLE = """<style>
#marks .marks {position: relative; height: 26px; margin-top: -10px}
#marks .marks span {position: absolute; transform: translateX(-50%); text-align: center;
  font-size: 11px; line-height: 1.2; color: #c2410c; font-weight: 700}
.dark #marks .marks span {color: #fb923c}
</style>"""


def build_page(
    gradio: Any,
    loaded: LoadedModel,
    examples: Sequence[tuple[str, str]],
    max_new_tokens: int = 256,
) -> Any:
    """The page as Gradio's Blocks; examples are (picture, question).

    A file stays a file until this package opens it, so that what is not an image is refused by the
    rules of the processor.
    """
    answers = Answers(gradio, loaded, max_new_tokens)
    name = Path(loaded.source).name
    with gradio.Blocks(title=f"{name} - TokenFLEX", analytics_enabled=False) as page:
        gradio.Markdown(_introduction(name, answers))
        with gradio.Row():
            with gradio.Column():
                given = _inputs(gradio, loaded, answers)
            with gradio.Column():
                found = _outputs(gradio)
        compared = _comparison(gradio, loaded, answers)
        gradio.Examples(
            [list(example) for example in examples],
            [given.file, given.question],
            elem_id="examples",
        )
        _connect(gradio, answers, given, found, compared)
    return page


def _introduction(name: str, answers: Answers) -> str:
    text = (
        f"# {name}: a slider over the vision tokens\n\nAn image is cut into tiles, and each tile "
        "becomes n x n vision tokens: fewer make a shorter prompt and a faster answer."
    )
    if answers.known.trained is None:
        return f"{text} Which counts this model was trained with is not recorded in its config."
    return f"{text} {_MARK} marks the counts that this model was trained with."


def _inputs(gradio: Any, loaded: LoadedModel, answers: Answers) -> SimpleNamespace:
    side = int(loaded.processor.num_image_tokens) ** 0.5
    images = loaded.processor.image_processor
    given = SimpleNamespace()
    given.file = gradio.Image(
        label="Image (file or clipboard)",
        sources=["upload", "clipboard"],
        type="filepath",
        image_mode=None,
        height=280,
        elem_id="file",
    )
    # The file as it is: Gradio would open it first.
    given.file.preprocess = lambda payload: None if payload is None else payload.path
    given.question = gradio.Textbox(label="Question", elem_id="question")
    given.side = gradio.Slider(
        1,
        loaded.patches_per_side,
        value=int(side),
        step=1,
        label="n: each tile becomes n x n vision tokens",
        elem_id="side",
    )
    gradio.HTML(_STYLE + _marks(loaded.patches_per_side, answers), padding=False, elem_id="marks")
    given.known = gradio.Textbox(
        answers.of(int(side)), show_label=False, container=False, interactive=False, elem_id="known"
    )
    given.tiles = gradio.Slider(
        images.min_tiles,
        answers.most_tiles,
        value=images.max_tiles,
        step=1,
        label="max_tiles: an image is cut into so many tiles at most",
        elem_id="tiles",
    )
    given.ask = gradio.Button("Ask", variant="primary", elem_id="ask")
    return given


def _marks(sides: int, answers: Answers) -> str:
    """The slider's values that were trained, below it."""
    left, right = _TRACK[0], _TRACK[1] + 7 * (len(str(sides)) - 1)
    marks = []
    for n in filter(lambda n: answers.is_trained(n * n), range(1, sides + 1)):
        share = (n - 1) / max(1, sides - 1)
        place = f"calc({left}px + (100% - {left + right}px) * {share:.4f})"
        marks.append(
            f'<span style="left: {place}" title="{answers.of(n)}">{_MARK}<br>{n} x {n}</span>'
        )
    return f'<div class="marks">{"".join(marks)}</div>'


def _outputs(gradio: Any) -> SimpleNamespace:
    found = SimpleNamespace()
    found.shown = gradio.Image(
        label="Tiles and tokens", type="pil", interactive=False, elem_id="grid"
    )
    found.tokens = gradio.Textbox(label="Tokens", interactive=False, elem_id="tokens")
    found.text = gradio.Textbox(label="Answer", interactive=False, elem_id="answer")
    found.cost = gradio.Textbox(label="Latency", interactive=False, elem_id="latency")
    return found


def _comparison(gradio: Any, loaded: LoadedModel, answers: Answers) -> SimpleNamespace:
    counts = [n * n for n in range(1, loaded.patches_per_side + 1)]
    chosen = answers.known.trained or counts[:: max(1, len(counts) // _COMPARED)]
    compared = SimpleNamespace()
    gradio.Markdown("### The same picture and question at several counts")
    compared.counts = gradio.CheckboxGroup(
        [
            (f"{count} {_MARK}" if answers.is_trained(count) else str(count), count)
            for count in counts
        ],
        value=[count for count in chosen if count in counts],
        label="Tokens per tile",
        elem_id="counts",
    )
    compared.button = gradio.Button("Compare", elem_id="compare")
    compared.table = gradio.Dataframe(
        headers=list(HEAD), interactive=False, wrap=True, type="array", elem_id="comparison"
    )
    return compared


def _connect(
    gradio: Any,
    answers: Answers,
    given: SimpleNamespace,
    found: SimpleNamespace,
    compared: SimpleNamespace,
) -> None:
    """What happens when; the model answers one question at a time, or times would say nothing."""
    asked = [given.file, given.question, given.side, given.tiles]
    answering = [
        event(
            answers.answer, asked, [found.text, found.cost], api_name="ask", concurrency_id="model"
        )
        for event in (given.ask.click, given.question.submit)
    ]
    comparing = compared.button.click(
        answers.compare,
        [given.file, given.question, compared.counts, given.tiles],
        compared.table,
        api_name="compare",
        concurrency_id="model",
    )
    moved = (given.file.change, given.side.change, given.tiles.change)
    for event in moved:
        event(
            answers.grid,
            [given.file, given.side, given.tiles],
            [found.shown, found.tokens, given.known],
            api_name=False,
            show_progress="hidden",
        )
    # An answer to something else must not stay.
    _clear((*moved, given.question.change), _no_answer(gradio), [found.text, found.cost], answering)
    other = (given.file.change, given.tiles.change, given.question.change)
    _clear(other, lambda: [], compared.table, [comparing])


def _clear(events: Iterable[Any], nothing: Callable[[], Any], outputs: Any, running: Any) -> None:
    for event in events:
        event(
            nothing,
            None,
            outputs,
            api_name=False,
            show_progress="hidden",
            queue=False,
            cancels=running,
        )


def _no_answer(gradio: Any) -> Callable[[], Any]:
    return lambda: (gradio.update(value="", label="Answer"), "")
