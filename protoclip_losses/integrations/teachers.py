"""External teachers as the hosts take them: features by sample index, or clusters that were found before."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..clustering.kmeans import KMeansResult
from ..episodes import FeatureBank
from ..losses import ProtoLoss
from ..prototypes import Clustering, EpisodicClusterer, Prototypes
from ..teachers import TeacherAdapter

Teacher = TeacherAdapter | Clustering | KMeansResult


def check_rows(teachers: Mapping[str, Any], samples: int, data: str) -> None:
    """Compare the rows of teachers with the samples of the data, once: row i has to belong to sample i.

    Raises:
        ValueError: a teacher with fewer rows. One with more is a warning. Rows with sample numbers of their own are not compared.
    """
    for name, teacher in teachers.items():
        rows = _number_of_rows(teacher)
        if rows is None:
            continue
        if rows < samples:
            raise ValueError(f"teachers[{name!r}] must have a row for each of the {samples} samples of {data}, got {rows} rows")
        if rows > samples:
            warnings.warn(
                f"teachers[{name!r}] has {rows} rows and {data} {samples} samples: row i is taken for sample i, so give "
                "the teacher the rows of those samples, in their order",
                stacklevel=3,
            )


def _number_of_rows(teacher: Any) -> int | None:
    """Features or labels by sample index; None where there is no telling."""
    if isinstance(teacher, (Clustering, KMeansResult)):
        return None if teacher.labels is None else len(teacher.labels)
    return None if getattr(teacher, "has_index", False) or not hasattr(teacher, "__len__") else len(teacher)


def build_episode(clusterer: EpisodicClusterer, bank: FeatureBank, teachers: Mapping[str, Any], loss: ProtoLoss) -> Prototypes:
    """The prototypes of an episode. Modalities are not clustered where their terms have no weight."""
    if teachers and not loss.w_proto:
        return clusterer.build(bank, teachers, internal=False)
    return clusterer.build(bank, teachers)


def labels_or_features(loss: ProtoLoss, teachers: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """The arguments by which ``loss`` knows samples: their index in episodes, the teachers' features of them in online mode.

    Raises:
        TypeError: in online mode, a teacher of which there are clusters and no features.
    """
    given: dict[str, Any] = {"index": index} if loss.needs_episodes else {}
    if not loss.needs_episodes or loss.w_distill:
        given["teacher_features"] = {}
        for name, teacher in teachers.items():
            if not isinstance(teacher, (Clustering, KMeansResult)):
                given["teacher_features"][name] = teacher[index.cpu()].to(index.device)
            elif not loss.needs_episodes:
                raise TypeError(
                    f"teachers[{name!r}] must be a TeacherAdapter with OnlinePrototypes, which cluster its features as training "
                    f"goes on, got a {type(teacher).__name__}"
                )
    return given
