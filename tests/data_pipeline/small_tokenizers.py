"""Tokenizers that tests train in a moment, without a network."""

from pathlib import Path

from data_pipeline.tokenizer import train_sentencepiece

TEXTS = [
    "hello world, this is a small text about a picture\n",
    "user system assistant\nWhat is shown in the picture? A red cell in row 3.",
    "<img> </img> <IMG_CONTEXT> <|im_start|> <|im_end|> quoted in a caption",
] * 20


def save_sentencepiece(folder: Path) -> Path:
    """One of our own sentencepiece models; returns the .model file."""
    train_sentencepiece(TEXTS, folder / "tokenizer.model", 400)
    return folder / "tokenizer.model"


def save_hugging_face(folder: Path) -> Path:
    """A byte-level BPE as Qwen has it, with two of the five specials, and two as ordinary ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<img>", AddedToken("<IMG_CONTEXT>", special=False, normalized=False)])
    tokenizer.save_pretrained(folder)
    return folder
