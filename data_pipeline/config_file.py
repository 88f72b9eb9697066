"""Settings from one YAML file and `key=value` overrides, every problem reported at once."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from data_pipeline.errors import InputError

_Settings = TypeVar("_Settings", bound=BaseModel)


def load_settings(
    kind: type[_Settings], path: str | Path, overrides: list[str] | None = None
) -> _Settings:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and check everything.

    Raises:
        InputError: naming the file and, for every problem found, the key and what was expected.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a mapping of settings, found {type(raw).__name__}")
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise InputError(_describe(kind, path, error)) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in the nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"override {override!r}: expected key.sub=value, as in train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value: {error}") from error
    *parents, last = key.split(".")
    node = raw
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section"
            )
    node[last] = value


def _describe(kind: type[BaseModel], path: Path, error: ValidationError) -> str:
    """All problems of a configuration, one per line."""
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            message = "unknown key" + _suggestion(kind, item["loc"])
        elif item["type"] == "missing":
            message = "is required"
        else:
            found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
            message = item["msg"].removeprefix("Value error, ") + found
        problems.append(f"  {key}: {message}")
    plural = "problem" if len(problems) == 1 else "problems"
    return f"{path}: {len(problems)} {plural}:\n" + "\n".join(problems)


def _suggestion(kind: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The valid keys beside an unknown one, the nearest first."""
    model: Any = kind
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:  # otherwise a place in a list, or a name in a mapping
            found = (field.annotation, *getattr(field.annotation, "__args__", ()))
            model = next(
                (t for t in found if isinstance(t, type) and issubclass(t, BaseModel)), None
            )
    names = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; expected one of {', '.join(names)}" if names else ""
