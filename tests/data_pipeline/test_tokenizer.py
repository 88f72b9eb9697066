"""Both kinds of tokenizer: special tokens out of reach of text, round trips, errors."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS
from data_pipeline.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from tests.data_pipeline.small_tokenizers import TEXTS, save_hugging_face, save_sentencepiece

# Unicode without lone surrogates and without the character that sentencepiece uses for the space.
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))
TRICKY = st.lists(
    st.one_of(st.sampled_from([*SPECIAL_TOKENS, "<|endoftext|>", "</s>", "\0", "\n"]), PLAIN)
).map("".join)


def foreign_model(**options: Any) -> bytes:
    """A sentencepiece model of somebody else's, as `sentencepiece` trains them by default."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=buffer,
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    save_sentencepiece(folder)
    save_hugging_face(folder / "hf")
    (folder / "llama.model").write_bytes(foreign_model())
    # Specials as symbols that the model matches inside text.
    (folder / "symbols.model").write_bytes(foreign_model(user_defined_symbols=list(SPECIAL_TOKENS)))
    return folder


@pytest.fixture(scope="module", params=["tokenizer.model", "hf", "llama.model", "symbols.model"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return load_tokenizer(folder / request.param)


@pytest.fixture(scope="module", params=["tokenizer.model", "hf"])
def lossless(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    """Those that promise an exact round trip."""
    return load_tokenizer(folder / request.param)


@given(text=TRICKY)
def test_text_never_yields_a_special_id(tokenizer: Tokenizer, text: str) -> None:
    specials = {tokenizer.special_id(token) for token in SPECIAL_TOKENS}
    assert not specials & set(tokenizer.encode(text))


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<|endoftext|>"])
def test_literal_special_token_stays_text(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"see {token} here")
    assert len(ids) > 3
    # A model that has it as a symbol is given it in two texts, which may cost a space.
    assert tokenizer.decode(ids).replace("< ", "<") == f"see {token} here"


@given(text=TRICKY)
@example(text="  two  spaces \n\n and\ttabs \r\n")
@example(text="\u00a0\u3000\u200b \ufb01 \uff21 \u00e9 e\u0301 <0x41>")
def test_round_trip(lossless: Tokenizer, text: str) -> None:
    assert lossless.decode(lossless.encode(text)) == text


def test_special_ids_are_distinct_and_inside_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special_id(token) for token in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size
    assert tokenizer.end_of_turn_id == tokenizer.special_id("<|im_end|>")
    vocabulary = tokenizer.vocabulary()
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == ids
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))
    assert max(tokenizer.encode("héllo 漢字\n" + TEXTS[0])) < tokenizer.vocab_size


def test_missing_specials_are_appended_behind_the_vocabulary(folder: Path) -> None:
    model = folder / "llama.model"
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    tokenizer = load_tokenizer(model)
    ids = [tokenizer.special_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(size, size + 5))
    assert tokenizer.vocab_size == size + 5
    assert tokenizer.appended == {*ids}
    assert load_tokenizer(folder / "hf").appended == {load_tokenizer(folder / "hf").vocab_size - 1}
    assert tokenizer.pad_id == tokenizer.end_of_turn_id  # this model has no pad piece


def test_known_specials_keep_their_ids(folder: Path) -> None:
    model = folder / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = load_tokenizer(model)
    for token in SPECIAL_TOKENS:
        assert tokenizer.special_id(token) == pieces.piece_to_id(token)
        assert pieces.is_control(tokenizer.special_id(token))
    assert tokenizer.vocab_size == pieces.vocab_size() and not tokenizer.appended
    assert tokenizer.pad_id == pieces.pad_id()
    hf = load_tokenizer(folder / "hf")
    assert (hf.pad_id, hf.special_id("<|im_start|>"), hf.end_of_turn_id) == (0, 1, 2)


def test_decode_skips_or_names_specials_and_ignores_ids_out_of_range(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.end_of_turn_id
    ids = [start, *tokenizer.encode("é"), end, tokenizer.vocab_size, tokenizer.vocab_size + 7, -1]
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>é<|im_end|>"
    assert tokenizer.decode([]) == ""
    specials = [tokenizer.special_id(token) for token in SPECIAL_TOKENS]
    assert tokenizer.decode(specials) == ""
    assert tokenizer.decode(specials, skip_special=False) == "".join(SPECIAL_TOKENS)


def test_lone_surrogate_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"U\+D800 at character 2"):
        tokenizer.encode("é \ud800")


def test_fingerprint_follows_the_vocabulary_not_the_place(folder: Path, tmp_path: Path) -> None:
    names = ["tokenizer.model", "hf", "llama.model", "symbols.model"]
    fingerprints = [load_tokenizer(folder / name).fingerprint for name in names]
    assert len(set(fingerprints)) == len(names)
    train_sentencepiece([*TEXTS, "quagga quagga"], tmp_path / "other.model", 400)
    other = load_tokenizer(tmp_path / "other.model")  # the same special ids
    assert other.fingerprint not in fingerprints
    copy = tmp_path / "copy.model"
    copy.write_bytes((folder / "tokenizer.model").read_bytes())
    assert load_tokenizer(copy).fingerprint == fingerprints[0]
    assert load_tokenizer(folder / "hf").fingerprint == fingerprints[1]


def test_pickle_keeps_behaviour(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "a <|im_end|> b <|endoftext|>"
    assert (copy.fingerprint, copy.encode(text)) == (tokenizer.fingerprint, tokenizer.encode(text))


def test_training_is_deterministic_and_keeps_newlines(folder: Path, tmp_path: Path) -> None:
    train_sentencepiece(iter(TEXTS), tmp_path / "again.model", 400)
    assert (tmp_path / "again.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    tokenizer = SentencePieceTokenizer(tmp_path / "again.model")
    newline = tokenizer.encode("\n")
    assert len(newline) == 1  # learned, not spelled in bytes or turned into a space
    assert tokenizer.decode(newline) == "\n"


def test_training_uses_long_texts(tmp_path: Path) -> None:
    train_sentencepiece(["zebra quagga " * 1000], tmp_path / "long.model", 300)
    assert len(SentencePieceTokenizer(tmp_path / "long.model").encode("zebra")) <= 2


@pytest.mark.parametrize(("texts", "size"), [([], 400), (TEXTS, 100)])
def test_training_that_cannot_work(texts: list[str], size: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a vocabulary of {size}"):
        train_sentencepiece(texts, tmp_path / "tokenizer.model", size)
    assert list(tmp_path.iterdir()) == []


def test_loading_errors_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(b"no model")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken_hf").mkdir()
    (tmp_path / "broken_hf" / "tokenizer.json").write_text('{"version": ')
    cases = {
        "missing.model": "does not exist",
        "missing/folder": "does not exist",
        "broken.model": "cannot be read as a sentencepiece model",
        "tokenizer.json": "does not end in .model",
        "empty": "no tokenizer could be loaded",
        "broken_hf": "no tokenizer could be loaded",
    }
    for name, reason in cases.items():
        for path in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(InputError) as caught:
                load_tokenizer(path)
            assert reason in str(caught.value) and str(tmp_path / name) in str(caught.value)
    with pytest.raises(InputError, match=r"no/such\.model does not exist"):
        load_tokenizer("no/such.model")


def test_folder_with_only_a_sentencepiece_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    same = load_tokenizer(folder / "tokenizer.model")
    assert load_tokenizer(tmp_path).fingerprint == same.fingerprint
