"""Each method of making tokens: what it computes, in float64, and what all of them keep to."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training import (
    export_scenarios,
    test_flops,
    test_host_waits,
    tiny,
    token_method_scenarios,
)
from tests.training.scenarios import tiny_config
from tests.training.test_model import (
    SAMPLES,
    make_batch,
    make_config,
    make_model,
    make_samples,
    split_batch,
)
from training.config import ProjectorSettings, RunConfig
from training.export import export
from training.flops import method_flops
from training.model import TokenFlexForConditionalGeneration
from training.model.build import model_config, section_differences
from training.model.hub import METHODS, TokenMethod
from training.model.pack_inputs import model_inputs

GRID, WIDTH, INNER, TEXT = (6, 6), 12, 20, 8
FIXED = 9
OTHERS = [name for name in METHODS if name != "pool"]
ANY = [name for name, kind in METHODS.items() if not kind.fixed]


def make(name: str, grid: tuple[int, int] = GRID) -> TokenMethod:
    torch.manual_seed(0)
    kind = METHODS[name]
    module = kind(WIDTH, INNER, TEXT, grid, num_tokens=FIXED if kind.fixed else None).double()
    for parameter in module.parameters():  # norms and biases, too, must be seen to matter
        nn.init.normal_(parameter, std=0.5)
    return module


def sides_of(name: str, sides: list[int]) -> list[int]:
    """The sides, or as many of the one that the method can make."""
    return [math.isqrt(FIXED)] * len(sides) if METHODS[name].fixed else sides


def patches_for(sides: list[int], grid: tuple[int, int] = GRID, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(len(sides), grid[0] * grid[1], WIDTH, dtype=torch.float64)


def head(module: TokenMethod, rows: Tensor) -> Tensor:
    """The common LayerNorm and SwiGLU, of PyTorch's own parts."""
    m: Any = module
    normed = F.layer_norm(rows, (WIDTH,), m.norm_weight, m.norm_bias, m.eps)
    gated = F.silu(normed @ m.w1.T + m.b1) * (normed @ m.w2.T + m.b2)
    return gated @ m.w3.T + m.b3


def expected_unshuffle(module: Any, patches: Tensor, n: int) -> Tensor:
    """InternVL's two reshapes with an exchange of axes in between, then its MLP of Linears."""
    tiles, factor = len(patches), GRID[0] // n
    x = patches.view(tiles, *GRID, WIDTH)
    x = x.reshape(tiles, GRID[0], n, factor * WIDTH).permute(0, 2, 1, 3)
    x = x.reshape(tiles, n, n, factor * factor * WIDTH).permute(0, 2, 1, 3)
    rows = x.reshape(tiles, n * n, -1)
    mlp = nn.Sequential(
        nn.LayerNorm(rows.shape[-1]),
        nn.Linear(rows.shape[-1], TEXT),
        nn.GELU(),
        nn.Linear(TEXT, TEXT),
    ).double()
    names = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
    for own, name in zip(mlp.parameters(), names, strict=True):
        own.data.copy_(getattr(module, name))
    return mlp(rows)


def multihead(module: Any, name: str) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(WIDTH, 1, batch_first=True, dtype=torch.float64)
    made.in_proj_weight.data.copy_(getattr(module, f"{name}_in_weight"))
    made.in_proj_bias.data.copy_(getattr(module, f"{name}_in_bias"))
    made.out_proj.weight.data.copy_(getattr(module, f"{name}_out_weight"))
    made.out_proj.bias.data.copy_(getattr(module, f"{name}_out_bias"))
    return made


def normed(module: Any, name: str, rows: Tensor) -> Tensor:
    weight, bias = getattr(module, f"{name}_weight"), getattr(module, f"{name}_bias")
    return F.layer_norm(rows, (WIDTH,), weight, bias, module.eps)


def sines() -> Tensor:
    """One place after the other: of row and column, sine and cosine at WIDTH / 4 rates."""
    places = []
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            waves = []
            for value in (row, column):
                angles = [value / 10_000 ** (i / (WIDTH // 4)) for i in range(WIDTH // 4)]
                waves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            places.append(waves)
    return torch.tensor(places, dtype=torch.float64)


def expected_query(module: Any, patches: Tensor, n: int) -> Tensor:
    read = normed(module, "key_norm", patches)
    queries = normed(module, "query_norm", module.queries)[None, : n * n].expand(len(read), -1, -1)
    found = multihead(module, "patch")(queries, read + sines(), read, need_weights=False)[0]
    return head(module, found)


def expected_pool(module: Any, patches: Tensor, n: int) -> Tensor:
    maps = patches.transpose(1, 2).unflatten(2, GRID)
    return head(module, F.adaptive_avg_pool2d(maps, n).flatten(2).transpose(1, 2))


def expected_pool_query(module: Any, patches: Tensor, n: int) -> Tensor:
    """Tile after tile, with an m x m grid of anchors: 1 of 1, 1 of 4, 4 of 9, 4 of 16, ..."""
    m = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 4}[n]
    count = max(1, n * n - m * m)
    found = []
    for tile in patches:
        anchors, places = (
            F.adaptive_avg_pool2d(x.T.unflatten(1, GRID), m).flatten(1).T for x in (tile, sines())
        )
        read = normed(module, "key_norm", anchors)
        queries = module.queries[:count]
        asked = normed(module, "query_norm", queries)
        queries = queries + multihead(module, "anchor")(asked, read + places, read)[0]
        read = normed(module, "key_norm", tile)
        asked = normed(module, "read_norm", queries)
        seen = multihead(module, "patch")(asked, read + sines(), read)[0]
        found.append(torch.cat([anchors[: n * n - count], seen]))
    return head(module, torch.stack(found))


def expected_select(module: Any, patches: Tensor, n: int) -> Tensor:
    """A tile, a patch and a number at a time."""
    places = [(row, column) for row in range(GRID[0]) for column in range(GRID[1])]
    diagonal = math.hypot(GRID[0] - 1, GRID[1] - 1)
    rows = []
    for tile in patches.detach():
        apart = [patch - tile.mean(0) for patch in tile]
        order = sorted(range(len(apart)), key=lambda i: -float(apart[i].norm()))
        chosen = order[: (n * n + 1) // 2]
        while len(chosen) < n * n:
            far = {}
            for i in set(order) - set(chosen):
                between = []
                for j in chosen:
                    cosine = float(apart[i] @ apart[j] / (apart[i].norm() * apart[j].norm()))
                    between.append((1 - cosine) / 2 + math.dist(places[i], places[j]) / diagonal)
                far[i] = min(between)
            chosen.append(max(far, key=lambda i: far[i]))
        rows.append(tile[sorted(chosen)])
    return head(module, torch.stack(rows))


def expected_merge(module: Any, patches: Tensor, n: int) -> Tensor:
    """ToMe with sizes: tokens are (mean, how many patches), merged pair by pair in a list."""
    rows = []
    for tile in patches.detach():
        tokens = [(patch, 1) for patch in tile]
        while len(tokens) > n * n:
            best = []
            for i in range(0, len(tokens), 2):
                like = [
                    (float(F.cosine_similarity(tokens[i][0], tokens[j][0], dim=0)), j)
                    for j in range(1, len(tokens), 2)
                ]
                best.append((*max(like), i))
            gone = sorted(best, reverse=True)[: min(len(tokens) - n * n, len(tokens) // 2)]
            for _, j, i in gone:
                (a, size_a), (b, size_b) = tokens[i], tokens[j]
                tokens[j] = ((a * size_a + b * size_b) / (size_a + size_b), size_a + size_b)
            merged = {i for *_, i in gone}
            tokens = [token for i, token in enumerate(tokens) if i not in merged]
        rows.append(torch.stack([mean for mean, _ in tokens]))
    return head(module, torch.stack(rows))


EXPECTED = {
    "pool": expected_pool,
    "unshuffle": expected_unshuffle,
    "query": expected_query,
    "pool_query": expected_pool_query,
    "select": expected_select,
    "merge": expected_merge,
}


@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_those_of_an_independent_computation(name: str) -> None:
    module = make(name)
    for n in sides_of(name, [1, 2, 3, 4, 5, 6]):
        patches = patches_for([n] * 2)
        expected = EXPECTED[name](module, patches, n)
        torch.testing.assert_close(
            module(patches, [n, n]), expected.flatten(0, 1), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", METHODS)
def test_a_tile_is_made_of_its_own_patches_alone(name: str) -> None:
    module = make(name)
    sides = sides_of(name, [3, 1, 6, 3, 2, 4])
    patches = patches_for(sides)
    counts = [n * n for n in sides]
    found = module(patches, sides)
    assert found.shape == (sum(counts), TEXT) and found.isfinite().all()
    assert torch.equal(found, module(patches, torch.tensor(sides)))
    # Alone, and in another order, each tile has the same tokens.
    alone = [module(patches[i : i + 1], [n]) for i, n in enumerate(sides)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-10, atol=1e-10)
    order = [4, 2, 0, 5, 3, 1]
    moved = module(patches[order], [sides[i] for i in order])
    torch.testing.assert_close(moved, torch.cat([alone[i] for i in order]), rtol=1e-10, atol=1e-10)
    # Other patches in one tile, and the tokens of all the others are bitwise as they were.
    changed = patches.clone()
    changed[3] += torch.randn_like(changed[3])
    again = module(changed, sides).split(counts)
    same = [torch.equal(a, b) for a, b in zip(found.split(counts), again, strict=True)]
    assert same == [True, True, True, False, True, True]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sides", [[1], [1, 1], [6], [2, 5, 1]])
def test_gradients_reach_patches_and_every_parameter(name: str, sides: list[int]) -> None:
    """Of every parameter also where all tiles get one token: a rank without would be waited for."""
    module, sides = make(name), sides_of(name, sides)
    patches = patches_for(sides).requires_grad_()
    module(patches, sides).square().sum().backward()
    assert patches.grad is not None and patches.grad.abs().sum() > 0
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("sides", "told"), [([0], "0"), ([7], "7"), ([3, 3], "2 entries")])
def test_sides_that_cannot_be_are_refused(name: str, sides: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=f"tile_sides.*{told}"):
        make(name)(patches_for([1]), sides)
    assert make(name)(patches_for([]), []).shape == (0, TEXT)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "train",
    [
        test_flops.settings(),
        test_flops.settings("vision_model"),
        test_flops.settings("projector"),
        test_flops.settings("vision_model", "projector"),
    ],
    ids=["all", "frozen tower", "frozen projector", "decoder"],
)
def test_flops_are_those_that_pytorch_counts(name: str, train: Any) -> None:
    """Of the method alone: beside the rest of the model it may be too small to be seen."""
    fixed = METHODS[name].fixed
    config = test_flops.config_of(projector_method=name, projector_num_tokens=16 if fixed else None)
    for sides in ([4] * 5 if fixed else test_flops.MANY, []):
        part = test_flops.PackCost(config, train, 1).pack([100], sides, 10)["projector"]
        expected = counted(config, train, sides or [config.smallest_side])
        assert part.hardware == pytest.approx(expected, rel=0.01)


def counted(config: Any, train: Any, sides: list[int]) -> float:
    """What PyTorch counts of the projector, forward and backward."""
    kind, side = METHODS[config.projector_method], config.patch_grid
    widths = (config.vision_config.hidden_size, config.text_config.hidden_size)
    inner = config.projector_hidden_ratio * widths[0]
    module = kind(widths[0], inner, widths[1], side, num_tokens=config.projector_num_tokens)
    module.requires_grad_(train.modules.projector.train)
    patches = torch.randn(len(sides), side[0] * side[1], widths[0])
    patches.requires_grad_(train.modules.vision_model.train)
    with test_flops.FlopCounterMode(display=False, custom_mapping=test_flops.ON_CPU) as counter:
        tokens = module(patches, sides)
        if tokens.requires_grad:
            tokens.sum().backward()
    return float(counter.get_total_flops())


def of(name: str) -> dict[str, Any]:
    """The keys of the model's config for 4 x 4 patches."""
    return {"projector_method": name, "projector_num_tokens": 4 if METHODS[name].fixed else None}


def samples_for(name: str) -> list[Any]:
    return make_samples([[2], [2, 2], [], [2]]) if METHODS[name].fixed else SAMPLES


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("text_only", [False, True])
def test_no_step_waits_for_the_device(
    name: str, text_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(**of(name))
    samples = test_host_waits.TEXT_ONLY if text_only else samples_for(name)
    batch = test_host_waits.packed_batch(samples)
    inputs = model_inputs(batch, torch.device("cpu"), loss_chunks=2)
    with test_host_waits.listed(inputs, monkeypatch) as operations:
        test_host_waits.train(model, inputs)
    assert operations.waits == []
    # A pack without images, too, leaves no parameter out.
    assert [n for n, p in model.projector.named_parameters() if p.grad is None] == []
    # On the meta device whatever is read on the host raises.
    test_host_waits.train(model.to("meta"), model_inputs(batch, torch.device("meta")))


@pytest.mark.parametrize("name", METHODS)
def test_a_pack_is_the_sum_of_its_samples(name: str) -> None:
    model, samples = make_model(**of(name)), samples_for(name)
    batch = make_batch(samples)
    packed = model(**batch).loss
    apart = torch.stack([model(**part).loss for part in split_batch(batch, samples)])
    assert apart.sum().item() == pytest.approx(packed.item(), rel=1e-5)


def test_settings_and_flops_know_the_same_methods() -> None:
    known = get_args(ProjectorSettings.model_fields["method"].annotation)
    assert known == tuple(METHODS) == tuple(method_flops._WORK)
    assert make_config().projector_method == "pool"  # of folders that do not name one


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"projector_method": "resample"}, ("resample", *METHODS)),
        ({"projector_method": "query", "pool": "resize"}, ("resize", "query", "leave pool out")),
        ({"projector_method": "query", "projector_num_tokens": 4}, ("4", "query", "leave it out")),
        ({"projector_method": "unshuffle"}, ("None", "unshuffle", "1, 4, 16")),
        ({"projector_method": "unshuffle", "projector_num_tokens": 9}, ("9", "4 x 4", "1, 4, 16")),
        ({"projector_method": "unshuffle", "projector_num_tokens": 8}, ("8", "1, 4, 16")),
    ],
)
def test_a_config_that_fits_no_method_is_refused(changes: dict, told: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"projector_method|projector_num_tokens|pool") as error:
        make_config(**changes)
    assert all(text in str(error.value) for text in told)


UNSHUFFLE = ["model.projector.method=unshuffle", "data.tokens.probabilities=[1]"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.projector.method=resample"], ("model.projector.method", "resample", "query")),
        (["model.projector.method=unshuffle"], ("[4, 16, 64]", "data.tokens.counts=[4]")),
        (
            [*UNSHUFFLE, "data.tokens.counts=[4]", "model.projector.num_tokens=16"],
            ("[4]", "16", "data.tokens.counts=[16]"),
        ),
        (
            ["model.projector.method=query", "train.projector_impl=triton"],
            ("train.projector_impl", "query", "auto"),
        ),
        (
            ["model.projector.method=query", "train.projector_backward=recompute"],
            ("train.projector_backward", "query", "save"),
        ),
    ],
)
def test_settings_that_fit_no_method_are_refused(
    overrides: list[str], told: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as error:
        tiny_config(Path("corpus"), *overrides)
    assert all(text in str(error.value) for text in told)


def settings_of(name: str, *overrides: str) -> RunConfig:
    fixed = ["data.tokens.counts=[16]", "data.tokens.probabilities=[1]"] * METHODS[name].fixed
    return tiny_config(Path("corpus"), f"model.projector.method={name}", *fixed, *overrides)


def test_the_one_count_is_that_of_the_data() -> None:
    config = settings_of("unshuffle")
    assert config.model.projector.num_tokens == 16
    assert model_config(config.model, 100, 5).projector_num_tokens == 16
    with pytest.raises(InputError, match=r"9.*8 x 8.*1, 4, 16, 64"):
        model_config(settings_of("unshuffle", "data.tokens.counts=[9]").model, 100, 5)


def test_weights_of_another_method_are_another_model() -> None:
    pool, query = settings_of("pool").model, settings_of("query").model
    assert section_differences(pool, pool) == {}
    told = section_differences(pool, query)
    assert told.keys() == {"model.projector.method"} and "'pool' there" in next(iter(told.values()))


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", OTHERS)
def test_two_ranks_train_resume_and_export(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path, name: str
) -> None:
    """A resumed run is bitwise the one undisturbed, another method's checkpoint is refused, and
    the exported folder answers as the trainer's evaluation did."""
    found = two_ranks.run(token_method_scenarios.train_resume, digits_corpus, tmp_path, name)
    first, second = found
    assert first["loss"] == second["loss"] == first["resumed loss"]
    for key, value in first["parameters"].items():
        assert np.array_equal(value, first["resumed parameters"][key]), key
    assert "model.projector" in first["refused"]
    export(tmp_path, tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=False)
    trained = {tiny.earlier_name(model, key): value for key, value in model.named_parameters()}
    assert trained.keys() == first["saved"].keys()
    for key, value in first["saved"].items():
        assert np.array_equal(trained[key].detach().numpy(), value), key
    outcomes = first["outcomes"] | second["outcomes"]
    assert export_scenarios.generated(tmp_path / "model", digits_corpus, outcomes) == outcomes


ELSEWHERE = """
import sys, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
given = torch.load(sys.argv[1])
for name, (folder, inputs) in given.items():
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(model.model.projector).__module__.startswith("transformers_modules."), name
    assert "data_pipeline" not in sys.modules and "training" not in sys.modules
    given[name] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
torch.save(given, sys.argv[1])
"""


def test_folders_of_all_methods_load_where_this_repository_is_not(tmp_path: Path) -> None:
    processor = tiny.make_processor(tmp_path / "tokenizer")
    given, expected = {}, {}
    for name in OTHERS:
        model = tiny.make_model(TokenFlexForConditionalGeneration, processor, **of(name))
        inputs = processor(
            images=tiny.picture(3), text=tiny.prompt("<image>\nWhat is this?"), num_image_tokens=4
        )
        expected[name] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        model.save_pretrained(tmp_path / name)
        assert f'"projector_method": "{name}"' in (tmp_path / name / "config.json").read_text()
        given[name] = (str(tmp_path / name), dict(inputs))
    torch.save(given, tmp_path / "given")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "given")],
        cwd=tmp_path,
        env={**kept, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "given")
    assert all(torch.equal(found[name], ids) for name, ids in expected.items())


def test_another_count_of_a_fixed_method_is_refused_by_name(tmp_path: Path) -> None:
    processor = tiny.make_processor(tmp_path / "tokenizer")
    model = tiny.make_model(TokenFlexForConditionalGeneration, processor, **of("unshuffle"))
    inputs = processor(images=tiny.picture(3), text="<image>", num_image_tokens=9)
    with pytest.raises(ValueError, match=r"num_image_tokens is 9.*unshuffle.*num_image_tokens=4"):
        model(**inputs)
