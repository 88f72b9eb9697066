"""The released layout, on a small random model: its features, both ways, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index import build_index
from data_pipeline.prepare.shard_writer import SampleWriter, ShardLimits
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.small_tokenizers import save_hugging_face
from tests.training.exported import png
from tests.training.tiny import picture
from training.evaluate.examples import HeldOut
from training.generate import load_model
from training.import_ristretto.__main__ import main
from training.import_ristretto.release import VISION_HEAD, from_release, to_release
from training.model.hub import chatml_template

WIDTH, TEXT, GRID = 16, 32, 5
BIG = 10**9

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 4 * GRID,
    "patch_size": 4,
    "drop_path_rate": 0.1,  # like the next lines: in the release, and without effect
    "torch_dtype": None,
    "top_k": 50,
}
LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": TEXT,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "max_length": 20,
    "_attn_implementation_autoset": True,
}
CONFIG = {
    "architectures": ["RistrettoModel"],
    "auto_map": {
        "AutoConfig": "modeling_ristretto.RistrettoConfig",
        "AutoModel": "modeling_ristretto.RistrettoModel",
        "AutoModelForCausalLM": "modeling_ristretto.RistrettoModel",
    },
    "model_type": "ristretto",
    "dynamic_image_size": True,
    "force_image_size": 4 * GRID,
    "max_dynamic_patch": 3,
    "min_dynamic_patch": 1,
    "num_image_token": 9,
    "pad2square": False,
    "select_layer": -1,
    "template": "qwen",
    "torch_dtype": "float32",
    "use_thumbnail": True,
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the released layout, whose code must not run."""
    folder = tmp_path_factory.mktemp("release")
    tokenizer = AutoTokenizer.from_pretrained(save_hugging_face(folder))
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.model_max_length = 400
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    vision = SiglipVisionModel(SiglipVisionConfig(**VISION))
    llm_config = Qwen2Config(**{**LLM, "vocab_size": len(tokenizer), "initializer_range": 0.3})
    llm = AutoModelForCausalLM.from_config(llm_config)
    shapes = {
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
        "f1.weight": (3 * WIDTH, WIDTH),
        "f1.bias": (3 * WIDTH,),
        "f2.weight": (3 * WIDTH, WIDTH),
        "f2.bias": (3 * WIDTH,),
        "g.weight": (TEXT, 3 * WIDTH),
        "g.bias": (TEXT,),
    }
    weights = {f"projector.mlp.{name}": torch.randn(shape) for name, shape in shapes.items()}
    for name, value in vision.state_dict().items():
        weights[f"vision_model.vision_model.{name}"] = torch.randn_like(value) * 0.3
    weights |= {f"language_model.{name}": value for name, value in llm.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    config = {
        **CONFIG,
        "vision_config": VISION,
        "llm_config": {**LLM, "vocab_size": len(tokenizer)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_ristretto.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\nraise SystemExit('code of the folder ran')\n"
    )
    return folder


@pytest.fixture(scope="module")
def converted(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    main([str(release), str(out)])
    return out


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of the release with other settings."""
    shutil.copytree(folder, to)
    found = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**found, **config}))
    return to


def projector_by_hand(patches: np.ndarray, weights: dict[str, np.ndarray], n: int) -> np.ndarray:
    """The released projector as its description has it: patches float64 [H*W, C] -> [n*n, D]."""
    side = int(len(patches) ** 0.5)
    grid = patches.reshape(side, side, -1)
    resized = -(-side // n) * n
    # Bilinear with aligned corners: output i lies at i * (side - 1) / (resized - 1).
    places = np.arange(resized) * ((side - 1) / (resized - 1))
    low = np.minimum(places.astype(int), side - 2)
    share = (places - low)[:, None, None]
    rows = grid[low] * (1 - share) + grid[low + 1] * share
    share = share.transpose(1, 0, 2)
    both = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    k = resized // n
    pooled = both.reshape(n, k, n, k, -1).mean((1, 3)).reshape(n * n, -1)
    centred = pooled - pooled.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    normed = normed * weights["layernorm.weight"] + weights["layernorm.bias"]
    gate = normed @ weights["f1.weight"].T + weights["f1.bias"]
    value = normed @ weights["f2.weight"].T + weights["f2.bias"]
    return (gate / (1 + np.exp(-gate)) * value) @ weights["g.weight"].T + weights["g.bias"]


@pytest.mark.parametrize("n", range(1, GRID + 1))
def test_image_features_are_those_of_the_description(
    release: Path, converted: Path, n: int
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=False).double()
    stored = load_file(release / "model.safetensors")
    vision = SiglipVisionModel(SiglipVisionConfig(**VISION)).double().eval()
    prefix = "vision_model.vision_model."
    vision.load_state_dict({k[len(prefix) :]: v for k, v in stored.items() if k.startswith(prefix)})
    tiles = torch.randint(0, 256, (2, 3, 4 * GRID, 4 * GRID), dtype=torch.uint8)
    with torch.no_grad():
        pixels = ((tiles.float() / 255 - 0.5) / 0.5).double()
        patches = vision(pixel_values=pixels).last_hidden_state.numpy()
        found = model.model.image_features(tiles, [n, n]).numpy()
    weights = {
        name.removeprefix("projector.mlp."): value.double().numpy()
        for name, value in stored.items()
        if name.startswith("projector.")
    }
    expected = np.concatenate([projector_by_hand(tile, weights, n) for tile in patches])
    assert found.shape == (2 * n * n, TEXT)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_the_language_model_is_the_same(release: Path, converted: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=False).eval()
    stored = load_file(release / "model.safetensors")
    vocabulary = model.config.text_config.vocab_size
    llm = AutoModelForCausalLM.from_config(Qwen2Config(**{**LLM, "vocab_size": vocabulary})).eval()
    llm.load_state_dict(
        {k.removeprefix("language_model."): v for k, v in stored.items() if k.startswith("lang")}
    )
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llm(ids).logits)
    assert model.config.text_config.rope_parameters["rope_theta"] == 500000.0


def test_settings_are_taken_over_and_no_code_has_run(release: Path, converted: Path) -> None:
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=False)
    images = processor.image_processor
    assert (images.tile_size, images.min_tiles, images.max_tiles) == (4 * GRID, 1, 3)
    assert images.thumbnail and processor.num_image_tokens == 9
    assert processor.tokenizer.model_max_length == 400
    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=False)
    assert (model.config.pool, model.config.projector_hidden_ratio) == ("resize", 3)
    assert not hasattr(model.config.text_config, "max_length")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}],
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(images=picture(), text=text, num_image_tokens=4)
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert not (release / "ran").exists()
    assert not (converted / "modeling_ristretto.py").exists()


def chat_prompt(turns: list[str], tiles: list[int], count: int) -> str:
    """What the release's `chat` hands to its tokenizer.

    turns: question, answer, question ... as its history has them; `<image>` where one is shown.
    """
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for number, turn in enumerate(turns):
        text += f"<|im_start|>{['user', 'assistant'][number % 2]}\n{turn}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    for own in tiles:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * count * own}</img>", 1)
    return text


IMAGE = {"type": "image", "image": picture(width=60)}  # two tiles and a thumbnail


def part(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("questions", "asked"),
    [
        ([[IMAGE, part("What is it?")]], ["<image>\nWhat is it?"]),
        ([[IMAGE, part("\nWhat is it?")]], ["<image>\nWhat is it?"]),
        ([[part("What is "), IMAGE, part(" here?")]], ["What is <image> here?"]),
        (
            [[part("Image-1: "), IMAGE, part("\nImage-2: "), IMAGE, part("\nWhich?")]],
            ["Image-1: <image>\nImage-2: <image>\nWhich?"],
        ),
        ([[IMAGE, IMAGE, part("Which?")]], ["<image>\n<image>\nWhich?"]),
        (
            [[IMAGE, part("What is it?")], [part("And where?")]],
            ["<image>\nWhat is it?", "a picture", "And where?"],
        ),
        ([[IMAGE]], ["<image>\n"]),
        ([[part("Who are you?")]], ["Who are you?"]),
    ],
)
def test_it_prompts_as_its_own_chat(
    release: Path, converted: Path, questions: list[Any], asked: list[str]
) -> None:
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=False)
    messages: list[Any] = [{"role": "user", "content": questions[0]}]
    for question in questions[1:]:
        messages.append({"role": "assistant", "content": [part("a picture")]})
        messages.append({"role": "user", "content": question})
    tiles = [3] * sum("image" in entry for question in questions for entry in question)
    theirs = AutoTokenizer.from_pretrained(release)  # the whole string at once, as `chat` does
    expected = theirs(chat_prompt(asked, tiles, 4), add_special_tokens=False)["input_ids"]
    called = processor(messages=messages, num_image_tokens=4)
    templated = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        num_image_tokens=4,
    )
    assert called["input_ids"][0].tolist() == templated["input_ids"][0].tolist() == expected
    # As other libraries do: rendered without pictures, then tokenized with them.
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [IMAGE["image"]] * len(tiles) or None
    again = processor(text=text, images=pictures, num_image_tokens=4)
    assert again["input_ids"][0].tolist() == expected


def test_evaluation_prompts_as_its_own_chat(release: Path, converted: Path, tmp_path: Path) -> None:
    with SampleWriter(tmp_path / "shards", ShardLimits(samples=5)) as writer:
        content = [{"type": "image", "image": "0.png"}, part("What is it?")]
        answer = {"role": "assistant", "content": [part("a picture")]}
        files = {"0.png": png(picture(width=60))}
        writer.write("0", [{"role": "user", "content": content}, answer], files, {})
    shards = str(tmp_path / "shards")
    build_index(shards, load_tokenizer(converted), ChatSettings())
    held_out = HeldOut(load_model(str(converted)), [shards])
    found = held_out.prompt_ids(held_out.read(0), 2)
    text = chat_prompt(["<image>\nWhat is it?"], [3], 4)
    theirs = AutoTokenizer.from_pretrained(release)
    assert found == theirs(text, add_special_tokens=False)["input_ids"]


def test_other_prompts_are_noted_on_the_way_back(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "other")
    (tmp_path / "other/chat_template.jinja").write_text(chatml_template("Be brief."))
    system, newline = to_release(tmp_path / "other", tmp_path / "back", BIG)
    assert "You are a helpful assistant." in system and "line end" in newline


def test_there_and_back_is_the_same(
    release: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--reverse", str(converted), str(tmp_path / "back"), "--max-shard-size", "20KB"])
    printed = capsys.readouterr().out
    assert "modeling_ristretto.py" in printed and "note" not in printed
    before = load_file(release / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    old, new = (json.loads((f / "config.json").read_text()) for f in (release, tmp_path / "back"))
    effective = {
        "llm_config": LLM.keys() - {"max_length", "_attn_implementation_autoset"},
        "vision_config": VISION.keys() - {"drop_path_rate", "torch_dtype", "top_k"},
    }
    for part, keys in effective.items():
        before_part, after_part = old.pop(part), new.pop(part)
        assert {k: before_part[k] for k in keys} == {k: after_part[k] for k in keys}
    assert old == new
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (release, tmp_path / "back"))
    text = "a picture <img> \u4e16\u754c\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()
    from_release(tmp_path / "back", tmp_path / "again", BIG)
    assert (tmp_path / "again" / VISION_HEAD).is_file()


def test_a_tower_saved_less_deep_is_the_same(
    release: Path, converted: Path, tmp_path: Path
) -> None:
    source = copied(release, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    twice = "vision_model.vision_model."
    save_file(
        {name.replace(twice, "vision_model."): value for name, value in weights.items()},
        source / "model.safetensors",
    )
    from_release(source, tmp_path / "out", BIG)
    for file in ("model.safetensors", VISION_HEAD):
        assert (tmp_path / "out" / file).read_bytes() == (converted / file).read_bytes()


def test_a_model_that_lost_the_head_says_so(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "without")
    (tmp_path / "without" / VISION_HEAD).unlink()
    (note,) = to_release(tmp_path / "without", tmp_path / "back", BIG)
    assert "pooling head" in note
    found = json.loads((tmp_path / "back/config.json").read_text())
    assert found["vision_config"]["vision_use_head"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("projector.mlp.f2.bias"), r"lacks projector\.mlp\.f2\.bias$"),
        (lambda w: w.pop("language_model.model.norm.weight"), r"lacks language_model\.model\.norm"),
        (
            lambda w: w.update({"projector.mlp.f4.bias": torch.ones(2)}),
            r"has projector\.mlp\.f4\.b",
        ),
        (lambda w: w.update(extra=torch.ones(2)), r"has extra"),
        (
            lambda w: w.update({"projector.mlp.g.weight": torch.ones(8, 48)}),
            r"projector\.mlp\.g\.weight .*\[8, 48\] .*\[32, 48\]",
        ),
        (
            lambda w: w.update(
                {
                    "vision_model.vision_model.embeddings.position_embedding.weight": torch.ones(
                        9, 16
                    )
                }
            ),
            r"position_embedding\.weight .*\[9, 16\] .*\[25, 16\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    release: Path, tmp_path: Path, change: Any, message: str
) -> None:
    source = copied(release, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(InputError, match=message):
        from_release(source, tmp_path / "out", BIG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "internvl_chat"}, "'internvl_chat'.*'ristretto'"),
        ({"select_layer": -2}, "select_layer is -2"),
        ({"template": "Hermes-2"}, "template is 'Hermes-2'"),
        ({"force_image_size": 448}, "force_image_size is 448"),
        ({"llm_config": {"architectures": ["GPT2LMHeadModel"]}}, "GPT2LMHeadModel"),
        ({"vision_config": {"model_type": "clip_vision_model", "image_size": 20}}, "clip_vision"),
    ],
)
def test_other_models_are_refused(
    release: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    source = copied(release, tmp_path / "source", **settings)
    with pytest.raises(InputError, match=message):
        from_release(source, tmp_path / "out", BIG)


def test_pickles_are_not_opened(release: Path, tmp_path: Path) -> None:
    source = copied(release, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        from_release(source, tmp_path / "out", BIG)


def test_an_index_cannot_lead_outside(release: Path, tmp_path: Path) -> None:
    source = copied(release, tmp_path / "source")
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside the folder"):
        from_release(source, tmp_path / "out", BIG)


def test_a_tokenizer_without_the_markers_is_refused(release: Path, tmp_path: Path) -> None:
    source = copied(release, tmp_path / "source")
    save_hugging_face(source)
    with pytest.raises(InputError, match=r"lacks </img>"):
        from_release(source, tmp_path / "out", BIG)


def test_what_the_released_code_cannot_do_is_refused_on_the_way_back(
    converted: Path, release: Path, tmp_path: Path
) -> None:
    source = copied(converted, tmp_path / "source", pool="adaptive")
    with pytest.raises(InputError, match=r"pool .*'adaptive'.*'resize'"):
        to_release(source, tmp_path / "out", BIG)
    with pytest.raises(InputError, match="without --reverse"):
        to_release(release, tmp_path / "out", BIG)
