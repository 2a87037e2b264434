"""The teachers of ``--proto-teacher``: features or clusters of each row of the csv, in files, or the words of its captions."""

import argparse
import logging
import os
from typing import Any

import numpy as np
import torch

from ...clustering.kmeans import KMeansResult
from ...distributed import active_group, validate_on_all_ranks
from ...teachers import TeacherAdapter

WORDS = "words"
BLOCK = 65_536  # rows that are looked at together


def read_teachers(options: argparse.Namespace, info: Any) -> dict[str, TeacherAdapter | KMeansResult]:
    """The teachers, which have a row or a label for each row of the training data. A word for one that has more.

    Raises:
        FileNotFoundError: no such file; on all ranks if on one, as all of these.
        ValueError: a WebDataset, a teacher with fewer rows, data without captions, a file of another kind, clusters online.
    """
    files = {name: file for name, file in options.proto_teacher if file is not None}
    if info.shared_epoch is not None:
        words = (
            ", and the words of its captions have to be known before training" if len(files) < len(options.proto_teacher) else ""
        )
        raise ValueError(f"--proto-teacher needs --dataset-type csv: samples of a WebDataset have no row number{words}")
    data = info.dataloader.dataset
    samples = len(data)
    found: dict[str, TeacherAdapter | KMeansResult] = {}

    def read() -> None:
        for name, file in files.items():
            found[name] = (
                _load_clusters(file) if _is_clusters(file) else TeacherAdapter.from_file(file, options.proto_teacher_dim)
            )
            if options.proto_online and isinstance(found[name], KMeansResult):
                raise ValueError(f"--proto-teacher {name} must have features with --proto-online, got clusters: {file}")
            if (rows := _num_rows(found[name])) < samples:
                raise ValueError(f"--proto-teacher: {file} must have a row for each of {samples} samples, got {rows}")
        if len(files) < len(options.proto_teacher) and not hasattr(data, "captions"):
            raise ValueError(f"--proto-teacher {WORDS} needs the captions of a csv, got a {type(data).__name__}, which has none")

    validate_on_all_ranks(read, active_group(None), lambda: {name: repr(teacher) for name, teacher in found.items()})
    for name, teacher in found.items():
        if (rows := _num_rows(teacher)) > samples:
            logging.warning(
                f"--proto-teacher {name} has {rows} rows for {samples} samples of --train-data, and row i is taken for "
                "sample i: check that both are of the same samples in the same order"
            )
    return {
        name: found[name] if name in found else _of_words(data.captions, options.proto_teacher_dim)
        for name, _ in options.proto_teacher
    }


def _is_clusters(file: str) -> bool:
    """Of a folder, or a file that is no .npy; of one that does not exist, by its name."""
    if os.path.isfile(file):
        with open(file, "rb") as content:
            return not file.endswith(".npy") and content.read(6) != np.lib.format.MAGIC_PREFIX
    return not file.endswith(".npy")


def _load_clusters(file: str) -> KMeansResult:
    try:
        return KMeansResult.load(file)
    except ValueError as error:
        raise ValueError(
            f"--proto-teacher must name .npy files or what python -m protoclip_losses.cluster wrote: {error}"
        ) from error


def _num_rows(teacher: TeacherAdapter | KMeansResult) -> int:
    return len(teacher.labels if isinstance(teacher, KMeansResult) else teacher)


def _of_words(captions: list[Any], dim: int) -> TeacherAdapter:
    """A teacher of the captions as open_clip has read them: text, or NaN where a cell of the csv is empty."""
    teacher = TeacherAdapter.from_captions([str(text) if text == text else "" for text in captions], dim)
    rows = torch.split(torch.arange(len(teacher), device="cpu"), BLOCK)
    unlabelled = sum(int((~teacher[index].any(1)).sum()) for index in rows)
    logging.info(f"--proto-teacher {WORDS}: {unlabelled} of {len(teacher)} captions have no known word, and get no label")
    return teacher
