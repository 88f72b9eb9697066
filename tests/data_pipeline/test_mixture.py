"""Several datasets as one: ids, names, weights, and what a mixture refuses."""

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.mixture import Dataset, Mixture, make_ids, split_ids
from tests.data_pipeline.indexes import make_index


def texts(number: int) -> Dataset:
    return Dataset(f"d{number}", make_index([number] * number, [[]] * number))


def test_ids_lead_back_to_dataset_and_sample() -> None:
    ids = make_ids(np.array([0, 2, 1]), np.array([5, 0, (1 << 40) - 1]))
    dataset, numbers = split_ids(ids)
    assert dataset.tolist() == [0, 2, 1] and numbers.tolist() == [5, 0, (1 << 40) - 1]
    assert make_ids(0, np.arange(3)).tolist() == [0, 1, 2]


def test_names_say_the_dataset_where_there_are_several() -> None:
    mixture = Mixture([texts(2), texts(3)])
    sample = int(make_ids(1, np.array([2]))[0])
    assert mixture.name(sample) == "d3/0.tar:s2"
    assert (mixture.bad_sample(sample, "why").shard, mixture.bad_sample(sample, "").key) == (
        "d3/0.tar",
        "s2",
    )
    assert mixture.dataset(sample) == 1 and mixture.supervised_tokens(sample) == 1
    assert Mixture.of(texts(3).index).name(2) == "0.tar:s2"
    assert len(mixture) == 5


def test_without_weights_datasets_count_by_their_size() -> None:
    assert Mixture([texts(1), texts(3)]).weights.tolist() == [0.25, 0.75]
    weighted = [Dataset("a", texts(1).index, 3.0), Dataset("b", texts(9).index, 1.0)]
    assert Mixture(weighted).weights.tolist() == [0.75, 0.25]


def test_a_fingerprint_changes_with_what_decides_the_order() -> None:
    index = texts(2).index

    def fingerprint(**changes: float) -> dict:
        return Mixture(
            [Dataset("a", index, **{"weight": 1.0, **changes}), Dataset("b", index, 1.0)]
        ).fingerprint()

    assert fingerprint() == fingerprint()
    assert fingerprint(weight=2.0) != fingerprint()
    assert fingerprint(repeat=2.0) != fingerprint()


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([], "different names"),
        ([texts(1), texts(1)], "different names"),
        ([Dataset("a", make_index([], []))], "index of a holds no samples"),
        ([Dataset("a", texts(1).index, 1.0), texts(2)], "weights are given for some"),
    ],
)
def test_impossible_mixtures_are_refused(datasets: list[Dataset], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture(datasets)
