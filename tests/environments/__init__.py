"""Environments on top of the project's own, for what only some tests need."""
