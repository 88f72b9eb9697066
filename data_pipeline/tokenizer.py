"""Text to token ids and back: Hugging Face or sentencepiece behind one small interface.

The five special tokens of the prompt exist in every tokenizer loaded here (appended behind the
vocabulary where the model lacks them), and plain text can never produce one of their ids: a
caption that quotes "<IMG_CONTEXT>" would otherwise claim a place for an image feature.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from data_pipeline.errors import InputError, for_users
from data_pipeline.files import write_atomically
from data_pipeline.pretrained_source import check_source
from data_pipeline.processor import prompt_tokenflex
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS

_TEXT_MAX_BYTES = 1 << 20  # longer training texts are skipped (sentencepiece's default is 4192)
_encode_text = for_users(prompt_tokenflex.encode_text)


class Tokenizer(ABC):
    """What the pipeline needs of a tokenizer.

    Attributes: `vocab_size` (number of ids, specials included: the embedding needs at least that
    many rows), `fingerprint` (hex, equal for equal vocabulary and behaviour), `pad_id`,
    `end_of_turn_id` (the id of <|im_end|>), `source` (where it was loaded from, for messages),
    `appended` (ids of the special tokens that the model or folder lacks).
    """

    vocab_size: int
    fingerprint: str
    pad_id: int
    end_of_turn_id: int
    source: str
    appended: frozenset[int]

    def __init__(self, special_ids: Mapping[str, int], definition: bytes, source: str) -> None:
        """`definition`: the bytes that define vocabulary and behaviour, for the fingerprint."""
        self._special_ids = dict(special_ids)
        self._special_values = frozenset(special_ids.values())
        specials = json.dumps(self._special_ids, sort_keys=True).encode()
        self.fingerprint = hashlib.sha256(
            hashlib.sha256(definition).digest() + hashlib.sha256(specials).digest()
        ).hexdigest()
        self.end_of_turn_id = self._special_ids["<|im_end|>"]
        self.source = source
        self._text_name = f"a text for the tokenizer {source}"

    def __reduce__(self) -> tuple[Callable[[str], "Tokenizer"], tuple[str]]:
        """Pickled by where it comes from: the libraries' own pickling loses settings."""
        return load_tokenizer, (self.source,)

    @abstractmethod
    def _encode_raw(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS; may still hold a special id for odd vocabularies."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; ids outside the vocabulary (padded embedding rows) give nothing.

        `skip_special=False` keeps the special tokens of the prompt as their literal text.
        """

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, specials included."""

    def special_id(self, token: str) -> int:
        """Id of one of `SPECIAL_TOKENS`. KeyError for any other text."""
        return self._special_ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no BOS or EOS, and never a special id, whatever the text contains.

        InputError for text that is not valid Unicode (a lone surrogate from a JSON escape).
        """
        return _encode_text(self._encode_raw, text, self._special_values, self._text_name)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face fast tokenizer, from a folder or a name on the hub.

    Where it lacks one of our special tokens, the token is appended behind its vocabulary.
    InputError if nothing can be loaded from there.
    """

    def __init__(self, name_or_folder: str | Path) -> None:
        source = str(name_or_folder)
        loaded = _load_hugging_face(source)
        known = loaded.get_vocab()
        # Also promotes a token that is there as an ordinary added one: those match inside text.
        loaded.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        backend = loaded.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        ids = {token: backend.token_to_id(token) for token in SPECIAL_TOKENS}
        super().__init__(ids, backend.to_str().encode(), source)
        backend.encode_special_tokens = True  # text that looks like a special token stays text
        self.appended = frozenset(id for token, id in ids.items() if token not in known)
        self.vocab_size = max(self.vocabulary().values()) + 1
        pad = loaded.pad_token_id
        self.pad_id = self.end_of_turn_id if pad is None else int(pad)

    def vocabulary(self) -> dict[str, int]:
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def _encode_raw(self, text: str) -> list[int]:
        # The fast one keeps no offsets.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=skip_special))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file; special tokens it lacks are appended behind its vocabulary.

    One character does not survive a round trip: U+2581, which sentencepiece uses for the space.
    """

    def __init__(self, model_file: str | Path) -> None:
        source = str(model_file)
        try:
            model = Path(model_file).read_bytes()
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._num_pieces = size = self._pieces.vocab_size()
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{source} cannot be read as a sentencepiece model ({error}); give the .model "
                "file that sentencepiece or `train_sentencepiece` wrote"
            ) from error
        ids = {}
        for token in SPECIAL_TOKENS:
            known = self._pieces.piece_to_id(token)
            if self._pieces.id_to_piece(known) != token:  # unknown pieces give the <unk> id
                known, size = size, size + 1
            ids[token] = known
        super().__init__(ids, model, source)
        self.appended = frozenset(range(self._num_pieces, size))
        self.vocab_size = size
        pad = self._pieces.pad_id()
        self.pad_id = pad if pad >= 0 else self.end_of_turn_id

    def vocabulary(self) -> dict[str, int]:
        pieces = {self._pieces.id_to_piece(i): i for i in range(self._num_pieces)}
        return {**pieces, **self._special_ids}

    def _encode_raw(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(text)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        names = {value: name for name, value in self._special_ids.items()}
        parts: list[str] = []
        run: list[int] = []  # ids are decoded in runs: one character may span several byte pieces
        for i in map(int, ids):
            if i not in names:
                if 0 <= i < self._num_pieces:
                    run.append(i)
            elif not skip_special:
                parts += [self._pieces.decode(run), names[i]]
                run = []
        return "".join([*parts, self._pieces.decode(run)])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer: a `*.model` file is sentencepiece, a folder or hub name Hugging Face.

    A folder that holds `tokenizer.model` and nothing of Hugging Face's is taken as sentencepiece.
    InputError, naming the path, if it is missing or cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        model = local / "tokenizer.model"
        if model.is_file() and not any(local.glob("tokenizer*.json")):
            return SentencePieceTokenizer(model)
        return HuggingFaceTokenizer(local)
    if local.is_file() and local.suffix == ".model":
        return SentencePieceTokenizer(local)
    if local.is_file():
        raise InputError(
            f"the tokenizer {path} is a file that does not end in .model; give a sentencepiece "
            ".model file, or the folder with tokenizer.json in it"
        )
    check_source(
        path,
        f"the tokenizer {path}",
        "a sentencepiece .model file, a folder with tokenizer.json in it, or a name on the Hugging "
        "Face hub",
    )
    return HuggingFaceTokenizer(path)


def train_sentencepiece(
    texts: Iterable[str], out: Path, vocab_size: int, split_digits: bool = True
) -> None:
    """Train a byte-fallback BPE model on texts and write it to `out` (a .model file).

    Deterministic: equal texts in equal order give equal bytes. The special tokens are control
    symbols, which text never produces. `vocab_size` counts everything and is an upper bound: few
    texts give fewer pieces. InputError if there is no text, or if it is too small for the 256
    bytes, the special tokens and the characters of the texts.
    """
    chunks: list[bytes] = []

    class _Sink:
        def write(self, data: bytes) -> None:
            chunks.append(data)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=_Sink(),
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            control_symbols=list(SPECIAL_TOKENS),
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            normalization_rule_name="identity",  # with the next two: text survives a round trip
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=split_digits,
            max_sentence_length=_TEXT_MAX_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"sentencepiece could not train a vocabulary of {vocab_size}: {error}; give more text, "
            "or a vocab_size that has room for 256 bytes, the special tokens and every character"
        ) from error
    write_atomically(out, b"".join(chunks))


def _load_hugging_face(source: str) -> Any:
    from transformers import AutoTokenizer  # takes two seconds, which sentencepiece users save

    try:
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds, bare Exception among them
        raise InputError(
            f"no tokenizer could be loaded from {source} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}); give "
            "a folder with tokenizer.json in it, a name on the Hugging Face hub, or a .model file"
        ) from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise InputError(
            f"the tokenizer of {source} has no fast version (tokenizer.json); save one with "
            "transformers, or give its sentencepiece .model file"
        )
    return loaded
