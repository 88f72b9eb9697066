"""The model: packs equal separate samples, the loss is what it should be, saving and loading."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, SiglipVisionConfig
from transformers.cache_utils import DynamicCache

from data_pipeline.errors import InputError
from kernels import token_adaptive_projector
from training.config import LAYERED
from training.model import (
    RELEASED_NAMES,
    PackedTokenFlex,
    TokenAdaptiveProjector,
    TokenFlexConfig,
)
from training.parameters import recompute_activations

IMAGE_TOKEN, VOCAB, TILE = 3, 64, 16
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 4,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough for every path to matter in the outputs
    "pad_token_id": 0,
}
Sample = tuple[list[int], list[bool], list[int]]  # ids, supervised, sides of its tiles


def make_config(text: dict[str, Any] | None = None, **changes: Any) -> TokenFlexConfig:
    changes = {"image_token_id": IMAGE_TOKEN, **changes}
    return TokenFlexConfig(
        vision_config=dict(VISION), text_config={**TEXT, **(text or {})}, **changes
    )


def make_model(**changes: Any) -> PackedTokenFlex:
    torch.manual_seed(0)
    return PackedTokenFlex(make_config(**changes))


@pytest.fixture(scope="module")
def shared_model():
    return make_model()


@pytest.fixture
def model(shared_model):
    shared_model.zero_grad()
    return shared_model


def make_samples(sides: list[list[int]], seed: int = 0) -> list[Sample]:
    """One sample per list of tile sides: text, its image tokens, text; the last part supervised."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(4, VOCAB, (length,), generator=generator).tolist()

    samples = []
    for index, tiles in enumerate(sides):
        prompt = text(3) + [IMAGE_TOKEN] * sum(n * n for n in tiles) + text(2 + index)
        answer = text(3 + 2 * index)
        ids = prompt + answer
        samples.append((ids, [False] * len(prompt) + [True] * len(answer), tiles))
    return samples


def make_batch(samples: list[Sample], seed: int = 1) -> dict[str, Any]:
    """The forward's arguments for one pack of the samples."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([token for sample in samples for token in sample[0]])
    supervised = torch.tensor([flag for sample in samples for flag in sample[1]])
    lengths = torch.tensor([len(sample[0]) for sample in samples])
    sides = [n for sample in samples for n in sample[2]]
    tiles = torch.randint(
        0, 256, (len(sides), 3, TILE, TILE), dtype=torch.uint8, generator=generator
    )
    weights = torch.rand(len(ids), generator=generator) + 0.5
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": int(lengths.max()),
        "labels": torch.where(supervised, ids, -100)[None],
        "loss_weights": torch.where(supervised, weights, 0.0)[None],
        "pixel_values": tiles,
        "tile_sides": sides,
    }


def split_batch(batch: dict[str, Any], samples: list[Sample]) -> list[dict[str, Any]]:
    """The same pack, as one batch per sample."""
    bounds, tile, parts = batch["cu_seqlens"].tolist(), 0, []
    for index, sample in enumerate(samples):
        start, stop, tiles = bounds[index], bounds[index + 1], len(sample[2])
        part = {
            name: batch[name][:, start:stop]
            for name in ("input_ids", "position_ids", "labels", "loss_weights")
        }
        part["pixel_values"] = batch["pixel_values"][tile : tile + tiles]
        part["tile_sides"] = list(sample[2])
        tile += tiles
        parts.append(part)
    return parts


SAMPLES = make_samples([[2], [4, 1], [], [3], [2, 2]])
INPUTS = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen", "pixel_values", "tile_sides")


def only_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in INPUTS if name in batch}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for rounding, which is seen against the largest of all: key biases have none."""
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        allowed = 1e-4 * grad.abs().max().item() + 1e-6 * largest
        assert (found[name] - grad).abs().max().item() < allowed, name


FAMILIES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"model_type": "llama"},
    {"model_type": "qwen3"},
    {"model_type": "mistral", "sliding_window": 64},
    {"model_type": "phi3"},
    {"model_type": "gemma3_text", "sliding_window": 64},
]


@pytest.mark.parametrize("text", FAMILIES, ids=lambda text: "-".join(map(str, text.values())))
def test_pack_equals_the_sum_of_its_samples(text):
    model = make_model(text=text)
    batch = make_batch(SAMPLES)
    packed = model(**batch)
    packed.loss.backward()
    packed_grads = gradients(model)
    model.zero_grad()
    apart = [model(**part) for part in split_batch(batch, SAMPLES)]
    total = torch.stack([output.loss for output in apart]).sum()
    total.backward()
    assert total.item() == pytest.approx(packed.loss.item(), rel=1e-5)
    torch.testing.assert_close(
        torch.cat([output.token_losses for output in apart]),
        packed.token_losses,
        rtol=1e-4,
        atol=1e-4,
    )
    assert packed_grads.keys() == dict(model.named_parameters()).keys()
    assert_same_gradients(gradients(model), packed_grads)


def test_loss_is_the_weighted_sum_of_next_token_cross_entropies(model):
    batch = make_batch(SAMPLES)
    output = model(**batch)
    logits = model(**only_inputs(batch)).logits
    labels, weights = batch["labels"][0, 1:], batch["loss_weights"][0, 1:]
    losses = F.cross_entropy(logits[0, :-1], labels, reduction="none", ignore_index=-100)
    kept = labels != -100
    assert output.loss.dtype == torch.float32 and output.loss.shape == ()
    assert output.logits is None and output.num_supervised == int(kept.sum())
    assert output.loss.item() == pytest.approx((weights * losses).sum().item(), rel=1e-5)
    torch.testing.assert_close(output.token_losses, losses[kept], rtol=1e-5, atol=1e-5)
    assert torch.equal(output.predictions, logits[0, :-1].argmax(-1)[kept])
    assert not output.token_losses.requires_grad
    unweighted = model(**{**batch, "loss_weights": None}).loss
    assert unweighted.item() == pytest.approx(losses.sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_sample_leaves_the_others_bitwise_the_same(dtype):
    model = make_model().to(dtype)
    batch = make_batch(SAMPLES)
    before = model(**only_inputs(batch)).logits
    start, stop = batch["cu_seqlens"][1:3].tolist()
    changed = only_inputs(copy.deepcopy(batch))
    part = changed["input_ids"][0, start:stop]
    part[part != IMAGE_TOKEN] = part[part != IMAGE_TOKEN] % 7 + 5
    changed["pixel_values"][1:3] = 255 - changed["pixel_values"][1:3]
    after = model(**changed).logits
    same = torch.ones(before.shape[1], dtype=torch.bool)
    same[start:stop] = False
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[:, start:stop], after[:, start:stop])


def test_chunks_change_neither_loss_nor_gradients(model):
    batch = make_batch(SAMPLES)
    one = model(**batch, loss_chunks=1)
    one.loss.backward()
    expected = gradients(model)
    for chunks in (3, 100):
        model.zero_grad()
        several = model(**batch, loss_chunks=chunks)
        several.loss.backward()
        assert several.loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
        torch.testing.assert_close(several.token_losses, one.token_losses)
        assert torch.equal(several.predictions, one.predictions)
        assert_same_gradients(gradients(model), expected)
    with pytest.raises(ValueError, match="loss_chunks is 0"):
        model(**batch, loss_chunks=0)


@pytest.mark.parametrize("supervised", [0, 1, 2, 40])
def test_the_head_runs_once_per_chunk_whatever_is_supervised(model, supervised):
    """Ranks would wait for each other for ever if one ran lm_head less often than another."""
    ids = list(range(4, 54))
    samples = [(ids, [False] * (50 - supervised) + [True] * supervised, [])]
    calls = []
    hook = model.language_model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    output = model(**make_batch(samples), loss_chunks=4)
    assert len(calls) == 4 and output.num_supervised == supervised
    output.loss.backward()
    hook.remove()
    assert len(calls) == 8  # each chunk once more in backward
    assert all(p.grad is not None for p in model.parameters())
    assert len(output.token_losses) == len(output.predictions) == supervised
    assert supervised or output.loss.item() == 0


def test_parameters_are_read_only_inside_their_own_modules_forward(model):
    """ZeRO-3 in small: a module's own parameters exist only while its forward runs."""
    batch = make_batch(SAMPLES)
    expected = model(**batch, loss_chunks=2).loss
    lent = copy.deepcopy(model)
    for module in lent.modules():
        own = dict(module.named_parameters(recurse=False))
        full = {name: p.data for name, p in own.items()}
        if not own:
            continue

        def give(module, *_, own=own, full=full):
            for name, p in own.items():
                p.data = full[name]

        def take(module, *_, own=own):
            for p in own.values():
                p.data = torch.empty(0)

        module.register_forward_pre_hook(give)
        module.register_forward_hook(take)
        take(module)
    with torch.no_grad():
        assert torch.equal(lent(**batch, loss_chunks=2).loss, expected)
    assert "16 -> 48 -> 32" in repr(lent)


def test_pack_without_images_equals_the_language_model_and_reaches_every_parameter(model):
    batch = make_batch(make_samples([[], [], []]))
    output = model(**{**batch, "pixel_values": None, "tile_sides": None})
    output.loss.backward()
    logits = model.language_model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    losses = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="none")
    assert output.loss.item() == pytest.approx(
        (losses * batch["loss_weights"][0, 1:]).sum().item(), rel=1e-5
    )
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any() != name.startswith(("vision_model", "projector")), name
    none, empty = output.loss, model(**batch).loss
    assert torch.equal(none, empty)


def test_an_empty_pack_runs_and_costs_nothing(model):
    output = model(
        input_ids=torch.tensor([[0]]),
        position_ids=torch.tensor([[0]]),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen=1,
        labels=torch.tensor([[-100]]),
        loss_weights=torch.zeros(1, 1),
        pixel_values=torch.zeros(0, 3, TILE, TILE, dtype=torch.uint8),
        tile_sides=[],
        loss_chunks=2,
    )
    output.loss.backward()
    assert output.loss.item() == 0 and output.num_supervised == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_image_features_land_on_the_image_tokens_in_order(model):
    batch = make_batch(SAMPLES)
    seen = {}
    decoder = model.language_model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    features = model.image_features(batch["pixel_values"], batch["tile_sides"])
    assert len(features) == sum(n * n for n in batch["tile_sides"])
    is_image = batch["input_ids"][0] == IMAGE_TOKEN
    assert torch.equal(seen["inputs_embeds"][0, is_image], features)
    words = model.get_input_embeddings()(batch["input_ids"][0, ~is_image])
    assert torch.equal(seen["inputs_embeds"][0, ~is_image], words)


def test_pixels_are_scaled_per_channel_on_the_way_in():
    mean, std = [0.1, 0.5, 0.9], [0.5, 0.25, 1.0]
    model = make_model(image_mean=mean, image_std=std)
    tiles = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat(TILE * TILE)
    tiles = tiles.reshape(1, 3, TILE, TILE)
    expected = (tiles / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    patches = model.vision_model(pixel_values=expected).last_hidden_state
    torch.testing.assert_close(
        model.image_features(tiles, [2]), model.projector(patches, [2]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
def test_the_configured_pooling_is_used(pool):
    model, sides = make_model(pool=pool), [3, 2]
    tiles = make_batch(make_samples([sides]))["pixel_values"]
    patches = model.vision_model(pixel_values=(tiles / 255 - 0.5) / 0.5).last_hidden_state
    weights = dict(model.projector.named_parameters())
    expected = token_adaptive_projector(patches, sides, **weights, grid=(4, 4), pool=pool)
    torch.testing.assert_close(model.image_features(tiles, sides), expected)


def test_sample_bounds_may_come_from_the_positions_alone(model):
    batch = make_batch(SAMPLES)
    expected = model(**batch).loss
    assert torch.equal(model(**{**batch, "cu_seqlens": None, "max_seqlen": None}).loss, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_implementations_give_the_same_loss(model, implementation):
    batch = make_batch(SAMPLES)
    expected = model(**batch).loss.item()
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    assert other(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(model):
    batch = make_batch(SAMPLES)
    model(**batch).loss.backward()
    expected = gradients(model)
    other = copy.deepcopy(model)
    other.zero_grad()
    other.gradient_checkpointing_enable()
    other.train()
    calls = []
    layer = other.language_model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    other(**batch).loss.backward()
    assert len(calls) == 2
    assert_same_gradients(gradients(other), expected)


@pytest.mark.parametrize("chosen", [[], ["vision_model"], ["language_model"], list(LAYERED)])
def test_only_the_chosen_layers_are_computed_again(model, chosen):
    batch = make_batch(SAMPLES)
    model(**batch).loss.backward()
    expected = gradients(model)
    other = copy.deepcopy(model).train()
    other.zero_grad()
    calls: list[str] = []
    recompute_activations(other, LAYERED)
    recompute_activations(other, chosen)  # says of every module what it does
    layers = {"vision_model": other.vision_model, "language_model": other.language_model}
    for name, part in layers.items():
        norm = next(m for m in part.modules() if isinstance(m, nn.ModuleList))[0].mlp
        norm.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    other(**batch).loss.backward()
    assert {name: calls.count(name) for name in layers} == {
        name: 1 + (name in chosen) for name in layers
    }
    assert_same_gradients(gradients(other), expected)


def test_cached_steps_equal_one_forward(model):
    part = split_batch(make_batch(SAMPLES), SAMPLES)[1]
    inputs = {name: part[name] for name in ("input_ids", "pixel_values", "tile_sides")}
    expected = model(**inputs).logits
    cache, length = DynamicCache(config=model.config.text_config), inputs["input_ids"].shape[1]
    first = {**inputs, "input_ids": inputs["input_ids"][:, : length - 3]}
    steps = [model(**first, past_key_values=cache, use_cache=True).logits]
    towers = []
    hook = model.vision_model.register_forward_hook(lambda *_: towers.append(1))
    for i in range(length - 3, length):
        output = model(inputs["input_ids"][:, i : i + 1], past_key_values=cache, use_cache=True)
        steps.append(output.logits)
    hook.remove()
    assert not towers  # later steps need no image
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)
    last = model(**inputs, logits_to_keep=1).logits
    assert last.shape == (1, 1, VOCAB)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)


def test_padded_rows_equal_single_rows(model):
    batch = make_batch(SAMPLES)
    parts = split_batch(batch, SAMPLES)
    lengths = [part["input_ids"].shape[1] for part in parts]
    ids = torch.zeros(len(parts), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, part in enumerate(parts):
        ids[row, : lengths[row]], mask[row, : lengths[row]] = part["input_ids"][0], 1
    together = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=batch["pixel_values"],
        tile_sides=batch["tile_sides"],
    ).logits
    for row, part in enumerate(parts):
        alone = model(**only_inputs(part)).logits
        torch.testing.assert_close(together[row, : lengths[row]], alone[0], rtol=1e-4, atol=1e-4)


def test_training_works_after_evaluation_in_inference_mode(model):
    batch = make_batch(SAMPLES)
    with torch.inference_mode():
        evaluated = model(**batch).loss
    trained = model(**batch).loss
    trained.backward()
    assert torch.equal(evaluated, trained.detach())


def test_state_dict_survives_saving_and_loading(model, tmp_path):
    batch = make_batch(SAMPLES)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "modeling_tokenflex.py").exists()  # which would need this repository
    assert saved["model_type"] == "tokenflex" and saved["text_config"]["model_type"] == "qwen2"
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, TokenFlexConfig)
    assert isinstance(config.vision_config, SiglipVisionConfig)
    assert not config.vision_config.vision_use_head
    again = PackedTokenFlex.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    half = PackedTokenFlex.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(**batch).loss.dtype == torch.float32


def test_tied_embeddings_stay_tied_through_saving(tmp_path):
    model = make_model(text={"tie_word_embeddings": True})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = PackedTokenFlex.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    batch = make_batch(SAMPLES)
    assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        model = PackedTokenFlex(make_config())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert dict(model.state_dict()).keys() == make_model().state_dict().keys()


def test_sub_models_follow_the_requested_dtype_not_the_one_their_configs_were_saved_with():
    config = make_config(text={"dtype": "bfloat16"})
    config.vision_config.dtype = torch.bfloat16
    model = PackedTokenFlex(config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = PackedTokenFlex._from_config(make_config(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_names_and_sizes():
    model = make_model()
    names = set(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"vision_model", "projector", "language_model"}
    own = {name.removeprefix("projector.") for name in names if name.startswith("projector.")}
    assert own == set(RELEASED_NAMES.values()) and len(RELEASED_NAMES) == 8
    assert not any("head" in name for name in names if name.startswith("vision_model"))
    assert {"TokenAdaptiveProjector", "Qwen2DecoderLayer", "SiglipEncoderLayer"} <= set(
        model._no_split_modules
    )
    assert model.config.tile_size == TILE and model.config.patch_grid == (4, 4)
    assert model.config.image_mean == model.config.image_std == [0.5, 0.5, 0.5]


def test_projector_of_the_release_has_the_released_number_of_parameters():
    with torch.device("meta"):
        projector = TokenAdaptiveProjector(1152, 3 * 1152, 2048, (27, 27))
    assert sum(p.numel() for p in projector.parameters()) == 15_051_776


def test_projector_starts_as_transformers_starts_a_linear():
    projector = make_model(text={"initializer_range": 0.05, "hidden_size": 64}).projector
    for weight in (projector.w1, projector.w2, projector.w3):
        assert weight.std().item() == pytest.approx(0.05, rel=0.1)
        assert abs(weight.mean().item()) < 0.01
    for bias in (projector.b1, projector.b2, projector.b3, projector.norm_bias):
        assert not bias.any()
    assert (projector.norm_weight == 1).all()
    assert TokenAdaptiveProjector(64, 64, 64, (4, 4)).w1.std().item() == pytest.approx(
        0.02, rel=0.1
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_sides": [2, 4, 1, 3, 2, 1]}, "38 image tokens.* 35"),
        ({"tile_sides": [2, 4]}, "2 .*6 tiles"),
        ({"tile_sides": None}, "without tile_sides"),
        ({"pixel_values": None}, r"38 image tokens.* 0\b"),
        ({"pixel_values": torch.zeros(6, 3, TILE, TILE)}, "expected torch.uint8"),
        ({"pixel_values": torch.zeros(6, 3, 8, 8, dtype=torch.uint8)}, r"\[tiles, 3, 16, 16\]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "runs from 0 to 9"),
        ({"position_ids": None}, "without position_ids"),
        ({"attention_mask": torch.ones(1, 99)}, "one row"),
    ],
)
def test_arguments_that_disagree_are_errors(model, change, message):
    batch = make_batch(SAMPLES)
    assert int((batch["input_ids"] == IMAGE_TOKEN).sum()) == 38
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "nanochat"}, "text_config.final_logit_softcapping is 15.0"),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 2.0}, "lm_head_multiplier is 2.0"),
        (
            {"model_type": "granitemoehybrid", "mamba_n_heads": 8, "logits_scaling": 8.0},
            "scaling is 8.0",
        ),
        ({"layer_types": ["full_attention", "conv"]}, "'qwen2' has conv"),
        ({"vocab_size": 3}, "image_token_id is 3.* 3 tokens"),
    ],
)
def test_language_models_that_do_not_fit_are_errors(text, message):
    with pytest.raises(InputError, match=message):
        make_model(text=text)


def test_language_models_that_do_not_isolate_samples_are_errors():
    batch = make_batch(SAMPLES)
    model = make_model(text={"model_type": "llama"})
    model.config.text_config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(InputError, match="linear_attention"):
        model(**batch)
    model = make_model()

    def drop_segments(module, args, kwargs):
        """A decoder that does not hand its extra arguments down."""
        return args, {**kwargs, "segments": None, "attention_mask": None}

    model.language_model.get_decoder().register_forward_pre_hook(drop_segments, with_kwargs=True)
    with pytest.raises(InputError, match="extra arguments"):
        model(**batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "max"}, "pool .*max.* adaptive, resize"),
        ({"projector_hidden_ratio": 0}, "at least 1"),
        ({"image_std": [0.5, 0.5]}, "three numbers each"),
        ({"image_std": [0.5, 0.5, 0.0]}, "std above 0"),
        ({"text_config": {"vocab_size": 8}}, "text_config.model_type is None"),
        ({"text_config": {"model_type": "nonsense"}}, "model_type is 'nonsense'"),
        ({"vision_config": {"model_type": "dinov2"}}, "siglip_vision_model, clip_vision_model"),
        ({"vision_config": {"image_size": 4, "patch_size": 8}}, "at least one patch"),
    ],
)
def test_configs_that_cannot_work_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenFlexConfig(**{"image_token_id": IMAGE_TOKEN, **changes})
