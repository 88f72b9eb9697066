"""The consistency loss against an independent one in float64; its settings."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from tests.training.scenarios import tiny_config
from training.flops import PackCost
from training.model.consistency import chunked_consistency
from training.model.loss import Consistency, Supervision

LENGTH, WIDTH, VOCABULARY = 40, 8, 23
POSITIONS = [3, 4, 11, 12, 20, 21, 30, 35, 36]
TEACHERS = [4, 5, 4, 5, 4, 5, 6, 8, 8]  # two tokens in three copies, one alone, one in two copies
STUDENT = np.array([1, 1, 1, 1, 0, 0, 0, 1, 0], dtype=bool)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def case() -> tuple[torch.Tensor, torch.nn.Linear, Supervision]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, LENGTH, WIDTH, generator=generator, requires_grad=True)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
    weights = torch.rand(len(POSITIONS), generator=generator) + 0.1
    consistency = Consistency(torch.tensor(TEACHERS), 0.7 * weights * torch.from_numpy(STUDENT))
    targets = torch.randint(VOCABULARY, (len(POSITIONS),), generator=generator)
    return hidden, head, Supervision(torch.tensor(POSITIONS), targets, weights, consistency)


@pytest.mark.parametrize("chunks", [1, 2, 20])
def test_loss_and_gradient_are_those_of_float64(chunks: int) -> None:
    hidden, head, given = case()
    loss, losses, predictions, divergences = chunked_consistency(hidden, given, head, chunks)
    loss.backward()
    states = hidden.detach().numpy().astype(np.float64)[0][POSITIONS]
    matrix = head.weight.detach().numpy().astype(np.float64)
    probability = softmax(states @ matrix.T)
    teacher = probability[TEACHERS]
    rows, targets = np.arange(len(POSITIONS)), given.targets.numpy()
    cross_entropy = -np.log(probability[rows, targets])
    divergence = (teacher * (np.log(teacher) - np.log(probability))).sum(axis=1)
    assert given.consistency is not None
    weights, students = given.weights.double().numpy(), given.consistency.weights.double().numpy()
    assert loss.item() == pytest.approx(weights @ cross_entropy + students @ divergence, rel=1e-5)
    assert losses.numpy() == pytest.approx(cross_entropy, rel=1e-5)
    assert divergences.numpy() == pytest.approx(divergence, rel=1e-4, abs=1e-6)
    assert predictions.tolist() == probability.argmax(axis=1).tolist()
    one_hot = np.eye(VOCABULARY)[targets]
    by_logit = weights[:, None] * (probability - one_hot)
    by_logit += students[:, None] * (probability - teacher)  # the teacher is given
    expected = np.zeros((LENGTH, WIDTH))
    expected[POSITIONS] = by_logit @ matrix
    assert hidden.grad is not None and head.weight.grad is not None
    assert hidden.grad[0].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert head.weight.grad.numpy() == pytest.approx(by_logit.T @ states, rel=1e-4, abs=1e-5)


def test_nothing_supervised_is_no_loss() -> None:
    hidden, head, _ = case()
    none = torch.empty(0, dtype=torch.int64)
    given = Supervision(none, none, torch.empty(0), Consistency(none, torch.empty(0)))
    loss, *others = chunked_consistency(hidden, given, head, 3)
    loss.backward()
    assert loss.item() == 0 and all(len(other) == 0 for other in others)


def test_settings_that_mean_nothing_are_refused(digits_corpus: Path) -> None:
    on = "data.tokens.schedule=consistency"
    assert tiny_config(digits_corpus, on, "train.consistency.weight=2").consistency_weight == 2
    assert tiny_config(digits_corpus).consistency_weight is None
    with pytest.raises(InputError, match=r"train.consistency.weight=2 has no effect .*=nested"):
        tiny_config(digits_corpus, "data.tokens.schedule=nested", "train.consistency.weight=2")
    one = ["data.tokens.counts=[4, 16]", "data.tokens.probabilities=[0, 1]"]
    with pytest.raises(InputError, match=r"consistency compares counts.*\[4, 16\] trains one"):
        tiny_config(digits_corpus, on, *one)
    with pytest.raises(InputError, match=r"draw=pack"):
        tiny_config(digits_corpus, on, "data.tokens.draw=pack")


def test_the_teachers_logits_are_counted(digits_corpus: Path) -> None:
    class Tokenizer:
        vocab_size = 300

        def special_id(self, token: str) -> int:
            return 299

    def loss(chunks: int, *overrides: str) -> tuple[float, float]:
        cost = PackCost.of(tiny_config(digits_corpus, *overrides), Tokenizer(), chunks)  # type: ignore[arg-type]
        part = cost.pack([40], [4], 10)["loss"]
        return part.model, part.extra

    once = loss(1)[0] / 3
    assert loss(1) == (3 * once, 0) and loss(2) == (3 * once, once)
    assert loss(1, "data.tokens.schedule=consistency") == (3 * once, once)
    assert loss(2, "data.tokens.schedule=consistency") == (3 * once, 3 * once)
