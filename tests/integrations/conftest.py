"""Data that the tests of several hosts read."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from protoclip_losses import EpisodicClusterer, KMeans, TeacherAdapter

# Of open_clip 4.x, which is not released: nothing that CI installs has it, and a test that is skipped there is an error.
collect_ignore = [] if find_spec("open_clip") and find_spec("open_clip.task") else ["test_open_clip_4.py"]


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """48 pairs in open_clip's csv form."""
    from host_data import write_csv

    return write_csv(tmp_path_factory.mktemp("csv"), 48)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """(pattern, number of samples) of a WebDataset."""
    from pair_files import emoji_with_groups, write_shards

    pattern, captions = write_shards(tmp_path_factory.mktemp("shards"), emoji_with_groups()[0])
    return pattern, len(captions)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """open_clip's model "tiny"."""
    from open_clip_step import add_tiny_model

    add_tiny_model(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def pairs(request):
    """As many pictures with captions as the module's ROWS says."""
    from host_pairs import PicturePairs

    return PicturePairs(request.module.ROWS)


@pytest.fixture(scope="module")
def words(pairs):
    pytest.importorskip("sklearn")
    return TeacherAdapter.from_captions(pairs.captions, dim=8)


@pytest.fixture(scope="module")
def clusters(words):
    return EpisodicClusterer(4).fit_teacher(words)


@pytest.fixture(scope="module")
def command_clusters(words, tmp_path_factory):
    """What ``python -m protoclip_losses.cluster`` writes for the features of ``words``."""
    folder = tmp_path_factory.mktemp("command")
    np.save(folder / "words.npy", words[torch.arange(len(words))].numpy())
    arguments = [str(folder / "words.npy"), "--num-clusters", "4", "--out", str(folder / "clusters"), "--quiet"]
    subprocess.run([sys.executable, "-m", "protoclip_losses.cluster", *arguments], check=True)
    return folder / "clusters"


@pytest.fixture
def widths(monkeypatch):
    """Of the rows that K-means was run on."""
    seen, fit = [], KMeans.fit

    def counted(self, x, **more):
        seen.append(x.shape[1])
        return fit(self, x, **more)

    monkeypatch.setattr(KMeans, "fit", counted)
    return seen
