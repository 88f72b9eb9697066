"""Errors of a call's result and gradients against torch's own ops in float64."""

from torch import Tensor

from kernels.passes import Weights
from kernels.profile.baselines import eager_grouped
from kernels.profile.cases import Case
from kernels.profile.random_inputs import Inputs, outputs_and_gradients


def float64_results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """`outputs_and_gradients` in float64, on the inputs' device: 4 GB at 64 tiles of 16 x 16."""
    x = inputs.x.detach().double().requires_grad_(inputs.x.requires_grad)
    weights = Weights(*(weight.detach().double().requires_grad_() for weight in inputs.weights))
    wide = Inputs(x, weights, inputs.grad.double())
    return outputs_and_gradients(eager_grouped(case, x.device), wide)


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of the difference over that of `expected`, by name; nan stays nan."""
    return {
        name: ((found[name].double() - value).norm() / value.norm()).item()
        for name, value in expected.items()
    }
