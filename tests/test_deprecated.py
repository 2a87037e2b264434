"""Every name of 0.6 that has moved is the same object under its old path, and says where it is."""

import inspect
import pickle
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from helpers import in_new_process

import protoclip_losses
from protoclip_losses import (
    Clustering,
    EpisodicClusterer,
    InfoNCE,
    OnlinePrototypes,
    ProtoLoss,
    PrototypeTerm,
    StreamEpisodes,
)
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

# Parameters in 0.6: those that may be given by position, in that order, and after `|` those by keyword alone.
PARAMETERS = """
EpisodeReport: clusterings agreement drift changed seconds
Episode.shard: self rank world_size
EpisodeSampler: dataset_size episode_size | seed episodes
EpisodeSampler.episode: self number
EpisodicClusterer: num_prototypes | niter tol nredo backend spherical seed device warm_start max_dropped process_group
EpisodicClusterer.build: self bank teachers
EpisodicClusterer.fit: self features | init index
FeatureBank: index dim | dtype device
FeatureBank.update: self index image_features text_features
FeatureCollector: dim | dtype device
FeatureCollector.update: self index image_features text_features | teacher_features
InfoNCE: | process_group gather_with_grad chunk_size check_values
InfoNCE.forward: self image_features text_features logit_scale | output_dict logit_bias
OnlinePrototypes: num_prototypes queue_size every warmup | calls_per_step niter seed
OnlinePrototypes.update: self students teachers group sizes labels
ProjectionHead: in_dim out_dim hidden_dim num_layers norm
ProtoLoss: | w_clip w_proto w_external target_temperature external_target_temperature back_translation normalize_prototypes
ProtoLoss: | process_group gather_with_grad chunk_size check_values
ProtoLoss.forward: self image_features text_features logit_scale logit_bias | image_features_projected text_features_projected
ProtoLoss.forward: self | logit_scale_proto index teacher_features features output_dict
ProtoLoss.set_prototypes: self prototypes
PrototypeLoss: target_temperature | chunk_size check_values
PrototypeLoss.forward: self student_features student_centroids teacher_centroids labels logit_scale | valid ignore_index
Prototypes: index terms
Prototypes.from_state_dict: state
Prototypes.positions: self index | check_values
PrototypicalBackTranslation: num_prototypes
PrototypicalBackTranslation.forward: self labels features
PrototypicalBackTranslation.update: self labels features
StreamEpisode: number shards seed
StreamEpisode.batches: self read decode batch_size | rank world_size only max_dropped
StreamEpisodes: shards shards_per_episode | seed episodes
TeacherAdapter: rows | index pca encode normalize
TeacherAdapter.encode: self captions
TeacherAdapter.from_encoder: encode texts cache dim | batch_size normalize dtype progress process_group
TeacherAdapter.from_file: path dim | normalize
TeacherAdapter.from_tensor: x dim | index normalize
functional.back_translate: labels features num_prototypes | check_values
functional.info_nce: image_features text_features logit_scale | chunk_size check_values
functional.prototype_cross_entropy: features prototypes labels logit_scale | targets valid ignore_index chunk_size check_values
functional.soft_targets: teacher_centroids prototypes temperature | valid
distributed.in_step: batches process_group
pca.PCA.fit: blocks dim
metrics.grouping: features labels num_clusters seed
metrics.linear_probe: train_x train_y test_x test_y seed
metrics.modality_gap: image text
metrics.retrieval_recall: image text concepts ks | text_concepts
metrics.zero_shot_accuracy: image labels classifier topk
metrics.zero_shot_classifier: prompt_embeddings
plots.cluster_grid: pictures labels captions path | num_clusters per_cluster
plots.loss_curves: records path
plots.modality_map: image text categories names path
integrations.extraction.EpisodeOrder: episodes rank world_size
integrations.extraction.WithIndex: dataset
integrations.extraction.extract: model batches project
integrations.heads.ProjectionHeads: in_dim out_dim hidden_dim norm
integrations.open_clip.OpenClipLoss: proto pair
integrations.open_clip.add_heads: model dim hidden_dim norm
integrations.protoclip.ProtoLoss.forward: self student_features student_centroids teacher_centroids logit_scale_student
integrations.protoclip.ProtoLoss.forward: self | teacher_temperature labels
"""


def found(path):
    """The object at a path below the package."""
    module, _, name = f"protoclip_losses.{path}".rpartition(".")
    parent = import_module(module) if module.rpartition(".")[2].islower() else found(module.removeprefix("protoclip_losses."))
    return getattr(parent, name)


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


@pytest.mark.filterwarnings("ignore:protoclip_losses:FutureWarning")
@pytest.mark.parametrize("line", PARAMETERS.strip().split("\n"))
def test_parameters_of_0_6_have_their_names_and_order(line):
    path, _, names = line.partition(":")
    positional, keywords = (part.split() for part in f"{names}|".split("|")[:2])
    parameters = inspect.signature(found(path)).parameters
    in_order = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert in_order[: len(positional)] == positional
    assert not set(keywords) - parameters.keys()


def test_call_forms_of_0_6_warn_at_the_line_of_the_user_and_mean_what_they_did():
    x, labels, valid = torch.eye(3, 2), torch.tensor([0, 1]), torch.tensor([True, True])
    online = OnlinePrototypes(2, queue_size=4, every=1, warmup=1)
    by_hand = PrototypeTerm(torch.eye(2), valid, Clustering(torch.ones(2, 3), labels))
    loss = ProtoLoss()
    loss.set_prototypes(None)
    passing = StreamEpisodes(["shard"], 1).episode(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = InfoNCE()(x, x, 1.0, True)
        terms = [
            PrototypeTerm(torch.eye(2), torch.ones(2, 3), labels, valid),
            PrototypeTerm(prototypes=torch.eye(2), teacher_centroids=torch.ones(2, 3), labels=labels, valid=valid),
        ]
        online.update({"image": x, "text": x}, {})
        online.check({"image": x, "text": x})
        nearest = online.labels("image", x)
        total = loss(x, x, 1.0, teacher_features=x)
        batches = passing.batches(lambda shard: range(5), int, 2, workers=0, shuffle=2, collate=list)
        assert EpisodicClusterer(2).report is None
    assert {warning.filename for warning in caught} == {__file__}
    assert [str(warning.message).partition(" is deprecated")[0] for warning in caught] == [
        "output_dict as the fourth positional argument of InfoNCE",
        *["PrototypeTerm(prototypes, teacher_centroids, labels, valid)"] * 2,
        "OnlinePrototypes.update",
        "OnlinePrototypes.check",
        "OnlinePrototypes.labels(teacher, features)",
        "teacher_features as a single tensor",
        *[f"batches({old}=)" for old in ("workers", "shuffle", "collate")],
        "EpisodicClusterer.report",
    ]
    assert torch.equal(parts["contrastive_loss"], total)
    for term in terms:
        for name in ("prototypes", "teacher_centroids", "labels", "valid"):
            assert torch.equal(getattr(term, name), getattr(by_hand, name))
    assert nearest.shape == (3,)
    again = passing.batches(lambda shard: range(5), int, 2, shuffle_buffer=2, collate_fn=list)
    assert [(index.tolist(), batch) for index, batch in batches] == [(index.tolist(), batch) for index, batch in again]


def test_a_call_form_of_0_6_breaks_no_graph():
    compiled = torch.compile(InfoNCE(), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert float(compiled(torch.eye(2), torch.eye(2), 1.0, True)["contrastive_loss"]) == pytest.approx(0.3133, abs=1e-4)


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
