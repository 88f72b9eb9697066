"""`train.modules.language_model.train=new_tokens`: which tokens are new to the language model."""

from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from training import checkpoint
from training.checkpoint import Manifest
from training.distributed import from_main
from training.model.build import pretrained_config
from training.run import Run
from training.start.pretrained_tokenizer import PROBES

_NAMED = 8
"""Most tokens in one message."""


def settle_new_tokens(run: Run, manifest: Manifest | None, stage: Path | None) -> list[int]:
    """The ids whose rows are to train, ascending; none where the settings ask for none.

    They are the same at every start of a run: its checkpoints name them.

    Args:
        manifest: of the checkpoint that the run goes on from.
        stage: the earlier stage that it starts from.

    Raises:
        InputError: on every rank, if no token is new.
    """
    if run.config.train.modules.language_model.train != "new_tokens":
        return []
    saved = manifest.run.get("new_tokens") if manifest else None
    ids: list[int] = saved or from_main(lambda: sorted(_new_to_the_weights(run, stage)))
    if not ids:
        raise InputError(
            "train.modules.language_model.train=new_tokens, but no token of "
            f"data.tokenizer={run.config.data.tokenizer} is new to the language model; set it to "
            "false, which freezes all rows, or true, which trains the whole language model"
        )
    names = [run.tokenizer.decode([i], skip_special=False) or f"id {i}" for i in ids[:_NAMED]]
    more = ", ..." if len(ids) > _NAMED else ""
    run.say(f"rows of {len(ids)} new tokens train: {', '.join(names)}{more}")
    return ids


def _new_to_the_weights(run: Run, stage: Path | None) -> set[int]:
    """The tokens that the trainer appended, or that the weights to start from do not know."""
    ids = set(run.tokenizer.appended) | _unknown_to_the_pretrained(run)
    pretrained = run.config.model.llm.pretrained
    if stage:
        before = checkpoint.read_manifest(stage).run
        ids.update(before.get("new_tokens", []))
        known = before.get("vocab_size", run.tokenizer.vocab_size)
    elif pretrained and not run.config.model.pretrained:
        known = pretrained_config("model.llm.pretrained", pretrained).vocab_size
    else:
        known = run.tokenizer.vocab_size
    return ids.union(range(known, run.tokenizer.vocab_size))


def _unknown_to_the_pretrained(run: Run) -> set[int]:
    """The tokens that the tokenizer of the pretrained language model has not; none without one."""
    path = run.config.model.pretrained or run.config.model.llm.pretrained
    try:
        own = load_tokenizer(path) if path else None
    except InputError:
        return set()
    # Where there are no files, transformers makes a tokenizer that knows no text.
    if own is None or not own.encode(PROBES[0]):
        return set()
    known = {token: i for token, i in own.vocabulary().items() if i not in own.appended}
    return {i for token, i in run.tokenizer.vocabulary().items() if known.get(token) != i}
