"""Real gloo processes: all cases of the first three ranks_*.py below in one spawn for each number of processes."""

import pytest
import ranks_clustering
import ranks_losses
import ranks_mismatch
import ranks_streams
import spawn

MODULES = ("ranks_losses", "ranks_clustering", "ranks_streams")


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda n: f"{n}_processes")
def ranks(request, tmp_path_factory):
    return spawn.run(MODULES, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def mismatched_ranks(tmp_path_factory):
    return spawn.run(["ranks_mismatch"], 2, tmp_path_factory.mktemp("ranks"), time_limit=60)


@pytest.mark.parametrize("case", [case.__name__ for case in ranks_losses.CASES + ranks_clustering.CASES + ranks_streams.CASES])
def test_on(ranks, case):
    if problem := spawn.failure(case, *ranks):
        pytest.fail(problem, pytrace=False)


@pytest.mark.parametrize("case", [case.__name__ for case in ranks_mismatch.CASES])
def test_ranks_that_differ_all_raise(mismatched_ranks, case):
    if problem := spawn.failure(case, *mismatched_ranks):
        pytest.fail(problem, pytrace=False)
