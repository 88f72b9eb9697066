"""No forward or backward of a pack asks the device for a number: each would stall its queue."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_pipeline.batch import IGNORE, PackedBatch
from kernels import registration
from tests.training.test_model import (
    IMAGE_TOKEN,
    SAMPLES,
    Sample,
    make_batch,
    make_model,
    make_samples,
)
from training.config import LAYERED
from training.model import PackedTokenFlex, TokenAdaptiveProjector
from training.model.attention import ATTENTION_NAME, packed_attention
from training.model.hub import TokenFlexProjector
from training.model.hub.modeling_tokenflex import _insert
from training.model.pack_inputs import model_inputs
from training.speed import compiled_layers
from training.speed.device_copies import PackCopies

# Ops whose result has a shape, or is a number, that only the device knows.
WAITING = (
    *("nonzero", "masked_select", "masked_scatter", "masked_scatter_backward", "argwhere"),
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "bincount", "histc"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
)
TEXT_ONLY, UNSUPERVISED = (
    make_samples([[], []]),
    [(s[0], [False] * len(s[0]), s[2]) for s in SAMPLES],
)


class Operations(TorchDispatchMode):
    """Lists what is done to tensors; `waits` are the ops that would wait for a device.

    host: tensors that stay on the host where the others are on a device, as do those computed from
        them alone.
    """

    def __init__(self, host: list[Tensor]) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []
        self._host = WeakTensorKeyDictionary(dict.fromkeys(host, True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        self.names.append(name)
        if given and all(tensor in self._host for tensor in given):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._host[tensor] = True
        # A mask as an index is looked through for its true places.
        elif name in WAITING or (name.startswith("index") and _masked(given)):
            self.waits.append(name)
        return result

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a custom op, which a mode does not see into, listed as well."""

        def listed(*args: Any) -> Any:
            with self:
                return function(*args)

        return listed


def _masked(tensors: list[Tensor]) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])


def packed_batch(samples: list[Sample]) -> PackedBatch:
    """The samples as the loader gives them."""
    made = make_batch(samples)
    ids, labels, weights = (made[name][0] for name in ("input_ids", "labels", "loss_weights"))
    learned = (labels != IGNORE).nonzero().flatten()
    return PackedBatch(
        input_ids=ids,
        position_ids=made["position_ids"][0],
        cu_seqlens=made["cu_seqlens"],
        labels=labels,
        loss_weights=weights,
        target_positions=learned - 1,
        targets=labels[learned],
        target_weights=weights[learned],
        image_positions=(ids == IMAGE_TOKEN).nonzero().flatten(),
        tiles=made["pixel_values"],
        tile_sides=made["tile_sides"],
        num_images=len(made["tile_sides"]),
        num_samples=len(samples),
        sample_ids=list(range(len(samples))),
        sample_datasets=[0] * len(samples),
        sample_sides=[0] * len(samples),
        max_seqlen=made["max_seqlen"],
        planned_tokens=len(ids),
        bad=[],
    )


def train(model: PackedTokenFlex, inputs: dict[str, Any]) -> Tensor:
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


@contextmanager
def listed(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Operations]:
    operations = Operations([inputs["cu_seqlens"]])  # checked where it is, on the host
    for name in ("forward", "backward"):
        monkeypatch.setattr(registration, name, operations.within(getattr(registration, name)))
    with operations:
        yield operations


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "samples", [SAMPLES, TEXT_ONLY, UNSUPERVISED], ids=["images", "text only", "unsupervised"]
)
def test_no_operation_of_a_step_waits_for_the_device(
    impl: str, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.projector.impl = impl
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = model_inputs(packed_batch(samples), torch.device("cpu"), loss_chunks=2)
    with listed(inputs, monkeypatch) as operations:
        train(model, inputs)
    assert operations.waits == []
    # Of every part it has listed something, also of what the projector's op hides.
    parts = {"convolution", "projector_forward", "projector_backward", "addmm", "embedding"}
    parts |= {"embedding_dense_backward", "_log_softmax", "_log_softmax_backward_data"}
    assert parts | ({"index_copy", "index_fill"} if inputs["tile_sides"] else set()) <= {
        *operations.names
    }


def test_a_step_runs_where_no_value_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device whatever is read on the host raises, also past the dispatcher."""
    monkeypatch.setattr(TokenAdaptiveProjector, "forward", TokenFlexProjector.forward)
    model, batch = make_model().to("meta"), packed_batch(SAMPLES)
    inputs = model_inputs(batch, torch.device("meta"))
    train(model, inputs)
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        model(**inputs | {"image_positions": None})


def test_the_exported_model_inserts_features_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, features = torch.randn(2, 9, 4), torch.randn(7, 4)
    where = torch.zeros(2, 9, dtype=torch.bool)
    where[[0, 0, 0, 1, 1, 1, 1], [1, 2, 8, 0, 4, 5, 7]] = True
    expected = embeds.clone()
    expected[where] = features
    compiled = torch.compile(_insert, fullgraph=True, backend="eager")
    assert torch.equal(compiled(embeds, where, features), expected)
    assert torch.equal(_insert(embeds, where, features), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Operations([]) as operations:
        assert _insert(embeds, where, features) is not embeds
    assert operations.waits == []


def test_compiled_layers_run_where_no_value_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenAdaptiveProjector, "forward", TokenFlexProjector.forward)
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    model, batch = make_model().to("meta"), packed_batch(SAMPLES)
    compiled_layers.compile_layers(model, LAYERED)
    try:
        train(model, model_inputs(batch, torch.device("meta")))
    finally:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
        torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("modules", [(), LAYERED], ids=["as it is", "compiled"])
def test_a_step_on_a_gpu_never_waits_for_it(modules: tuple[str, ...]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model, batch = make_model().to(device, torch.bfloat16), packed_batch(SAMPLES).pin_memory()
    if modules:
        compiled_layers.compile_layers(model, modules)
    copies = PackCopies(device)
    for _ in range(2):  # the first compiles kernels and fills caches
        expected = train(model, model_inputs(batch, device, loss_chunks=2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        copies.begin(batch)
        loss = train(model, model_inputs(batch, device, 2, moved=copies.take(batch)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, expected)
