"""Generation gives the same answers by every way of asking for them."""

import copy
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import CompileConfig, StaticCache, TextIteratorStreamer, pipeline
from transformers.cache_utils import DynamicCache

from tests.training.tiny import earlier_weights, make_model, make_processor, picture, prompt
from training.model import PackedTokenFlex, TokenFlexForConditionalGeneration, TokenFlexProcessor
from training.model.attention import ATTENTION_NAME

GREEDY = {"max_new_tokens": 6, "do_sample": False}
SAMPLES: list[dict[str, Any]] = [
    {"text": prompt("<image>\nWhat is this?"), "images": [picture(0)], "num_image_tokens": [16]},
    {"text": prompt("hello world"), "images": [], "num_image_tokens": []},
    {
        "text": prompt("<image>left, then <image>\nWhich row?"),
        "images": [picture(1), picture(2, 15, 60)],
        "num_image_tokens": [1, 9],
    },
    {"text": prompt("<image>"), "images": [picture(3, 16, 16)], "num_image_tokens": [4]},
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> TokenFlexProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def shared_model(processor: TokenFlexProcessor) -> Any:
    return make_model(TokenFlexForConditionalGeneration, processor)


@pytest.fixture
def model(shared_model: Any) -> Any:
    shared_model.set_attn_implementation("sdpa")
    return shared_model


@pytest.fixture(scope="module")
def single(processor: TokenFlexProcessor) -> Any:
    return [processor(**sample) for sample in SAMPLES]


@pytest.fixture(scope="module")
def batch(processor: TokenFlexProcessor) -> Any:
    return processor(**{name: [sample[name] for sample in SAMPLES] for name in SAMPLES[0]})


def answers(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    """The ids of each row's answer, greedily unless told otherwise."""
    ids = model.generate(**inputs, **{**GREEDY, **options})
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected(shared_model: Any, single: Any) -> list[list[int]]:
    """Each sample alone, without a cache."""
    shared_model.set_attn_implementation("sdpa")
    found = [answers(shared_model, inputs, use_cache=False)[0] for inputs in single]
    assert len({tuple(answer) for answer in found}) == len(SAMPLES)  # or little would be tested
    assert all(len(answer) == 6 for answer in found)
    return found


def test_alone_or_in_a_batch_cached_or_not(model, single, batch, expected):
    assert [answers(model, inputs)[0] for inputs in single] == expected
    assert answers(model, batch) == expected
    assert answers(model, batch, use_cache=False) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_language_models_give_the_same_alone_or_in_a_batch(processor, single, batch, family):
    model = make_model(TokenFlexForConditionalGeneration, processor, {"model_type": family})
    found = answers(model, batch)
    assert len({tuple(answer) for answer in found}) == len(SAMPLES)
    assert [answers(model, inputs)[0] for inputs in single] == found
    assert answers(model, batch, use_cache=False) == found


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(processor, model, single, side):
    for sample, alone in zip(SAMPLES, single, strict=True):
        padded = processor(**sample, padding="max_length", max_length=150, padding_side=side)
        assert padded["input_ids"].shape == (1, 150)
        real = padded["attention_mask"].bool()
        with torch.no_grad():
            found = model(**padded, position_ids=padded["attention_mask"].cumsum(1) - 1).logits
            wanted = model(**alone).logits
        torch.testing.assert_close(found[real], wanted[0], rtol=1e-4, atol=1e-4)


def test_cached_steps_give_the_logits_of_one_forward(model, batch, expected):
    output = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    with torch.no_grad():
        full = model(**{**batch, "input_ids": output.sequences, "attention_mask": mask},
                     position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits  # fmt: skip
    steps = torch.stack(output.logits, 1)
    torch.testing.assert_close(steps, full[:, -7:-1], rtol=1e-4, atol=1e-4)


CACHES = ["dynamic", "static", "offloaded", "offloaded_static", "quantized"]


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_gives_the_same_answers(model, batch, expected, cache):
    if "offloaded" in cache and not torch.cuda.is_available():
        pytest.skip("transformers offloads a cache from a GPU only")
    if cache == "quantized" and importlib.util.find_spec("optimum") is None:
        pytest.skip("needs optimum-quanto")
    assert answers(model, batch, cache_implementation=cache) == expected


@pytest.mark.parametrize("implementation", ["eager", "sdpa", ATTENTION_NAME, "flex_attention"])
def test_every_attention_gives_the_same_answers(model, batch, expected, implementation):
    model.set_attn_implementation(implementation)
    # Compiled for a CPU, flex attention takes a minute, and torch 2.13 decodes wrongly with it.
    stance = "force_eager" if implementation == "flex_attention" else "default"
    with torch.compiler.set_stance(stance):
        assert answers(model, batch) == expected
    if implementation != "flex_attention":  # transformers cannot hand its mask to a static cache
        assert answers(model, batch, cache_implementation="static") == expected


def test_a_step_with_a_static_cache_compiles_into_one_graph(model, batch, expected):
    torch._dynamo.utils.counters.clear()
    # What transformers does by itself on a GPU; "eager" leaves out the compiler behind the graph.
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    assert answers(model, batch, **options) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_trainers_class_generates_the_same(processor, model, batch, expected):
    trained = make_model(PackedTokenFlex, processor, seed=1)
    trained.load_state_dict(earlier_weights(model))
    assert answers(trained, batch) == expected
    assert answers(trained, batch, use_cache=False) == expected


def test_beams_keep_the_images_of_their_rows(model, single, batch):
    options = {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True}
    alone = [answer for inputs in single for answer in answers(model, inputs, **options)]
    assert len(alone) == 2 * len(SAMPLES)
    assert answers(model, batch, **options) == alone
    assert answers(model, batch, use_cache=False, **options) == alone


def test_several_samples_of_each_row_keep_its_images(model, batch, expected):
    found = answers(model, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert found == [answer for answer in expected for _ in range(2)]


def test_assisted_decoding_gives_the_same_answers(processor, model, single, expected):
    other = make_model(TokenFlexForConditionalGeneration, processor, seed=1)
    language_model = make_model(PackedTokenFlex, processor).language_model  # of the same weights
    wider = make_model(TokenFlexForConditionalGeneration, processor, {"hidden_size": 48})
    assistants = [other, wider, copy.deepcopy(model), language_model]
    for inputs, answer in zip(single, expected, strict=True):
        assert answers(model, inputs, prompt_lookup_num_tokens=3) == [answer]
    for assistant in assistants:
        assert answers(model, single[2], assistant_model=assistant) == [expected[2]]


def test_a_prompt_read_in_chunks_gives_the_same_answers(model, batch, expected):
    assert answers(model, batch, prefill_chunk_size=7) == expected
    assert answers(model, batch, prefill_chunk_size=7, cache_implementation="static") == expected


def test_the_vision_tower_runs_once_per_prompt(model, batch, expected):
    towers: list[int] = []
    hook = model.model.vision_model.register_forward_hook(lambda *_: towers.append(1))
    assert answers(model, batch) == expected and len(towers) == 1
    assert answers(model, batch, use_cache=False) == expected and len(towers) == 2
    hook.remove()


def test_streaming_hands_over_the_answer(processor, model, single, expected):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    answers(model, single[0], streamer=streamer)
    assert "".join(streamer) == processor.decode(expected[0])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_chat_goes_on_from_its_cache(processor, model, kind):
    """The second turn has an image, too, and computes only what the first did not."""
    turns = [{"role": "user", "content": [{"type": "image", "image": picture(0)}]}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    first = processor.apply_chat_template(turns, num_image_tokens=[9], **options)
    config = model.config.text_config
    cache = (
        DynamicCache(config=config)
        if kind == "dynamic"
        else StaticCache(config=config, max_cache_len=300)
    )
    said = answers(model, first, past_key_values=cache)[0]
    question = torch.tensor([processor.tokenizer(" and this?")["input_ids"]])
    image = processor(images=picture(4), text=prompt("<image>"), num_image_tokens=4)
    start = processor.tokenizer.convert_tokens_to_ids("<img>")
    image_ids = image["input_ids"][:, image["input_ids"][0].tolist().index(start) :]
    ids = torch.cat([first["input_ids"], torch.tensor([said]), question, image_ids], 1)
    new = {"pixel_values": image["pixel_values"], "tile_sides": image["tile_sides"]}
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **new, **GREEDY
    )
    both = {name: torch.cat([first[name], image[name]]) for name in new}
    assert torch.equal(found, model.generate(input_ids=ids, **both, **GREEDY))


def test_a_cached_chat_takes_the_tiles_of_all_of_it_and_only_new_ids(processor, model, single):
    first, image = single[0], processor(text="<|im_start|>user\n<image>", images=picture(4))
    both = {name: torch.cat([first[name], image[name]]) for name in ("pixel_values", "tile_sides")}
    ids = torch.cat([first["input_ids"], image["input_ids"]], 1)
    expected = model.generate(input_ids=ids, **both, **GREEDY)[:, ids.shape[1] :]
    new = {name: image[name] for name in ("input_ids", "pixel_values", "tile_sides")}
    for given in ({"input_ids": ids, **both}, new):
        cache = DynamicCache(config=model.config.text_config)
        model(**first, past_key_values=cache, use_cache=True)
        found = model.generate(
            **given, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY
        )
        assert torch.equal(found[:, given["input_ids"].shape[1] :], expected)


def test_embeddings_encoded_images_and_a_positional_prompt_give_the_same(model, batch, expected):
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, **rest, **GREEDY).tolist() == expected
    assert model.generate(ids, **rest, **GREEDY)[:, ids.shape[1] :].tolist() == expected
    tiles = {name: rest.pop(name) for name in ("pixel_values", "tile_sides")}
    encoded = {"image": model.get_image_features(**tiles)}
    assert answers(model, {"input_ids": ids, **rest}, mm_encoder_outputs=encoded) == expected
    with pytest.raises(ValueError, match=r"pixel_values.*mm_encoder_outputs"):
        model.generate(**batch, mm_encoder_outputs=encoded)
    with pytest.raises(ValueError, match=r"134 image tokens.*pixel_values.*\b115\b"):
        short = {"image": type(encoded["image"])(pooler_output=[torch.zeros(115, 32)])}
        answers(model, {"input_ids": ids, **rest}, mm_encoder_outputs=short)


def test_generations_side_by_side_and_inside_each_other_keep_their_images(model, single, expected):
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda inputs: answers(model, inputs)[0], single))
    assert found == expected
    inner: list[list[int]] = []

    def ask_something_else(_: Any, scores: torch.Tensor) -> torch.Tensor:
        inner.extend(answers(model, single[1]))
        return scores

    assert answers(model, single[2], logits_processor=[ask_something_else]) == [expected[2]]
    assert inner == [expected[1]] * 6


def test_a_prompt_longer_than_the_context_is_an_error(processor, single):
    model = make_model(
        TokenFlexForConditionalGeneration, processor, {"max_position_embeddings": 90}
    )
    with pytest.raises(ValueError, match=r"input_ids .*120 .*\b90\b.* shorten"):
        answers(model, single[0])


def test_no_image_token_is_ever_generated(processor, model, single):
    head = copy.deepcopy(model)
    with torch.no_grad():
        head.get_output_embeddings().weight[processor.image_token_id] *= 100
    for inputs in single:
        assert processor.image_token_id not in answers(head, inputs)[0]


def test_the_pipeline_answers_chats_and_text(processor, model, single, expected):
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"generate_kwargs": GREEDY, "return_full_text": False}
    wanted = [processor.decode(answer, skip_special_tokens=True) for answer in expected]
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "\nWhat is this?"}]
    chat = [{"role": "user", "content": content}]
    found = ask(text=chat, num_image_tokens=16, **options)
    assert found[0]["generated_text"] == wanted[0]
    sample = {name: SAMPLES[2][name] for name in ("text", "images")}
    found = ask(**sample, num_image_tokens=[1, 9], **options)
    assert found[0]["generated_text"] == wanted[2]
    # Chats of several lengths at a time: the pipeline pads them itself.
    longer = [{"role": "user", "content": [*content, {"type": "text", "text": " Or that?" * 9}]}]
    settings = {"num_image_tokens": 16, "processor_kwargs": {"max_tiles": 2}}
    alone = [ask(text=each, **settings, **options)[0] for each in (chat, longer)]
    found = ask(text=[chat, longer], batch_size=2, **settings, **options)
    assert [answer for (answer,) in found] == alone
    full = ask(text=chat, num_image_tokens=16, generate_kwargs=GREEDY)[0]["generated_text"]
    assert full[-1] == {"role": "assistant", "content": wanted[0]}
