"""SigLIP's vision tower, of one resolution; also SigLIP 2's where it has one."""

from transformers import SiglipVisionModel

from .vision_family_tokenflex import VisionFamily

SIGLIP = VisionFamily(
    model_type="siglip_vision_model",
    model_class=SiglipVisionModel,
    # The head makes one vector of all patches, which nothing reads.
    fixed={"vision_use_head": False},
)
