"""Packs on their way to a GPU: the next one's copy is under way before this one is computed."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.batch import PackedBatch
from data_pipeline.loader import StepBatch
from data_pipeline.plan import PlanState, StepPlan
from tests.training.test_host_waits import SAMPLES, packed_batch
from training import step
from training.speed.device_copies import PackCopies

GPU = torch.device("cuda", 0)


@pytest.fixture
def did(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, in order, on a GPU that is not there."""
    done: list[str] = []

    def move(pack: PackedBatch, device: torch.device) -> PackedBatch:
        done.append(f"copy {pack.num_images}")
        return pack

    current = SimpleNamespace(wait_stream=lambda stream: done.append(f"wait for {stream}"))
    monkeypatch.setattr(PackedBatch, "to", move)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "the copies")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    return done


def numbered(number: int) -> PackedBatch:
    pack = packed_batch(SAMPLES)
    pack.num_images = number
    return pack


def test_a_pack_that_was_begun_is_waited_for_by_the_stream_alone(did: list[str]) -> None:
    copies, packs = PackCopies(GPU), [numbered(0), numbered(1), numbered(2)]
    copies.take(packs[0])
    copies.begin(packs[1])
    assert did == ["copy 0", "copy 1"]
    assert copies.take(packs[1]) is packs[1] and did[2:] == ["wait for the copies"]
    copies.begin(packs[0])  # of a step that then did not come
    copies.begin(None)
    assert copies.take(packs[2]) is packs[2] and did[-1] == "copy 2"


def test_where_nothing_is_to_be_ahead_a_pack_is_copied_when_it_is_taken(did: list[str]) -> None:
    pack = numbered(0)
    for copies in (PackCopies(torch.device("cpu")), PackCopies(GPU, one_ahead=False)):
        copies.begin(pack)
        assert not did
        assert copies.take(pack) is pack and did.pop() == "copy 0"


def test_a_step_copies_one_pack_ahead_also_of_the_next_step(
    did: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packs, following = [numbered(0), numbered(1)], numbered(2)
    batch = StepBatch(packs, PlanState(), StepPlan(0, 0, ()), following=lambda: following)

    class Stop(Exception):
        pass

    def reduce() -> None:
        did.append("metrics")
        raise Stop  # what comes after has no copies in it

    def engine(**inputs: Any) -> Any:
        did.append("forward")
        return SimpleNamespace(loss=torch.zeros(()), token_losses=None, divergences=None)

    engine.param_groups, engine.backward = [], lambda *_, **__: did.append("backward")  # type: ignore[attr-defined]
    meter: Any = SimpleNamespace(add=lambda *_: None, counts={}, reduce=reduce)
    run: Any = SimpleNamespace(
        copies=PackCopies(GPU),
        config=SimpleNamespace(consistency_weight=None),
        ranks=SimpleNamespace(world_size=1, device=GPU),
        schedule=SimpleNamespace(factor=lambda step: 1.0),
        loss_chunks=1,
    )
    arguments: Any = (engine, batch, 1.0, 1, meter, run, None)
    with pytest.raises(Stop):
        step.train_step(*arguments)
    once = ["forward", "backward"]
    first, second = ["copy 0", "copy 1", *once], ["wait for the copies", *once, "copy 2"]
    assert did == [*first, *second, "metrics"]
    assert run.copies.take(following) is following and did[-1] == "wait for the copies"
