"""What an optimizer is given: its settings, and which learning rate a layer has."""

from training.optimizers.layer_decay import layer_depths

__all__ = ["layer_depths"]
