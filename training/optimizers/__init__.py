"""What an optimizer is given: its settings, which parameters are whose, a layer's learning rate."""

from training.optimizers.hidden_matrices import hidden_matrices
from training.optimizers.layer_decay import layer_depths
from training.optimizers.optimizer_settings import EmaSettings, OptimizerSettings

__all__ = ["EmaSettings", "OptimizerSettings", "hidden_matrices", "layer_depths"]
