"""Rows of new tokens train beside a frozen language model, as they would in the whole embedding."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.small_tokenizers import save_hugging_face
from tests.training import start_scenarios, tiny
from tests.training.scenarios import tiny_config
from tests.training.test_pretrained import save_llm
from training.model import PackedTokenFlex
from training.model.new_rows import train_new_rows
from training.start.new_tokens import settle_new_tokens

NEW = [5, 7, 30, 31]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.make_processor(tmp_path_factory.mktemp("processor"))


def packs(processor: Any) -> dict[str, Any]:
    """Two samples in a pack, new tokens in inputs and labels; one is the padding token."""
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (1, 24))
    ids[0, [2, 5, 6, 13, 21]] = torch.tensor([*NEW, NEW[0]])
    labels = torch.where(torch.rand(1, 24) < 0.7, ids, -100)
    labels[0, [0, 10]] = -100
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


@pytest.mark.parametrize(("chunks", "checkpointed"), [(1, False), (3, True)])
@pytest.mark.parametrize(
    "text",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "pad_token_id": 7},
        {"model_type": "phi", "tie_word_embeddings": False},  # its head has a bias
        {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 512},  # scales embeddings
    ],
    ids=["tied", "untied", "bias", "scaled"],
)
def test_gradients_are_those_of_the_whole_embedding(
    processor: Any, text: dict[str, Any], chunks: int, checkpointed: bool
) -> None:
    whole, rows = (tiny.make_model(PackedTokenFlex, processor, text).double() for _ in "ab")
    rows.requires_grad_(False)
    train_new_rows(rows, NEW)
    for model in (whole, rows):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = packs(processor)
    expected, found = (model(**batch, loss_chunks=chunks) for model in (whole, rows))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert torch.equal(found.predictions, expected.predictions)
    expected.loss.backward()
    found.loss.backward()
    full = dict(whole.named_parameters())
    trained = {name: p for name, p in rows.named_parameters() if p.requires_grad}
    tied = text.get("tie_word_embeddings", False)
    bias = text.get("model_type") == "phi"
    assert len(trained) == 1 + (not tied) + bias
    for name, parameter in trained.items():
        gradient = full[name.replace("new_rows.", "")].grad[NEW]
        assert parameter.shape == gradient.shape and gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def test_all_ways_through_the_model_see_the_rows(processor: Any) -> None:
    """Rows that are neither packed nor supervised, logits, and generation."""
    whole, rows = (tiny.make_model(PackedTokenFlex, processor).double() for _ in "ab")
    train_new_rows(rows.requires_grad_(False), NEW)
    with torch.no_grad():
        change = torch.randn(len(NEW), 32)
        for name in ("get_input_embeddings", "get_output_embeddings"):
            getattr(whole, name)().weight[NEW] += change
            getattr(rows, name)().new_rows.weight += change
    ids = packs(processor)["input_ids"]
    torch.testing.assert_close(rows(ids).logits, whole(ids).logits, rtol=1e-12, atol=1e-12)
    answers = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (rows, whole)]
    assert torch.equal(*answers)


def settled(corpus: Path, tokenizer: Path, *overrides: str) -> list[str]:
    """The new tokens of a run that starts anew, by name."""
    rows = "train.modules.language_model.train=new_tokens"
    config = tiny_config(corpus, rows, f"data.tokenizer={tokenizer}", *overrides)
    loaded = load_tokenizer(tokenizer)
    run: Any = SimpleNamespace(config=config, tokenizer=loaded, say=print)
    names = {id: token for token, id in loaded.vocabulary().items()}
    return [names[id] for id in settle_new_tokens(run, None, None)]


def test_which_tokens_are_new(digits_corpus: Path, tmp_path: Path) -> None:
    """Those that the trainer appends, the pretrained weights have no row for, or its tokenizer no
    name."""
    with_markers = digits_corpus / "tokenizer.model"
    without = start_scenarios.without_markers(with_markers, tmp_path)
    assert settled(digits_corpus, without) == list(SPECIAL_TOKENS)
    size = load_tokenizer(with_markers).vocab_size
    larger = start_scenarios.with_more_tokens(with_markers, tmp_path, 3)
    llm = save_llm(digits_corpus, tmp_path / "llm", vocab_size=size + 1)
    pretrained = f"model.llm.pretrained={llm}"
    assert settled(digits_corpus, larger, pretrained) == ["<new1>", "<new2>"]

    from transformers import AutoTokenizer

    padded = save_llm(digits_corpus, tmp_path / "padded", vocab_size=1000)
    own = AutoTokenizer.from_pretrained(save_hugging_face(padded))
    own.add_tokens(["<box>"], special_tokens=True)
    own.save_pretrained(tmp_path / "own")
    pretrained = f"model.llm.pretrained={padded}"
    assert settled(digits_corpus, tmp_path / "own", pretrained) == ["<box>", "</img>"]


def test_no_new_token_is_refused(digits_corpus: Path, tmp_path: Path) -> None:
    model = digits_corpus / "tokenizer.model"
    with pytest.raises(InputError, match=r"new_tokens, but .*tokenizer\.model.* false.* true"):
        settled(digits_corpus, model)
    llm = save_llm(digits_corpus, tmp_path, vocab_size=load_tokenizer(model).vocab_size)
    with pytest.raises(InputError, match="new_tokens, but no token"):
        settled(digits_corpus, model, f"model.llm.pretrained={llm}")
    with pytest.raises(InputError, match=r"model\.llm\.pretrained=.*no config\.json"):
        settled(digits_corpus, model, f"model.llm.pretrained={digits_corpus}")
