"""Questions that cannot be asked: named as they come, counted, and too many of them an error."""

import sys

from tqdm import tqdm

from data_pipeline.errors import InputError


class FailedAnswers:
    """Counts questions without an answer; `most` is the share of all that may fail."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._asked = self._failed = 0

    def ask(self, questions: int) -> None:
        """So many questions are to come."""
        self._asked += questions

    def note(self, name: str, reason: str) -> None:
        """A question failed.

        Raises:
            InputError: these are too many for scores that mean anything.
        """
        self._failed += 1
        tqdm.write(f"no answer to {name}: {reason}", file=sys.stderr)
        if self._failed > self._most * self._asked:
            raise InputError(
                f"{self._failed} of {self._asked} questions cannot be asked, more than "
                f"max_failed_fraction={self._most:g} allows; the last is {name}: {reason}. Mend "
                "them, or raise max_failed_fraction (questions answered from --use_cache are not "
                "among them)"
            )

    def report(self) -> None:
        """Say how many failed, if any did."""
        if self._failed:
            print(
                f"{self._failed} of {self._asked} questions could not be asked, and an empty answer"
                " stands for each; their names are above",
                file=sys.stderr,
            )
