"""Each family of language models passes the checks of the docs' table, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.balance.cost import CostModel, LayerStack, decoder_stack, head_weights
from data_pipeline.errors import InputError
from training.language_model_table import __main__ as command
from training.language_model_table.family_checks import (
    TOLERANCE,
    build_family,
    pack,
    passed,
    refusal,
    run_checks,
)
from training.language_model_table.family_table import family_table
from training.language_model_table.tested_families import FAMILIES, REFUSED, Family
from training.model import attention
from training.model.bucketed_attention import causal_mask
from training.model.segments import PackedSegments

ROOT = Path(__file__).resolve().parents[2]


def named(name: str) -> Family:
    return next(family for family in (*FAMILIES, *REFUSED) if family.name == name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_passes_every_check(family: Family) -> None:
    found = run_checks(family)
    assert found.keys() == {"logits", "packed", "isolated", "generates"}
    assert found["logits"] < TOLERANCE and found["packed"] < TOLERANCE
    assert found["isolated"] is True and found["generates"] is True and passed(found)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_a_family_that_cannot_work_is_refused_by_name_before_the_first_step(family: Family) -> None:
    with pytest.raises(InputError, match=family.changes["model_type"]):
        build_family(family)
    assert refusal(family) is not None


def test_the_docs_have_the_recorded_table() -> None:
    record = json.loads((ROOT / command.RECORD).read_text())
    assert [row["family"] for row in record["families"]] == [family.name for family in FAMILIES]
    assert [row["family"] for row in record["refused"]] == [family.name for family in REFUSED]
    assert all(row["passed"] for row in record["families"])
    assert [row["because"] for row in record["refused"]] == [refusal(f) for f in REFUSED]
    assert "\n".join(family_table(record)) in (ROOT / "docs/model.md").read_text()


def test_a_family_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window that attention does not see: the checks notice, and so does the command."""
    monkeypatch.setattr(
        attention, "bucketed_attention", without_window(attention.bucketed_attention)
    )
    with pytest.raises(SystemExit):
        command.main(["--families", "mistral", "--out", str(tmp_path / "record.json")])
    (row,) = json.loads((tmp_path / "record.json").read_text())["families"]
    assert row["logits"] > 1e-2 and row["packed"] > 1e-2 and not row["passed"]
    assert "mistral" in capsys.readouterr().err
    with pytest.raises(InputError, match="nonsense"):
        command.make_record(["nonsense"])


def without_window(real: Any) -> Any:
    return lambda q, k, v, scale, buckets, *options, **named: real(q, k, v, scale, buckets)


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("mistral", "sliding_window", "sliding_window of 8"),
        ("gemma2", "softcap", "attn_logit_softcapping of 5.0"),
    ],
)
def test_a_layer_that_keeps_its_window_or_cap_to_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, key: str, message: str
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = build_family(named(name))

    def dropping(*states: Any, **kwargs: Any) -> Any:
        kwargs.pop(key, None)
        return attention.packed_attention(*states, **kwargs)

    known = ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(known, attention.ATTENTION_NAME, dropping)
    with pytest.raises(InputError, match=message):
        model(**pack())


def test_positions_that_follow_the_longest_sample_are_refused_beyond_their_limit() -> None:
    factors = [1.0] * 4
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": factors,
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    family = Family("phi", "", {"model_type": "phi3", **changes})
    with pytest.raises(InputError, match=r"longrope.* 16 tokens .*max_tokens to at most 16"):
        build_family(family)(**pack())


def test_recurrence_beside_attention_is_refused() -> None:
    changes = {"model_type": "llama"}
    model = build_family(Family("llama", "", changes))
    from training.model.language_models import check_modules

    check_modules(model.language_model)
    model.language_model.model.layers[0].conv = torch.nn.Conv1d(1, 1, 1)
    with pytest.raises(InputError, match=r"'llama' has Conv1d as model.layers.0.conv"):
        check_modules(model.language_model)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_a_family_costs_is_counted_from_its_config(family: Family) -> None:
    model: Any = build_family(family)
    decoder, sizes = model.language_model.get_decoder(), model.config.text_config.to_dict()
    stack = decoder_stack(sizes)
    weights = [m.weight for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    active = sum(weight.numel() for weight in weights)
    for module in decoder.modules():  # what a token uses of each layer's experts, and the router
        if type(module).__name__.endswith("Experts"):
            used = sizes["num_experts_per_tok"] / model.config.text_config.num_experts
            active += int(used * sum(p.numel() for p in module.parameters()))
        if type(module).__name__.endswith("Router"):
            active += module.weight.numel()
    assert stack.layers * stack.weights == active
    assert head_weights(sizes) == model.get_output_embeddings().weight.numel()
    segments = count_windows(model)
    assert (stack.windowed, stack.window) == (len(segments), segments[0] if segments else 0)


def count_windows(model: Any) -> list[int]:
    """The windows that layers hand to their attention, one each."""
    found: list[int] = []

    def received(self: PackedSegments, window: int | None, softcap: float | None) -> None:
        found.extend([] if window is None else [window])
        original(self, window, softcap)

    original = PackedSegments.received
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSegments, "received", received)
        model(**pack())
    return found


def test_pairs_before_a_window_cost_nothing() -> None:
    lengths, window = np.array([3.0, 8.0, 9.0, 40.0]), 8
    stack = LayerStack(layers=4, weights=1, attention=1, last=1, width=1, windowed=3, window=window)
    seen = [
        causal_mask(int(length), reach, torch.device("cpu")).sum().item()
        for reach in (None, window, window, window)
        for length in lengths
    ]
    assert stack.causal_pairs(lengths) == pytest.approx(sum(seen) / 4)
    sizes = dict.fromkeys(("llm_parameters", "vision_parameters", "vision_layers"), 0)
    rest = {"llm_layers": 4, "llm_width": 2, "vision_width": 0, "patches_per_tile": 0}
    plain, short = (
        CostModel(**sizes, **rest, llm_windowed_layers=count, llm_window=8) for count in (0, 3)
    )
    saved = (plain.flops([40], [0]) - short.flops([40], [0])).item()
    assert saved == 3 * 6 * 2 * 32**2 and (short.flops([8], [0]) == plain.flops([8], [0])).all()
