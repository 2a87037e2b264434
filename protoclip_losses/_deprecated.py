"""Names of 0.6 that have moved: they work throughout 0.7.x, each with a FutureWarning that says what to write.

Nothing is imported before it is asked for. Modules of the package need not know of this one: it is installed from outside.
"""

import sys
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ._checks import warn_renamed

# Old path: new path, both below protoclip_losses. `module.*` is a module that does not exist any more; the line holds for
# all names in it that have no line of their own.
MOVED = {
    "Clusters": "KMeansResult",
    "back_translation.*": "prototypes.back_translation.*",
    "back_translation.PrototypicalBackTranslation": "PrototypicalBackTranslation",
    "caption_cache.*": "teachers.caption_cache.*",
    "clustering.Clusters": "KMeansResult",
    "clustering.EpisodeReport": "EpisodeReport",
    "clustering.EpisodicClusterer": "EpisodicClusterer",
    "clustering.PrototypeTerm": "PrototypeTerm",
    "clustering.Prototypes": "Prototypes",
    "clustering.clusterer.*": "prototypes.build.*",
    "clustering.clusterer.EpisodicClusterer": "EpisodicClusterer",
    "clustering.clusters.*": "clustering.kmeans.*",
    "clustering.clusters.Clusters": "KMeansResult",
    "clustering.episode.*": "prototypes.report.*",
    "clustering.prototypes.*": "prototypes.episode.*",
    "clustering.prototypes.PrototypeTerm": "PrototypeTerm",
    "clustering.prototypes.Prototypes": "Prototypes",
    "clustering.report.EpisodeReport": "EpisodeReport",
    "clustering.rows.*": "clustering.points.*",
    "collector.*": "episodes.collector.*",
    "collector.FeatureCollector": "FeatureCollector",
    "distributed.in_step": "distributed.even_batches",
    "functional.contrastive.*": "functional.info_nce.*",
    "functional.contrastive.info_nce": "functional.info_nce",
    "functional.prototypes.*": "functional.prototype_cross_entropy.*",
    "functional.prototypes.prototype_cross_entropy": "functional.prototype_cross_entropy",
    "functional.prototypes.soft_targets": "functional.soft_targets",
    "graph.*": "kernels.autograd.*",
    "integrations.extraction.*": "episodes.extraction.*",
    "integrations.extraction.EpisodeOrder": "EpisodeOrder",
    "integrations.extraction.WithIndex": "WithIndex",
    "integrations.extraction.extract": "extract",
    "integrations.heads.*": "heads.*",
    "integrations.heads.ProjectionHeads": "ProjectionHeads",
    "integrations.open_clip_arguments.*": "integrations.open_clip.arguments.*",
    "integrations.open_clip_arguments.parse_arguments": "integrations.open_clip.parse_arguments",
    "integrations.open_clip_data.*": "integrations.open_clip.data.*",
    "integrations.open_clip_model.*": "integrations.open_clip.model.*",
    "integrations.open_clip_model.OpenClipLoss": "integrations.open_clip.OpenClipLoss",
    "integrations.open_clip_model.add_heads": "integrations.open_clip.add_heads",
    "integrations.open_clip_online.*": "integrations.open_clip.online.*",
    "integrations.require": "_checks.require",
    "kernels.contrastive.*": "kernels.info_nce.*",
    "kernels.prototype.*": "kernels.prototype_cross_entropy.*",
    "losses.offsets.*": "losses.soft_target_cache.*",
    "losses.prototype.*": "losses.prototype_loss.*",
    "losses.prototype.PrototypeLoss": "PrototypeLoss",
    "online.*": "prototypes.online.*",
    "online.OnlinePrototypes": "OnlinePrototypes",
    "pca.*": "teachers.pca.*",
    "pca.PCA": "teachers.PCA",
    "stream_pass.*": "episodes.shard_reader.*",
    "stream_pass.StreamPass": "StreamPass",
    "streams.*": "episodes.stream.*",
    "streams.StreamEpisode": "StreamEpisode",
    "streams.StreamEpisodes": "StreamEpisodes",
}
ROOT = __name__.rpartition(".")[0]


def split(path: str) -> tuple[str, str]:
    """A path below the package as the full name of its module, and the name in it."""
    module, _, name = f"{ROOT}.{path}".rpartition(".")
    return module, name


def moved_to(module: str, name: str) -> Any:
    """What ``module.name`` has become: the ``__getattr__`` of that module, which Python calls for names that it does not have."""
    path = f"{module}.{name}".removeprefix(f"{ROOT}.")
    new = MOVED.get(path) or MOVED.get(f"{module}.*".removeprefix(f"{ROOT}."), "").replace("*", name)
    if not new or name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new_module, new_name = split(new)
    value = getattr(import_module(new_module), new_name)
    # `from package import name` asks twice, and the first time the import system only looks whether it has to import a module.
    if sys._getframe(1).f_code.co_name != "_handle_fromlist":
        warn_renamed(f"{ROOT}.{path}", f"{ROOT}.{new}")
    return value


def install() -> None:
    """Make the modules that do not exist any more, and have every module in the table ask :func:`moved_to`."""
    for path in MOVED:
        module, name = split(path)
        if name == "*":
            sys.modules[module] = empty = ModuleType(module, f"A module of 0.6, moved to {ROOT}.{MOVED[path]}")
            empty.__spec__ = ModuleSpec(module, None)
            parent, _, child = module.rpartition(".")
            setattr(import_module(parent), child, empty)
    for module in {split(path)[0] for path in MOVED}:
        vars(import_module(module))["__getattr__"] = partial(moved_to, module)
