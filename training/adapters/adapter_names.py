"""What adapters are called among a model's parameters, and which matrix each of them lies beside.

PEFT puts a layer of its own in a Linear's place: X.weight becomes X.base_layer.weight, beside
X.lora_A.default.weight [r, in], X.lora_B.default.weight [out, r] and, of DoRA,
X.lora_magnitude_vector.default.weight [out]. Those of the projector's matrix projector.w1 are
projector.adapters.w1.lora_A and lora_B.
"""

import re

ADAPTER = "default"
"""The one adapter's name in PEFT."""
_OF_LAYER = re.compile(rf"(.*\.)(lora_A|lora_B|lora_magnitude_vector)\.{ADAPTER}\.weight")
_OF_PROJECTOR = re.compile(r"(.*)adapters\.(w\d)\.(lora_A|lora_B)")


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def piece_of(name: str) -> tuple[str, str] | None:
    """(plain name of the matrix, lora_A and so on) of an adapter's parameter; else None."""
    if found := _OF_LAYER.fullmatch(name):
        return f"{found[1]}weight", found[2]
    if found := _OF_PROJECTOR.fullmatch(name):
        return f"{found[1]}{found[2]}", found[3]
    return None
