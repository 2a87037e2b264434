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


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    spawn.run(["ranks_killed"], 3, tmp_path, time_limit=90)
    said = [tmp_path / f"said.{rank}" for rank in range(3)]
    assert [file.exists() for file in said] == [True, False, True], [(tmp_path / f"log.{r}").read_text() for r in (0, 2)]
    assert all(float(file.read_text().split()[0]) < 75 for file in (said[0], said[2]))
