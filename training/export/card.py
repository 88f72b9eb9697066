"""The model card: what a README.md of an exported folder says."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from data_pipeline.draw import TokenCountSettings
from data_pipeline.pretrained_source import is_missing
from data_pipeline.processor.releases_tokenflex import NEWEST, OLDEST
from data_pipeline.tiling import TilingSettings
from data_pipeline.yaml_text import write_yaml
from training.export.trained_run import TrainedRun
from training.model.hub import TokenFlexConfig
from training.model.known_counts import known_counts

_USE = """\
```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

messages = [{{"role": "user", "content": [
    {{"type": "image", "image": Image.open("image.png")}},
    {{"type": "text", "text": "What does the image show?"}},
]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True,
    num_image_tokens={default},
)
with torch.no_grad():
    answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

It needs torch, pillow and transformers {oldest} to {newest}, which it was tested with (written
with {version}). `trust_remote_code=True` runs the `*_tokenflex.py` files of this folder: read
them first. `AutoModel` gives the model without its head, of `vision_model`, `projector` and
`language_model`."""

UNKNOWN_COUNTS = """\
Nothing is known of a count that was neither trained nor evaluated: evaluate it before you rely
on it. Answers may be right far less often there: of this trainer's demos, trained with 4, 16 and
64 tokens per tile, the one with 2 x 2 grids of digits gives 53 to 61 % right answers at these
counts and 10 to 11 % at 9, 25, 36 and 49 tokens, the one with 2 x 2 grids of colours 98 % and 13
to 18 %."""

LIMITS = """\
- A vision-language model writes what is likely, not what is true: it makes up what an image does
  not show, and more so the fewer tokens an image gets.
- It was tested on no more than the accuracy above; nothing is known of its safety, its bias, or
  of other images, tasks and languages.
- An image is stretched to fill its tiles of {tile} x {tile} pixels; small detail is lost."""

_LICENSE = """\
Not given. Whoever publishes this model gives one, in the first lines of this file and here, that
the licenses of its data and of the weights it was started from allow."""


def run_card(run: TrainedRun, config: TokenFlexConfig, default: int) -> str:
    """The card of a model that was trained here; `default` tokens per tile where none are given."""
    settings = run.config
    model = settings.model
    sources = [getattr(part, "pretrained", None) for part in (model, model.vision, model.llm)]
    started = ", ".join(source for source in sources if source) or "random weights"
    if settings.checkpoint.init_from:
        started = f"an earlier stage, {settings.checkpoint.init_from}"
    read = ", ".join(f"{count:,} {name}" for name, count in run.seen.items())
    rates = {True: "{:g}", False: "frozen", "new_tokens": "{:g}, rows of new tokens only"}
    modules = [(name, rates[m.train].format(m.lr)) for name, m in settings.train.modules]
    modules += [
        (f"{name}, adapters of rank {adapter.r}", f"{adapter.lr:g}")
        for name, adapter in settings.train.adapters.given.items()
    ]
    training = [
        f"{run.manifest.step:,} steps of {settings.train.steps:,}, in {run.precision}, started "
        f"from {started}." + (f" Read: {read}." if read else ""),
        table(("module", "peak learning rate"), modules),
        _details("All settings", _settings(settings.model_dump(mode="json"))),
    ]
    return card(
        config,
        default,
        counts=_counts(settings.data.tokens),
        accuracy=_accuracy(run.evaluation, run.manifest.step),
        training="\n\n".join(training),
        data=_data(run),
        bases=[source for source in sources if source and _on_the_hub(source)],
    )


def card(
    config: TokenFlexConfig,
    default: int,
    counts: str,
    accuracy: str,
    training: str,
    data: str,
    bases: Iterable[str] = (),
) -> str:
    """The card from its parts; `bases` are names on the hub that the weights come from."""
    from transformers import __version__

    side = min(config.patch_grid)
    base = "".join(f"- {name}\n" for name in bases)
    front = (
        "---\n# license: to be given by whoever publishes this model\n"
        "library_name: transformers\npipeline_tag: image-text-to-text\n"
        + (f"base_model:\n{base}" if base else "")
        + "tags:\n- tokenflex\n- custom_code\n---\n"
    )
    vision, text = config.vision_config, config.text_config
    architecture = (
        f"A vision-language model that reads an image tile as {_how_many(config)}. "
        f"{vision.model_type} ({vision.num_hidden_layers} layers of {vision.hidden_size}, "
        f"tiles of {config.tile_size} pixels, {side} x {side} patches), {_projector(config)}, "
        f"{text.model_type} ({text.num_hidden_layers} layers of "
        f"{text.hidden_size}, context {getattr(text, 'max_position_embeddings', 'unknown')})."
    )
    sections = {
        "": architecture,
        "How to use": _USE.format(
            default=default, version=__version__, oldest=OLDEST, newest=NEWEST
        ),
        "Tokens per image": _tokens_per_image(config, counts, default),
        "Accuracy": accuracy,
        "Training": training,
        "Data": data,
        "Limits": LIMITS.format(tile=config.tile_size),
        "License": _LICENSE,
    }
    body = [
        f"## {title}\n\n{text}" if title else f"# TokenFLEX\n\n{text}"
        for title, text in sections.items()
    ]
    return front + "\n" + "\n\n".join(body) + "\n"


def _how_many(config: TokenFlexConfig) -> str:
    if config.projector_num_tokens is not None:
        return f"{config.projector_num_tokens} tokens"
    side = min(config.patch_grid)
    paper = "[TokenFLEX](https://arxiv.org/abs/2504.03154)"
    return f"n x n tokens, n from 1 to {side} ({paper}): fewer are faster"


def _projector(config: TokenFlexConfig) -> str:
    if config.projector_method == "pool":
        return f"a token-adaptive projector ({config.pool} pooling)"
    return f"a projector of the method `{config.projector_method}`"


def _tokens_per_image(config: TokenFlexConfig, counts: str, default: int) -> str:
    if config.projector_num_tokens is not None:
        return f"{counts} This model makes {default} tokens of a tile and no other number."
    most = min(config.patch_grid) ** 2
    return (
        f"{counts} `num_image_tokens` may be any square n * n up to {most}; without it: {default}."
        f"\n\n{_known(config)}{UNKNOWN_COUNTS}"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _counts(tokens: TokenCountSettings) -> str:
    random = tokens.schedule == "stochastic"
    counts = [
        f"{count}{f' ({part:.0%})' * random}" if part else f"{count} (not trained, only evaluated)"
        for count, part in zip(tokens.counts, tokens.shares, strict=True)
    ]
    how = "drawn at random" if random else f"each sample at all of them ({tokens.schedule})"
    return f"Tokens per tile in training, {how}: {', '.join(counts)}."


def _known(config: TokenFlexConfig) -> str:
    """A line for each count that something is recorded of."""
    known = known_counts(config)
    counts = sorted({*(known.trained or ()), *known.evaluated})
    lines = [f"- {count} tokens per tile: {known.of(count)}\n" for count in counts]
    return "".join(lines) + "\n" * bool(lines)


def _accuracy(rows: list[dict[str, Any]], step: int) -> str:
    if not rows:
        return f"Step {step:,} was not evaluated."
    counts = sorted({row["num_image_tokens"] for row in rows})
    cells = {(row["detail"], row["num_image_tokens"]): row for row in rows}
    details = sorted({row["detail"] for row in rows}, key=lambda d: (d == "all", d))
    lines = [
        [
            f"{detail}, {cells[detail, counts[0]]['answers']} answers",
            *(f"{cells[detail, count]['accuracy']:.1%}" for count in counts),
        ]
        for detail in details
    ]
    return "Exact match of the greedy answer on held-out samples, by tokens per tile:\n\n" + table(
        ["", *(f"{count} tokens" for count in counts)], lines
    )


def _data(run: TrainedRun) -> str:
    data = run.config.data
    rows = [
        [
            name,
            ", ".join(_public(s) for s in source.shards),
            _or_dash(source.weight),
            _or_dash(source.repeat),
        ]
        for name, source in data.sources.items()
    ]
    held_out = ", ".join(_public(shards) for shards in data.eval_shards) or "none"
    return (
        table(("dataset", "shards", "weight", "epochs at most"), rows)
        + f"\n\nHeld out: {held_out}. Tokenizer: {data.tokenizer}. {_tiles(data.tiling)} "
        f"Prompts are in ChatML, with the system text {data.chat.system!r}."
    )


def _tiles(tiling: TilingSettings) -> str:
    if tiling.max_tiles == 1:
        return "An image is one tile."
    thumbnail = " and a thumbnail" if tiling.thumbnail else ""
    return f"An image is cut into {tiling.min_tiles} to {tiling.max_tiles} tiles{thumbnail}."


def _settings(dump: Mapping[str, Any]) -> str:
    """The settings as YAML, without what may hold secrets."""
    shown = {key: value for key, value in dump.items() if key != "output_dir"}
    shown["data"] = {key: value for key, value in dump["data"].items() if key != "storage"}
    shown = _public_values(shown)
    return f"```yaml\n{write_yaml(shown)}```"


def _public_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public_values(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public_values(entry) for entry in value]
    return _public(value) if isinstance(value, str) else value


def _public(place: str) -> str:
    """A URL without user, password and query, which may be a signature."""
    if "://" not in place:
        return place
    parts = urlsplit(place)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _on_the_hub(source: str) -> bool:
    return "/" in source and not Path(source).exists() and not is_missing(source)
