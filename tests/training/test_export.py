"""An exported folder holds the trained weights, loads anywhere, and answers as in training."""

import ctypes
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training import export_scenarios
from tests.training.clean_environment import make_environment, run_there
from tests.training.tiny import earlier_name
from training.export import export
from training.export.__main__ import main
from training.export.safetensors_files import parse_size, write_weights
from training.export.weights import (
    Weight,
    check_weights,
    checkpoint_weights,
    folder_weights,
)
from training.model.known_counts import known_counts

FROZEN = ["train.modules.vision_model.train=false"]
STEPS = 40
EMA = "train.ema={decay: 0.5, every: 10}"


def load(folder: Path) -> tuple[Any, Any]:
    """(model, processor) by the classes that a user gets, the code being this repository's."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture(scope="module")
def trained(
    two_ranks: RankPool, digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray], dict[tuple[int, int], export_scenarios.Outcome]]:
    """A run of two ranks, its parameters, and what came out for each held-out sample."""
    out = tmp_path_factory.mktemp("run") / "digits"
    results = two_ranks.run(
        export_scenarios.train_and_evaluate, digits_corpus, out, STEPS, ["train.steps=40", EMA]
    )
    return out, results[0][0], results[0][1] | results[1][1]


@pytest.fixture(scope="module")
def exported(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    main([str(trained[0]), str(folder), "--max-shard-size", "200KB"])
    return folder


@pytest.mark.multiprocess
def test_every_parameter_is_the_trained_one(trained: Any, exported: Path) -> None:
    model, _ = load(exported)
    found = {earlier_name(model, name): value for name, value in model.named_parameters()}
    assert found.keys() == trained[1].keys()
    for name, value in trained[1].items():
        assert np.array_equal(found[name].detach().numpy(), value), name


@pytest.mark.multiprocess
def test_the_moving_average_is_exported_where_it_is_asked_for(
    trained: Any, exported: Path, tmp_path: Path
) -> None:
    main([str(trained[0]), str(tmp_path / "average"), "--ema"])
    averaged, plain = load(tmp_path / "average")[0], load(exported)[0]
    weights = dict(plain.named_parameters())
    for name, value in averaged.named_parameters():
        way = (weights[name] - value).norm()
        assert 0 < way < value.norm() + 1, name
    card = (tmp_path / "average/README.md").read_text()
    assert f"Step {STEPS} was not evaluated" in card


@pytest.mark.multiprocess
def test_files_are_of_the_size_asked_for(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    total = 0
    for file in files:
        with safe_open(file, "pt") as stored:
            sizes = [stored.get_tensor(name).nbytes for name in stored.keys()]  # noqa: SIM118
        assert sum(sizes) <= 200_000 or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total


@pytest.mark.multiprocess
def test_the_hub_classes_answer_each_held_out_sample_as_the_trainer_did(
    trained: Any, exported: Path, digits_corpus: Path
) -> None:
    run, _, outcomes = trained
    counts = sorted({count for _, count in outcomes})
    samples = {sample for sample, _ in outcomes}
    assert len(outcomes) == len(samples) * len(counts) and len(samples) == 24
    assert export_scenarios.generated(exported, digits_corpus, outcomes) == outcomes
    exact: Counter[int] = Counter()
    for (_, count), (right, _) in outcomes.items():
        exact[count] += right
    rows = json.loads((run / "evaluation.json").read_text())["results"]
    for row in (row for row in rows if row["detail"] == "all"):
        assert exact[row["num_image_tokens"]] / len(samples) == row["accuracy"]
    # Otherwise nothing was compared: some first tokens are right by now, and some are not.
    leads = [leading for _, leading in outcomes.values()]
    assert min(leads) < max(leads)


FRESH = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

for name in ("sentencepiece", "deepspeed", "data_pipeline", "training", "kernels", "torchvision"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is there")
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
image = Image.new("RGB", (40, 32), "white")
text = {"type": "text", "text": "What does the image show?"}
messages = [{"role": "user", "content": [{"type": "image", "image": image}, text]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, num_image_tokens=16
)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=6)
print(output[0].tolist())
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
print(repr(pipe(messages, max_new_tokens=6)[0]["generated_text"][-1]["content"]))
"""


@pytest.mark.multiprocess
def test_it_loads_with_torch_transformers_and_pillow_alone(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    there = run_there(make_environment(tmp_path / "site"), FRESH, tmp_path, str(exported))
    ids, answer = there.splitlines()
    model, processor = load(exported)
    content = [
        {"type": "image", "image": Image.new("RGB", (40, 32), "white")},
        {"type": "text", "text": "What does the image show?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        num_image_tokens=16,
    )
    assert ids == str(model.generate(**inputs, max_new_tokens=6)[0].tolist())
    assert isinstance(answer, str) and answer


@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_and_tied_weights_are_whole(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path, precision: str
) -> None:
    overrides = [
        *FROZEN,
        "model.llm.config.tie_word_embeddings=true",
        "model.llm.config.vocab_size=1001",  # rows that two ranks cannot share out evenly
        f"train.precision={precision}",
        "data.eval_shards=[]",
    ]
    results = two_ranks.run(
        export_scenarios.train_and_evaluate, digits_corpus, tmp_path / "run", 1, overrides
    )
    expected = results[0][0]
    export(tmp_path / "run", tmp_path / "out")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model, _ = load(tmp_path / "out")
    weights = folder_weights(tmp_path / "out")
    stored = {earlier_name(model, weight.name): weight.read() for weight in weights}
    assert stored.keys() == expected.keys() and "language_model.lm_head.weight" not in stored
    for name, value in expected.items():
        assert stored[name].dtype == dtype
        assert torch.equal(stored[name], torch.from_numpy(value).to(dtype)), name
    assert model.dtype == dtype
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.multiprocess
def test_the_card_says_how_it_was_made(trained: Any, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    run, _, _ = trained
    rows = json.loads((run / "evaluation.json").read_text())["results"]
    for row in rows:
        assert f"{row['accuracy']:.1%}" in text
    for expected in (
        "4 (34%), 16 (33%), 64 (33%)",
        f"{STEPS} steps of {STEPS}",
        "in fp32",
        "num_image_tokens=64",
        "# license: to be given",
        "## Limits",
        "Nothing is known of a count that was neither trained nor evaluated",
    ):
        assert expected in text, expected
    known = known_counts(AutoConfig.from_pretrained(exported))
    for row in rows:
        if row["detail"] == "all":
            line = f"- {row['num_image_tokens']} tokens per tile: trained; {row['accuracy']:.1%} of"
            assert line in text
            count = known.evaluated[row["num_image_tokens"]]
            assert (count.accuracy, count.answers) == (row["accuracy"], row["answers"])
    assert known.trained == [4, 16, 64] and known.evaluated.keys() == {4, 16, 64}
    assert "work, and" not in text


@pytest.mark.multiprocess
def test_an_older_evaluation_is_not_taken_for_this_steps(trained: Any, tmp_path: Path) -> None:
    run = copy_run(trained[0], tmp_path)
    found = json.loads((run / "evaluation.json").read_text())
    for name in ("evaluation.json", "evaluations.jsonl"):
        (run / name).unlink()  # hard links
    (run / "evaluation.json").write_text(json.dumps({**found, "step": 1}))
    (run / "evaluations.jsonl").write_text(json.dumps({**found, "step": STEPS}) + "\n")
    accuracy = f"{found['results'][0]['accuracy']:.1%}"
    export(run, tmp_path / "kept")  # as of the best checkpoint, which is not the newest
    assert accuracy in (tmp_path / "kept/README.md").read_text()
    (run / "evaluations.jsonl").unlink()
    export(run, tmp_path / "out")
    assert f"Step {STEPS} was not evaluated" in (tmp_path / "out/README.md").read_text()


def copy_run(run: Path, folder: Path) -> Path:
    """The run as hard links."""
    return Path(shutil.copytree(run, folder / "run", copy_function=os.link))


@pytest.mark.multiprocess
def test_a_damaged_checkpoint_is_named_and_leaves_nothing(trained: Any, tmp_path: Path) -> None:
    run = copy_run(trained[0], tmp_path)
    (shard,) = run.glob("checkpoints/step-*/*rank_1*optim*.pt")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(InputError, match=f"{shard.name} .*damaged"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.multiprocess
def test_settings_of_another_run_are_refused(trained: Any, tmp_path: Path) -> None:
    run = copy_run(trained[0], tmp_path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match="--config"):
        export(run, tmp_path / "out")
    (tmp_path / "other.yaml").write_text(text.replace("pool: adaptive", "pool: resize"))
    with pytest.raises(InputError, match=r"model in .*other\.yaml"):
        export(run, tmp_path / "out", config=tmp_path / "other.yaml")


@pytest.mark.multiprocess
def test_a_folder_in_use_is_refused(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export(trained[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished checkpoint"):
        export(tmp_path, tmp_path / "out")


def test_weights_that_do_not_fit_are_named() -> None:
    expected = {"a": (2, 3), "b": (4,), "c": (1,)}
    with pytest.raises(InputError) as error:
        check_weights({"a": (3, 2), "b": (4,), "d": (1,)}, expected, "there")
    assert str(error.value) == (
        "the weights of there do not fit its config: it lacks c; it has d, which the model does "
        "not; a is [3, 2] there and [2, 3] by the config"
    )


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 KiB", "7", "200kb")] == [
        5 * 10**9,
        1536,
        7,
        200_000,
    ]
    for wrong in ("", "GB", "-1GB", "0", "5 TB", "nan"):
        with pytest.raises(InputError, match="size"):
            parse_size(wrong)


@pytest.mark.parametrize("kinds", [(torch.float32,), (torch.bfloat16, torch.int64, torch.bool)])
def test_written_files_are_read_back(tmp_path: Path, kinds: tuple[torch.dtype, ...]) -> None:
    tensors = {
        f"{shape}{kind}": (torch.randn(shape) * 9).to(kind)
        for shape in ((), (3,), (0, 2), (5, 7, 3))
        for kind in kinds
    }
    weights = [
        Weight(name, tuple(t.shape), t.dtype, lambda t=t: t)  # type: ignore[misc]
        for name, t in tensors.items()
    ]
    total = write_weights(tmp_path, weights, 100)
    assert total == sum(t.nbytes for t in tensors.values())
    found = {weight.name: weight.read() for weight in folder_weights(tmp_path)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


MIB = 2**20


def anonymous_memory() -> int:
    """Bytes of this process that no file backs: mapped shards are not in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that `work` adds to the anonymous memory at any time."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what earlier tests freed would be used again
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return peak - before


def write_synthetic(
    folder: Path, trained: dict[str, Any], kept: dict[str, Any], ranks: int
) -> None:
    """A checkpoint in the layout of DeepSpeed's ZeRO-3, of these tensors."""

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        part = -(-tensor.numel() // ranks)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, part * ranks - tensor.numel()))
        return [piece.clone() for piece in padded.split(part)]

    for rank in range(ranks):
        flat = torch.cat([parts(tensor)[rank] for tensor in trained.values()])
        groups = list(flat.split([len(flat) // 3, len(flat) - len(flat) // 3]))  # across a tensor
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: tensor.shape for name, tensor in trained.items()}],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in kept.items()},
            "frozen_param_fragments": {n: parts(tensor)[rank] for n, tensor in kept.items()},
        }
        optimizer = {"optimizer_state_dict": {"fp32_flat_groups": [g.clone() for g in groups]}}
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(model, folder / f"{prefix}_model_states.pt")
        torch.save(optimizer, folder / f"{prefix}_optim_states.pt")


def test_memory_holds_a_tensor_and_not_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "out").mkdir()
    trained = {f"t{i}": torch.randn(1023, 1025) for i in range(24)}  # 4 MiB each
    kept = {f"k{i}": torch.randn(2047, 1023).bfloat16() for i in range(12)}
    write_synthetic(tmp_path / "step", trained, kept, ranks=4)
    expected = {**trained, **kept}
    total = sum(tensor.numel() * 2 for tensor in expected.values())

    def work() -> None:
        weights = checkpoint_weights(tmp_path / "step", 4, torch.bfloat16)
        assert write_weights(tmp_path / "out", weights, 10**9) == total

    assert peak_of(work) < total / 2  # one file of them all; a tensor is a thirtieth
    found = {weight.name: weight.read() for weight in folder_weights(tmp_path / "out")}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16()), name
