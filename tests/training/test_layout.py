"""The layout that transformers' tools expect of an exported model, and what was written before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from tests.ranks import RankPool
from tests.training import scenarios
from tests.training.test_export import write_synthetic
from tests.training.tiny import earlier_weights, make_model, make_processor, picture, prompt
from training.export.safetensors_files import write_weights
from training.export.weights import checkpoint_weights
from training.model import (
    PackedTokenFlex,
    TokenFlexForConditionalGeneration,
    TokenFlexModel,
    TokenFlexProcessor,
)
from training.model.build import build_model
from training.model.hub.language_model_tokenflex import EARLIER_NAMES, renamed, trainer_names

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "phi": {},  # its head has a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 2},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> TokenFlexProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def batch(processor: TokenFlexProcessor) -> Any:
    text = [prompt("<image>\nWhat is this?"), prompt("<image> please")]
    return processor(images=[picture(0), picture(1)], text=text, num_image_tokens=[[16], [4]])


def make(processor: TokenFlexProcessor, family: str, tied: bool = False, **options: Any) -> Any:
    text = {"model_type": family, "tie_word_embeddings": tied, **FAMILIES[family]}
    return make_model(TokenFlexForConditionalGeneration, processor, text, **options)


def as_before(folder: Path, model: Any) -> Path:
    """The folder as it was written before the model had a base model."""
    names = trainer_names(model.config.text_config)
    weights = load_file(folder / "model.safetensors")
    earlier = {renamed(name, names): value for name, value in weights.items()}
    assert earlier.keys().isdisjoint(weights)
    save_file(earlier, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"], config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("family", "tied"),
    [("qwen2", False), ("qwen2", True), ("phi", False), ("gpt2", True), ("mixtral", False)],
)
def test_an_earlier_folder_loads_bitwise_and_is_saved_as_a_new_one(
    processor: TokenFlexProcessor, batch: Any, tmp_path: Path, family: str, tied: bool
) -> None:
    model = make(processor, family, tied)
    model.save_pretrained(tmp_path / "new")
    new = load_file(tmp_path / "new" / "model.safetensors")
    model.save_pretrained(tmp_path / "old")
    as_before(tmp_path / "old", model)
    with torch.no_grad():
        expected = model(**batch)
    for number, folder in enumerate((tmp_path / "old", tmp_path / "new")):
        found = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert found.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
        assert (found.lm_head.weight is found.get_input_embeddings().weight) == tied
        with torch.no_grad():
            assert torch.equal(found(**batch).logits, expected.logits)
        found.save_pretrained(tmp_path / f"again{number}")
        again = load_file(tmp_path / f"again{number}" / "model.safetensors")
        assert again.keys() == new.keys()
        headless = AutoModel.from_pretrained(folder).eval()
        assert type(headless) is TokenFlexModel
        with torch.no_grad():
            hidden = headless(**batch).last_hidden_state
            assert torch.equal(model.lm_head(hidden), expected.logits)


def test_the_parts_have_the_places_that_tools_look_for(
    processor: TokenFlexProcessor, batch: Any
) -> None:
    model = make(processor, "qwen2")
    assert model.base_model_prefix == "model" and model.base_model is model.model
    assert [name for name, _ in model.named_children()] == ["model", "lm_head"]
    assert [name for name, _ in model.model.named_children()] == [
        "vision_model",
        "projector",
        "language_model",
    ]
    assert type(model.model.language_model).__name__ == "Qwen2Model"
    for part in (model, model.model):
        assert part.get_decoder() is model.model.language_model
        assert part.get_encoder(modality="image") is model.model.vision_model
        assert part.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.model.get_output_embeddings() is None
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        hidden = model.model(**batch, return_dict=False)[0]
        as_tuple = model(**batch, return_dict=False)
        assert torch.equal(hidden, output.hidden_states[-1])
        assert torch.equal(model.lm_head(hidden), output.logits)
        assert torch.equal(as_tuple[0], output.logits)


def test_a_saved_base_model_loads_as_both(
    processor: TokenFlexProcessor, batch: Any, tmp_path: Path
) -> None:
    model = make(processor, "qwen2", tied=True)  # else there would be no head to load
    model.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"].keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
    }
    with torch.no_grad():
        expected = model(**batch).logits
        found = TokenFlexForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(found(**batch).logits, expected)
        hidden = AutoModel.from_pretrained(tmp_path).eval()(**batch).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_whole_language_model(
    processor: TokenFlexProcessor, family: str
) -> None:
    """What its own class makes of the embeddings, bitwise."""
    model = make(processor, family)
    causal = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    weights = earlier_weights(model)
    own = {name.removeprefix("language_model."): value for name, value in weights.items()}
    causal.load_state_dict({name: own[name] for name in causal.state_dict()})
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        found, expected = model(ids, labels=ids), causal(ids, labels=ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_map_both_ways(processor: TokenFlexProcessor, family: str) -> None:
    model = make(processor, family)
    text = {"model_type": family, "tie_word_embeddings": False, **FAMILIES[family]}
    trained = make_model(PackedTokenFlex, processor, text)
    assert trained.state_dict().keys() == earlier_weights(model).keys()
    for name in model.state_dict():
        earlier = renamed(name, trainer_names(model.config.text_config))
        assert earlier != name and renamed(earlier, EARLIER_NAMES) == name
        assert renamed(name, EARLIER_NAMES) == name
    for name, value in earlier_weights(model).items():  # equal seeds give equal weights
        assert torch.equal(trained.state_dict()[name], value), name


def test_a_checkpoint_of_any_version_is_exported_by_the_new_names(
    processor: TokenFlexProcessor, tmp_path: Path
) -> None:
    """Its names, which are written out here, are those of the first release."""
    model = make(processor, "qwen2")
    weights = earlier_weights(model)
    assert {
        "vision_model.embeddings.patch_embedding.weight",
        "projector.w1",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.lm_head.weight",
    } <= weights.keys()
    frozen = {name: value for name, value in weights.items() if name.startswith("vision")}
    (tmp_path / "step").mkdir()
    trained = {name: value for name, value in weights.items() if name not in frozen}
    write_synthetic(tmp_path / "step", trained, frozen, ranks=2)
    read = checkpoint_weights(tmp_path / "step", 2, torch.float32)
    model.config.save_pretrained(tmp_path)
    write_weights(tmp_path, [w.renamed(renamed(w.name, EARLIER_NAMES)) for w in read], 10**9)
    found = TokenFlexForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "roberta", "is_decoder": True}, "'roberta'.*roberta, lm_head.*decoder"),
        ({"model_type": "nanochat"}, "final_logit_softcapping is 15.0"),
    ],
)
def test_a_language_model_of_other_parts_is_refused(
    processor: TokenFlexProcessor, text: dict[str, Any], message: str
) -> None:
    for kind, error in (
        (TokenFlexForConditionalGeneration, ValueError),
        (PackedTokenFlex, InputError),
    ):
        with pytest.raises(error, match=message):
            make_model(kind, processor, text)


def exported_by_the_run(corpus: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A folder of the tests' run with another seed; its weights by the trainer's names."""
    config = scenarios.tiny_config(corpus, "seed=1")
    trained = build_model(config, load_tokenizer(corpus / "tokenizer.model"))
    model = TokenFlexForConditionalGeneration(trained.config)
    weights = {renamed(n, EARLIER_NAMES): value for n, value in trained.state_dict().items()}
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return {name: value.clone() for name, value in trained.state_dict().items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", ["new", "earlier"])
def test_a_run_starts_from_an_exported_folder_of_any_layout(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path, layout: str
) -> None:
    expected = exported_by_the_run(digits_corpus, tmp_path)
    if layout == "earlier":
        as_before(tmp_path, TokenFlexForConditionalGeneration.from_pretrained(tmp_path))
    overrides = [f"model.pretrained={tmp_path}"]
    found, _ = two_ranks.run(scenarios.train_steps, digits_corpus, 0, overrides)[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.from_numpy(found[name]), value), name
