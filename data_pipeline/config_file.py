"""Settings from one YAML file and `key=value` overrides, every problem reported at once."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from data_pipeline.errors import InputError
from data_pipeline.paths import expand_path
from data_pipeline.yaml_text import ends_early, read_yaml

_Settings = TypeVar("_Settings", bound=BaseModel)


class Settings(BaseModel):
    """Base of all settings: an unknown key, a number that is none, a switch for one are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    either: ClassVar[tuple[str, ...]] = ()
    """Keys that say the same thing: an override of one takes the place of the others."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(v, bool) for v in values):
            raise ValueError("expected a number, not a switch")
        return value


class KeyProblems(ValueError):
    """Problems inside a setting that is a dictionary: (key in it, what is wrong) of each."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {problem}" for key, problem in problems))
        self.problems = problems


def load_settings(
    kind: type[_Settings], path: str | Path, overrides: list[str] | None = None
) -> _Settings:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and check everything.

    An empty section has its defaults. Of overrides of one key the last counts; one that gives a
    section adds to it, one that gives a dictionary or a list replaces it.

    Raises:
        InputError: naming the file and, for every problem found, the key and what was expected.
    """
    try:
        path = Path(expand_path(str(path)))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: {error}") from error
    except ValueError as error:
        raise InputError(f"cannot read the config: {error}") from error
    raw = read_yaml(text, path)
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a mapping of settings, found {_shown(raw)}")
    for override in overrides or []:
        _apply_override(kind, raw, override)
    try:
        return kind.model_validate(_without_empty(kind, raw))
    except ValidationError as error:
        problems = [f"  {key}: {problem}" for key, problem in describe(kind, error)]
        plural = "problem" if len(problems) == 1 else "problems"
        raise InputError(f"{path}: {len(problems)} {plural}:\n" + "\n".join(problems)) from error


def _apply_override(kind: type[BaseModel], raw: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in the nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"override {override!r}: expected key.sub=value, as in train.steps=100")
    value = read_yaml(text, f"override {override!r}: the value")
    if ends_early(text):
        raise InputError(
            f"override {override!r}: what follows the # is a comment in YAML; put the value in "
            "quotes of its own"
        )
    keys = key.split(".")
    node = raw
    for depth, parent in enumerate(keys[:-1], 1):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise InputError(
                f"override {override!r}: {'.'.join(keys[:depth])} is a value, not a section"
            )
    section = _section(kind, keys[:-1])
    joined = _joined(section, node, {keys[-1]: value}) if section else {**node, keys[-1]: value}
    node.clear()
    node.update(joined)


def _joined(section: type[BaseModel] | None, old: Any, new: Any) -> Any:
    """`new`, with the keys of a section that only `old` gives and nothing in `new` replaces."""
    if section is None or not isinstance(old, dict) or not isinstance(new, dict):
        return new
    joined = {key: _joined(_section(section, [key]), old.get(key), new[key]) for key in new}
    either: tuple[str, ...] = getattr(section, "either", ())
    replaced = {*either} - {*new} if any(new.get(key) is not None for key in either) else set()
    return {**{key: value for key, value in old.items() if key not in replaced}, **joined}


def _section(kind: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The settings at a place; None where it is a value, a dictionary, or no place at all."""
    section: type[BaseModel] | None = kind
    for key in keys:
        field = section.model_fields.get(key) if section else None
        section = _model_of(field.annotation) if field else None
    return section


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation stands for, also an optional one."""
    if get_origin(annotation) in (dict, list):
        return None
    found = (annotation, *get_args(annotation))
    return next((t for t in found if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of; none of a dictionary's."""
    if get_origin(annotation) is dict:
        return set()
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


def _without_empty(kind: type[BaseModel], raw: dict[str, Any]) -> dict[str, Any]:
    """The mapping without sections, dictionaries and lists that are written, but empty."""
    kept = {}
    for key, value in raw.items():
        field = kind.model_fields.get(key)
        section = _model_of(field.annotation) if field else None
        if field and value is None:
            section_or_dict = field.annotation is section or get_origin(field.annotation) is dict
            if section_or_dict or field.default == []:
                continue
        nested = section is not None and isinstance(value, dict)
        kept[key] = _without_empty(section, value) if section and nested else value
    return kept


def describe(kind: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """The key and what is wrong, of every problem that pydantic found."""
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "config"
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, KeyProblems):
            problems += [(f"{key}.{sub}", problem) for sub, problem in cause.problems]
        elif item["type"] == "extra_forbidden":
            problems.append((key, "unknown key" + _suggestion(kind, item["loc"])))
        elif item["type"] == "missing":
            problems.append((key, "is required"))
        else:
            found = "" if isinstance(item["input"], BaseModel) else _found(item)
            problems.append((key, item["msg"].removeprefix("Value error, ") + found))
    return problems


def _found(item: Any) -> str:
    """What stands there; not where the message of a whole section says it."""
    value, is_text = item["input"], item["type"] in ("string_type", "path_type")
    if isinstance(value, dict) and item["type"] == "value_error":
        return ""
    hint = "; put it in quotes" if is_text and isinstance(value, bool | int | float) else ""
    hint = f"; write [{value}]" if item["type"] == "list_type" and isinstance(value, str) else hint
    return f" (found {_shown(value)}{hint})"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return "a section" if isinstance(value, dict) else repr(value)


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
    key = str(location[-1])
    hint = nearest(key, list(getattr(model, "model_fields", {})))
    places = [] if "did you mean" in hint else list(_places(kind, key))[:4]
    return f"; did you mean {' or '.join(places)}?" if places else hint


def _places(kind: type[BaseModel], name: str, prefix: str = "") -> Iterator[str]:
    """The settings of that name in any section."""
    for key, field in kind.model_fields.items():
        if key == name and prefix:
            yield prefix + key
        if section := _model_of(field.annotation):
            yield from _places(section, name, f"{prefix}{key}.")


def nearest(key: str, names: list[str], cutoff: float = 0.6) -> str:
    """What to say behind "unknown key": the name that is near, or all of them."""
    if close := difflib.get_close_matches(key, names, 1, cutoff):
        return f"; did you mean {close[0]}?"
    return f"; expected one of {', '.join(names)}" if names else ""
