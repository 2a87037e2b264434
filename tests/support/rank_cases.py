"""``@rank_case``: a function of (rank, world_size, folder) in a file ``ranks_*.py`` that runs on each rank of real processes.

pytest collects those files through this module, so a case needs no list and no test function. Cases of one folder and world
size share their processes, as most of the time goes into starting them.
"""

import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import spawn

PREFIX = "ranks_"


@dataclass(frozen=True)
class Setting:
    world_sizes: tuple[int, ...]
    own_processes: bool


def rank_case(function=None, *, world_sizes=(1, 2, 4), own_processes=False):
    """Collect ``function`` once per world size; ``own_processes`` are not shared with the cases of other files."""

    def mark(function):
        name, file = function.__qualname__, Path(function.__code__.co_filename).name
        if not file.startswith(PREFIX) or name != function.__name__:
            raise ValueError(f"a rank case must be at the top level of a file {PREFIX}*.py, got {name} in {file}")
        function.rank_case = Setting(tuple(world_sizes), own_processes)
        return function

    return mark if function is None else mark(function)


def cases_of(module):
    """The rank cases of a module; a function that takes (rank, world_size, ...) and is not marked is an error."""
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    for_ranks = [f for f in own if list(inspect.signature(f).parameters)[:2] == ["rank", "world_size"]]
    if not for_ranks:
        raise ValueError(f"{module.__name__} must hold a function of (rank, world_size, folder), got none")
    if forgotten := [f.__name__ for f in for_ranks if not hasattr(f, "rank_case")]:
        raise ValueError(f"rank cases of {module.__name__} must be marked with @rank_case, got {forgotten} without it")
    return for_ranks


class RankModule(pytest.Module):
    """A file of rank cases."""

    def collect(self):
        try:
            cases = cases_of(self.obj)
        except ValueError as error:
            raise self.CollectError(str(error)) from None
        return [RankItem.make(self, case, world_size) for case in cases for world_size in case.rank_case.world_sizes]


class RankItem(pytest.Item):
    """One case at one world size. The first of a batch to run starts the processes, for all of it that was selected."""

    @classmethod
    def make(cls, parent, case, world_size):
        item = cls.from_parent(parent, name=f"{case.__name__}[{world_size}_processes]")
        item.add_marker("distributed")
        item.case, item.line = f"{item.path}::{case.__name__}", case.__code__.co_firstlineno - 1
        item.batch = item.path if case.rank_case.own_processes else item.path.parent, world_size
        return item

    def runtest(self):
        ran = self.config.stash.setdefault(RAN, {})
        if self.batch not in ran:
            folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
            self.config.add_cleanup(folder.cleanup)
            cases = [x.case for x in self.session.items if isinstance(x, RankItem) and x.batch == self.batch]
            ran[self.batch] = spawn.run(cases, self.batch[1], Path(folder.name))
        if problem := spawn.failure(self.case, *ran[self.batch]):
            pytest.fail(problem, pytrace=False)

    def reportinfo(self):
        return self.path, self.line, self.name


RAN = pytest.StashKey()


def pytest_pycollect_makemodule(module_path, parent):
    return RankModule.from_parent(parent, path=module_path) if module_path.name.startswith(PREFIX) else None
