"""No tasks of our own: lmms-eval looks for this folder in a plugin."""
