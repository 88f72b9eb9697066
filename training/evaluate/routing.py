"""Training a router in an evaluation, and reporting it on samples that it was not trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.draw import uniform_hash
from data_pipeline.errors import InputError
from training.distributed import Ranks, from_main
from training.evaluate.counts import Row, model_fingerprint
from training.evaluate.examples import HeldOut
from training.evaluate.router import MIN_SAMPLES, ROUTER_FILE, Floats, Router, train_router
from training.evaluate.router_features import identities, measure_features
from training.evaluate.token_budget import check_token_budget, compare
from training.generate import LoadedModel

MIN_REPORTED = 20


@dataclass(frozen=True)
class RoutingSettings:
    """budgets: tokens per tile. train_share: of the samples to train a router on; None: none.

    path: the router's file, by default beside the model's weights, else in `out`.
    """

    budgets: Sequence[float]
    train_share: float | None
    path: Path | None
    out: Path
    resamples: int
    seed: int

    def file(self, loaded: LoadedModel) -> Path:
        """Where the router is, or will be."""
        folder = Path(loaded.source)
        return self.path or (folder if folder.is_dir() else self.out) / ROUTER_FILE


class Routing:
    """Which samples train a router, and which are reported; all ranks do the same.

    Raises:
        InputError: a budget below the smallest count, no router to use, or too few samples.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        held_out: HeldOut,
        counts: Sequence[int],
        settings: RoutingSettings,
        ranks: Ranks,
    ) -> None:
        self._loaded, self._held_out, self._counts = loaded, held_out, list(counts)
        self._settings, self._ranks = settings, ranks
        for budget in settings.budgets:
            check_token_budget(budget, counts)
        self._model = from_main(lambda: model_fingerprint(loaded))
        self._known = identities(held_out, held_out.samples.tolist())
        self._router: Router | None = None
        if settings.train_share is not None:
            self._training = uniform_hash(0, "router", self._known) < settings.train_share
        else:
            path = settings.file(loaded)
            self._router = from_main(lambda: Router.load(path, self._model))
            self._training = np.isin(self._known, self._router.trained_on)
            self._check_counts(self._router)
        self._check_parts()

    def run(self, rows: Mapping[int, Mapping[int, Row]]) -> dict[str, Any]:
        """The comparisons for each budget, once all samples are scored; on rank 0, else empty.

        Args:
            rows: count -> sample -> row, on rank 0.
        """
        side = isqrt(self._counts[0])
        features = measure_features(self._loaded, self._held_out, side, self._ranks)
        found: dict[str, Any] = {}
        from_main(lambda: found.update(self._report(rows, features)))
        return found

    def _report(
        self, rows: Mapping[int, Mapping[int, Row]], features: Mapping[int, Floats]
    ) -> dict[str, Any]:
        settings, first = self._settings, rows[self._counts[0]]
        samples = self._held_out.samples
        usable = np.array(["bad" not in first[s] and s in features for s in samples.tolist()])
        training, reported = usable & self._training, usable & ~self._training
        counts = np.array(self._counts, dtype=np.int64)

        def part(mask: np.ndarray) -> tuple[Floats, Floats]:
            own = samples[mask].tolist()
            scores = [[rows[count][s]["score"] for count in self._counts] for s in own]
            return np.stack([features[s] for s in own]), np.array(scores)

        path = settings.file(self._loaded)
        router = self._router
        if router is None:
            known = self._known[training]
            router = train_router(*part(training), counts, known, self._model)
            router.save(path)
        found = {
            "router": str(path),
            "trained_on": len(router.trained_on),
            "reported_on": int(reported.sum()),
        }
        if not settings.budgets:
            return found
        report_features, scores = part(reported)
        places = [self._counts.index(count) for count in router.counts.tolist()]
        tiles = np.array([first[s]["tiles"] for s in samples[reported].tolist()])
        predicted = router.predict(report_features)
        own = [self._counts[place] for place in places]
        budgets = [
            compare(scores[:, places], predicted, own, tiles, b, settings.resamples, settings.seed)
            for b in settings.budgets
        ]
        return found | {"budgets": budgets}

    def _check_counts(self, router: Router) -> None:
        missing = sorted(set(router.counts.tolist()) - set(self._counts))
        if missing:
            chooses = " ".join(map(str, router.counts.tolist()))
            raise InputError(
                f"the router chooses among {chooses} tokens, and {missing} are not evaluated; give "
                f"--num-image-tokens {chooses}, or train it again with --train-router"
            )
        for budget in self._settings.budgets:
            check_token_budget(budget, router.counts.tolist())

    def _check_parts(self) -> None:
        training, reported = int(self._training.sum()), int((~self._training).sum())
        if self._router is None and training < MIN_SAMPLES:
            raise InputError(
                f"{training} of {len(self._training)} samples are there to train the router on, "
                f"{MIN_SAMPLES} are needed: give more shards, or a larger --limit or --router-share"
            )
        if self._settings.budgets and reported < MIN_REPORTED:
            raise InputError(
                f"{reported} of {len(self._training)} samples are left to report on, at least "
                f"{MIN_REPORTED} are needed, since the router was trained on the others: give "
                "other shards, a larger --limit, or --train-router with a smaller --router-share"
            )
