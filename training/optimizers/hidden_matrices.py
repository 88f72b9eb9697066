"""The matrices that Muon updates: those inside of layers, from features to features."""

from typing import Any

from torch import nn

from training.adapters import piece_of

_OF_PROJECTORS = ("w1", "w2", "w3")


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the weights of linear layers and of the projector's w1, w2 and w3.

    Not of embeddings and the head (nor of rows of new tokens in them), which are tables of rows;
    nor of convolutions; nor of adapters, whose factors are no matrices of their own.
    """
    whole: Any = model
    head = whole.language_model.get_output_embeddings()
    tables = {id(module) for module in head.modules()} if head is not None else set()
    found = set()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear) and leaf == "weight" and id(module) not in tables
            of_projector = name.startswith("projector") and leaf in _OF_PROJECTORS
            if (linear or of_projector) and not piece_of(f"{name}.{leaf}"):
                found.add(id(parameter))
    return found
