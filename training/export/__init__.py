"""A trained checkpoint as a folder that loads with transformers alone."""

from training.export.export import export
from training.export.model_folder import ModelFolder, new_folder
from training.export.weights import Weight, checkpoint_weights, folder_weights

__all__ = [
    "ModelFolder",
    "Weight",
    "checkpoint_weights",
    "export",
    "folder_weights",
    "new_folder",
]
