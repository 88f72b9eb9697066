"""What lmms-eval looks up in a plugin: model names and their classes, in modules of those names."""

AVAILABLE_MODELS = {"tokenflex": "TokenFlexPlugin"}
