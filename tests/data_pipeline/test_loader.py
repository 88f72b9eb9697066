"""From the plan to tensors: what a batch holds, on any world size, with faults, in threads."""

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipeline.chat import ChatSettings, expand_images, tokenize_chat
from data_pipeline.draw import TokenCountSettings
from data_pipeline.errors import InputError
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.loader import (
    IGNORE,
    LoaderSettings,
    PackBuilder,
    PackedBatch,
    StepBatch,
    StepLoader,
)
from data_pipeline.loss_weighting import LOSS_WEIGHTINGS
from data_pipeline.mixture import Dataset, Mixture
from data_pipeline.plan import PackPlan, PackSettings, Planner, PlanState
from data_pipeline.tiling import TilingSettings
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.indexes import replaced
from tests.data_pipeline.small_tokenizers import save_sentencepiece

CHAT = ChatSettings(system="")
TILING = TilingSettings(tile_size=16, max_tiles=2)
COUNTS = TokenCountSettings(counts=[1, 4, 9])
PACKS_PER_STEP = 4
NUM_SAMPLES = 40
FOUND = ("image_positions", "target_positions", "targets", "target_weights")
NOT_PER_TOKEN = ("cu_seqlens", "tiles", *FOUND)
TENSORS = ("input_ids", "position_ids", "labels", "loss_weights", *NOT_PER_TOKEN)


def turn(role: str, *content: str) -> dict:
    """A turn; a content that ends in .png is an image."""
    parts = [
        {"type": "image", "image": part}
        if part.endswith(".png")
        else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": role, "content": parts}


def make_sample(number: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Messages, and the pixels [height, width, 3] of the images: texts, one image, two, turns."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    wide = rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)
    answer = turn("assistant", "A red cell " * (1 + number % 5))
    if number % 4 == 0:
        return [turn("user", "quoted in a caption: <IMG_CONTEXT>"), answer], {}
    if number % 4 == 1:
        return [turn("user", "0.png", "\nWhat is shown?"), answer], {"0.png": small}
    images = {"0.png": small, "1.png": wide}
    if number % 4 == 2:
        return [turn("user", "0.png", "1.png", "hello"), answer], images
    more = [turn("user", "and ", "1.png"), turn("assistant", "row 3")]
    return [turn("user", "0.png", "hello"), answer, *more], images


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Corpus:
    """Two shards of `make_sample`s, their index, and what is made from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Tokenizer = load_tokenizer(save_sentencepiece(folder))
        (folder / "shards").mkdir()
        for shard in range(2):
            with webdataset.TarWriter(str(folder / f"shards/{shard}.tar")) as tar:
                for number in range(shard, NUM_SAMPLES, 2):
                    messages, images = make_sample(number)
                    files = {name: png(pixels) for name, pixels in images.items()}
                    tar.write({"__key__": f"s{number}", "json": {"messages": messages}, **files})
        build_index(str(folder / "shards"), self.tokenizer, CHAT)
        self.index = self.load()

    def load(self) -> Index:
        return load_index(str(self.folder / "shards"), self.tokenizer, CHAT)

    def planner(self, epochs: float | None = None) -> Planner:
        pack = PackSettings(max_tokens=256, packs_per_step=PACKS_PER_STEP, window_samples=25)
        mixture = Mixture([Dataset("data", self.index, repeat=epochs)])
        return Planner(mixture, TILING, COUNTS, pack, 0)

    def builder(self, weighting: str = "sqrt", index: Index | None = None) -> PackBuilder:
        return PackBuilder(Mixture.of(index or self.index), self.tokenizer, CHAT, TILING, weighting)

    def loader(self, rank: int = 0, world_size: int = 1, **settings: float) -> StepLoader:
        loader_settings = LoaderSettings(**settings)
        return StepLoader(self.planner(), self.builder(), loader_settings, rank, world_size)

    def number(self, sample: int) -> int:
        """The number that `make_sample` made a sample of the index from."""
        return int(self.index.key(sample)[1:])

    def overwrite(self, sample: int, offset: int, data: bytes) -> None:
        """Damage the shard of a sample, which keeps its size."""
        with Path(self.index.shards[self.index.shard[sample]].url).open("r+b") as file:
            file.seek(offset)
            file.write(data)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("loader"))


@pytest.fixture
def own_corpus(tmp_path: Path) -> Corpus:
    """For tests that damage it."""
    return Corpus(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def take(loader: StepLoader, steps: int, state: PlanState | None = None) -> list[StepBatch]:
    iterator = loader.steps(state)
    batches = list(islice(iterator, steps))
    iterator.close()
    return batches


def assert_equal(first: PackedBatch, second: PackedBatch) -> None:
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), name
        else:
            assert value == other, name


def cut(batch: PackedBatch, context_id: int) -> dict[int, dict[str, torch.Tensor]]:
    """A batch cut into its samples: sample id -> its part of every tensor."""
    bounds, tile, samples = batch.cu_seqlens.tolist(), 0, {}
    for i, sample in enumerate(batch.sample_ids):
        own = slice(bounds[i], bounds[i + 1])
        part = {name: getattr(batch, name)[own] for name in TENSORS if name not in NOT_PER_TOKEN}
        first, places = tile, int((part["input_ids"] == context_id).sum())
        while places > 0:
            places -= batch.tile_sides[tile] ** 2
            tile += 1
        assert places == 0
        part["tiles"] = batch.tiles[first:tile]
        part["tile_sides"] = torch.tensor(batch.tile_sides[first:tile])
        samples[sample] = part
    assert tile == len(batch.tile_sides) == len(batch.tiles)
    return samples


def check_positions(batch: PackedBatch, context_id: int) -> None:
    """What the model would have to find on the device: where features go and losses are taken."""
    images = [i for i, token in enumerate(batch.input_ids.tolist()) if token == context_id]
    learned = [i for i, label in enumerate(batch.labels.tolist()) if label != IGNORE]
    assert batch.image_positions.tolist() == images
    assert batch.target_positions.tolist() == [i - 1 for i in learned]
    assert torch.equal(batch.targets, batch.labels[learned])
    assert torch.equal(batch.target_weights, batch.loss_weights[learned])


def expected_tiles(pixels: np.ndarray) -> np.ndarray:
    """Images as large as their grid are cut without resampling; a wide one has a thumbnail."""
    if pixels.shape[1] == 16:
        return pixels.transpose(2, 0, 1)[None]
    thumbnail = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    cells = [pixels[:, :16], pixels[:, 16:], np.asarray(thumbnail)]
    return np.stack([cell.transpose(2, 0, 1) for cell in cells])


def test_an_unknown_loss_weighting_is_refused_and_a_new_one_is_a_line(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ", ".join(LOSS_WEIGHTINGS)
    with pytest.raises(InputError, match=f"'half' is unknown; use one of {names}"):
        corpus.builder("half")
    monkeypatch.setitem(LOSS_WEIGHTINGS, "half", lambda n: 0.5)
    pack = next(corpus.planner().steps())[0].packs[0]
    weights = corpus.builder("half").build(pack).loss_weights
    assert set(weights.tolist()) == {0.0, 0.5}


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_a_batch_holds_what_was_planned(corpus: Corpus, weighting: str) -> None:
    builder = corpus.builder(weighting)
    context = corpus.tokenizer.special_id("<IMG_CONTEXT>")
    seen = set()
    for step, _ in corpus.planner(epochs=1).steps():  # so that no pack has a sample twice
        for pack in (pack for pack in step.packs if pack.tokens):
            batch = builder.build(pack)
            assert batch.sample_ids == pack.sample_ids.tolist()
            assert batch.planned_tokens == pack.tokens == len(batch.input_ids)
            assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
            assert batch.bad == []
            check_positions(batch, context)
            samples = cut(batch, context)
            for sample, sides in zip(batch.sample_ids, pack.sides, strict=True):
                check_sample(corpus, sample, sides.tolist(), samples[sample], weighting)
                seen.add(corpus.number(sample) % 4)
    assert seen == {0, 1, 2, 3}


def check_sample(
    corpus: Corpus, sample: int, sides: list[int], part: dict[str, torch.Tensor], weighting: str
) -> None:
    messages, images = make_sample(corpus.number(sample))
    names = [c["image"] for t in messages for c in t["content"] if c["type"] == "image"]
    tiles = [expected_tiles(images[name]) for name in names]
    context = corpus.tokenizer.special_id("<IMG_CONTEXT>")
    ids, supervised = expand_images(
        tokenize_chat(messages, corpus.tokenizer, CHAT),
        [len(t) * n * n for t, n in zip(tiles, sides, strict=True)],
        context,
    )
    ids, mask = torch.tensor(ids), torch.tensor(supervised)
    weight = {"token": 1.0, "sample": 1 / sum(supervised), "sqrt": sum(supervised) ** -0.5}
    assert torch.equal(part["input_ids"], ids)
    assert torch.equal(part["position_ids"], torch.arange(len(ids)))
    assert torch.equal(part["labels"], torch.where(mask, ids, IGNORE))
    assert part["labels"][0] == IGNORE
    assert torch.equal(part["loss_weights"], mask * torch.tensor(weight[weighting]))
    assert part["tile_sides"].tolist() == np.repeat(sides, [len(t) for t in tiles]).tolist()
    if tiles:
        assert np.array_equal(part["tiles"].numpy(), np.concatenate(tiles))


def test_shapes_and_types(corpus: Corpus) -> None:
    step, _ = next(corpus.planner().steps())
    batch = corpus.builder().build(step.packs[0])
    types = {name: getattr(batch, name).dtype for name in TENSORS}
    assert types == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "labels": torch.int64,
        "loss_weights": torch.float32,
        "tiles": torch.uint8,
        "target_positions": torch.int64,
        "targets": torch.int64,
        "target_weights": torch.float32,
        "image_positions": torch.int64,
    }
    assert batch.tiles.shape == (len(batch.tile_sides), 3, 16, 16)
    assert batch.tiles.is_contiguous()
    assert len(batch.cu_seqlens) == len(batch.sample_ids) + 1


def test_sample_sides_tell_what_the_images_of_a_sample_share(corpus: Corpus) -> None:
    by_kind = {corpus.number(i) % 4: i for i in range(len(corpus.index))}
    ids = [by_kind[0], by_kind[1], by_kind[2], by_kind[3]]
    sides = tuple(np.array(s, dtype=np.int64) for s in ([], [3], [2, 2], [1, 3]))
    tiles = tuple(np.array(t, dtype=np.int64) for t in ([], [1], [1, 3], [1, 3]))
    lengths = corpus.index.text_tokens[ids] + [0, 9, 4 + 3 * 4, 1 + 3 * 9]
    batch = corpus.builder().build(PackPlan(np.array(ids), lengths, sides, tiles))
    assert batch.sample_sides == [0, 3, 2, -1]
    assert batch.tile_sides == [3, 2, 2, 2, 2, 1, 3, 3, 3]


def test_the_first_token_of_a_sample_is_never_supervised(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_supervised(messages: list, tokenizer: Tokenizer, chat: ChatSettings) -> object:
        tokens = tokenize_chat(messages, tokenizer, chat)
        return replace(tokens, supervised=[True] * len(tokens.input_ids))

    monkeypatch.setattr("data_pipeline.batch.tokenize_chat", all_supervised)
    index = replaced(corpus.index, supervised_tokens=corpus.index.text_tokens)
    step, _ = next(corpus.planner().steps())
    batch = corpus.builder("token", index).build(step.packs[0])
    assert batch.bad == []
    starts = batch.cu_seqlens[:-1].long()
    assert (batch.labels[starts] == IGNORE).all() and (batch.loss_weights[starts] == 0).all()
    assert (batch.labels[starts + 1] != IGNORE).all()


def test_an_empty_pack_is_one_pad_token(corpus: Corpus) -> None:
    batch = corpus.builder().build(PackPlan.empty())
    assert batch.input_ids.tolist() == [corpus.tokenizer.pad_id]
    assert batch.position_ids.tolist() == [0]
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.labels.tolist() == [IGNORE]
    assert batch.loss_weights.tolist() == [0.0]
    assert all(len(getattr(batch, name)) == 0 for name in FOUND)
    assert batch.tiles.shape == (0, 3, 16, 16)
    assert (batch.sample_ids, batch.sample_sides, batch.tile_sides) == ([], [], [])
    assert (batch.planned_tokens, batch.max_seqlen) == (0, 1)


def test_a_plan_of_other_tiles_gives_bad_samples(corpus: Corpus) -> None:
    one_tile = TilingSettings(tile_size=16)
    builder = PackBuilder(Mixture.of(corpus.index), corpus.tokenizer, CHAT, one_tile)
    packs = [p for step, _ in islice(corpus.planner().steps(), 2) for p in step.packs]
    bad = [bad for pack in packs for bad in builder.build(pack).bad]
    assert bad and all("tiles where the index has" in one.reason for one in bad)


def test_to_moves_every_tensor_and_leaves_the_original(corpus: Corpus) -> None:
    batch = corpus.builder().build(next(corpus.planner().steps())[0].packs[0])
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert {getattr(batch, name).device.type for name in TENSORS} == {"cpu"}
    assert moved.tile_sides == batch.tile_sides and moved.max_seqlen == batch.max_seqlen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_are_pinned_and_arrive_whole(corpus: Corpus) -> None:
    batch = take(corpus.loader(), 1)[0].packs[0]
    assert all(getattr(batch, name).is_pinned() for name in TENSORS)
    moved = batch.to("cuda")
    torch.cuda.synchronize()
    assert_equal(replace(moved, **{name: getattr(moved, name).cpu() for name in TENSORS}), batch)


def test_pinning_is_done_on_the_device_of_the_consumer(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads start on GPU 0: without this every rank of a node would open a context there."""
    device_of_thread: dict[int, int] = {}
    pinned_on = []

    def set_device(device: int) -> None:
        device_of_thread[threading.get_ident()] = device

    def pin_memory(batch: PackedBatch) -> PackedBatch:
        pinned_on.append(device_of_thread.get(threading.get_ident(), 0))
        return batch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(PackedBatch, "pin_memory", pin_memory)
    take(corpus.loader(), 2)
    assert len(pinned_on) >= 2 * PACKS_PER_STEP and set(pinned_on) == {3}


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_world_size_has_the_same_packs_in_the_same_order(
    corpus: Corpus, world_size: int
) -> None:
    alone = take(corpus.loader(), 6)
    ranks = [take(corpus.loader(rank, world_size), 6) for rank in range(world_size)]
    for step, expected in enumerate(alone):
        share = [ranks[rank][step] for rank in range(world_size)]
        assert {(batch.plan.epoch, batch.state) for batch in share} == {
            (expected.plan.epoch, expected.state)
        }
        for number, pack in enumerate(expected.packs):
            assert_equal(share[number % world_size].packs[number // world_size], pack)
        assert sum(len(batch.packs) for batch in share) == PACKS_PER_STEP


def test_resumes_after_any_step_on_another_world_size(corpus: Corpus) -> None:
    run = take(corpus.loader(), 9)
    assert run[-1].plan.epoch > 0
    for i in (0, 2, 3, 5):
        state = PlanState.from_dict(run[i].state.to_dict())
        again = take(corpus.loader(1, 2), 3, state)
        for batch, expected in zip(again, run[i + 1 :], strict=False):
            assert batch.state == expected.state
            for pack, expected_pack in zip(batch.packs, expected.packs[1::2], strict=True):
                assert_equal(pack, expected_pack)


class ThreeDatasets:
    """Three weighted datasets over the shards of a corpus; the first ends after two epochs."""

    def __init__(self, corpus: Corpus) -> None:
        shards = corpus.folder / "shards"
        parts = {"a": shards / "0.tar", "b": shards / "1.tar", "c": shards}
        weights = {"a": (2.0, 2.0), "b": (1.0, None), "c": (0.5, None)}
        self.mixture = Mixture(
            [
                Dataset(name, load_index(str(path), corpus.tokenizer, CHAT), *weights[name])
                for name, path in parts.items()
            ]
        )
        pack = PackSettings(max_tokens=256, packs_per_step=8, window_samples=40)
        self.planner = Planner(self.mixture, TILING, COUNTS, pack, 3)
        self.builder = PackBuilder(self.mixture, corpus.tokenizer, CHAT, TILING)

    def take(
        self, steps: int, rank: int = 0, world_size: int = 1, state: PlanState | None = None
    ) -> list[StepBatch]:
        loader = StepLoader(self.planner, self.builder, LoaderSettings(), rank, world_size)
        return take(loader, steps, state)


@pytest.fixture(scope="module")
def three_datasets(corpus: Corpus) -> ThreeDatasets:
    return ThreeDatasets(corpus)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_three_datasets_are_the_same_on_any_world_size_and_after_any_resume(
    three_datasets: ThreeDatasets, world_size: int
) -> None:
    alone = three_datasets.take(10)
    epochs = [step.plan.epochs for step in alone]
    assert epochs[0][0] < 2 == epochs[-1][0], "the first dataset must end on the way"
    seen = {d for step in alone for pack in step.packs for d in pack.sample_datasets}
    assert seen == {0, 1, 2}
    for begin in range(10):
        state = PlanState.from_dict(alone[begin - 1].state.to_dict()) if begin else None
        rank = begin % world_size
        for batch, expected in zip(
            three_datasets.take(10 - begin, rank, world_size, state), alone[begin:], strict=True
        ):
            assert batch.state == expected.state
            for pack, whole in zip(batch.packs, expected.packs[rank::world_size], strict=True):
                assert_equal(pack, whole)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch_steps", [1, 4])
def test_threads_do_not_change_the_order(corpus: Corpus, threads: int, prefetch_steps: int) -> None:
    expected = [
        corpus.builder().build(pack)
        for step, _ in islice(corpus.planner().steps(), 5)
        for pack in step.packs
    ]
    loader = corpus.loader(threads=threads, prefetch_steps=prefetch_steps)
    packs = [pack for batch in take(loader, 5) for pack in batch.packs]
    for pack, expected_pack in zip(packs, expected, strict=True):
        assert_equal(pack, expected_pack)


def test_a_world_size_that_does_not_divide_is_an_error(corpus: Corpus) -> None:
    with pytest.raises(InputError, match=r"packs_per_step is 4.* 3 ranks"):
        corpus.loader(0, 3)


def damage_image(corpus: Corpus, sample: int) -> Index:
    image = int(corpus.index.image_start[sample])
    corpus.overwrite(sample, int(corpus.index.join("image_offset")[image]) + 40, b"\0" * 20)
    return corpus.index


def damage_json(corpus: Corpus, sample: int) -> Index:
    corpus.overwrite(sample, int(corpus.index.join("text_offset")[sample]), b"[")
    return corpus.index


def wrong(column: str, by: int, of_image: bool = False) -> Callable[[Corpus, int], Index]:
    """An index that disagrees with the shard in one number."""

    def change(corpus: Corpus, sample: int) -> Index:
        values = corpus.index.join(column).copy()
        values[corpus.index.image_start[sample] if of_image else sample] += by
        return replaced(corpus.index, **{column: values})

    return change


def reject_image(corpus: Corpus, sample: int) -> Index:
    """An image that was damaged before it was indexed: only decoding finds out."""
    image = int(corpus.index.image_start[sample])
    offset, size = (
        int(corpus.index.join("image_offset")[image]),
        int(corpus.index.join("image_bytes")[image]),
    )
    corpus.overwrite(sample, offset + size - 30, b"\0" * 30)
    build_index(str(corpus.folder / "shards"), corpus.tokenizer, CHAT)
    return corpus.load()


FAULTS: dict[str, tuple[Callable[[Corpus, int], Index], str]] = {
    "image bytes": (damage_image, "not those that were indexed"),
    "image that cannot be decoded": (reject_image, "damaged or truncated image"),
    "json bytes": (damage_json, "not those that were indexed"),
    "supervised tokens": (wrong("supervised_tokens", 1), "supervised tokens where the index has"),
    "json crc": (wrong("text_crc", 1), "not those that were indexed"),
    "image crc": (wrong("image_crc", 1, True), "not those that were indexed"),
    "image place": (wrong("image_offset", 512, True), "not those that were indexed"),
    "json place": (wrong("text_offset", 1 << 40), "ends inside"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_sample_is_masked_and_nothing_else_changes(own_corpus: Corpus, fault: str) -> None:
    corpus = own_corpus
    context = corpus.tokenizer.special_id("<IMG_CONTEXT>")
    packs = [p for step, _ in islice(corpus.planner().steps(), 4) for p in step.packs]
    pack = max(packs, key=lambda p: len(p.sample_ids))
    kinds = [corpus.number(sample) % 4 for sample in pack.sample_ids]
    place = kinds.index(2)
    assert place > 0 or place < len(kinds) - 1, "the bad sample needs neighbours"
    bad = int(pack.sample_ids[place])
    good = corpus.builder().build(pack)

    damage, reason = FAULTS[fault]
    masked = corpus.builder(index=damage(corpus, bad)).build(pack)

    assert [(b.shard, b.key) for b in masked.bad] == [
        (corpus.index.shards[corpus.index.shard[bad]].name, str(corpus.index.keys[bad]))
    ]
    assert reason in masked.bad[0].reason
    for name in ("sample_ids", "sample_sides", "planned_tokens", "max_seqlen"):
        assert getattr(masked, name) == getattr(good, name)
    assert torch.equal(masked.cu_seqlens, good.cu_seqlens)
    assert torch.equal(masked.position_ids, good.position_ids)
    check_positions(masked, context)
    before, after = cut(good, context), cut(masked, context)
    stand_in = after.pop(bad)
    assert (stand_in["input_ids"] == corpus.tokenizer.pad_id).all()
    assert (stand_in["labels"] == IGNORE).all()
    assert (stand_in["loss_weights"] == 0).all()
    assert len(stand_in["tiles"]) == 0 < len(before[bad]["tiles"])
    for sample, part in after.items():
        for name, value in part.items():
            assert torch.equal(value, before[sample][name]), (sample, name)


def test_counts_that_disagree_with_the_index_are_bad_samples(own_corpus: Corpus) -> None:
    """A length that is not the planned one, and images of another size or number."""
    corpus = own_corpus
    sample = next(i for i in range(len(corpus.index)) if corpus.number(i) % 4 == 1)
    first = corpus.index.image_start[sample]
    text = wrong("text_tokens", 3)(corpus, sample)
    size = wrong("image_width", 16, True)(corpus, sample)
    starts = corpus.index.image_start.copy()
    starts[sample + 1 :] -= 1
    number = replaced(corpus.index, image_start=starts)
    for index, tiles, reason in (
        (text, [1], "tokens where the index has"),
        (size, [3], "pixels"),
        (number, [], "1 images where the index has 0"),
    ):
        assert first == index.image_start[sample]
        sides = np.full(len(tiles), 2)
        tokens = int(index.text_tokens[sample]) + 4 * sum(tiles)
        plan = PackPlan(np.array([sample]), np.array([tokens]), (sides,), (np.array(tiles),))
        batch = corpus.builder(index=index).build(plan)
        assert len(batch.input_ids) == tokens
        assert reason in batch.bad[0].reason
        assert "run python -m data_pipeline.index again" in batch.bad[0].reason


def test_any_error_of_a_decoder_is_a_bad_sample_but_lack_of_memory_is_not(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [ZeroDivisionError("no such thing"), MemoryError()]
    monkeypatch.setattr(
        "data_pipeline.batch.image_tiles", lambda *_, **__: (_ for _ in ()).throw(error)
    )
    sample = next(i for i in range(len(corpus.index)) if corpus.number(i) % 4 == 1)
    tokens, one = int(corpus.index.text_tokens[sample]) + 1, np.array([1])
    pack = PackPlan(np.array([sample]), np.array([tokens]), (one,), (one,))
    error = errors[0]
    assert corpus.builder().build(pack).bad[0].reason == "ZeroDivisionError: no such thing"
    error = errors[1]
    with pytest.raises(MemoryError):
        corpus.builder().build(pack)


def test_a_shard_that_lost_its_end_gives_bad_samples(own_corpus: Corpus) -> None:
    corpus = own_corpus
    middle = len(corpus.index) // 4
    shard = corpus.index.shards[0]
    with Path(shard.url).open("r+b") as file:
        file.truncate(int(corpus.index.join("text_offset")[middle]))
    lost = {str(corpus.index.keys[i]) for i in range(middle, len(corpus.index) // 2)}
    batches = take(corpus.loader(max_bad_fraction=1.0), 8)
    bad = [b for batch in batches for pack in batch.packs for b in pack.bad]
    assert lost <= {b.key for b in bad} and {b.shard for b in bad} == {"0.tar"}


def damage_samples(corpus: Corpus, number: int) -> list[str]:
    for sample in range(number):
        damage_json(corpus, sample)
    return [str(corpus.index.keys[sample]) for sample in range(number)]


def test_too_many_bad_samples_stop_the_run(own_corpus: Corpus) -> None:
    keys = damage_samples(own_corpus, 4)  # one in ten
    with pytest.raises(InputError) as error:
        take(own_corpus.loader(max_bad_fraction=0.03), 1000)
    message = str(error.value)
    assert "data.loader.max_bad_fraction (0.03)" in message
    bad, seen = int(message.split()[0]), int(message.split()[2])
    assert 31 <= bad <= 40 and seen > 200  # 3 % of 1000, then the rest of a step
    assert all(message.count(f"0.tar:{key}: ") == 1 for key in keys)


def test_bad_samples_within_the_limit_do_not_stop_the_run(own_corpus: Corpus) -> None:
    damage_samples(own_corpus, 4)
    batches = take(own_corpus.loader(max_bad_fraction=0.2), 120)
    packs = [pack for batch in batches for pack in batch.packs]
    seen = sum(len(pack.sample_ids) for pack in packs)
    assert seen > 1500
    assert sum(len(pack.bad) for pack in packs) == pytest.approx(0.1 * seen, rel=0.2)


def test_with_a_limit_of_zero_the_first_bad_sample_stops_the_run(own_corpus: Corpus) -> None:
    damage_samples(own_corpus, 1)
    with pytest.raises(InputError, match=r"^[12] of \d+ samples could not"):
        take(own_corpus.loader(max_bad_fraction=0), 20)


class SlowBuilder:
    """Stands for a `PackBuilder`: takes its time, counts, and fails at one call if told to."""

    def __init__(self, builder: PackBuilder, seconds: float = 0.0, fail_at: int = -1) -> None:
        self.builder, self.seconds, self.fail_at = builder, seconds, fail_at
        self.mixture = builder.mixture
        self.begun = 0
        self.lock = threading.Lock()

    def build(self, pack: PackPlan) -> PackedBatch:
        with self.lock:
            self.begun += 1
            number = self.begun
        if number == self.fail_at:
            raise RuntimeError("the builder broke")
        time.sleep(self.seconds)
        return self.builder.build(pack)


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("data-")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def slow_loader(corpus: Corpus, builder: SlowBuilder, **settings: float) -> StepLoader:
    return StepLoader(corpus.planner(), builder, LoaderSettings(**settings))  # type: ignore[arg-type]


def test_the_following_pack_is_known_once_it_is_built(corpus: Corpus) -> None:
    builder, gate = SlowBuilder(corpus.builder()), threading.Event()
    build = builder.build

    def held(pack: PackPlan) -> PackedBatch:
        if builder.begun >= PACKS_PER_STEP:  # of the second step
            gate.wait(30)
        return build(pack)

    builder.build = held  # type: ignore[method-assign]
    steps = slow_loader(corpus, builder, threads=1).steps()
    batch = next(steps)
    assert batch.following() is None  # nobody waits for it
    gate.set()
    wait_until(lambda: batch.following() is not None)
    following = batch.following()
    assert next(steps).packs[0] is following
    steps.close()


def test_an_error_in_a_thread_reaches_the_consumer(corpus: Corpus) -> None:
    builder = SlowBuilder(corpus.builder(), fail_at=2 * PACKS_PER_STEP + 2)
    steps = slow_loader(corpus, builder, threads=1).steps()
    assert [len(next(steps).packs) for _ in range(2)] == [PACKS_PER_STEP] * 2
    with pytest.raises(RuntimeError, match="the builder broke"):
        next(steps)
    assert not loader_threads()


def test_an_impossible_state_reaches_the_consumer(corpus: Corpus) -> None:
    with pytest.raises(InputError, match="not one of this plan"):
        next(corpus.loader().steps(PlanState(window=1000)))
    with pytest.raises(InputError, match="not one of this plan"):
        next(corpus.loader().steps(PlanState(step=1000)))


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_closing_ends_the_threads_promptly(corpus: Corpus, consumed: int) -> None:
    builder = SlowBuilder(corpus.builder(), seconds=0.1)
    steps = slow_loader(corpus, builder, prefetch_steps=50).steps()
    for _ in range(consumed):
        next(steps)
    start = time.monotonic()
    steps.close()
    assert time.monotonic() - start < 4  # 50 steps of 4 packs would take 10 s
    assert not loader_threads()


def test_an_exception_in_the_loop_ends_the_threads(corpus: Corpus) -> None:
    def train() -> None:
        for _ in corpus.loader().steps():
            raise KeyError("training failed")

    with pytest.raises(KeyError):
        train()
    wait_until(lambda: not loader_threads())


def test_no_more_is_built_ahead_than_asked_for(corpus: Corpus) -> None:
    builder = SlowBuilder(corpus.builder())
    steps = slow_loader(corpus, builder, prefetch_steps=2).steps()
    for consumed in (1, 2, 3):
        next(steps)
        expected = (consumed + 2) * PACKS_PER_STEP
        wait_until(lambda expected=expected: builder.begun >= expected)
        time.sleep(0.05)
        assert builder.begun == expected
    steps.close()


def test_few_threads(corpus: Corpus) -> None:
    before = threading.active_count()
    steps = corpus.loader(threads=2, prefetch_steps=8).steps()
    next(steps)
    assert threading.active_count() - before <= 3
    steps.close()


def test_wait_is_the_time_the_consumer_waited(corpus: Corpus) -> None:
    builder = SlowBuilder(corpus.builder(), seconds=0.1)
    steps = slow_loader(corpus, builder, threads=1, prefetch_steps=1).steps()
    assert next(steps).wait_s >= 0.09 * PACKS_PER_STEP
    time.sleep(0.2 * PACKS_PER_STEP)
    assert next(steps).wait_s < 0.25  # the step after it is not waited for
    steps.close()


def test_the_interpreter_ends_while_steps_are_being_built(corpus: Corpus) -> None:
    code = f"""
import sys
from pathlib import Path
from tests.data_pipeline.test_loader import *
corpus = Corpus.__new__(Corpus)
corpus.folder = Path({str(corpus.folder)!r})
corpus.tokenizer = load_tokenizer(corpus.folder / "tokenizer.model")
corpus.index = corpus.load()
steps = corpus.loader(prefetch_steps=4).steps()
next(steps)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stderr == ""
