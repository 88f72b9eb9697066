"""transformers' Trainer, or TRL's SFTTrainer, on the exported model and processor.

    torchrun --nproc-per-node 2 -m training.bench.trainer_arm FOLDER OUT.json [--trl] [--workers 1]

As their users run them at their fastest: batches of like length, DDP, pictures read and processed
by worker processes that persist, no logging and no saving.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from data_pipeline.batch import IGNORE
from data_pipeline.mixture import Mixture
from training import exit_codes
from training.bench.arm_record import ArmRecord, ArmStep
from training.bench.bench_workload import batch_size, open_workload
from training.bench.held_out_rows import HeldOutRows
from training.bench.planned_samples import PlannedSample, plan_of
from training.config import RunConfig


class ProcessorCollator:
    """Samples by their ids to the model's arguments: read, and left to the exported processor."""

    def __init__(self, mixture: Mixture, samples: list[PlannedSample], processor: Any) -> None:
        self._mixture, self._processor = mixture, processor
        self._counts = {row.sample: (row.sides**2).tolist() for row in samples}

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        samples = [item["sample"] for item in items]
        encoded = self._processor.apply_chat_template(
            [self._messages(sample) for sample in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            num_image_tokens=[self._counts[sample] for sample in samples],
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        answers = encoded.pop("assistant_masks").bool()
        labels = encoded["input_ids"].masked_fill(~answers, IGNORE)
        return {**encoded, "labels": labels, "samples": torch.tensor(samples)}

    def _messages(self, sample: int) -> list[dict[str, Any]]:
        content, files = self._mixture.read(sample)
        images = iter([Image.open(BytesIO(data)) for data in files])
        return [
            {
                "role": turn["role"],
                "content": [
                    part if part["type"] == "text" else {"type": "image", "image": next(images)}
                    for part in turn["content"]
                ],
            }
            for turn in content["messages"]
        ]


def recorded(kind: type[Trainer], record: ArmRecord) -> type[Trainer]:
    """A trainer that notes each step's samples and loss, and is otherwise the one given."""

    class Recorded(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(StepEnds(record, lambda: self.noted))

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            samples, mask = inputs.pop("samples").tolist(), inputs["attention_mask"]
            supervised = int((inputs["labels"] != IGNORE).sum())
            loss = super().training_step(model, inputs, *rest, **named)
            own = float(loss) / self.args.world_size
            self.noted = ArmStep(samples, int(mask.sum()), mask.numel(), supervised, own)
            return loss

    return Recorded


class StepEnds(TrainerCallback):
    """Notes when training begins, and a step when its update is done."""

    def __init__(self, record: ArmRecord, step: Callable[[], ArmStep]) -> None:
        self._record, self._step = record, step

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of the first step was done."""
        self._record.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The weights are updated."""
        self._record.end_step(self._step())


def arguments(config: RunConfig, folder: Path, out: Path, workers: int) -> dict[str, Any]:
    """Settings of both trainers: the optimizer of the workload, and what makes them fast."""
    train = config.train
    return {
        "output_dir": str(out.with_suffix(".run")),
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size(folder),
        "learning_rate": train.modules.language_model.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": train.weight_decay,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "adam_epsilon": train.eps,
        "max_grad_norm": train.clip_grad_norm,
        "bf16": train.precision == "bf16",
        "use_cpu": True,
        "seed": config.seed,
        "train_sampling_strategy": "group_by_length",
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "dataloader_prefetch_factor": 2 if workers else None,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def run(folder: Path, out: Path, trl: bool, workers: int) -> int:
    """Train the workload in `folder`, and write what was noted to `out`."""
    config, record = open_workload(folder), ArmRecord()
    plan, held_out = plan_of(config), HeldOutRows(config, folder)
    kind, settings_of = _trainer(trl)
    settings = settings_of(**arguments(config, folder, out, workers), **(_FOR_TRL if trl else {}))
    start = folder / "start"
    model = AutoModelForImageTextToText.from_pretrained(start, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    processor.tokenizer.padding_side = "right"

    def loss_sum(rows: dict[str, Any]) -> float:
        return float(model(**rows).loss) * int((rows["labels"] != IGNORE).sum())

    record.held_out_before = held_out.score(model, loss_sum)
    trainer = recorded(kind, record)(
        model=model,
        args=settings,
        train_dataset=dataset(plan.samples, trl),
        data_collator=ProcessorCollator(plan.corpus.mixture, plan.samples, processor),
        processing_class=processor,
    )
    trainer.train()
    record.held_out_after = held_out.score(model, loss_sum)
    record.write(out, trainer.is_world_process_zero())
    return exit_codes.OK


def dataset(samples: Sequence[PlannedSample], trl: bool) -> Any:
    """Ids of samples and their lengths, which grouping goes by."""
    if trl:
        from datasets import Dataset

        rows = [{"sample": row.sample, "length": row.length, "images": []} for row in samples]
        return Dataset.from_list(rows)
    # Without that package transformers takes the length of what is called input_ids.
    return [{"sample": row.sample, "input_ids": range(row.length)} for row in samples]


_FOR_TRL: dict[str, Any] = {"gradient_checkpointing": False, "max_length": None}


def _trainer(trl: bool) -> tuple[type[Trainer], type[TrainingArguments]]:
    if not trl:
        return Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer, SFTConfig


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    exit_codes.run_rank(lambda: run(options.folder, options.out, options.trl, options.workers))
