"""The model that users load: projector, outputs, saving, resizing, and its files on their own."""

import ast
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import data_pipeline.processor
import training.model.hub as hub
from data_pipeline.processor import prompt_tokenflex
from kernels import POOL_MODES, pooling_table
from kernels.reference import projector_reference
from tests.training.tiny import (
    GRID,
    TILE,
    earlier_weights,
    make_model,
    make_processor,
    picture,
    prompt,
)
from training.model import PackedTokenFlex, TokenFlexForConditionalGeneration, TokenFlexProcessor
from training.model.hub import TokenFlexProjector, pooling_tokenflex

TINY = TokenFlexForConditionalGeneration


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> TokenFlexProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(processor: TokenFlexProcessor) -> Any:
    return make_model(TINY, processor)


@pytest.fixture(scope="module")
def batch(processor: TokenFlexProcessor) -> Any:
    """Two rows, one of them padded; counts and numbers of images differ."""
    return processor(
        images=[[picture(0)], [picture(1), picture(2, 20, 50)]],
        text=[prompt("<image>\nWhat is this?"), prompt("one <image> and another <image> please")],
        num_image_tokens=[[16], [9, 1]],
    )


def test_pooling_modes_are_those_of_the_kernels_and_another_is_refused():
    assert pooling_tokenflex.POOL_MODES == POOL_MODES
    patches, message = torch.zeros(1, 4, 3), f"'max'.*{', '.join(POOL_MODES)}"
    with pytest.raises(ValueError, match=message):
        pooling_tokenflex.pool_patches(patches, [1], (2, 2), "max")
    with pytest.raises(ValueError, match=message):
        pooling_table(1, 2, "max")


@pytest.mark.parametrize("pool", POOL_MODES)
@pytest.mark.parametrize("grid", [(6, 6), (5, 8)])
def test_projector_equals_the_kernels_reference_in_float64(pool, grid):
    torch.manual_seed(0)
    module = TokenFlexProjector(12, 20, 8, grid, pool).double()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    sides = [*range(1, min(grid) + 1), 3, 1]
    patches = torch.randn(len(sides), grid[0] * grid[1], 12, dtype=torch.float64)
    patches.requires_grad_()
    weights = dict(module.named_parameters())
    expected = projector_reference(patches, sides, **weights, grid=grid, pool=pool)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    inputs = [patches, *weights.values()]
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for given in (sides, torch.tensor(sides)):
        found = module(patches, given)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for grad, want in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projector_rounds_where_the_reference_does(dtype):
    torch.manual_seed(0)
    module = TokenFlexProjector(64, 64, 32, (6, 6), "resize").to(dtype)
    patches = torch.randn(3, 36, 64, dtype=dtype)
    expected = projector_reference(
        patches, [4, 1, 6], **dict(module.named_parameters()), grid=(6, 6), pool="resize"
    )
    found = module(patches, [4, 1, 6])
    assert found.dtype == dtype
    # A mean that falls between two numbers may be rounded either way, seldom.
    assert (found == expected).float().mean() > 0.9
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_the_trainers_class_has_the_same_parameters_and_gives_the_same_logits(
    processor, model, batch
):
    trained = make_model(PackedTokenFlex, processor, seed=1)
    weights = earlier_weights(model)
    assert trained.state_dict().keys() == weights.keys()
    trained.load_state_dict(weights)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        rows = model(**batch).logits[mask]
        torch.testing.assert_close(trained(**batch).logits[mask], rows, rtol=1e-4, atol=1e-4)
        lengths = mask.sum(1)
        pack = trained(
            input_ids=batch["input_ids"][mask][None],
            position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
            pixel_values=batch["pixel_values"],
            tile_sides=batch["tile_sides"],
        ).logits[0]
    torch.testing.assert_close(pack, rows, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_mean_cross_entropy_and_reaches_every_parameter(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :20] = -100
    output = model(**batch, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for n, p in model.named_parameters()
        if "k_proj.bias" not in n
    )  # fmt: skip - a bias of keys shifts all scores alike
    model.zero_grad()


def test_gradient_checkpointing_changes_no_gradient(model, batch):
    def gradients(module: Any) -> dict[str, torch.Tensor]:
        module.train()
        module(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: p.grad for name, p in module.named_parameters()}

    plain, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    calls: list[int] = []
    checkpointed.model.language_model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    expected = gradients(plain)
    for name, grad in gradients(checkpointed).items():
        torch.testing.assert_close(grad, expected[name], msg=name)
    assert len(calls) == 2


def test_text_alone_is_the_language_models_business(processor, model):
    inputs = processor(text=["hello", "hello world in the picture"])
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        expected = model.lm_head(model.model.language_model(**inputs).last_hidden_state)
        assert torch.equal(model(**inputs).logits, expected)
        empty = {"pixel_values": torch.zeros(0, 3, TILE, TILE, dtype=torch.uint8)}
        assert torch.equal(model(**inputs, **empty, tile_sides=[]).logits, expected)


def test_embeddings_in_place_of_ids_and_all_outputs(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "input_ids"}
    with torch.no_grad():
        expected = model(**batch).logits
        embeds = model.get_input_embeddings()(batch["input_ids"])
        assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, expected)
        assert torch.equal(model(**batch, logits_to_keep=2).logits, expected[:, -2:])
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        output = eager(**batch, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert output.attentions[0].shape[-1] == batch["input_ids"].shape[1]
    features = model.get_image_features(batch["pixel_values"], batch["tile_sides"]).pooler_output
    assert [len(tile) for tile in features] == batch["tile_sides"].square().tolist()
    with torch.no_grad():
        given = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            mm_encoder_outputs={"image": model.get_image_features(**{
                name: batch[name] for name in ("pixel_values", "tile_sides")})},
        )  # fmt: skip
    assert torch.equal(given.logits, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_saved_model_loads_bitwise(processor, batch, tmp_path, family, tied):
    text = {"model_type": family, "tie_word_embeddings": tied}
    model = make_model(TINY, processor, text)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = TINY.from_pretrained(tmp_path)
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.generation_config.suppress_tokens == [processor.image_token_id]
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loads_and_runs_in_half_precision(processor, model, batch, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    with torch.no_grad():
        logits, expected = half(**batch).logits, model(**batch).logits
    assert logits.dtype == dtype
    assert F.cosine_similarity(logits.float(), expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("tied", [False, True])
def test_token_embeddings_can_be_resized(processor, batch, tmp_path, tied):
    model = make_model(TINY, processor, {"tie_word_embeddings": tied})
    old = model.config.text_config.vocab_size
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(old + 7)
        after = model(**batch).logits
    assert model.config.text_config.vocab_size == old + 7 == after.shape[-1]
    torch.testing.assert_close(after[..., :old], before)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    ids = torch.full((1, 5), old + 6)
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = TINY.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_sides": None}, "pixel_values .*tile_sides"),
        ({"tile_sides": [2, 1]}, "tile_sides .*2 .*14 tiles"),
        ({"tile_sides": [5] * 14}, "tile_sides .*5.* 4 x 4"),
        ({"tile_sides": [0] * 14}, "tile_sides .*0.* 1 to 4"),
        ({"tile_sides": [1] * 14}, r"129 image tokens.*pixel_values .*\b14\b"),
        ({"pixel_values": None}, r"129 image tokens.*pixel_values .*\b0\b"),
        ({"pixel_values": torch.zeros(14, 3, TILE, TILE)}, "pixel_values .*float32"),
        ({"input_ids": None}, "input_ids.*inputs_embeds"),
    ],
)
def test_arguments_that_disagree_are_errors(model, batch, change, message):
    assert len(batch["tile_sides"]) == 14
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


def test_an_image_token_outside_of_the_vocabulary_is_an_error(processor):
    with pytest.raises(ValueError, match=r"image_token_id is 3\b.* 3 tokens"):
        make_model(TINY, processor, {"vocab_size": 3}, image_token_id=3)


def test_the_exported_files_stand_alone():
    allowed = {"torch", "transformers", "numpy", "PIL", *sys.stdlib_module_names}
    for folder in (Path(hub.__file__).parent, Path(data_pipeline.processor.__file__).parent):
        files = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        names = {path.stem for path in files}
        assert names and all(name.endswith("_tokenflex") for name in names)
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert all(alias.name.split(".")[0] in allowed for alias in node.names), path
                elif isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1 and node.module in names, path
                elif isinstance(node, ast.ImportFrom):
                    assert node.module.split(".")[0] in allowed, path


@pytest.fixture
def exported(processor: TokenFlexProcessor, model: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-tokenflex"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_no_code_of_a_folder_runs_unless_it_is_trusted(exported, batch, model):
    for path in exported.glob("*.py"):
        path.write_text("raise SystemExit('code of the folder ran')")
    assert isinstance(AutoConfig.from_pretrained(exported), hub.TokenFlexConfig)
    loaded = AutoModelForImageTextToText.from_pretrained(exported)
    assert type(loaded) is TINY and type(AutoProcessor.from_pretrained(exported)).__module__ == (
        TokenFlexProcessor.__module__
    )
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


ELSEWHERE = """
import importlib.machinery, json, sys

class Only(importlib.machinery.PathFinder):
    # What torch, transformers and Pillow need, and not the rest.
    missing = {"accelerate", "deepspeed", "pydantic", "scipy", "sentencepiece", "sklearn",
               "torchvision", "triton", "webdataset", "data_pipeline", "kernels", "training"}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Only
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder, image = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [
    {"type": "image", "path": image}, {"type": "text", "text": "\\nWhat is this?"}]}]
inputs = processor(messages=messages, num_image_tokens=9)
ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
answers = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answer = answers(text=messages, num_image_tokens=9, max_new_tokens=6, return_full_text=False,
                 generate_kwargs={"do_sample": False})
model.save_pretrained(folder + "-again")
print(json.dumps([ids[0].tolist(), answer[0]["generated_text"], type(model).__module__]))
"""


def test_a_folder_loads_where_this_repository_is_not(processor, model, exported, tmp_path):
    picture(3).save(tmp_path / "image.png")
    inputs = processor(images=picture(3), text=prompt("<image>\nWhat is this?"), num_image_tokens=9)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(exported), str(tmp_path / "image.png")],
        cwd=tmp_path,
        env={**kept, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids, answer, module = ast.literal_eval(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    assert ids == expected.tolist()
    asked = inputs["input_ids"].shape[1]
    assert answer == processor.decode(expected[asked:], skip_special_tokens=True)
    # What was loaded with its code is saved with it.
    processors = {path.name for path in Path(prompt_tokenflex.__file__).parent.iterdir()}
    names = {path.name for path in exported.glob("*_tokenflex.py")} - processors
    assert names <= {path.name for path in Path(f"{exported}-again").iterdir()}


def test_the_patch_grid_of_the_tests_is_what_they_say(model):
    assert model.config.patch_grid == (GRID, GRID) and model.config.tile_size == TILE
