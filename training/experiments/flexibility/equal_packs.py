"""What samples come to at each count: the tokens of a pack, and the FLOPs of an answer."""

from math import ceil, isqrt

import numpy as np

from data_pipeline.config_file import load_settings
from data_pipeline.corpus import cost_of, open_config, open_mixture
from data_pipeline.mixture import DatasetSettings, Mixture, make_ids
from data_pipeline.plan.window_samples import WindowSamples, draw, gather
from data_pipeline.settings import DataConfig
from data_pipeline.tiling import TilingSettings
from training.experiments.flexibility.experiment_settings import (
    ArmSettings,
    ExperimentSettings,
    arm_overrides,
)

_NO_LIMIT = 1 << 40


class SampleSizes:
    """Sizes of every training sample of an experiment's base config."""

    def __init__(self, experiment: ExperimentSettings) -> None:
        self._experiment = experiment
        config, corpus = open_config(experiment.base, experiment.settings)
        self._samples = _all(corpus.mixture, config.data.tiling)

    def pack_tokens(self, arm: ArmSettings) -> int:
        """Tokens of a pack in which a step has the experiment's samples per step, in the mean.

        At least as many as the longest sample has, so that none is capped or left out.
        """
        experiment = self._experiment
        overrides = arm_overrides(experiment, arm)
        data = load_settings(DataConfig, experiment.base, overrides).data
        lengths = draw(self._samples, data.tokens, _NO_LIMIT, seed=0).lengths
        longest = max(lengths.max(), self._samples.lengths_at(data.tokens.trained_sides[-1]).max())
        in_pack = experiment.samples_per_step / data.pack.packs_per_step
        return max(int(longest), ceil(lengths.mean() * in_pack))


def answer_gflop(experiment: ExperimentSettings) -> dict[int, float]:
    """Count -> GFLOP of a forward pass over a held-out sample, in the mean.

    Of tower and language model, as `training.evaluate` counts them; what an arm's own settings
    change of them is not in it.
    """
    config, corpus = open_config(experiment.base, experiment.settings)
    source = DatasetSettings(shards=config.data.eval_shards)
    mixture = open_mixture(config.data, corpus.tokenizer, {"held-out": source})
    samples = _all(mixture, config.data.tiling)
    cost = cost_of(config.model.vision.config, config.model.llm.config)
    return {
        n: float(cost.flops(samples.lengths_at(isqrt(n)), samples.tiles).mean() / 3e9)
        for n in sorted(experiment.counts)
    }


def _all(mixture: Mixture, tiling: TilingSettings) -> WindowSamples:
    """Every sample once."""
    sizes = [len(dataset.index) for dataset in mixture.datasets]
    every = np.concatenate([make_ids(i, np.arange(n)) for i, n in enumerate(sizes)])
    return gather(mixture, tiling, every, np.zeros(len(every), np.int64))
