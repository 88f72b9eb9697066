"""Two steps of TRL's trainers and of PEFT's adapters on a model folder; prints a JSON of each.

Run by test_trl.py where TRL is, and this repository is not: trl_scenarios.py FOLDER OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255,) * 3}
QUESTION = "What colour?"
FOLDER, OUT = sys.argv[1:]
OPTIONS: dict[str, Any] = {
    "output_dir": OUT,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "trust_remote_code": True,
}
LORA = LoraConfig(
    task_type="CAUSAL_LM",
    r=4,
    target_modules="all-linear",
    modules_to_save=["projector"],
    init_lora_weights=False,
)


def load() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    return model.eval(), AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)


def samples(**columns: Any) -> Dataset:
    """A row for each colour: its picture, and the columns as functions of its name."""
    return Dataset.from_list(
        [
            {"images": [Image.new("RGB", (20, 20), colour)]}
            | {key: make(name) for key, make in columns.items()}
            for name, colour in COLOURS.items()
        ]
    )


def asked(_: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION}]


def answer(name: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": name}]


def trained(trainer: Any, watched: str) -> dict[str, Any]:
    """The losses of two steps, and whether they moved the parameters of a name."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if watched in n}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    return {"losses": losses, "moved": moved, "watched": list(before)}


def rows(ids: torch.Tensor, kept: torch.Tensor) -> list[list[int]]:
    return [row[own].tolist() for row, own in zip(ids, kept, strict=True)]


def sft(**options: Any) -> dict[str, Any]:
    model, processor = load()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**OPTIONS),
        train_dataset=samples(prompt=asked, completion=answer),
        processing_class=processor,
        **options,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"]
    found = {
        "labels": rows(labels, labels != -100),
        "ids": rows(batch["input_ids"], batch["attention_mask"].bool()),
    }
    if not options:
        with torch.no_grad():
            found["own loss"] = model(**batch).loss.item()
    return found | trained(trainer, ".default" if options else "vision_model")


def lora() -> dict[str, Any]:
    found = sft(peft_config=LORA)
    model, processor = load()
    batch = processor(images=[Image.new("RGB", (20, 20))], text=["<image>x"], num_image_tokens=9)
    adapted = get_peft_model(model, LORA).eval()
    adapted.save_pretrained(OUT)
    again = PeftModel.from_pretrained(load()[0], OUT).eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        found["reloaded"] = torch.equal(again(**batch).logits, expected)
        rename_as_before(Path(OUT, "adapter_model.safetensors"))
        before = PeftModel.from_pretrained(load()[0], OUT).eval()
        found["earlier"] = torch.equal(before(**batch).logits, expected)
        found["merged"] = (again.merge_and_unload()(**batch).logits - expected).abs().max().item()
    return found


def rename_as_before(file: Path) -> None:
    """An adapter's names as those of a model folder that had no base model."""
    names = {
        "model.model.language_model.": "model.language_model.model.",
        "model.model.": "model.",
    }
    weights = {}
    for name, value in load_file(file).items():
        start = next(start for start in names if f"base_model.{start}" in name)
        weights[name.replace(start, names[start], 1)] = value
    save_file(weights, file)


def dpo() -> dict[str, Any]:
    model, processor = load()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**OPTIONS),
        train_dataset=samples(prompt=asked, chosen=answer, rejected=lambda _: answer("nothing")),
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    found = {"labels": rows(batch["input_ids"], batch["completion_mask"].bool())}
    return found | trained(trainer, "vision_model")


def grpo() -> dict[str, Any]:
    model, processor = load()
    side = round(processor.num_image_tokens**0.5)

    def add_sides(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None and kwargs.get("tile_sides") is None:
            kwargs["tile_sides"] = [side] * len(kwargs["pixel_values"])
        return args, kwargs

    # TRL hands on the image inputs that it knows, and tile_sides is not one of them.
    model.model.register_forward_pre_hook(add_sides, with_kwargs=True)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=GRPOConfig(**OPTIONS, num_generations=4, max_completion_length=6),
        train_dataset=samples(prompt=asked),
        processing_class=processor,
    )
    return trained(trainer, "vision_model")


def prompt_tuning() -> dict[str, Any]:
    model, processor = load()
    images = [Image.new("RGB", (20, 20), colour) for colour in COLOURS.values()]
    batch = processor(images=images, text=["<image>x"] * 4, num_image_tokens=[1, 4, 9, 16])
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(model, config)
    tuned(**batch, labels=batch["input_ids"]).loss.backward()
    answers = tuned.generate(**batch, max_new_tokens=4)
    return {
        "trained": [name for name, p in tuned.named_parameters() if p.grad is not None],
        "new": answers.shape[1] - batch["input_ids"].shape[1],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {scenario.__name__: scenario() for scenario in (sft, lora, dpo, grpo, prompt_tuning)}
    Path(OUT, "results.json").write_text(json.dumps(results))
