"""The template: exact text, what is supervised, prompts as prefixes, images, validation."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.chat import (
    ChatSettings,
    TokenizedChat,
    expand_images,
    image_names,
    parse_sample,
    template_fingerprint,
    tokenize_chat,
    tokenize_prompt,
)
from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.small_tokenizers import save_hugging_face, save_sentencepiece

Turn = dict[str, Any]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def image(name: str = "0.png") -> dict[str, str]:
    return {"type": "image", "image": name}


def turn(role: str, *parts: Any) -> Turn:
    return {"role": role, "content": list(parts)}


ASK = turn("user", image(), text("What is it?"))
ANSWER = turn("assistant", text("A cell."))

texts = st.builds(text, st.lists(st.sampled_from([*SPECIAL_TOKENS, "a b", "\n", "é"])).map("".join))
images = st.builds(image, st.sampled_from(["0.png", "1.jpg"]))
words = st.just(text("a b"))  # neither a question nor an answer is empty
users = st.builds(
    lambda parts, last: turn("user", *parts, last), st.lists(texts | images, max_size=5), words
)
answers = st.builds(
    lambda parts, last: turn("assistant", *parts, last), st.lists(texts, max_size=3), words
)
systems = st.builds(lambda parts: [turn("system", *parts)], st.lists(texts | images, max_size=2))


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    rounds = draw(st.lists(st.tuples(users, answers), min_size=1, max_size=3))
    return draw(st.just([]) | systems) + [turn for pair in rounds for turn in pair]


@pytest.fixture(scope="module", params=[save_sentencepiece, save_hugging_face])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return load_tokenizer(request.param(tmp_path_factory.mktemp("tokenizer")))


def supervised_text(chat: TokenizedChat, tokenizer: Tokenizer) -> str:
    ids = [i for i, s in zip(chat.input_ids, chat.supervised, strict=True) if s]
    return tokenizer.decode(ids, skip_special=False)


def test_the_text_of_the_template(tokenizer: Tokenizer) -> None:
    again = [turn("user", text("Sure?")), turn("assistant", text("Yes."))]
    chat = tokenize_chat([ASK, ANSWER, *again], tokenizer, ChatSettings())
    assert tokenizer.decode(chat.input_ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<img></img>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cell.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert supervised_text(chat, tokenizer) == "A cell.<|im_end|>Yes.<|im_end|>"
    assert not chat.supervised[0]
    (position,) = chat.image_positions
    markers = [tokenizer.special_id("<img>"), tokenizer.special_id("</img>")]
    assert chat.input_ids[position - 1 : position + 1] == markers


def test_system_turn_of_the_sample_setting_or_none(tokenizer: Tokenizer) -> None:
    own = turn("system", text("Be brief."))
    for messages, setting, expected in [
        ([own, ASK, ANSWER], "You are a helpful assistant.", "<|im_start|>system\nBe brief.<|im_e"),
        ([own, ASK, ANSWER], "", "<|im_start|>system\nBe brief.<|im_e"),
        ([ASK, ANSWER], "Other.", "<|im_start|>system\nOther.<|im_e"),
        ([ASK, ANSWER], "", "<|im_start|>user\n<img>"),
    ]:
        chat = tokenize_chat(messages, tokenizer, ChatSettings(system=setting))
        assert tokenizer.decode(chat.input_ids, skip_special=False).startswith(expected)


def test_ids_are_those_of_the_whole_text_tokenised_at_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Piecewise tokenising gives what a chat template gives a pretrained model of this kind."""
    from transformers import AutoTokenizer

    folder = save_hugging_face(tmp_path_factory.mktemp("hf"))
    ours = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    chat = tokenize_chat(
        [turn("user", text("What is shown?")), ANSWER], ours, ChatSettings(system="Be brief.")
    )
    whole = ours.decode(chat.input_ids, skip_special=False)
    assert theirs(whole, add_special_tokens=False)["input_ids"] == chat.input_ids


@given(messages=conversations(), data=st.data())
def test_context_tokens_are_the_images_own(
    tokenizer: Tokenizer, messages: list[Turn], data: st.DataObject
) -> None:
    chat = tokenize_chat(messages, tokenizer, ChatSettings())
    names = image_names(messages)
    counts = data.draw(
        st.lists(st.sampled_from([0, 1, 4, 9]), min_size=len(names), max_size=len(names))
    )
    context = tokenizer.special_id("<IMG_CONTEXT>")
    ids, supervised = expand_images(chat, counts, context)
    assert ids.count(context) == sum(counts)
    assert len(ids) == len(supervised) == len(chat.input_ids) + sum(counts)
    assert [i for i in ids if i != context] == chat.input_ids
    assert sum(supervised) == sum(chat.supervised)
    assert not any(s for i, s in zip(ids, supervised, strict=True) if i == context)
    # Each run lies between an image's own markers, in reading order.
    opening, closing = tokenizer.special_id("<img>"), tokenizer.special_id("</img>")
    starts = [k for k, i in enumerate(ids) if i == opening]
    ends = [k for k, i in enumerate(ids) if i == closing]
    assert [e - s - 1 for s, e in zip(starts, ends, strict=True)] == counts


@given(messages=conversations(), system=st.sampled_from(["", "Be brief.", "<|im_end|>"]))
def test_prompt_is_a_prefix_of_the_training_ids(
    tokenizer: Tokenizer, messages: list[Turn], system: str
) -> None:
    settings = ChatSettings(system=system)
    chat = tokenize_chat(messages, tokenizer, settings)
    prompt = tokenize_prompt(messages[:-1], tokenizer, settings)
    size = len(prompt.input_ids)
    assert chat.input_ids[:size] == prompt.input_ids
    assert chat.supervised[:size] == prompt.supervised
    assert chat.image_positions == prompt.image_positions
    assert tokenizer.decode(prompt.input_ids, False).endswith("<|im_start|>assistant\n")
    # What follows is the answer, supervised but for the newline behind it.
    answer = "".join(part["text"] for part in messages[-1]["content"])
    assert tokenizer.decode(chat.input_ids[size:], False) == answer + "<|im_end|>\n"
    newline = len(tokenizer.encode("\n"))
    assert all(chat.supervised[size:-newline]) and not any(chat.supervised[-newline:])


@given(messages=conversations())
def test_supervised_text_is_that_of_the_assistant(
    tokenizer: Tokenizer, messages: list[Turn]
) -> None:
    chat = tokenize_chat(messages, tokenizer, ChatSettings())
    expected = [
        "".join(part["text"] for part in turn["content"]) + "<|im_end|>"
        for turn in messages
        if turn["role"] == "assistant"
    ]
    assert supervised_text(chat, tokenizer) == "".join(expected)


def test_neighbouring_text_parts_are_one_text(tokenizer: Tokenizer) -> None:
    split = turn("user", text("What is sh"), text("own in the pict"), text("ure?"))
    whole = turn("user", text("What is shown in the picture?"))
    settings = ChatSettings()
    assert (
        tokenize_chat([split, ANSWER], tokenizer, settings).input_ids
        == tokenize_chat([whole, ANSWER], tokenizer, settings).input_ids
    )


def test_expand_images_wants_one_count_per_image(tokenizer: Tokenizer) -> None:
    chat = tokenize_chat([ASK, ANSWER], tokenizer, ChatSettings())
    for counts in ([], [1, 2], [-1]):
        with pytest.raises(InputError, match="1 images in the sample"):
            expand_images(chat, counts, 7)


def test_template_fingerprint_depends_on_the_settings() -> None:
    assert template_fingerprint(ChatSettings()) == template_fingerprint(ChatSettings())
    assert template_fingerprint(ChatSettings()) != template_fingerprint(ChatSettings(system=""))


def test_unknown_settings_are_refused() -> None:
    for settings in ({"sytem": "x"}, {"template": "llama"}):
        with pytest.raises(ValidationError):
            ChatSettings(**settings)  # type: ignore[arg-type]


BAD_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages is of type NoneType"),
    ([], "messages is an empty list"),
    (["hello"], "turn 0 is not an object"),
    ([{"role": "user", "content": "hello"}], 'a list "content"'),
    ([{"content": []}], "turn 0 has the role of type NoneType"),
    ([turn("gpt", text("a"))], "the role 'gpt', not system, user or assistant"),
    ([ANSWER], "turn 0 has the role 'assistant' where system or user is expected"),
    ([ASK, ANSWER, turn("system")], "turn 2 has the role 'system' where user is expected"),
    ([ASK, ASK, ANSWER], "turn 1 has the role 'user' where assistant is expected"),
    ([ASK, ANSWER, ANSWER], "turn 2 has the role 'assistant' where user is expected"),
    ([turn("system"), turn("system")], "turn 1 has the role 'system' where user is expected"),
    ([turn("system")], "nothing after it"),
    ([ASK], "no answer to learn from"),
    ([ASK, turn("assistant", image())], "turn 1 is the assistant's and has an image"),
    ([turn("user", {"type": "video", "video": "a"}), ANSWER], "its type is 'video'"),
    ([turn("user", {"type": "text"}), ANSWER], "its type is 'text'"),
    ([turn("user", {"type": "image", "image": 3}), ANSWER], "its type is 'image'"),
    ([turn("user", "hello"), ANSWER], "its type is of type NoneType"),
    ([turn("user", text("\ud800")), ANSWER], "lone surrogate"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_bad_messages(tokenizer: Tokenizer, messages: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenize_chat(messages, tokenizer, ChatSettings())
    assert reason in str(caught.value)


def test_a_prompt_has_no_answer(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="leave out the answer"):
        tokenize_prompt([ASK, ANSWER], tokenizer, ChatSettings())


def test_parse_sample() -> None:
    sample = {"messages": [ASK, ANSWER], "metadata": {"question": "all"}}
    assert parse_sample(json.dumps(sample).encode()) == sample
    for data, reason in [
        (b"", "does not parse"),
        (b'{"messages": [', "does not parse"),
        (b'{"messages": ' + b"1" * 5000 + b"}", "does not parse"),
        (b"\xff\xfe", "not UTF-8 (invalid start byte at byte 0)"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[]", "not an object"),
        (b'{"caption": "a"}', 'not an object with the key "messages"'),
        (b'{"messages": []}', "an empty list"),
        (json.dumps({**sample, "metadata": []}).encode(), '"metadata" is an empty list'),
    ]:
        with pytest.raises(InputError) as caught:
            parse_sample(data)
        assert reason in str(caught.value)


def test_messages_about_nested_rubbish_do_not_recurse() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="its type is of type NoneType"):
        tokenize_chat([turn("user", deep), ANSWER], None, ChatSettings())  # type: ignore[arg-type]
