"""The model that users load, compiled: one graph, the same numbers, and the checks stay on."""

from typing import Any

import pytest
import torch

from kernels import POOL_MODES
from tests.training.tiny import make_model, make_processor, picture, prompt
from training.model import TokenFlexForConditionalGeneration
from training.model.hub.pooling_tokenflex import pool_patches, pool_patches_in_graph


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return make_model(TokenFlexForConditionalGeneration, processor)


@pytest.fixture(scope="module")
def batch(processor: Any) -> Any:
    """Two rows, one of them padded; counts and numbers of images differ."""
    return processor(
        images=[[picture(0)], [picture(1), picture(2, 20, 50)]],
        text=[prompt("<image>\nWhat is this?"), prompt("one <image> and another <image> please")],
        num_image_tokens=[[16], [9, 1]],
    )


@pytest.fixture
def compiled(model: Any, request: pytest.FixtureRequest) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=getattr(request, "param", "eager"))


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("grid", [(6, 6), (5, 8), (1, 1), (27, 27)])
def test_pooling_in_a_graph_equals_pooling_outside_in_float64(mode, grid):
    torch.manual_seed(0)
    sides = [*range(1, min(grid) + 1), 1, min(grid)]
    patches = torch.randn(len(sides), grid[0] * grid[1], 3, dtype=torch.float64)
    expected = pool_patches(patches, sides, grid, mode)
    for rows in (len(expected), len(expected) + 7, len(expected) // 2):
        found = pool_patches_in_graph(patches, torch.tensor(sides), grid, mode, rows)
        assert found.shape == (rows, 3) and found.isfinite().all()
        kept = min(rows, len(expected))
        torch.testing.assert_close(found[:kept], expected[:kept], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("compiled", "as_list"),
    [("eager", True), ("eager", False), ("aot_eager", False)],
    indirect=["compiled"],
)
def test_one_graph_gives_the_same_logits_and_gradients(model, batch, compiled, as_list):
    inputs = dict(batch) | ({"tile_sides": batch["tile_sides"].tolist()} if as_list else {})
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(called: Any) -> dict[str, torch.Tensor]:
        called(**inputs, labels=labels).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    wanted = gradients(model)
    for name, grad in gradients(compiled).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_other_sides_in_a_tensor_run_what_was_compiled(processor, model, compiled):
    def inputs(counts: list[int]) -> Any:
        found = processor(
            images=[picture(i, 16, 16) for i in range(len(counts))],
            text=prompt("<image>" * len(counts)),
            num_image_tokens=counts,
            padding="max_length",
            max_length=160,
        )
        return dict(found)

    with torch.no_grad():
        compiled(**inputs([4, 16, 1]))
        with torch.compiler.set_stance("fail_on_recompile"):
            for counts in ([1, 1, 9], [16, 16, 16]):
                asked = inputs(counts)
                torch.testing.assert_close(
                    compiled(**asked).logits, model(**asked).logits, rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize(
    ("compiled", "change"),
    [
        ("eager", {"pixel_values": None, "tile_sides": None}),
        ("aot_eager", {"pixel_values": None, "tile_sides": None}),
        ("aot_eager", {"tile_sides": torch.ones(14, dtype=torch.long)}),
        ("eager", {"tile_sides": [1] * 14}),
        ("eager", {"tile_sides": torch.full((14,), 5)}),
    ],
    ids=["no tiles", "no tiles, aot", "fewer, aot", "fewer in a list", "out of range"],
    indirect=["compiled"],
)
def test_the_checks_stay_on(batch, compiled, change):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"image tokens of the tiles|from 1 to"):
        compiled(**{**batch, **change})


def test_a_wrong_number_of_sides_is_named(batch, compiled):
    with torch.no_grad(), pytest.raises(Exception, match="2 entries for 14 tiles"):
        compiled(**{**batch, "tile_sides": torch.tensor([2, 1])})
