"""Errors of a call's result and gradients against torch's own ops in float64."""

import torch
from torch import Tensor

from kernels.passes import Weights
from kernels.profile.baselines import eager_grouped
from kernels.profile.cases import Case
from kernels.profile.random_inputs import Inputs, outputs_and_gradients


def float64_results(case: Case, inputs: Inputs, max_rows: int = 4096) -> dict[str, Tensor]:
    """`outputs_and_gradients` in float64, tiles of one side at a time, at most `max_rows` rows.

    Lies on the inputs' device; about 1 GB at 64 tiles of 16 x 16.
    """
    weights = Weights(*(weight.detach().double().requires_grad_() for weight in inputs.weights))
    wide = {name: torch.zeros_like(weight) for name, weight in weights._asdict().items()}
    wide["out"] = torch.empty_like(inputs.grad, dtype=torch.float64)
    if inputs.x.requires_grad:
        wide["x"] = torch.empty_like(inputs.x, dtype=torch.float64, requires_grad=False)
    for tiles, rows, part in _parts(case, max_rows, inputs.x.device):
        x = inputs.x.detach()[tiles].double().requires_grad_(inputs.x.requires_grad)
        call = eager_grouped(part, inputs.x.device)
        results = outputs_and_gradients(call, Inputs(x, weights, inputs.grad[rows].double()))
        wide["out"][rows] = results.pop("out")
        if "x" in results:
            wide["x"][tiles] = results.pop("x")
        for name, gradient in results.items():
            wide[name] += gradient
    return wide


def _parts(case: Case, max_rows: int, device: torch.device) -> list[tuple[Tensor, Tensor, Case]]:
    """(tiles, rows, the case that is these tiles alone), the tiles of a part all of one side."""
    counts = torch.tensor(case.sides).square()
    first_row = counts.cumsum(0) - counts
    parts = []
    for n in sorted(set(case.sides)):
        tiles = torch.tensor([tile for tile, side in enumerate(case.sides) if side == n])
        for some in tiles.split(max(1, max_rows // (n * n))):
            rows = (first_row[some][:, None] + torch.arange(n * n)).flatten()
            part = Case((n,), (1.0,), len(some), case.pool, case.grid)
            parts.append((some.to(device), rows.to(device), part))
    return parts


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of the difference over that of `expected`, by name; nan stays nan."""
    return {
        name: ((found[name].double() - value).norm() / value.norm()).item()
        for name, value in expected.items()
    }
