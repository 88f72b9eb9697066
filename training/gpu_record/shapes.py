"""Which models the training stages measure, and on what data: settings over a preset."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.bench.photos import make_corpus
from data_pipeline.chat import ChatSettings
from training.config import RunConfig, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
_QWEN_1_5B = (
    *("hidden_size=1536", "intermediate_size=8960", "num_hidden_layers=28"),
    *("num_attention_heads=12", "num_key_value_heads=2"),
)
_RANDOM = ("model.vision.pretrained=null", "model.llm.pretrained=null")


@dataclass(frozen=True)
class Shape:
    """One model, trained from random weights with mixed token counts and with one.

    overrides: settings over the preset. mixed: the token counts drawn, with their probabilities,
    as settings; fixed: the one count. samples: of the corpus. steps: measured, after `warmup`.
    """

    preset: str
    overrides: tuple[str, ...]
    mixed: str
    fixed: int
    samples: int
    packs: int
    warmup: int
    steps: int

    def config(self, work: Path, counts: str, more: tuple[str, ...] = ()) -> RunConfig:
        """The settings of a run with "mixed" or "fixed" counts on the corpus in `work`."""
        one = f"{{counts: [{self.fixed}], probabilities: [1.0], draw: image}}"
        settings = [
            f"output_dir={work / 'run'}",
            "data.prepare=null",
            "data.eval_shards=[]",
            f"data.shards=[{work / 'corpus' / 'shards'}]",
            f"data.chat.system={ChatSettings().system}",  # with which the corpus is indexed
            f"data.tokenizer={work / 'corpus' / 'tokenizer.model'}",
            f"data.pack.packs_per_step={self.packs}",
            f"data.tokens={self.mixed if counts == 'mixed' else one}",
        ]
        return load_config(CONFIGS / self.preset, [*settings, *self.overrides, *more])

    def prepare(self, work: Path) -> None:
        """Write the corpus, photographs with a few sentences, unless it is there."""
        done = work / "corpus" / "complete"
        if not done.exists():
            make_corpus(work / "corpus", self.samples, num_shards=8)
            done.touch()


_MIXED = "{counts: [64, 144, 256], probabilities: [0.2, 0.3, 0.5], draw: image}"
# SigLIP so400m, 384 px, 8192 tokens a pack. Per parameter ZeRO-3 on one GPU takes 18 bytes (bf16
# weights, fp32 gradients, masters and Adam): calculated 2.0e9 x 18 = 33 GiB, 3.5e9 x 18 = 59 GiB.
SHAPES = {
    "1.5b": Shape(
        "ristretto_3b.yaml",
        (*_RANDOM, *(f"model.llm.config.{setting}" for setting in _QWEN_1_5B)),
        *(_MIXED, 256, 800, 4, 3, 20),
    ),
    "3b": Shape("ristretto_3b.yaml", _RANDOM, _MIXED, 256, 800, 4, 3, 12),
    "rehearsal": Shape(
        "digits.yaml",
        (
            *("data.pack.max_tokens=1024", "train.device=cpu", "data.tiling.max_tiles=2"),
            *("model.vision.config.num_hidden_layers=1", "model.llm.config.num_hidden_layers=1"),
        ),
        "{counts: [4, 16, 64], probabilities: [0.2, 0.3, 0.5], draw: image}",
        *(64, 24, 2, 1, 2),
    ),
}
