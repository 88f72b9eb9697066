"""The router: from a picture's features to how likely its answer is right at each token count.

One logistic regression per count, trained on an evaluation's own right and wrong answers. The
smallest sufficient count of a picture is where a larger one no longer makes a right answer more
likely than its tokens are worth: `token_budget.allocate` decides, for a budget over all pictures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save

from data_pipeline.draw import uniform_hash
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ROUTER_FILE = "router.safetensors"
MIN_SAMPLES = 40
"""Fewer samples of the training part say too little of pictures."""
_FOLDS = 5
_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""L2 on the weights of standardised features; the samples' summed loss chooses."""
_ARRAYS = ("weight", "bias", "mean", "scale", "counts", "trained_on")


@dataclass(frozen=True)
class Router:
    """F features, K counts.

    weight: float64 [F, K]. bias: [K]. mean, scale: [F], of the features in training.
    counts: int64 [K], ascending. trained_on: int64 [N], the identities of the training samples.
    model: fingerprint of the model it was trained for.
    """

    weight: Floats
    bias: Floats
    mean: Floats
    scale: Floats
    counts: Ints
    trained_on: Ints
    model: str

    def predict(self, features: Floats) -> Floats:
        """Probability of a right answer, [S, F] -> [S, K]."""
        if features.shape[1] != len(self.mean):
            raise InputError(
                f"the router was trained on {len(self.mean)} features, this model gives "
                f"{features.shape[1]}: train it again with --train-router"
            )
        logits = (features - self.mean) / self.scale @ self.weight + self.bias
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -500, 500))))

    def save(self, path: Path) -> None:
        """Write it whole."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"tokenflex_router": json.dumps({"model": self.model})}
        write_atomically(path, save(arrays, about))

    @classmethod
    def load(cls, path: Path, model: str) -> "Router":
        """InputError where there is none, it is no router, or that of another model."""
        if not path.is_file():
            raise InputError(
                f"there is no router at {path}; train one with --train-router, or name its file "
                "with --router"
            )
        try:
            with safe_open(path, "numpy") as file:
                about = json.loads((file.metadata() or {})["tokenflex_router"])
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except Exception as error:  # a damaged file, or one of something else
            raise InputError(
                f"{path} is not a router ({type(error).__name__}: {error}); train one with "
                "--train-router"
            ) from error
        if about["model"] != model:
            raise InputError(
                f"the router {path} was trained for another model, or this one has changed since; "
                "train it again with --train-router"
            )
        return cls(**arrays, model=about["model"])


def train_router(
    features: Floats, scores: Floats, counts: Ints, identities: Ints, model: str
) -> Router:
    """Fit a router.

    Args:
        features: [N, F]. scores: [N, K] in 0..1, of the answers at each count.
        counts: [K]. identities: [N].

    Raises:
        InputError: too few samples.
    """
    number = len(features)
    if number < MIN_SAMPLES:
        raise InputError(
            f"{number} samples are left to train the router on, {MIN_SAMPLES} are needed: give "
            "more shards, or a larger --limit or --router-share"
        )
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    x, y = torch.from_numpy((features - mean) / scale), torch.from_numpy(scores)
    fold = torch.from_numpy(uniform_hash(0, "router folds", identities) * _FOLDS).long()
    penalty = min(_PENALTIES, key=lambda p: _held_out_loss(x, y, fold, p))
    weight, bias = _fit(x, y, penalty)
    return Router(weight.numpy(), bias.numpy(), mean, scale, counts, identities, model)


def _held_out_loss(x: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, penalty: float) -> float:
    """Summed cross-entropy of every sample by the fit of the other folds."""
    total = 0.0
    for number in range(_FOLDS):
        out = fold == number
        if out.any() and not out.all():
            weight, bias = _fit(x[~out], y[~out], penalty)
            total += float(_loss(x[out] @ weight + bias, y[out]))
    return total


def _fit(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [F, K] and biases [K] of least penalised loss; convex, so that there is one.

    Penalised are the differences from the next smaller count: where counts are as often right, they
    are to be so for the same pictures, and no tokens are spent on noise.
    """
    share = (y.mean(dim=0) * len(y) + 0.5) / (len(y) + 1)
    more = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.logit(share).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [more, bias], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # A little on the biases: a count that is always right would send its own to infinity.
        loss = _loss(x @ more.cumsum(dim=1) + bias, y) + penalty / 2 * more.square().sum()
        loss = loss + 1e-3 * bias.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return more.detach().cumsum(dim=1), bias.detach()


def _loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
