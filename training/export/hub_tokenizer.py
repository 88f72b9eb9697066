"""The project's tokenizers as fast tokenizers of transformers, with the same ids for every text.

A sentencepiece model becomes a `tokenizer.json` that needs no sentencepiece. Where the two
libraries would disagree the conversion is refused: `check_same_ids` compares them at every one.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS, encode_fast, encode_text
from data_pipeline.tokenizer import SentencePieceTokenizer, Tokenizer

_SPACE = "\u2581"
# sentencepiece's ModelProto.SentencePiece.Type and TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_BPE = 2


def to_hub_tokenizer(tokenizer: Tokenizer, context: int) -> Any:
    """A fast tokenizer with the ids of `tokenizer`, to be saved into a model folder.

    Args:
        tokenizer: from `data_pipeline.tokenizer.load_tokenizer`.
        context: tokens that the language model reads at most.

    Raises:
        InputError: if it cannot be converted, or would give another id for some text.
    """
    fast: Any
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = _from_sentencepiece(tokenizer)
    else:
        fast = AutoTokenizer.from_pretrained(tokenizer.source, trust_remote_code=False)
        fast.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        fast.chat_template = None  # the processor has training's
        if fast.pad_token_id is None:
            fast.pad_token = "<|im_end|>"
        if fast.eos_token_id is None:
            fast.eos_token = "<|im_end|>"
    fast.model_max_length = context
    check_same_ids(tokenizer, fast)
    return fast


def check_same_ids(tokenizer: Tokenizer, fast: Any) -> None:
    """InputError, with the text, if the two disagree on markers or on some text of a few thousand.

    Texts: every piece of the vocabulary (of a large one a sample), random runs of pieces, and what
    usually differs between libraries.
    """
    markers = {token: tokenizer.special_id(token) for token in SPECIAL_TOKENS}
    for marker, expected in markers.items():
        if (found := fast.convert_tokens_to_ids(marker)) != expected:
            raise InputError(
                f"the tokenizer {tokenizer.source} has {marker} as id {expected}, converted it has "
                f"{found}; train the model with a Hugging Face tokenizer instead"
            )
    special = set(markers.values())
    for text in _probes(tokenizer):
        expected_ids = tokenizer.encode(text)
        try:
            found_ids = encode_text(partial(encode_fast, fast), text, special, "text")
        except ValueError:
            found_ids = []
        if found_ids != expected_ids:
            raise InputError(
                f"the tokenizer {tokenizer.source} gives {expected_ids[:12]} for {text[:60]!r}, "
                f"converted it gives {found_ids[:12]}, so that the exported model would read other "
                "text than was trained; train it with a Hugging Face tokenizer instead"
            )


_AWKWARD = (
    "",
    " ",
    "   ",
    " leading, trailing ",
    "two  spaces\tand a tab\r\n\n\nlines\u00a0",
    "0123456789 00 1000000 3.14",
    "caf\u00e9 cafe\u0301 \u00df \ufb01 \u212b \u2460 \uff21",
    "\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \U0001f468\u200d\U0001f469\u200d\U0001f467 \ud55c",
    f"{_SPACE}a {_SPACE}{_SPACE} b{_SPACE}",
    "\x00\x01\x7f\ufeff\ufffd\u200b",
    "<0x41> <unk> <s> </s> <pad> <image>",
    *SPECIAL_TOKENS,
    "".join(SPECIAL_TOKENS),
    "a<img>b <|im_end|>\n<|im_start|>user\n <IMG_CONTEXT><IMG_CONTEXT> </img",
)


def _probes(tokenizer: Tokenizer, most: int = 3000) -> Iterator[str]:
    """The texts of `check_same_ids`, the same at every call."""
    yield from _AWKWARD
    rng = random.Random(0)
    ids = list(range(tokenizer.vocab_size))
    if len(ids) > most:
        ids = rng.sample(ids, most)
    pieces = [tokenizer.decode([i]) for i in ids]
    yield from pieces
    for _ in range(most):
        joint = rng.choice(("", "", " "))
        yield joint.join(rng.choices(pieces, k=rng.randint(2, 12)))
    for piece in rng.sample(pieces, min(len(pieces), most // 10)):
        yield piece * rng.randint(2, 9)  # merges that overlap


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> PreTrainedTokenizerFast:
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    proto = protobuf.ModelProto()  # type: ignore[attr-defined]  # made at import
    proto.ParseFromString(Path(tokenizer.source).read_bytes())
    _check_kind(proto, tokenizer.source)
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    backend = Backend(_model(proto, unknown))
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.decoder = _decoder(proto.normalizer_spec)
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            ordinary = piece.type == _USER_DEFINED
            token = AddedToken(piece.piece, normalized=ordinary, special=not ordinary)
            (backend.add_tokens if ordinary else backend.add_special_tokens)([token])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    names = {backend.token_to_id(token): token for token in SPECIAL_TOKENS}
    pad = names.get(tokenizer.pad_id) or backend.id_to_token(tokenizer.pad_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        pad_token=pad,
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )


def _check_kind(proto: Any, source: str) -> None:
    """InputError for what sentencepiece does and tokenizer.json does not, or not exactly."""
    if proto.trainer_spec.model_type != _BPE:
        problem = "is not a byte-pair model"
    elif proto.normalizer_spec.precompiled_charsmap:
        problem = "rewrites characters (its normalization rule is not `identity`)"
    elif proto.normalizer_spec.remove_extra_whitespaces:
        problem = "drops spaces"
    elif proto.trainer_spec.treat_whitespace_as_suffix:
        problem = "puts spaces behind words"
    elif not proto.normalizer_spec.escape_whitespaces:
        problem = "does not escape spaces"
    elif any(piece.type == _UNUSED for piece in proto.pieces):
        problem = "has unused pieces"
    else:
        return
    raise InputError(
        f"the tokenizer {source} {problem}, which tokenizer.json cannot do exactly; train with a "
        "byte-pair model without that, or with a Hugging Face tokenizer"
    )


def _model(proto: Any, unknown: str) -> Any:
    pieces = proto.pieces
    return models.BPE(
        vocab={piece.piece: i for i, piece in enumerate(pieces)},
        merges=_merges(pieces),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """The pairs that sentencepiece would join, the first to be joined first."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [(a, b) for a, b in pairs if a in scores and b in scores]
    return merges


def _normalizer(spec: Any) -> Any:
    prefix = [normalizers.Prepend(" ")] if spec.add_dummy_prefix else []
    return normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])


def _decoder(spec: Any) -> Any:
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
