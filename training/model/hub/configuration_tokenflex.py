"""Configuration of the model: vision tower, token-adaptive projector, any causal LM."""

# First: it names the release that is needed, where the rest could not be imported.
from .releases_tokenflex import OLDEST  # noqa: F401  # isort: skip

import math
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from .pooling_tokenflex import POOL_MODES
from .token_methods_tokenflex import DEFAULT_METHOD, METHODS, check_method
from .vision_family_tokenflex import VisionFamily
from .vision_towers_tokenflex import DEFAULT_FAMILY, vision_family

if TYPE_CHECKING:  # older releases copy from a folder only the files that are named here
    from .merge_tokens_tokenflex import MergeProjector  # noqa: F401
    from .projector_tokenflex import TokenFlexProjector  # noqa: F401
    from .query_tokens_tokenflex import QueryProjector  # noqa: F401
    from .select_tokens_tokenflex import SelectProjector  # noqa: F401
    from .token_method_tokenflex import TokenMethod  # noqa: F401
    from .unshuffle_tokenflex import UnshuffleProjector  # noqa: F401
    from .vision_clip_tokenflex import CLIP  # noqa: F401
    from .vision_siglip2_tokenflex import SIGLIP2  # noqa: F401
    from .vision_siglip_tokenflex import SIGLIP  # noqa: F401


class TokenFlexConfig(PreTrainedConfig):
    """What `TokenFlexForConditionalGeneration` is built from; kept in transformers' config.json.

    vision_config: the config of a vision tower of a known family (see `vision_towers_tokenflex`),
        or its dict. What does not change the patches is off: a head that pools them, for example.
    text_config: the config of any causal language model, or its dict with `model_type`.
    projector_method: how patches become tokens, one of `token_methods_tokenflex`.
    projector_num_tokens: tokens per tile, for a method that makes one number only; else None.
    pool: the windows of methods that pool, "adaptive" or "resize" (see `pooling_tokenflex`).
    projector_hidden_ratio: hidden width of the projector in multiples of the vision width; 3 in
        the released model.
    image_token_id: the id of <IMG_CONTEXT>, whose positions receive the image features.
    image_mean, image_std: per channel, applied to pixels in 0..1; None for the family's.

    Raises ValueError for a vision config of another kind, a text config without a known
    `model_type`, and values out of range.
    """

    model_type = "tokenflex"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    pool: str = "adaptive"
    projector_hidden_ratio: int = 3
    projector_method: str = DEFAULT_METHOD
    projector_num_tokens: int | None = None
    image_token_id: int = -1
    image_mean: Any = None
    image_std: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        default = DEFAULT_FAMILY.model_type
        self.vision_config = _sub_config("vision_config", self.vision_config, default)
        self.text_config = _sub_config("text_config", self.text_config, "qwen2")
        family = self.vision_family
        self.vision_config = family.complete(self.vision_config)
        self.image_mean = list(family.image_mean if self.image_mean is None else self.image_mean)
        self.image_std = list(family.image_std if self.image_std is None else self.image_std)
        self._check()
        super().__post_init__(**kwargs)
        # transformers asks this config, not the language model's.
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)

    def _check(self) -> None:
        if self.pool not in POOL_MODES:
            raise ValueError(f"pool is {self.pool!r}; use one of {', '.join(POOL_MODES)}")
        if self.projector_hidden_ratio < 1:
            raise ValueError(
                f"projector_hidden_ratio is {self.projector_hidden_ratio}; must be at least 1"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean is {self.image_mean}, image_std is {self.image_std}; "
                "give three numbers each (red, green, blue), std above 0"
            )
        self.vision_family.check(self.vision_config)
        check_method(self.projector_method, self.pool, self.projector_num_tokens, self.patch_grid)

    @property
    def vision_family(self) -> VisionFamily:
        """What is known of the vision tower's family."""
        return vision_family(self.vision_config.model_type)

    @property
    def tile_size(self) -> int:
        """Side of a square tile in pixels."""
        return self.vision_family.tile_size(self.vision_config)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of the vision tower's patches for one tile."""
        return self.vision_family.patch_grid(self.vision_config)

    @property
    def smallest_side(self) -> int:
        """The least n of a tile, which a blank one gets: 1, unless there is but one."""
        fixed = METHODS[self.projector_method].fixed
        return math.isqrt(self.projector_num_tokens or 0) if fixed else 1

    def check_image_token(self) -> None:
        """Raise ValueError unless the language model has the image token."""
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id}, the language model has "
                f"{self.text_config.vocab_size} tokens; give the id of <IMG_CONTEXT> and a "
                "text_config.vocab_size that covers the tokenizer"
            )


def _sub_config(key: str, value: Any, default_type: str) -> PreTrainedConfig:
    """A config object from what the user gave: an object, a dict, or None for the defaults."""
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    known = value is None or key == "vision_config"
    model_type = fields.pop("model_type", default_type if known else None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{key}.model_type is {model_type!r}; give one that the installed transformers knows, "
            f"such as {default_type!r}"
        )
    return CONFIG_MAPPING[model_type](**fields)
