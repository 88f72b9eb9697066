"""Inputs for the projector's tests, and the projector written with torch's own modules."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS, HIDDEN, WIDTH = 12, 20, 7
NAMES = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "w3", "b3")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_weights(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    channels: int = CHANNELS,
    hidden: int = HIDDEN,
    width: int = WIDTH,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "w1": (hidden, channels),
        "b1": (hidden,),
        "w2": (hidden, channels),
        "b2": (hidden,),
        "w3": (width, hidden),
        "b3": (width,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def make_tiles(
    tiles: int, grid: tuple[int, int], seed: int = 1, channels: int = CHANNELS
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, grid[0] * grid[1], channels, generator=generator, dtype=torch.float64)


def torch_pool(images: Tensor, n: int, pool: str) -> Tensor:
    """The two modes as torch and the released code write them: [T, C, H, W] -> [T, C, n, n]."""
    if pool == "adaptive":
        return F.adaptive_avg_pool2d(images, n)
    resized = [-(-size // n) * n for size in images.shape[-2:]]
    if resized != list(images.shape[-2:]):
        images = F.interpolate(images, size=resized, mode="bilinear", align_corners=True)
    return F.avg_pool2d(images, kernel_size=[size // n for size in resized])


def eager(x: Tensor, sides: list[int], w: dict[str, Tensor], grid, pool: str) -> Tensor:
    """Tile by tile with torch's pooling and functions, in the dtype of x."""
    rows = []
    for tile, n in zip(x, sides, strict=True):
        image = tile.T.reshape(1, -1, *grid)
        rows.append(torch_pool(image, n, pool).flatten(2)[0].T)
    normed = F.layer_norm(torch.cat(rows), x.shape[2:], w["norm_weight"], w["norm_bias"])
    gate = F.silu(normed @ w["w1"].T + w["b1"]) * (normed @ w["w2"].T + w["b2"])
    return gate @ w["w3"].T + w["b3"]


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = found.double().cpu() - expected.double().cpu()
    return (difference.norm() / expected.double().cpu().norm()).item()


def gradients(call, x: Tensor, weights: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    """call(x, weights) and its gradients of x and every weight: [out, dx, dnorm_weight, ...]."""
    x = x.detach().clone().requires_grad_()
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    out = call(x, leaves)
    out.backward(upstream.to(out))
    return [out.detach(), *(leaf.grad for leaf in (x, *leaves.values()))]
