"""What is recorded of a model's token counts: which were trained, and how often answers are right.

Nothing else is known of a count. Export notes it in the model's config, where it travels along.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluated:
    """accuracy: share of held-out answers that are right. answers: how many there are."""

    accuracy: float
    answers: int


@dataclass(frozen=True)
class KnownCounts:
    """trained: ascending; None where nobody noted them. evaluated: by count."""

    trained: list[int] | None
    evaluated: dict[int, Evaluated]

    def of(self, count: int) -> str:
        """What is known of one count."""
        if self.trained is None:
            trained = "whether it was trained is not recorded"
        else:
            trained = "trained" if count in self.trained else "not trained"
        found = self.evaluated.get(count)
        if found:
            return f"{trained}; {found.accuracy:.1%} of {found.answers} held-out answers are right"
        if self.trained and count in self.trained:
            return f"{trained}, not evaluated"
        return f"{trained}, not evaluated: nothing is known of its answers"


def note_counts(config: Any, trained: Iterable[int], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write into a model's config what a run recorded; `rows` are its evaluation's, or none."""
    config.trained_num_image_tokens = list(trained)
    config.evaluated_num_image_tokens = {
        str(row["num_image_tokens"]): {"accuracy": row["accuracy"], "answers": row["answers"]}
        for row in rows
        if row["detail"] == "all"
    }


def known_counts(config: Any) -> KnownCounts:
    """What a model's config has of it."""
    trained = getattr(config, "trained_num_image_tokens", None)
    evaluated = getattr(config, "evaluated_num_image_tokens", None) or {}
    return KnownCounts(
        sorted(map(int, trained)) if trained else None,
        {int(count): Evaluated(**found) for count, found in evaluated.items()},
    )
