"""The Slurm cluster that the tests of this folder share."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NoReturn

import pytest

from tests.slurm.cluster import Cluster, ClusterError, missing_requirement


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster of two nodes; see `no_cluster` for where none can be started."""
    if problem := missing_requirement():
        no_cluster(problem)
    with ExitStack() as stack:
        try:
            running = stack.enter_context(Cluster(tmp_path_factory.mktemp("slurm")))
        except ClusterError as error:
            no_cluster(str(error))
        yield running


def no_cluster(reason: str) -> NoReturn:
    """Skip the test, or fail it where REQUIRE_SLURM=1 says that there must be a cluster."""
    if os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(f"no Slurm cluster, but REQUIRE_SLURM=1: {reason}", pytrace=False)
    pytest.skip(f"no Slurm cluster: {reason}")
