"""Every name of 0.6 that has moved is the same object under its old path, and says where it is."""

import pickle
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
from helpers import in_new_process

import protoclip_losses
from protoclip_losses._deprecated import MOVED

NAMES = {old: new for old, new in MOVED.items() if not old.endswith(".*")}
MODULES = {old.removesuffix(".*"): new.removesuffix(".*") for old, new in MOVED.items() if old.endswith(".*")}

# Import paths that the documentation, the README and the examples of 0.6 print, where the object is still called that.
DOCUMENTED = """
ClusteringReport Clusters Episode EpisodeReport EpisodeSampler EpisodicClusterer FeatureBank FeatureCollector InfoNCE
OnlinePrototypes ProjectionHead ProtoLoss PrototypeLoss PrototypeTerm Prototypes PrototypicalBackTranslation StreamEpisode
StreamEpisodes StreamPass TeacherAdapter functional
functional.back_translate functional.info_nce functional.prototype_cross_entropy functional.soft_targets
distributed.in_step pca.PCA
back_translation.PrototypicalBackTranslation clustering.EpisodicClusterer collector.FeatureCollector episodes.EpisodeSampler
episodes.Episode episodes.FeatureBank heads.ProjectionHead online.OnlinePrototypes stream_pass.StreamPass
streams.StreamEpisodes streams.StreamEpisode teachers.TeacherAdapter losses.InfoNCE losses.ProtoLoss losses.PrototypeLoss
metrics.grouping metrics.linear_probe metrics.modality_gap metrics.retrieval_recall metrics.zero_shot_accuracy
metrics.zero_shot_classifier plots.cluster_grid plots.loss_curves plots.modality_map
integrations.extraction.EpisodeOrder integrations.extraction.WithIndex integrations.extraction.extract
integrations.heads.ProjectionHeads integrations.open_clip.OpenClipLoss integrations.open_clip.Launcher
integrations.open_clip.add_heads integrations.open_clip.main integrations.open_clip.parse_arguments
integrations.protoclip.ClipLoss integrations.protoclip.ProtoLoss integrations.protoclip.gather_features
"""


def found(path):
    """The object at a path below the package."""
    module, _, name = f"protoclip_losses.{path}".rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_is_the_new_object_and_warns_once(old):
    new = NAMES[old]
    with pytest.warns(FutureWarning) as caught:
        assert found(old) is found(new)
    assert [str(warning.message) for warning in caught] == [
        f"protoclip_losses.{old} is deprecated and goes after 0.7.x: use protoclip_losses.{new}"
    ]


@pytest.mark.parametrize("old", MODULES)
def test_a_module_that_is_gone_still_imports_and_has_the_names_of_the_new_one(old):
    module, new = import_module(f"protoclip_losses.{old}"), import_module(f"protoclip_losses.{MODULES[old]}")
    parent, _, child = module.__name__.rpartition(".")
    assert getattr(sys.modules[parent], child) is module
    assert find_spec(module.__name__).name == module.__name__
    name = next(name for name, x in vars(new).items() if getattr(x, "__module__", "") == new.__name__ and name[0] != "_")
    with pytest.warns(FutureWarning, match=f"protoclip_losses.{old}.{name} is deprecated"):
        assert getattr(module, name) is getattr(new, name)


@pytest.mark.parametrize("statement", ["from protoclip_losses.clustering import {}", "from protoclip_losses.streams import {}"])
def test_each_import_warns_once_at_the_line_of_the_user(statement):
    name = "Prototypes" if "clustering" in statement else "StreamEpisodes"
    code = compile("\n\n" + statement.format(name), "script_of_a_user.py", "exec")
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scope = {}
            exec(code, scope)
        assert [(warning.filename, warning.lineno) for warning in caught] == [("script_of_a_user.py", 3)]
        assert scope[name] is getattr(protoclip_losses, name)


def test_attributes_of_old_modules_need_no_import_of_their_own():
    with pytest.warns(FutureWarning, match=r"use protoclip_losses\.StreamEpisodes") as caught:
        assert protoclip_losses.streams.StreamEpisodes is protoclip_losses.StreamEpisodes
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match=r"use protoclip_losses\.ProjectionHeads"):
        assert protoclip_losses.integrations.heads.ProjectionHeads is protoclip_losses.heads.ProjectionHeads


@pytest.mark.parametrize("path", DOCUMENTED.split())
def test_what_0_6_documented_is_where_it_was_or_in_the_table(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert found(path) is not None
    has_moved = path in NAMES or path.rpartition(".")[0] in MODULES
    assert [warning.category for warning in caught] == [FutureWarning] * has_moved


@pytest.mark.filterwarnings("error")
def test_a_name_that_never_was_is_an_attribute_error_and_so_are_names_of_protocols():
    for path in ("nothing", "streams.nothing", "clustering.nothing", "distributed.agrees"):
        with pytest.raises(AttributeError, match="has no attribute"):
            found(path)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from protoclip_losses import nothing  # noqa: F401
    for module in (protoclip_losses, protoclip_losses.streams, protoclip_losses.clustering):
        assert not any(hasattr(module, name) for name in ("__wrapped__", "__test__", "__getstate__x__"))


def test_a_pickle_of_0_6_finds_its_class():
    old = b"cprotoclip_losses.episodes\nEpisodeSampler\n.", b"cprotoclip_losses.streams\nStreamEpisodes\n."
    assert pickle.loads(old[0]) is protoclip_losses.EpisodeSampler
    with pytest.warns(FutureWarning, match=r"use protoclip_losses\.StreamEpisodes"):
        assert pickle.loads(old[1]) is protoclip_losses.StreamEpisodes


def test_import_is_silent_and_imports_no_host_and_nothing_optional():
    code = """
import copy, doctest, inspect, pickle, sys, warnings
import numpy, torch
before = set(sys.modules)
warnings.simplefilter("error", FutureWarning)
import protoclip_losses, protoclip_losses.streams
optional = "accelerate faiss lightning matplotlib open_clip open_clip_train sklearn tqdm transformers".split()
assert not (set(sys.modules) - before).intersection(optional)
assert "protoclip_losses.integrations.open_clip" not in sys.modules
for module in [module for name, module in sys.modules.items() if name.startswith("protoclip_losses")]:
    inspect.getmembers(module), doctest.DocTestFinder().find(module), inspect.getdoc(module), repr(module)
sampler = protoclip_losses.EpisodeSampler(4, 2)
copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler)), inspect.getsource(protoclip_losses.EpisodeSampler)
from protoclip_losses import *
print(sampler.number)
"""
    assert in_new_process(code).strip() == "0"
