"""Config, model, training loop, checkpoints, metrics and evaluation."""
