"""Whether greedy decoding would produce an answer, read off one forward pass over it.

Greedy decoding leaves the reference at the first position where the most likely token, given the
reference so far, is another one; so it reproduces the answer, end of turn included, if and only if
every position's most likely token is the reference's.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForcedAnswer:
    """exact: whether greedy decoding gives the reference.

    tokens, tokens_right: of the reference without its end of turn, and those that are most likely
        given what stands before them.
    decoded: ids of greedy decoding, without the end of turn, up to its first wrong token: what it
        goes on with there is not known.
    """

    exact: bool
    tokens: int
    tokens_right: int
    decoded: list[int]


def forced_answer(predictions: Tensor, reference: Tensor) -> ForcedAnswer:
    """Compare the most likely ids [n] with a reference answer's [n], end of turn included."""
    right = predictions == reference
    exact = bool(right.all())
    end = len(right) - 1 if exact else int(right.int().argmin()) + 1
    return ForcedAnswer(exact, len(right) - 1, int(right[:-1].sum()), predictions[:end].tolist())
