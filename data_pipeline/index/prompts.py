"""A tokenizer that remembers: the same prompts stand in sample after sample of a data set."""

from collections.abc import Sequence
from functools import lru_cache

from data_pipeline.tokenizer import Tokenizer

_REMEMBERED = 16_384
_MAX_CHARACTERS = 200  # longer texts are answers, which differ


class RememberingTokenizer(Tokenizer):
    """Gives what another tokenizer gives; the lists of ids are shared, so they must not change."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encode_short = lru_cache(_REMEMBERED)(tokenizer.encode)
        self.vocab_size, self.pad_id = tokenizer.vocab_size, tokenizer.pad_id
        self.fingerprint, self.source = tokenizer.fingerprint, tokenizer.source
        self.end_of_turn_id, self.appended = tokenizer.end_of_turn_id, tokenizer.appended

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as the other tokenizer has them."""
        short = len(text) <= _MAX_CHARACTERS
        return self._encode_short(text) if short else self._tokenizer.encode(text)

    def special_id(self, token: str) -> int:
        """As the other tokenizer has it."""
        return self._tokenizer.special_id(token)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """As the other tokenizer does it."""
        return self._tokenizer.decode(ids, skip_special)

    def vocabulary(self) -> dict[str, int]:
        """As the other tokenizer's."""
        return self._tokenizer.vocabulary()

    def _encode_raw(self, text: str) -> list[int]:
        return self._tokenizer._encode_raw(text)


@lru_cache(maxsize=1)
def remembering(tokenizer: Tokenizer) -> RememberingTokenizer:
    """One for all shards of a process."""
    return RememberingTokenizer(tokenizer)
