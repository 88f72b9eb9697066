"""Steps of a ZeRO-3 engine with what is asked for to make them faster, on every rank."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.training import scenarios
from training.distributed import Ranks
from training.speed import compiled_layers, make_faster

PACKS = [[0, 1, 2], [3, 4]]


def faster_gradients(
    ranks: Ranks, corpus: Path, overrides: list[str]
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and whole gradients of a step; layers are compiled without a compiler."""
    build = scenarios.build_engine

    def built(config: Any, *args: Any) -> Any:
        engine = build(config, *args)
        make_faster(engine.module, config)
        return engine

    with (
        patch.object(scenarios, "build_engine", built),
        patch.object(compiled_layers, "BACKEND", "aot_eager"),
    ):
        return scenarios.step_gradients(ranks, corpus, PACKS, overrides)


def worst(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """The worst relative error (norms); what is zero but for rounding counts by the largest."""
    norms = {name: float(np.linalg.norm(value)) for name, value in expected.items()}
    floor = 1e-3 * max(norms.values())
    return max(
        float(np.linalg.norm(found[name] - value)) / max(norms[name], floor)
        for name, value in expected.items()
    )
