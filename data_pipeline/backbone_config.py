"""The `config` of a backbone: what transformers would take without a word, checked key by key.

transformers keeps keys that it does not know and never looks at them, so a misspelt one leaves the
default in its place.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from data_pipeline.config_file import KeyProblems, nearest

# Of older config.json files: transformers translates them.
_OLDER = {"torch_dtype", "auto_map", "rope_theta", "rope_scaling", "partial_rotary_factor"}
_ROPE = {"rope_parameters", "rope_scaling"}
_SIZES = {"hidden_size", "intermediate_size", "head_dim", "vocab_size", "image_size", "patch_size"}
_SIZES |= {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
_SIZES |= {"num_channels", "max_position_embeddings"}
_POSITIVE = {"initializer_range", "rope_theta", "rms_norm_eps", "layer_norm_eps"}
_DIVIDED = (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"))
_LAYER_TYPE = "_attention"
"""How the names end under which rope's settings are given for some layers only."""


def check_backbone(config: dict[str, Any]) -> dict[str, Any]:
    """A backbone's config as it is.

    Raises:
        KeyProblems: a key that its class in transformers does not know, or a wrong value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind is None:
        raise KeyProblems([("model_type", "is required")])
    if kind not in CONFIG_MAPPING:
        hint = _near(str(kind), set(CONFIG_MAPPING))
        raise KeyProblems([("model_type", f"transformers knows no {kind!r}{hint}")])
    if problems := [
        *_unknown(CONFIG_MAPPING[kind], config),
        *_wrong_numbers(CONFIG_MAPPING[kind], config),
    ]:
        raise KeyProblems(problems)
    try:
        CONFIG_MAPPING[kind](**config)
    except (StrictDataclassError, KeyError, TypeError, ValueError, AttributeError) as error:
        cause = " ".join((str(error).strip() or type(error).__name__).split())
        if field := re.match(r"Validation error for field '(\w+)': (?:\w+: )?", cause):
            raise KeyProblems([(field[1], cause[field.end() :])]) from error
        raise ValueError(f"transformers refuses it: {cause}") from error
    return config


BackboneConfig = Annotated[dict[str, Any], AfterValidator(check_backbone)]
"""A setting that is the config.json of a vision tower or language model of transformers."""


def tile_side(tower: Mapping[str, Any]) -> int | None:
    """Side in pixels of a tower's square images; None where its config does not say.

    A tower of any patch grid has the square of its positions.
    """
    size, positions, patch = (tower.get(k) for k in ("image_size", "num_patches", "patch_size"))
    if size is None and isinstance(positions, int) and isinstance(patch, int):
        size = math.isqrt(positions) * patch
    return size if isinstance(size, int) else None


def _unknown(kind: Any, config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a config that its class does not know, also those of configs inside it."""
    own = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    known = own | set(kind().to_dict()) | {"model_type"} | _OLDER
    for key, value in config.items():
        if key not in known and not _of_generation(key) and not _read_by_code(kind, key):
            problem = f"unknown key of {kind.__name__}, which would not use it{_near(key, own)}"
            yield f"{prefix}{key}", problem
        elif key in _ROPE and isinstance(value, Mapping):
            yield from _unknown_rope(value, f"{prefix}{key}.")
        elif key in kind.sub_configs and isinstance(value, Mapping):
            sub = kind.sub_configs[key]
            if dataclasses.is_dataclass(sub):
                yield from _unknown(sub, value, f"{prefix}{key}.")


def _of_generation(key: str) -> bool:
    """Whether a key says how to generate, as config.json once did: it changes nothing here."""
    from transformers import GenerationConfig

    return key in vars(GenerationConfig())


def _read_by_code(kind: Any, key: str) -> bool:
    """Whether the code of the model asks for a key that its class does not list: head_dim, say."""
    asks = re.compile(rf"""getattr\([\w.]*config, ["']{re.escape(key)}["']""")
    folder = Path(inspect.getfile(kind)).parent
    return any(asks.search(file.read_text("utf-8")) for file in folder.glob("modeling_*.py"))


def _unknown_rope(rope: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """The same of the settings of rotary positions, and a kind of rope that there is not."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    known = {*RopeParameters.__annotations__, "type", "mrope_interleaved"}
    kinds = {*ROPE_INIT_FUNCTIONS, "default", "mrope"}
    for key, value in rope.items():
        if isinstance(value, Mapping) and key.endswith(_LAYER_TYPE):
            yield from _unknown_rope(value, f"{prefix}{key}.")
        elif key not in known:
            yield f"{prefix}{key}", f"unknown key of rotary positions{_near(key, known)}"
        elif key in ("type", "rope_type") and value not in kinds:
            expected = ", ".join(sorted(kinds))
            yield f"{prefix}{key}", f"expected one of {expected} (found {value!r})"


def _wrong_numbers(kind: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Sizes that no model can have, which transformers meets when it builds one, or never."""
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield key, f"expected a finite number (found {value})"
        elif key in _SIZES and isinstance(value, int) and value < 1:
            yield key, f"expected a whole number from 1 on (found {value})"
        elif key in _POSITIVE and isinstance(value, int | float) and value <= 0:
            yield key, f"expected a number above 0 (found {value})"
        elif key == "hidden_act" and isinstance(value, str):
            yield from _unknown_activation(value)
    own_head_size = config.get("head_dim") or getattr(kind(), "head_dim", None)
    for whole, part in _DIVIDED if not own_head_size else _DIVIDED[1:]:
        size, count = config.get(whole), config.get(part)
        if isinstance(size, int) and isinstance(count, int) and count > 0 and size % count:
            yield whole, f"expected a multiple of {part} {count} (found {size})"
    image, patch = config.get("image_size"), config.get("patch_size")
    if isinstance(image, int) and isinstance(patch, int) and image < patch:
        yield "image_size", f"expected at least one patch of {patch} pixels (found {image})"


def _unknown_activation(name: str) -> Iterator[tuple[str, str]]:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        yield "hidden_act", f"transformers knows no activation {name!r}{_near(name, set(ACT2FN))}"


def _near(key: str, known: set[str]) -> str:
    hint = nearest(key, sorted(known), cutoff=0.75)
    return hint if "did you mean" in hint else ""
