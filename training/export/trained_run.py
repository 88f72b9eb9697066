"""What a run's output folder says about a checkpoint: settings, evaluation, how much was read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from training.checkpoint.folder_layout import Manifest, checkpoints_at, read_manifest
from training.checkpoint.verify import problems_of
from training.config import RunConfig, load_config
from training.metrics import read_evaluations, read_metrics
from training.side_outputs import warn


@dataclass(frozen=True)
class TrainedRun:
    """A whole checkpoint and its run.

    evaluation: the run's scores at this step, none if it was not evaluated. seen: sums of samples,
    images and tokens up to this step, empty if the run's metrics are not there.
    """

    checkpoint: Path
    manifest: Manifest
    config: RunConfig
    tokenizer: Tokenizer
    precision: str
    evaluation: list[dict[str, Any]]
    seen: dict[str, int]


def open_run(path: Path, config: Path | None = None, tokenizer: str | None = None) -> TrainedRun:
    """Verify a checkpoint and read its run's settings.

    Args:
        path: a checkpoint, a folder of them, or a run's output_dir; of several the newest whole
            one is taken.
        config: the run's config.yaml, where it is not in the checkpoint's run.
        tokenizer: of the run, where it is no longer at the place that the config names.

    Raises:
        InputError: if there is no whole checkpoint, or config and tokenizer are not those that
            trained it.
    """
    checkpoint = _newest_whole(path)
    manifest = read_manifest(checkpoint)
    run = checkpoint.parent.parent
    file = config or run / "config.yaml"
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the run's config.yaml with --config")
    settings = load_config(file)
    loaded = load_tokenizer(tokenizer or settings.data.tokenizer)
    _check_same(manifest, settings, loaded, file)
    precision = manifest.fingerprints.get("train.precision", settings.train.precision)
    return TrainedRun(
        checkpoint,
        manifest,
        settings,
        loaded,
        "bf16" if precision == "bf16" else "fp32",
        _evaluation(run, manifest.step),
        _seen(run / "metrics.jsonl", manifest.step),
    )


def _newest_whole(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest whole one of a run or folder."""
    newest_first = checkpoints_at(path)
    if not newest_first:
        raise InputError(
            f"{path} holds no finished checkpoint; give one like runs/digits/checkpoints/"
            "step-00000100, or the output_dir of a run"
        )
    problems = []
    for checkpoint in newest_first:
        with tqdm(
            desc=f"verifying {checkpoint.name}",
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar:
            found = problems_of(checkpoint, bar.update)
        if not found:
            return checkpoint
        problems.append(f"{checkpoint}: {found[0]}")
        if len(newest_first) > 1:
            warn(f"passed over: {problems[-1]}")
    raise InputError(f"no whole checkpoint: {'; '.join(problems)}; give another")


def _check_same(
    manifest: Manifest, config: RunConfig, tokenizer: Tokenizer, config_file: Path
) -> None:
    """InputError where the settings are not those that the checkpoint was saved with."""
    now = {
        "data.tokenizer": tokenizer.fingerprint,
        "data.chat": config.data.chat.model_dump(mode="json"),
        "data.tiling": config.data.tiling.model_dump(mode="json"),
        "model": config.model.fingerprint(),
        "train.adapters": config.train.adapters.shapes(),
    }
    saved = manifest.fingerprints
    if changed := [key for key in now if key in saved and saved[key] != now[key]]:
        raise InputError(
            f"{', '.join(changed)} in {config_file} is not what step {manifest.step} was trained "
            f"with (tokenizer: {tokenizer.source}); give the run's own config.yaml with --config, "
            "and its tokenizer with --tokenizer"
        )


def _evaluation(run: Path, step: int) -> list[dict[str, Any]]:
    """The newest evaluation if it is of this step, else that of the history."""
    try:
        newest = dict(json.loads((run / "evaluation.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        newest = {}
    found = [r.get("results") for r in (*read_evaluations(run), newest) if r.get("step") == step]
    return (found or [None])[-1] or []


def _seen(file: Path, step: int) -> dict[str, int]:
    rows = [row for row in read_metrics(file) if row["step"] <= step]
    if len(rows) < step:
        return {}
    return {name: round(sum(row[name] for row in rows)) for name in ("samples", "images", "tokens")}
