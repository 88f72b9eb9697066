"""What samples come to at each count: the tokens of a pack, and the FLOPs of an answer."""

from math import ceil, isqrt

import numpy as np

from data_pipeline.corpus import cost_of, open_config, open_mixture
from data_pipeline.mixture import DatasetSettings, Mixture, make_ids
from data_pipeline.plan.window_samples import WindowSamples, gather
from data_pipeline.settings import DataSettings
from data_pipeline.tiling import TilingSettings
from training.experiments.flexibility.experiment_settings import ArmSettings, ExperimentSettings


class SampleSizes:
    """Text tokens and tiles of every training sample of an experiment's base config."""

    def __init__(self, experiment: ExperimentSettings) -> None:
        config, corpus = open_config(experiment.base, experiment.settings)
        self._data: DataSettings = config.data
        samples = _all(corpus.mixture, config.data.tiling)
        self._text, self._tiles = samples.text_tokens, samples.tiles

    def pack_tokens(self, arm: ArmSettings, samples_per_step: int) -> int:
        """Tokens of a pack in which a step has so many samples in the mean.

        At least as many as the longest sample has, so that none is capped or left out.
        """
        mean = sum(n * weight for n, weight in arm.draw.items()) / sum(arm.draw.values())
        length = self._text.mean() + self._tiles.mean() * mean
        longest = int((self._text + self._tiles * max(arm.draw)).max())
        return max(longest, ceil(length * samples_per_step / self._data.pack.packs_per_step))


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
