"""The families of vision towers that a model can have. A new one: its file, and a line here."""

from .vision_clip_tokenflex import CLIP
from .vision_family_tokenflex import VisionFamily
from .vision_siglip2_tokenflex import SIGLIP2
from .vision_siglip_tokenflex import SIGLIP

FAMILIES: dict[str, VisionFamily] = {
    family.model_type: family for family in (SIGLIP, CLIP, SIGLIP2)
}
DEFAULT_FAMILY = SIGLIP


def vision_family(model_type: str) -> VisionFamily:
    """The family of a vision config's model_type; ValueError, naming all, where there is none."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"vision_config has model_type {model_type!r}; give the vision_config of a "
            f"checkpoint's config.json whose model_type is one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
