"""Pretrained weights come with a tokenizer: ids of another one would mean other rows to them."""

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from training.config import RunConfig

PROBES = (
    "What is shown in the picture? A red cell in row 3, 12345 of 67%.",
    "Überraschung im Café, naïve; 北京 東京 Москва\n    def f(x):\n\treturn x**2",
)


def check_pretrained_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Where the language model's weights are pretrained, is theirs the run's tokenizer?

    Compared by what it does; weights that come without a tokenizer pass.

    Raises:
        InputError: if it gives other ids and `checkpoint.init_allow` does not name data.tokenizer.
    """
    model = config.model
    key, path = "model.pretrained", model.pretrained
    if path is None:
        key, path = "model.llm.pretrained", model.llm.pretrained
    if path is None or "data.tokenizer" in config.checkpoint.init_allow:
        return
    try:
        own = load_tokenizer(path)
    except InputError:
        return
    for text in PROBES:
        # Where there are no files, transformers makes a tokenizer that knows no text.
        if own.encode(text) not in ([], tokenizer.encode(text)):
            raise InputError(
                f"{key}={path} has another tokenizer than data.tokenizer={config.data.tokenizer}: "
                f"{text[:20]!r} is {own.encode(text)[:4]}... there and "
                f"{tokenizer.encode(text)[:4]}... here. Set data.tokenizer={path}, or "
                "checkpoint.init_allow=[data.tokenizer] if the embeddings are to be trained anew"
            )
