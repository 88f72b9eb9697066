"""`checkpoint.init_from`: is it the same model and tokenizer, and had that stage ended?"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.errors import InputError
from training import checkpoint
from training.checkpoint import Manifest
from training.config import ModelSettings
from training.distributed import from_main
from training.engine_interface import Engine
from training.model.build import section_differences
from training.run import Run


def earlier_stage(run: Run) -> Path | None:
    """The whole checkpoint that `checkpoint.init_from` means; None if it names none.

    Raises:
        InputError: on every rank, if there is none, it is damaged, or it is of another model or
            tokenizer in more than `checkpoint.init_allow` names.
    """
    settings = run.config.checkpoint
    if settings.init_from is None:
        return None
    named = Path(settings.init_from)
    path = from_main(lambda: next(iter(checkpoint.checkpoints_at(named)), named))
    checkpoint.verify_together(path, "checkpoint.init_from")
    manifest = from_main(lambda: checkpoint.read_manifest(path))
    different, unknown = _differences(manifest.fingerprints, run)
    refused = {
        key: text for key, text in different.items() if not _allowed(key, settings.init_allow)
    }
    if refused:
        raise InputError(
            f"checkpoint.init_from={path} is of another model: "
            + "; ".join(f"{key}: {text}" for key, text in refused.items())
            + ". Correct the settings, or name what is to differ: "
            f"checkpoint.init_allow=[{', '.join(refused)}]"
        )
    for key, text in different.items():
        run.say(f"warning: {path} differs, as checkpoint.init_allow permits: {key}: {text}")
    if unknown:
        run.say(f"warning: {path} does not record its {' and '.join(unknown)}: not compared")
    if text := _unfinished(manifest):
        run.say(f"warning: {path} {text}")
    return path


def take_weights(engine: Engine, path: Path, run: Run) -> None:
    """Take the weights of the checkpoint that `earlier_stage` gave; say what differs.

    Adapters of that stage go on training where this one has the same; else they are merged.
    """
    manifest = from_main(lambda: checkpoint.read_manifest(path))
    before, now = manifest.adapters.shapes(), run.config.train.adapters.shapes()
    same = [part for part in before if before[part] == now.get(part)]
    vocabulary = 0
    if _allowed("data.tokenizer", run.config.checkpoint.init_allow):
        vocabulary = max(run.tokenizer.vocab_size, run.config.model.llm.config.get("vocab_size", 0))
    different = engine.load_weights(path, manifest.world_size, vocabulary, manifest.adapters, same)
    run.say(f"weights from {path}")
    for part in before:
        how = "go on training" if part in same else "are merged into its matrices"
        run.say(f"its adapters of {part} {how}")
    if different:
        run.say(f"warning: not all of {path} was taken as it is: {'; '.join(different)}")


def _allowed(key: str, names: list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _differences(saved: dict[str, Any], run: Run) -> tuple[dict[str, str], list[str]]:
    """By setting, in what the model or tokenizer is another; and what is not known of them."""
    different: dict[str, str] = {}
    unknown = []
    try:
        section = ModelSettings.model_validate(saved.get("model"))
        different |= section_differences(section, run.config.model)
    except (ValidationError, InputError):
        unknown.append("model")
    there, here = saved.get("data.tokenizer"), run.tokenizer.fingerprint
    if there is None:
        unknown.append("tokenizer")
    elif there != here:
        different["data.tokenizer"] = (
            f"another one (fingerprint {there[:12]} there, {here[:12]} here)"
        )
    return different, unknown


def _unfinished(manifest: Manifest) -> str:
    """What to say of a stage that had not ended."""
    steps = manifest.run.get("settings", {}).get("train", {}).get("steps")
    if steps is None:
        return f"is of step {manifest.step} and does not record of how many: it may be unfinished"
    return f"is unfinished: step {manifest.step} of {steps}" if manifest.step < steps else ""
