"""What a run is estimated to need, against real steps, and what is said where it does not fit."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import SiglipVisionConfig, SiglipVisionModel

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from tests.ranks import RankPool
from tests.training import scenarios, test_flops
from tests.training.estimate_scenarios import estimated, measured
from tests.training.record_estimate import CASES, SMALL_BUCKET
from training.estimate.__main__ import main
from training.estimate.fitting import RESERVED, largest_that_fits
from training.estimate.ledger import Ledger
from training.estimate.packs import PackShape, covering, extremes, fake_inputs, largest_pack
from training.estimate.rank_memory import MemoryModel
from training.estimate.report import Estimate, plot, text, to_json
from training.estimate.speed import Cluster, gpu_named, step_time
from training.estimate.workload import Workload
from training.flops import PartFlops
from training.model import PackedTokenFlex
from training.model.build import build_model
from training.model.loss import find_supervision

GIB = 2**30
PACK = PackShape((200, 100), (4, 2, 2), 90)
SMALL = [SMALL_BUCKET, "model.vision.config.num_hidden_layers=1"]
SMALL += ["model.llm.config.num_hidden_layers=2"]
FROZEN = [
    "data.pack.packs_per_step=1",
    "train.modules.vision_model.train=false",
    "train.gradient_checkpointing=true",
]
OFFLOAD = ["deepspeed.offload_optimizer=cpu", "train.loss_chunk_tokens=256"]
MUON = ["train.optimizer.name=muon", "data.pack.packs_per_step=2"]
OFFLOAD += ["train.gradient_checkpointing=[vision_model]"]


@pytest.mark.multiprocess
def test_the_peak_is_that_of_a_measured_step(one_rank: RankPool, two_ranks: RankPool) -> None:
    cases = ((one_rank, 1, FROZEN), (two_ranks, 2, OFFLOAD), (two_ranks, 2, MUON))
    for pool, ranks, settings in cases:
        found = pool.run(measured, [*SMALL, *settings], PACK)[0]
        expected = estimated(ranks, [*SMALL, *settings], PACK)
        assert expected.peak == pytest.approx(found.peak, rel=0.1)
        for kind in ("masters", "optimizer", "gradients", "bucket", "vision", "decoder"):
            assert expected.at_peak[kind] == pytest.approx(found.at_peak[kind], rel=0.1), kind
        assert (expected.gathered, expected.reduced) == (found.gathered, found.reduced)


def test_the_record_is_within_a_tenth() -> None:
    record = json.loads(Path("training/results/estimate.json").read_text())
    assert record["cases"].keys() == CASES.keys()
    for row in record["cases"].values():
        assert row["estimated_peak"] == pytest.approx(row["measured_peak"], rel=0.1)


def test_the_ledger_knows_what_lives_and_what_the_most_was() -> None:
    with Ledger() as ledger:
        with ledger.during("a"):
            kept = torch.empty(1000)
        with ledger.during("b"):
            for _ in range(2):
                view = torch.empty(500).view(50, 10)[:5]
                del view
            ledger.label(kept, "c")
        assert (ledger.total, ledger.peak) == (4000, 6000)
        assert ledger.at_peak == Counter(a=4000, b=2000)
        assert +ledger.totals == Counter(c=4000)
        del kept
        assert ledger.total == 0


def test_the_ledger_counts_what_the_allocator_gives() -> None:
    """Both peaks of an engine are the ledger's: here it is held against another counter."""
    with Ledger() as ledger:
        model = PackedTokenFlex._from_config(test_flops.config_of(), dtype=torch.float32).train()

        def step() -> None:
            model(**test_flops.pack(test_flops.MANY)).loss.backward()
            model.zero_grad()

        step()
        ledger.forget()
        before = ledger.total
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    allocated = np.cumsum([size for _, size in sorted(changes)])
    assert ledger.peak - before == pytest.approx(allocated.max(), rel=0.02)


def model_of_memory(**changes: Any) -> MemoryModel:
    """On two ranks: 40 GiB sharded, 1 GiB not, 20 GiB for a pack."""
    sharded = {"parameters": 5, "masters": 10, "gradients": 5, "optimizer": 20}
    fields: dict[str, Any] = {
        "ranks": 2,
        "resident": Counter({k: v * GIB for k, v in sharded.items()}) + Counter(bucket=GIB),
        "within": Counter(decoder=15 * GIB, vision=5 * GIB),
        "update": 2 * GIB,
        "gathered": 1000,
        "reduced": 500,
        "offload_optimizer": False,
        "offload_params": False,
    }
    return MemoryModel(**{**fields, **changes})


def test_shards_shrink_with_the_ranks_and_offloading_moves_them() -> None:
    memory = model_of_memory()
    assert memory.on(2).peak == 61 * GIB
    assert memory.on(8).peak == (40 // 4 + 1 + 20) * GIB
    offloaded = model_of_memory(offload_optimizer=True).on(2)
    assert offloaded.peak == (5 + 1 + 20) * GIB
    assert offloaded.host == Counter(masters=10 * GIB, gradients=5 * GIB, optimizer=20 * GIB)
    large_update = model_of_memory(update=30 * GIB)
    assert large_update.on(2).peak == (41 + 30) * GIB
    assert large_update.on(8).peak == (11 + 20) * GIB


def estimate_of(
    memory: MemoryModel, gpu: str = "a100-40gb", gpus: int = 8, **train: Any
) -> Estimate:
    config = scenarios.load_config(
        "training/configs/stage2_pretrain.yaml", [f"train.{k}={v}" for k, v in train.items()]
    )
    work = Workload([PackShape((8192,), (8,) * 10, 100)], 8000.0, PartFlops(3e14, 1e14), "test")
    return Estimate(config, Cluster(gpu_named("a100-40gb"), gpus, 1), memory, work, 8e9)


def test_a_moving_average_lies_on_the_host() -> None:
    memory, plain = model_of_memory(average=True), model_of_memory()
    assert memory.on(4).device == plain.on(4).device
    assert memory.on(4).host == plain.on(4).host + Counter(average=5 * GIB)
    assert memory.on(4, offload_optimizer=True).host["average"] == 5 * GIB


def test_a_config_that_fits_nowhere_is_told_what_would_help() -> None:
    estimate_of(model_of_memory()).check_fits()  # 31 GiB
    tight = estimate_of(model_of_memory(other=1 * GIB), gpus=2, gradient_checkpointing="false")
    with pytest.raises(InputError) as error:
        tight.check_fits()
    for part in ("61.0 GiB", "a100-40gb", "deepspeed.offload_optimizer=cpu", "8 GPUs"):
        assert part in str(error.value)
    assert "gradient_checkpointing" not in str(error.value)  # 42 GiB: not by itself
    wide = model_of_memory(within=Counter(decoder=60 * GIB), other=2 * GIB)
    with pytest.raises(InputError, match=r"gradient_checkpointing=true; data\.pack\.max_tokens=20"):
        estimate_of(wide, gpus=8, gradient_checkpointing="false").check_fits()
    with pytest.raises(InputError, match="larger GPU"):
        estimate_of(model_of_memory(resident=Counter(bucket=400 * GIB))).check_fits()


def test_the_other_way_of_checkpointing_is_all_layers_until_all_have_it() -> None:
    memory, ways = model_of_memory(other=GIB), {}
    for chosen in ("true", "false", "[language_model]"):
        report = text(estimate_of(memory, gradient_checkpointing=chosen))
        ways[chosen] = next(line for line in report.splitlines() if "checkpointing" in line)
    assert "20.00 GiB with activation checkpointing, 1.00 without" in ways["true"]
    assert "20.00 GiB without activation checkpointing, 1.00 with" in ways["false"]
    assert "but of language_model, 1.00 with it for all layers" in ways["[language_model]"]
    wide = model_of_memory(within=Counter(decoder=60 * GIB), other=2 * GIB)
    with pytest.raises(InputError, match="gradient_checkpointing=true"):
        estimate_of(wide, gradient_checkpointing="[language_model]").check_fits()


def test_the_largest_pack_fills_the_room() -> None:
    memory = model_of_memory(by_token=1e6, by_tile=1e8)
    cluster = Cluster(gpu_named("h100"), 8, 1)
    free = 80e9 - RESERVED - memory.on(8).peak
    found = largest_that_fits(memory, cluster, 8192, 10)
    assert found is not None
    assert found.max_tokens == int(8192 + free / 1e6) and found.max_tiles == int(10 + free / 1e8)
    assert largest_that_fits(model_of_memory(), cluster, 8192, 10) is None


def test_the_time_of_a_step_is_what_is_calculated() -> None:
    memory = model_of_memory(gathered=30 * 10**9, reduced=15 * 10**9)
    work = Workload([], 8000.0, PartFlops(3e14, 1e14), "test")
    found = step_time(Cluster(gpu_named("h100"), 8, 4), 32, memory, work, 128, 8e9)
    sent = np.float64(128 / 32) * 45e9 * 31 / 32
    assert found.link_bytes == pytest.approx(sent) and found.network_bytes == sent / 8
    assert found.compute_s == pytest.approx(4 * 4e14 / (0.5 * 989e12))
    assert found.binds == "compute" and found.step_s == found.compute_s + found.optimizer_s
    assert found.mfu == pytest.approx(4 * 3e14 / (989e12 * found.step_s))
    assert found.tokens_per_s == pytest.approx(128 * 8000 / found.step_s)
    slow = step_time(Cluster(gpu_named("h100"), 8, 4, 0.5, 1.0), 32, memory, work, 128, 8e9)
    alone = step_time(Cluster(gpu_named("h100"), 6, 1), 1, memory, work, 1, 8e9)
    assert alone.link_bytes == alone.network_bytes == 0
    assert slow.binds == "network" and slow.mfu < found.mfu


def test_the_report_goes_from_one_gpu_to_1024(tmp_path: Path) -> None:
    estimate = estimate_of(model_of_memory(other=GIB, by_token=1e6, by_tile=1e8))
    lines = text(estimate).splitlines()
    for ranks, mark in ((1, " "), (8, " "), (128, " "), (256, "*"), (1024, "*")):
        assert any(line.split()[:1] == [f"{ranks}{mark}".strip()] for line in lines), ranks
    assert to_json(estimate)["by_ranks"]["8"]["peak"] == 31 * GIB
    plot(estimate, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_packs_are_the_largest_of_the_plan_or_of_the_settings() -> None:
    packs = [PackShape((10, 5), (2,), 3), PackShape((12,), (), 3), PackShape((8,), (2, 2), 1)]
    assert extremes(packs) == [packs[0], packs[2]]
    assert extremes(packs[:2]) == [packs[0]]
    assert covering(packs) == PackShape((10, 5), (2, 2), 3)
    config = scenarios.load_config("training/configs/ristretto_3b.yaml", [])
    fullest = largest_pack(config, 8192, None)
    assert (fullest.tokens, fullest.tiles, set(fullest.sides)) == (8192, 64, {8})
    assert largest_pack(config, 8192, 20).tiles == 20
    inputs = fake_inputs(PACK, 32, 7, 1)
    assert int((inputs["input_ids"] == 7).sum()) == 16 + 4 + 4
    assert len(find_supervision(inputs["labels"], None, torch.device("cpu")).positions) == 90


def test_an_unknown_gpu_and_a_number_that_does_not_divide_are_named() -> None:
    preset = "training/configs/stage2_pretrain.yaml"
    with pytest.raises(InputError, match=r"'h1000'.*h100.*mi300x"):
        main([preset, "--gpu", "h1000"])
    with pytest.raises(InputError, match=r"packs_per_step is 128, which 24 GPUs"):
        main([preset, "--gpus", "8", "--nodes", "3"])


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training.train", scenarios.DIGITS, *arguments, "--dry-run"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.multiprocess
def test_a_dry_run_checks_and_estimates(digits_corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = dry_run(*scenarios.tiny_overrides(digits_corpus), f"output_dir={out}")
    assert found.returncode == 0, found.stderr
    for name in ("tokenizer", "data", "held-out data", "weights", "estimate", "free space"):
        assert f"{name}: in order" in found.stdout
    assert "GPU GiB" in found.stdout and not out.exists()


def test_a_dry_run_names_all_that_is_wrong(digits_corpus: Path, tmp_path: Path) -> None:
    wrong = [f"data.tokenizer={tmp_path}/no.model", f"checkpoint.init_from={tmp_path}/stage"]
    found = dry_run(*scenarios.tiny_overrides(digits_corpus), f"output_dir={tmp_path}", *wrong)
    assert found.returncode == 2
    assert f"{tmp_path}/no.model" in found.stderr and f"{tmp_path}/stage" in found.stderr
    assert "Traceback" not in found.stderr


def test_weights_are_compared_by_name_without_being_read(
    digits_corpus: Path, tmp_path: Path
) -> None:
    config = scenarios.tiny_config(digits_corpus, f"model.vision.pretrained={tmp_path}")
    tower = SiglipVisionConfig(**config.model.vision.config, vision_use_head=False)
    SiglipVisionModel(tower).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(digits_corpus / "tokenizer.model")
    model = build_model(config, tokenizer, on_meta=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "fc1.weight" in name)
    save_file({k: v for k, v in weights.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.vision\.pretrained.*lacks .*fc1\.weight"):
        build_model(config, tokenizer, on_meta=True)


@pytest.mark.multiprocess
def test_the_7b_preset_with_adapters_fits_one_gpu_of_80_gb(tmp_path: Path) -> None:
    """As `python -m training.estimate` says: exit code 2 where it does not fit."""
    preset, out = "training/configs/stage3_lora.yaml", tmp_path / "estimate.json"
    command = [sys.executable, "-m", "training.estimate", preset, "--gpus", "1", "--gpu", "h100"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--quick", "--json", str(out)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["memory"]["device"]
    # 8 G frozen weights in bf16, and 180 M that train: adapters of rank 64 and the projector.
    assert found["parameters"] == pytest.approx(16.4e9, rel=0.05)
    assert found["optimizer"] == pytest.approx(8 * 182e6, rel=0.05)
