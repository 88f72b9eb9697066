"""One question at several token counts, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.text_table import text_table
from training.generate.answer import Answer, generate_answer, prepare_messages
from training.generate.loaded_model import LoadedModel

HEAD = ("tokens/tile", "image tokens", "prompt", "first token", "answer", "tokens/s", "says")


def compare(
    loaded: LoadedModel,
    messages: Sequence[Any],
    counts: Sequence[int],
    max_new_tokens: int,
    max_tiles: int | None = None,
) -> Iterator[tuple[int, Answer]]:
    """The answer at each token count as it comes.

    One more at the first count is thrown away, which warms everything up.

    Raises:
        InputError: as `prepare_messages`.
    """
    for number, count in enumerate(counts):
        inputs = prepare_messages(loaded, messages, count, max_tiles)
        if number == 0:
            generate_answer(loaded, inputs, 2)
        yield count, generate_answer(loaded, inputs, max_new_tokens)


def comparison(answers: Mapping[int, Answer]) -> str:
    """Answers and latencies, a row per token count."""
    rows = [comparison_row(count, answer) for count, answer in answers.items()]
    return text_table([list(HEAD), *rows], left=(len(HEAD) - 1,))


def comparison_row(count: int, answer: Answer) -> list[str]:
    """An answer's line of the table."""
    return [
        str(count),
        str(answer.image_tokens),
        str(answer.prompt_tokens),
        f"{1000 * answer.first_token_s:.0f} ms",
        f"{1000 * answer.total_s:.0f} ms",
        f"{answer.tokens_per_s:.1f}" if answer.tokens_per_s else "-",
        " ".join(answer.text.split()) + ("" if answer.ended else " ..."),
    ]
