"""Uses an exported folder as people do, with torch, transformers and Pillow alone.

python use_exported.py FOLDER IMAGE OUT: writes {name: tensor, ids or text} with torch.save. Run
under several releases of transformers, it must write the same.
"""

import sys
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    StaticCache,
    pipeline,
)

folder, image, out = sys.argv[1:]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def chat(words: str, images: int = 1) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": Image.open(image)}] * images
    return [{"role": "user", "content": [*content, {"type": "text", "text": words}]}]


def load() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def answers(inputs: Any, **options: Any) -> list[list[int]]:
    ids = model.generate(**inputs, **{**GREEDY, **options})
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "tokenflex"
model, processor = load()
CHATS = [chat("What is this?"), chat(" Which of the two is it, then?", 2), chat("hello", 0)]
chat_options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
batch = processor.apply_chat_template(CHATS, num_image_tokens=9, **chat_options)
single = [processor.apply_chat_template(c, num_image_tokens=9, **chat_options) for c in CHATS]
text = processor(text="hello world")
found: dict[str, Any] = {"batch": dict(batch)}
with torch.no_grad():
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = batch["attention_mask"].bool()
    found["logits"] = model(**batch, position_ids=positions).logits[real]
    found["text logits"] = model(**text).logits
    found["loss"] = model(**single[0], labels=single[0]["input_ids"]).loss
found["alone"] = [answers(inputs)[0] for inputs in single]
found["batch of chats"] = answers(batch)
found["without a cache"] = answers(batch, use_cache=False)
found["static cache"] = answers(batch, cache_implementation="static")
found["in chunks"] = answers(batch, prefill_chunk_size=7)
found["one likely"] = answers(batch, do_sample=True, top_k=1)
torch.manual_seed(0)
found["sampled"] = answers(batch, do_sample=True, top_k=0, num_return_sequences=2)
found["beams"] = answers(batch, num_beams=3, num_return_sequences=2, early_stopping=True)
found["beams without a cache"] = answers(batch, num_beams=3, use_cache=False)
found["text"] = answers(text)
found["looked up"] = answers(single[0], prompt_lookup_num_tokens=3)
found["assisted"] = answers(single[1], assistant_model=load()[0])
config = model.config.text_config
for name, cache in (
    ("kept dynamic", DynamicCache(config=config)),
    ("kept static", StaticCache(config=config, max_cache_len=400)),
):
    said = model.generate(**single[0], **GREEDY, past_key_values=cache)
    more = torch.cat([said, text["input_ids"]], 1)
    found[name] = model.generate(
        input_ids=more, attention_mask=torch.ones_like(more), past_key_values=cache, **GREEDY
    ).tolist()
answer = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answer.processor.num_image_tokens = 9  # the oldest release hands over no options for chats
options = {"return_full_text": False, "generate_kwargs": GREEDY}
ones = answer(text=CHATS[:2], **options)
found["pipeline"] = [row[0]["generated_text"] for row in ones]
found["pipeline batched"] = [
    row[0]["generated_text"] for row in answer(text=CHATS[:2], batch_size=8, **options)
]
model.save_pretrained(folder + " saved.again")
processor.save_pretrained(folder + " saved.again")
folder += " saved.again"
model, processor = load()
found["saved again"] = answers(batch)
found["release"] = transformers.__version__
torch.save(found, out)
