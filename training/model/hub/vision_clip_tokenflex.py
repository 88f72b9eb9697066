"""CLIP's vision tower: the patches of its last layer, without the class token before them."""

from transformers import CLIPVisionModel

from .vision_family_tokenflex import VisionFamily

CLIP = VisionFamily(
    model_type="clip_vision_model",
    model_class=CLIPVisionModel,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    leading_tokens=1,
    # Of the projection behind the class token, which the vision model alone does not have.
    fixed={"projection_dim": 512},
)
