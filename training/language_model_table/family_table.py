"""The table of tested language models in the words of docs/model.md."""

from collections.abc import Mapping
from typing import Any

_HEAD = (
    "Models",
    "`model_type`",
    "Logits",
    "Loss, gradients",
    "Isolated",
    "Generates",
    "Of its own",
)


def family_table(record: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: the families that were tested, then those that are refused."""
    lines = [_row(_HEAD), "|---|---|---|---|---|---|---|"]
    lines += [
        _row(
            (
                found["models"],
                f"`{found['model_type']}`",
                f"{found['logits']:.0e}",
                f"{found['packed']:.0e}",
                _word(found["isolated"]),
                _word(found["generates"]),
                found["note"],
            )
        )
        for found in record["families"]
    ]
    return [*lines, ""] + [
        f"- {found['models']} (`{found['model_type']}`): {found['because']}."
        for found in record["refused"]
    ]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _word(holds: bool) -> str:
    return "yes" if holds else "**no**"
