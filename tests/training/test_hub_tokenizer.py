"""Exported tokenizers give the ids of the ones that trained, for any text."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS, encode_fast, encode_text
from data_pipeline.tokenizer import (
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from training.export.hub_tokenizer import check_same_ids, to_hub_tokenizer

LINES = Path("README.md").read_text(encoding="utf-8").splitlines()


def train(folder: Path, name: str) -> Path:
    """A model of each kind that the project can be given."""
    path = folder / f"{name}.model"
    if name == "project":
        train_sentencepiece(LINES, path, 900)
        return path
    options: dict[str, Any] = {
        "nfkc": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
        "llama": {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
        "unigram": {"model_type": "unigram"},
        "markers_in_text": {
            "model_type": "bpe",
            "user_defined_symbols": ["<img>"],
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
    }[name]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(path.with_suffix("")),
        vocab_size=900,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@lru_cache(maxsize=8)
def both(folder: Path, name: str) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """The project's tokenizer, and the converted one as it loads from a saved folder."""
    ours = load_tokenizer(train(folder, name))
    to_hub_tokenizer(ours, 2048).save_pretrained(folder / name)
    assert not list((folder / name).glob("*.model"))
    return ours, AutoTokenizer.from_pretrained(folder / name)


def assert_same(folder: Path, name: str, text: str) -> None:
    ours, fast = both(folder, name)
    special = {ours.special_id(token) for token in SPECIAL_TOKENS}
    assert encode_text(partial(encode_fast, fast), text, special, "text") == ours.encode(text)


TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="ab 01\n\u2581<>|img_/"),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, "token", " ", "  ", "\n", "\u2581", "é", "👍"])).map(
        "".join
    ),
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS)
@example("")
@example(" a  b ")
@example("".join(SPECIAL_TOKENS))
def test_the_projects_sentencepiece_models_keep_their_ids(folder: Path, text: str) -> None:
    assert_same(folder, "project", text)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS)
def test_models_like_llamas_keep_their_ids(folder: Path, text: str) -> None:
    assert_same(folder, "llama", text)


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_text_comes_back(folder: Path, text: str) -> None:
    ours, fast = both(folder, "project")
    ids = ours.encode(text)
    assert fast.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    marked = [ours.special_id("<img>"), *ids, ours.end_of_turn_id, ours.pad_id]
    assert fast.decode(marked, skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens_keep_their_ids_and_roles(folder: Path) -> None:
    ours, fast = both(folder, "project")
    for token in SPECIAL_TOKENS:
        assert fast.convert_tokens_to_ids(token) == ours.special_id(token)
    assert (fast.pad_token_id, fast.eos_token_id) == (ours.pad_id, ours.end_of_turn_id)
    assert (len(fast), fast.model_max_length) == (ours.vocab_size, 2048)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unigram", "not a byte-pair model"),
        ("nfkc", "rewrites characters"),
        ("markers_in_text", "<img>"),
    ],
)
def test_what_cannot_be_converted_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_hub_tokenizer(load_tokenizer(train(folder, name)), 2048)


def test_another_tokenizer_is_noticed(folder: Path) -> None:
    ours, _ = both(folder, "project")
    _, other = both(folder, "llama")
    with pytest.raises(InputError, match="converted it"):
        check_same_ids(ours, other)


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Path:
    """A byte-level BPE folder, without the markers and without padding."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet)
    )
    saved = folder / "hugging_face"
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(saved)
    return saved


def test_hugging_face_tokenizers_keep_their_ids(hugging_face: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(hugging_face)
    to_hub_tokenizer(ours, 512).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    check_same_ids(ours, fast)
    assert (len(fast), fast.pad_token_id) == (ours.vocab_size, ours.pad_id)
    assert load_tokenizer(tmp_path).encode("a <img> b") == ours.encode("a <img> b")
