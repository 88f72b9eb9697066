"""A trained checkpoint as a folder that loads with transformers alone."""

from training.export.checkpoint import export
from training.export.folder import ModelFolder, new_folder
from training.export.weights import Weight, checkpoint_weights, folder_weights

__all__ = [
    "ModelFolder",
    "Weight",
    "checkpoint_weights",
    "export",
    "folder_weights",
    "new_folder",
]
