"""What several test files need: features to work on, and Python code run in a process of its own."""

import os
import subprocess
import sys

import torch

RECORDED_DRAW = [3.5083, 1.2304, 0.6150, 2.5351]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def blobs(clusters, each, width, seed=0):
    """Well separated groups in random order, and the group of each row."""
    groups = torch.arange(clusters).repeat(each)[torch.randperm(clusters * each, generator=seeded(seed))]
    centers = 10 * torch.randn(clusters, width, generator=seeded(seed + 1))
    return centers[groups] + 0.01 * torch.randn(len(groups), width, generator=seeded(seed + 2)), groups


def same_partition(labels, groups):
    """Whether two labelings differ in names only."""
    pairs = torch.stack([labels, groups]).unique(dim=1).shape[1]
    return pairs == len(labels.unique()) == len(groups.unique())


def assert_same_state(one, other):
    """Two states, mappings of mappings, are equal bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same_state(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def child_environment(*folders):
    """The environment of a process that imports what this one does, and from ``folders``."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(folder) for folder in (*folders, *sys.path))}


def python_process(code, *arguments, folders=()):
    """A new interpreter that runs ``code`` with ``arguments`` in sys.argv."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(*folders),
    )


def in_new_process(code, *arguments, folders=()):
    """The standard output of ``code`` in a new interpreter, which must succeed and write no error."""
    process = python_process(code, *arguments, folders=folders)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    return out


def draws_as_recorded():
    """Whether K-means draws the random numbers here that it drew where results were recorded: torch 2.4 draws others."""
    numbers = torch.empty(4).exponential_(generator=seeded(0))
    return torch.allclose(numbers, torch.tensor(RECORDED_DRAW), atol=1e-4)


def assert_equal(one, other):
    """Tensors, and what lists, tuples and dicts have in them, are equal bit for bit, of one dtype and on one device."""
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other
