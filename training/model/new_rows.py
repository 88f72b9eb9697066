"""Rows of new tokens that train beside a frozen language model.

K new tokens, V vocabulary, D language width. Where the embedding has its [V, D] weight, a small one
of the same kind, `new_rows`, has [K, D]: it stands over the frozen rows of these tokens, and so it
does in the head. A head tied to the embedding shares its rows. Only the trainer knows of them:
whatever reads a checkpoint gets them in their places.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

NEW_ROWS = "new_rows"
"""X.new_rows.weight [K, D] lies over the rows X.new_rows.ids, ascending, of X.weight [V, D]."""

_ROWS_AT_ONCE = 8192

Whole = Callable[[nn.Parameter], AbstractContextManager[Any]]
"""In it a parameter is whole, and what is written into it stays."""

Rows = Callable[[nn.Parameter, Tensor], Tensor]
"""Gives the rows of a parameter, however an engine has partitioned it; every rank calls."""


def own_rows(parameter: nn.Parameter, ids: Tensor) -> Tensor:
    """A copy of some rows of a parameter that is not partitioned."""
    return parameter.detach()[ids.to(parameter.device)]


def train_new_rows(model: Any, ids: Sequence[int], rows: Rows = own_rows) -> None:
    """Let the rows of the tokens `ids` train, from the values that the frozen ones have.

    model: of transformers, its language model frozen.
    """
    index = torch.tensor(sorted(ids))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    over = {"weight": nn.Parameter(rows(embedding.weight, index))}
    table = _small_copy(embedding, over, index)
    table.num_embeddings = len(index)
    padding = index.tolist().index(embedding.padding_idx) if embedding.padding_idx in ids else None
    table.padding_idx = padding  # its row gets no gradient, here as there
    if head.weight is not embedding.weight:
        over = {"weight": nn.Parameter(rows(head.weight, index))}
    if head.bias is not None:
        over["bias"] = nn.Parameter(rows(head.bias, index))
    _small_copy(head, over, index).out_features = len(index)
    embedding.register_forward_hook(_over_embeddings)
    head.register_forward_hook(_over_logits)


def begin_at_the_mean(model: Any, ids: Sequence[int], known: int, whole: Whole) -> None:
    """Give the rows of the tokens `ids` the mean of the others, in embedding and head.

    model: a language model of transformers. known: its rows before it grew; later ones count not.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding.weight]
    if head.weight is not embedding.weight:
        tables.append(head.weight)
    if getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    for table in tables:
        with whole(table), torch.no_grad():
            index = torch.tensor(sorted(ids), device=table.device)
            is_old = torch.ones(len(table), dtype=torch.bool, device=table.device)
            is_old[known:] = is_old[index] = False
            parts = zip(table.split(_ROWS_AT_ONCE), is_old.split(_ROWS_AT_ONCE), strict=True)
            total = sum(rows[old].sum(0, dtype=torch.float32) for rows, old in parts)
            table[index] = (total / is_old.sum()).to(table.dtype)


def _small_copy(module: nn.Module, parameters: dict[str, nn.Parameter], ids: Tensor) -> Any:
    """Put a copy of the module that has these parameters into it, for the tokens `ids`."""
    small = copy.deepcopy(module, {id(getattr(module, k)): p for k, p in parameters.items()})
    small.register_buffer("ids", ids.to(parameters["weight"].device, copy=True))
    module.add_module(NEW_ROWS, small)
    return small


def _over_embeddings(embedding: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The embeddings [..., D] of the tokens [...], those of new tokens from their own rows."""
    (tokens,), table = inputs, embedding.get_submodule(NEW_ROWS)
    ids = table.get_buffer("ids")
    places = torch.searchsorted(ids, tokens).clamp_(max=len(ids) - 1)
    # Every rank calls it for every pack, new tokens or not: its rows may be partitioned.
    return torch.where((ids[places] == tokens)[..., None], table(places), output)


def _over_logits(head: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The logits [..., V], those of new tokens from their own rows."""
    table = head.get_submodule(NEW_ROWS)
    return output.index_copy_(-1, table.get_buffer("ids"), table(*inputs))
