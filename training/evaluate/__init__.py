"""Evaluation: the trainer's own (`in_training`), and that of exported models."""
