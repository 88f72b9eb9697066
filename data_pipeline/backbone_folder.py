"""The architecture of a tower or language model, read from the folder of its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.config_file import KeyProblems
from data_pipeline.errors import InputError
from data_pipeline.paths import expand_path
from data_pipeline.pretrained_source import check_source, is_missing
from data_pipeline.yaml_text import read_yaml

# Keys of a config.json that say who wrote it and for what, not what is computed.
_NOTES = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "problem_type",
        "torch_dtype",
        "transformers_version",
    ]
)


def with_architecture(section: Any) -> Any:
    """A backbone's section, its `config` that of `pretrained` where it gives none of its own.

    Raises:
        KeyProblems: what `pretrained` names has no configuration.
    """
    if not isinstance(section, Mapping) or section.get("config") is not None:
        return section
    source = section.get("pretrained")
    if not isinstance(source, str):
        text = "is required where pretrained names no folder to read it from"
        raise KeyProblems([("config", text)])
    return {**section, "config": architecture(expand_path(source))}


def architecture(source: str) -> dict[str, Any]:
    """The config of a folder, or of a name on the hub; the tower's where there is more than that.

    Raises:
        KeyProblems: of the key `pretrained`.
    """
    from transformers import AutoConfig

    try:
        check_source(source, source, "a folder with config.json, a name on the hub, or a config")
        found: Any = AutoConfig.from_pretrained(source)
    except (InputError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        text = f"its architecture cannot be read, and config gives none: {cause}"
        raise KeyProblems([("pretrained", text)]) from error
    found = getattr(found, "vision_config", found)
    return {key: value for key, value in found.to_dict().items() if key not in _NOTES}


def as_before(settings: Any) -> Any:
    """A run's settings, with architectures from the `config.yaml` in its `output_dir`.

    For parts that give none and whose weights are not there any more: checkpoints hold these.
    """
    try:
        folder = Path(expand_path(str(settings["output_dir"])))
        model = dict(settings["model"])
        saved = read_yaml((folder / "config.yaml").read_text("utf-8"), folder)["model"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return settings
    for part in ("vision", "llm"):
        section, before = model.get(part) or {}, saved.get(part) or {}
        if isinstance(section, Mapping) and section.get("config") is None:
            source = section.get("pretrained")
            gone = source is None or (isinstance(source, str) and is_missing(expand_path(source)))
            if gone and "config" in before:
                model[part] = {**section, "config": before["config"]}
    return {**settings, "model": model}
