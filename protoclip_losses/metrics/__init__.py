"""Evaluation of frozen encoder features: modality gap, retrieval, zero-shot, linear probe, grouping.

Features are the encoder's own output z, not the projected h that the prototype losses see. Every function L2-normalises what
has to be normalised, so that plain encoder outputs of any finite scale can be passed; sums are taken in float64 where the
device has it. :func:`linear_probe` and :func:`grouping` need scikit-learn, which is imported when they are called:
``pip install 'protoclip-losses[metrics]'``.
"""

from ..clustering.agreement import adjusted_mutual_info_score, adjusted_rand_score
from .grouping import grouping
from .linear_probe import linear_probe
from .modality_gap import modality_gap
from .retrieval import retrieval_recall
from .zero_shot import zero_shot_accuracy, zero_shot_classifier

__all__ = [
    "adjusted_mutual_info_score",
    "adjusted_rand_score",
    "grouping",
    "linear_probe",
    "modality_gap",
    "retrieval_recall",
    "zero_shot_accuracy",
    "zero_shot_classifier",
]
