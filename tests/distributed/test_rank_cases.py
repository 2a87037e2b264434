"""A function for ranks that nobody runs is an error when tests are collected."""

import subprocess
import sys
from types import ModuleType

import pytest
from helpers import child_environment
from rank_cases import cases_of, rank_case

CASES = """
from rank_cases import rank_case
def helper(rank): ...
@rank_case
def everywhere(rank, world_size, folder): ...
@rank_case(world_sizes=(2,))
def on_two(rank, world_size, folder): assert rank == 0
"""
FORGOTTEN = "def other(rank, world_size, folder): ..."


def pytest_in(folder, code, *arguments):
    """What pytest says of a folder with one file of rank cases."""
    (folder / "conftest.py").write_text("from rank_cases import pytest_pycollect_makemodule")
    (folder / "ranks_some.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-o", "python_files=ranks_*.py", "--rootdir", folder]
    command += ["-p", "no:cacheprovider", *arguments, folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=child_environment()).stdout


def test_each_case_is_collected_for_each_number_of_processes(tmp_path):
    listed = pytest_in(tmp_path, CASES, "--collect-only").splitlines()
    assert [line.partition("::")[2] for line in listed if "::" in line] == [
        *(f"everywhere[{n}_processes]" for n in (1, 2, 4)),
        "on_two[2_processes]",
    ]


@pytest.mark.distributed
def test_a_case_that_fails_on_one_rank_fails_and_says_where(tmp_path):
    out = pytest_in(tmp_path, CASES, "-k", "2_processes")
    assert "rank 1 failed" in out
    assert "assert rank == 0" in out
    assert "1 failed, 1 passed, 2 deselected" in out


def test_a_case_that_is_not_marked_is_an_error_of_pytest(tmp_path):
    out = pytest_in(tmp_path, CASES + FORGOTTEN)
    assert "rank cases of ranks_some must be marked with @rank_case, got ['other'] without it" in out
    assert "1 error" in out


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (FORGOTTEN, r"must be marked with @rank_case, got \['other'\] without it"),
        ("def helper(rank): ...", r"ranks_some must hold a function of \(rank, world_size, folder\), got none"),
    ],
)
def test_a_file_without_a_marked_case_is_an_error(code, message):
    module = ModuleType("ranks_some")
    exec(code, vars(module))
    with pytest.raises(ValueError, match=message):
        cases_of(module)


def test_a_case_of_another_file_is_not_run_again():
    module = ModuleType("ranks_some")
    exec(FORGOTTEN, vars(module))
    module.other.__module__ = "ranks_others"
    with pytest.raises(ValueError, match="got none"):
        cases_of(module)


def test_a_case_is_marked_only_where_it_is_found():
    with pytest.raises(ValueError, match=r"must be at the top level of a file ranks_\*\.py, got .* in test_rank_cases\.py"):
        rank_case(test_a_case_is_marked_only_where_it_is_found)
