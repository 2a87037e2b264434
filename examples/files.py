"""Files as people have them: links, folders that cannot be read, files that change, and several processes at once."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO

from pairs import concept_number

_locks: list[IO[str]] = []  # open until the process ends


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, which then takes the place of `path`: a reader finds the old file or the new one, complete.

    Its name is unique, as another process may write the same file at the same time.
    """
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    # Made for its owner alone; the file has the permissions of any other.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def lock_folder(folder: Path) -> bool:
    """Whether this process is now the only one with a lock on the folder; the system drops the lock when it ends."""
    try:
        import fcntl
    except ImportError:  # no POSIX system
        return True
    file = open(folder / "lock", "w")  # noqa: SIM115 - closing it would drop the lock
    try:
        # lockf and not flock: loader workers, which may outlive a killed parent, do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _locks.append(file)
    return True


def file_marks(paths: Sequence[str]) -> list[int]:
    """A number for each file that changes with its name, size or date of change. Missing files have one too."""
    blocks = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
    with ThreadPool(16) as pool:  # a file system on the network takes its time for each
        return [mark for block in pool.map(_marks, blocks) for mark in block]


def _marks(paths: Sequence[str]) -> list[int]:
    return [concept_number(f"{path}\0{_size_and_date(path)}") for path in paths]


def _size_and_date(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def changed_files(paths: Sequence[str], old: Sequence[int], new: Sequence[int]) -> str:
    """Which files have changed between two calls of :func:`file_marks`, in words; empty if none has."""
    if len(old) != len(new):
        return f"{len(old)} files before, {len(new)} now"
    changed = [path for path, before, now in zip(paths, old, new, strict=True) if before != now]
    return ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def find_files(folder: str, suffixes: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(files with these suffixes, (path, problem) of those that cannot be read), sorted, in `folder` and all below it.

    Links are followed. A folder that is reached twice, as by a link to one above it, is read once.
    """
    files: list[str] = []
    problems: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    todo = [folder]
    while todo:
        current = todo.pop()
        try:
            found = os.stat(current)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(current) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            problems.append((f"{current} ({error.strerror})", "unreadable folder"))
            continue
        links: list[str] = []
        for entry in listed:
            wanted = os.path.splitext(entry.name)[1][1:].lower() in suffixes
            try:
                mode = os.stat(entry.path).st_mode
            except OSError as error:
                dangling = entry.is_symlink() and isinstance(error, FileNotFoundError)
                if wanted or not os.path.splitext(entry.name)[1]:
                    problems.append((entry.path, "dangling link" if dangling else "unreadable file"))
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else todo).append(entry.path)
            elif wanted and stat.S_ISREG(mode):
                files.append(entry.path)
            elif wanted:
                problems.append((entry.path, "no regular file"))
        todo[:0] = links  # the last to be read, so that a folder keeps its own name
    return sorted(files), sorted(problems)
