"""What a language model must do to be trained in packs; each check is a number or an error.

The reference is transformers' own eager attention in float64, sample by sample: it knows no packs,
no length buckets, no chunks. P samples in the pack, L tokens.
"""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText

from data_pipeline.errors import InputError
from training.language_model_table.tested_families import Family
from training.model import PackedTokenFlex, TokenFlexConfig, TokenFlexForConditionalGeneration
from training.model.hub.language_model_tokenflex import EARLIER_NAMES, renamed

TOLERANCE = 1e-5
"""Of the errors below: the loss is in float32."""
_IMAGE, _TILE = 3, 16
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": _TILE,
    "patch_size": 4,
}
_SAMPLES: tuple[tuple[int, list[int], int], ...] = (
    (7, [2], 6),
    (3, [], 20),
    (2, [3, 1], 4),
    (11, [2, 2], 9),
)
"""Tokens before the images, the sides of their tiles, tokens behind, half of them supervised."""
_GENERATED = 6


def build_family(family: Family) -> PackedTokenFlex:
    """Its small model; InputError where it is refused."""
    torch.manual_seed(0)
    config = TokenFlexConfig(
        vision_config=dict(_VISION), text_config=family.text_config, image_token_id=_IMAGE
    )
    config._experts_implementation = "eager"  # the others have no float64
    return PackedTokenFlex(config)


def run_checks(family: Family) -> dict[str, float | bool]:
    """All of them, by name: relative errors, or whether it holds."""
    model = build_family(family)
    return {name: check(model) for name, check in CHECKS.items()}


def refusal(family: Family) -> str | None:
    """Why a family is refused, before or in its first forward; None where it is not."""
    try:
        build_family(family)(**pack())
    except InputError as error:
        return str(error)
    return None


def pack() -> dict[str, Any]:
    """The forward's arguments for one pack."""
    generator = torch.Generator().manual_seed(1)
    ids, labels, lengths = [], [], []
    sides: list[int] = []
    for before, tiles, behind in _SAMPLES:
        text = torch.randint(4, 64, (before + behind,), generator=generator)
        images = torch.full((sum(n * n for n in tiles),), _IMAGE)
        ids.append(torch.cat([text[:before], images, text[before:]]))
        lengths.append(len(ids[-1]))
        position = torch.arange(lengths[-1])
        labels.append(torch.where(position >= lengths[-1] - behind // 2, ids[-1], -100))
        sides += tiles
    bounds = torch.tensor(lengths).cumsum(0)
    shape = (len(sides), 3, _TILE, _TILE)
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "labels": torch.cat(labels)[None],
        "cu_seqlens": F.pad(bounds, (1, 0)).int(),
        "max_seqlen": max(lengths),
        "pixel_values": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "tile_sides": sides,
    }


def separate(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a pack, each as the arguments of a model that knows no packs."""
    parts, tile = [], 0
    bounds = batch["cu_seqlens"].tolist()
    for i, (_, tiles, _) in enumerate(_SAMPLES):
        part = {k: batch[k][:, bounds[i] : bounds[i + 1]] for k in ("input_ids", "labels")}
        if tiles:
            part["pixel_values"] = batch["pixel_values"][tile : tile + len(tiles)]
            part["tile_sides"] = tiles
        tile += len(tiles)
        parts.append(part)
    return parts


def logits_error(model: PackedTokenFlex) -> float:
    """The logits of a pack of text against transformers' own language model, sample by sample."""
    exact = _copy(model).double()
    ids = torch.randint(4, 64, (1, 50), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(30), torch.arange(20)])[None]
    with torch.no_grad():
        found = exact(input_ids=ids, position_ids=positions).logits
        exact.set_attn_implementation("eager")
        parts = [exact.language_model(input_ids=part).logits for part in ids.split([30, 20], 1)]
    return _error(found, torch.cat(parts, 1))


def packed_error(model: PackedTokenFlex) -> float:
    """Loss and gradients of a pack against those of the exported model, sample by sample."""
    exact, batch = _copy(model).double(), pack()
    exact(**batch, loss_chunks=2).loss.backward()
    reference = exported(model).double()
    reference.set_attn_implementation("eager")
    total = torch.zeros((), dtype=torch.float64)
    for part in separate(batch):
        labels = part.pop("labels")
        logits = reference(**part).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[0, 1:], reduction="sum")
    total.backward()
    wanted = dict(reference.named_parameters())
    pairs = [
        (p.grad, wanted[renamed(name, EARLIER_NAMES)].grad) for name, p in exact.named_parameters()
    ]
    largest = max(float(grad.abs().max()) for _, grad in pairs if grad is not None)
    errors = [float((found - grad).abs().max()) / largest for found, grad in pairs]
    return max([*errors, _error(exact(**batch).loss, total)])


def isolated(model: PackedTokenFlex) -> bool:
    """Whether another sample in the pack leaves a sample's logits bitwise the same."""
    batch = {name: value for name, value in pack().items() if name != "labels"}
    start, stop = batch["cu_seqlens"][1:3].tolist()
    with torch.no_grad():
        before = model(**batch).logits
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][0, start:stop] = batch["input_ids"][0, start:stop] % 7 + 5
        after = model(**batch).logits
    others = torch.ones(before.shape[1], dtype=torch.bool)
    others[start:stop] = False
    moved = not torch.equal(before[:, start:stop], after[:, start:stop])
    return moved and torch.equal(before[:, others], after[:, others])


def generates(model: PackedTokenFlex) -> bool:
    """Whether a saved folder answers with what the trained model finds most likely."""
    part = separate(pack())[-1]
    prompt = {name: value for name, value in part.items() if name != "labels"}
    with tempfile.TemporaryDirectory() as folder:
        exported(model).save_pretrained(folder)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder)
    loaded.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = loaded.generate(**prompt, max_new_tokens=_GENERATED, do_sample=False)
        whole = {**prompt, "input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
        logits = model(**whole, cu_seqlens=torch.tensor([0, ids.shape[1]])).logits[0]
    logits[:, _IMAGE] = -torch.inf
    return torch.equal(logits[-_GENERATED - 1 : -1].argmax(-1), ids[0, -_GENERATED:])


CHECKS: dict[str, Callable[[PackedTokenFlex], float | bool]] = {
    "logits": logits_error,
    "packed": packed_error,
    "isolated": isolated,
    "generates": generates,
}


def passed(found: dict[str, float | bool]) -> bool:
    """Whether all checks hold."""
    return all(value if isinstance(value, bool) else value < TOLERANCE for value in found.values())


def exported(model: PackedTokenFlex) -> TokenFlexForConditionalGeneration:
    """The same weights as the class that users load."""
    config = TokenFlexConfig.from_dict(model.config.to_dict())
    config._experts_implementation = "eager"
    found = TokenFlexForConditionalGeneration(config).eval()
    weights = {renamed(n, EARLIER_NAMES): value for n, value in model.state_dict().items()}
    found.load_state_dict(weights)
    return found


def _copy(model: PackedTokenFlex) -> Any:
    """With a configuration of its own: another attention of the copy leaves the model alone."""
    found = PackedTokenFlex(copy.deepcopy(model.config))
    found.load_state_dict(model.state_dict())
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
