"""Bad input of the losses: each error names the argument, what came and what was wanted."""

import pytest
import torch
from cases import episode, make_term, term, unit

from protoclip_losses import InfoNCE, ProtoLoss, PrototypeLoss, PrototypicalBackTranslation, functional

pytestmark = pytest.mark.cpu_only

T = term(batch=6, prototypes=4, width=5, teacher_width=3)
H, P, C, A, VALID = T.h, T.P, T.C, torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([True, True, True, False])
INTS = torch.ones(6, 5, dtype=torch.int64)
NAN, INF = float("nan"), float("inf")


def at(x, row, value):
    return x.index_fill(0, torch.tensor([row]), value)


def info_nce(image=H, text=H, scale=1.0, **kwargs):
    return functional.info_nce(image, text, scale, **kwargs)


def cross_entropy(features=H, prototypes=P, labels=A, scale=1.0, **kwargs):
    return functional.prototype_cross_entropy(features, prototypes, labels, scale, **kwargs)


def soft_targets(centroids=C, prototypes=P, temperature=0.1, **kwargs):
    return functional.soft_targets(centroids, prototypes, temperature, **kwargs)


def back_translate(labels=A, features=H, num_prototypes=4):
    return functional.back_translate(labels, features, num_prototypes)


def prototype_loss(features=H, student=P, teacher=C, labels=A, scale=1.0, temperature=0.1, **kwargs):
    return PrototypeLoss(temperature)(features, student, teacher, labels, scale, **kwargs)


def proto_loss(image=H, text=H, scale=1.0, names=("image", "text"), **kwargs):
    prototypes = episode(names, ("roberta",))
    loss = ProtoLoss()
    loss.set_prototypes(prototypes)
    return loss(image, text, scale, **{"index": prototypes.index[:6], **kwargs})


def streamed(*batches):
    pbt = PrototypicalBackTranslation(4)
    for labels, features in batches:
        pbt.update(labels, features)
    return pbt.compute()


def loaded(state_of, into):
    into.load_state_dict(state_of.state_dict())


def with_term(**changes):
    good = {"prototypes": P, "teacher_centroids": C, "labels": A, "valid": VALID}
    return make_term(**{**good, **changes})


# (call, exception, what the message must say, in order)
TABLE = {
    # info_nce
    "a list for images": (lambda: info_nce([[1.0]]), TypeError, "image_features", "Tensor", "list"),
    "None for texts": (lambda: info_nce(text=None), TypeError, "text_features", "Tensor", "NoneType"),
    "integer images": (lambda: info_nce(INTS), TypeError, "image_features", "float32", "int64"),
    "integer texts": (lambda: info_nce(text=INTS), TypeError, "text_features", "float32", "int64"),
    "images of one dimension": (lambda: info_nce(H[0]), ValueError, "image_features", "2 dimensions", "(5,)"),
    "texts of three dimensions": (lambda: info_nce(text=H[None]), ValueError, "text_features", "2 dimensions", "(1, 6, 5)"),
    "fewer texts than images": (lambda: info_nce(text=H[:4]), ValueError, "text_features", "6 rows", "image_features", "(4, 5)"),
    "texts of another width": (
        lambda: info_nce(text=H[:, :3]),
        ValueError,
        "text_features",
        "width 5",
        "image_features",
        "(6, 3)",
    ),
    "no pairs": (lambda: info_nce(H[:0], H[:0]), ValueError, "image_features", "at least one row", "(0, 5)"),
    "images with NaN": (lambda: info_nce(at(H, 3, NAN)), ValueError, "image_features", "finite", "1 of 6 rows", "first at 3"),
    "texts with Inf": (lambda: info_nce(text=at(H, 2, INF)), ValueError, "text_features", "finite", "1 of 6 rows", "first at 2"),
    "scale NaN": (lambda: info_nce(scale=NAN), ValueError, "logit_scale", "finite", "nan"),
    "scale Inf": (lambda: info_nce(scale=torch.tensor(INF)), ValueError, "logit_scale", "finite", "inf"),
    "scale of two": (lambda: info_nce(scale=torch.ones(2)), ValueError, "logit_scale", "()", "(1,)", "(2,)"),
    "scale of none": (lambda: info_nce(scale=torch.ones(0)), ValueError, "logit_scale", "()", "(1,)", "(0,)"),
    "scale an integer tensor": (lambda: info_nce(scale=torch.tensor(3)), TypeError, "logit_scale", "floating-point", "int64"),
    "scale a string": (lambda: info_nce(scale="10"), TypeError, "logit_scale", "float", "str"),
    "scale None": (lambda: info_nce(scale=None), TypeError, "logit_scale", "float", "NoneType"),
    "texts on another device": (
        lambda: info_nce(text=H.to("meta")),
        ValueError,
        "text_features",
        "meta",
        "image_features",
        "cpu",
    ),
    "chunk of none": (lambda: info_nce(chunk_size=0), ValueError, "chunk_size", "at least 1", "0"),
    "chunk of a fraction": (lambda: info_nce(chunk_size=2.5), TypeError, "chunk_size", "int", "float"),
    "chunk of True": (lambda: info_nce(chunk_size=True), TypeError, "chunk_size", "int", "bool"),
    "InfoNCE: chunk of none": (lambda: InfoNCE(chunk_size=0), ValueError, "chunk_size", "at least 1", "0"),
    "InfoNCE: fewer texts": (lambda: InfoNCE()(H, H[:4], 1.0), ValueError, "text_features", "6 rows", "(4, 5)"),
    "InfoNCE: no features": (lambda: InfoNCE()(None, H, 1.0), TypeError, "image_features", "Tensor", "NoneType"),
    # prototype_cross_entropy
    "features a list": (lambda: cross_entropy([1.0]), TypeError, "features", "Tensor", "list"),
    "integer features": (lambda: cross_entropy(INTS), TypeError, "features", "float32", "int64"),
    "features of one dimension": (lambda: cross_entropy(H[0]), ValueError, "features", "2 dimensions", "(5,)"),
    "prototypes None": (lambda: cross_entropy(prototypes=None), TypeError, "prototypes", "Tensor", "NoneType"),
    "prototypes None, targets given": (lambda: cross_entropy(prototypes=None, targets=P), TypeError, "prototypes", "NoneType"),
    "prototypes of one dimension": (lambda: cross_entropy(prototypes=P[0], targets=P), ValueError, "prototypes", "2 dim", "(5,)"),
    "prototypes of another width": (lambda: cross_entropy(H[:, :4]), ValueError, "prototypes", "width 4", "features", "(4, 5)"),
    "no prototypes": (lambda: cross_entropy(prototypes=P[:0]), ValueError, "prototypes", "at least one row", "(0, 5)"),
    "targets a list": (lambda: cross_entropy(targets=[0]), TypeError, "targets", "Tensor", "list"),
    "fewer targets than prototypes": (
        lambda: cross_entropy(targets=P[:3]),
        ValueError,
        "targets",
        "4 rows",
        "prototypes",
        "(3, 5)",
    ),
    "targets of another width": (lambda: cross_entropy(targets=C), ValueError, "targets", "width 5", "prototypes", "(4, 3)"),
    "labels a list": (lambda: cross_entropy(labels=[0] * 6), TypeError, "labels", "Tensor", "list"),
    "labels int32": (lambda: cross_entropy(labels=A.int()), TypeError, "labels", "int64", "int32"),
    "labels float": (lambda: cross_entropy(labels=A.double()), TypeError, "labels", "int64", "float64"),
    "labels of three dimensions": (
        lambda: cross_entropy(labels=A[:, None, None]),
        ValueError,
        "labels",
        "1 dimension",
        "(6, 1, 1)",
    ),
    "fewer labels than features": (lambda: cross_entropy(labels=A[:5]), ValueError, "labels", "6 entries", "features", "5"),
    "label of K": (
        lambda: cross_entropy(labels=at(A, 2, 4)),
        ValueError,
        "labels",
        "[0, 4)",
        "ignore_index=-1",
        "4",
        "position 2",
        "1 of 6",
    ),
    "label below 0": (lambda: cross_entropy(labels=at(A, 5, -2)), ValueError, "labels", "[0, 4)", "-2", "position 5"),
    "label -1 where another is ignored": (
        lambda: cross_entropy(labels=at(A, 1, -1), ignore_index=-100),
        ValueError,
        "labels",
        "[0, 4)",
        "ignore_index=-100",
        "-1",
        "position 1",
    ),
    "mask of numbers": (lambda: cross_entropy(valid=VALID.int()), TypeError, "valid", "bool", "int32"),
    "mask a list": (lambda: cross_entropy(valid=[True] * 4), TypeError, "valid", "bool", "list"),
    "mask too short": (lambda: cross_entropy(valid=VALID[:3]), ValueError, "valid", "(4,)", "prototypes", "(3,)"),
    "mask of nothing": (lambda: cross_entropy(valid=~VALID & VALID), ValueError, "valid", "at least one", "none"),
    "hard label of an invalid prototype": (
        lambda: cross_entropy(valid=VALID),
        ValueError,
        "labels",
        "invalid prototype",
        "1 rows",
        "position 3",
        "valid[3] is False",
    ),
    "features with NaN": (lambda: cross_entropy(at(H, 4, NAN)), ValueError, "features", "finite", "1 of 6 rows", "first at 4"),
    "features with NaN beside an ignored row": (
        lambda: cross_entropy(at(H, 4, INF), labels=at(A, 0, -1)),
        ValueError,
        "features",
        "finite",
        "1 of 5 rows",
    ),
    "prototypes with NaN": (
        lambda: cross_entropy(prototypes=at(P, 1, NAN)),
        ValueError,
        "prototypes",
        "finite",
        "1 of 4 rows",
        "at 1",
    ),
    "prototypes with Inf": (
        lambda: cross_entropy(prototypes=at(P, 1, INF)),
        ValueError,
        "prototypes",
        "finite",
        "1 of 4 rows",
        "at 1",
    ),
    "targets with NaN": (lambda: cross_entropy(targets=at(P, 2, NAN)), ValueError, "targets", "finite", "1 of 4 rows", "at 2"),
    "a scale that overflows": (lambda: cross_entropy(scale=1e308, prototypes=1e10 * P), ValueError, "logit_scale", "too large"),
    "term: scale NaN": (lambda: cross_entropy(scale=NAN), ValueError, "logit_scale", "finite", "nan"),
    "term: scale of two": (lambda: cross_entropy(scale=torch.ones(2)), ValueError, "logit_scale", "()", "(1,)", "(2,)"),
    "term: scale a string": (lambda: cross_entropy(scale="10"), TypeError, "logit_scale", "float", "str"),
    "term: chunk of -1": (lambda: cross_entropy(chunk_size=-1), ValueError, "chunk_size", "at least 1", "-1"),
    "prototypes elsewhere": (lambda: cross_entropy(prototypes=P.to("meta")), ValueError, "prototypes", "meta", "features", "cpu"),
    "labels elsewhere": (lambda: cross_entropy(labels=A.to("meta")), ValueError, "labels", "meta", "features", "cpu"),
    "targets elsewhere": (lambda: cross_entropy(targets=P.to("meta")), ValueError, "targets", "meta", "cpu"),
    "mask elsewhere": (lambda: cross_entropy(valid=VALID.to("meta")), ValueError, "valid", "meta", "cpu"),
    # soft_targets
    "soft: centroids a list": (lambda: soft_targets([0]), TypeError, "teacher_centroids", "Tensor", "list"),
    "soft: prototypes None": (lambda: soft_targets(prototypes=None), TypeError, "prototypes", "Tensor", "NoneType"),
    "soft: integer centroids": (lambda: soft_targets(INTS[:4]), TypeError, "teacher_centroids", "float32", "int64"),
    "soft: fewer centroids": (lambda: soft_targets(C[:3]), ValueError, "teacher_centroids", "4 rows", "prototypes", "(3, 3)"),
    "soft: prototypes of one dimension": (
        lambda: soft_targets(prototypes=P[0]),
        ValueError,
        "prototypes",
        "2 dimensions",
        "(5,)",
    ),
    "soft: temperature 0": (lambda: soft_targets(temperature=0), ValueError, "temperature", "positive", "0"),
    "soft: temperature below 0": (lambda: soft_targets(temperature=-0.1), ValueError, "temperature", "positive", "-0.1"),
    "soft: temperature Inf": (lambda: soft_targets(temperature=INF), ValueError, "temperature", "finite", "inf"),
    "soft: temperature NaN": (lambda: soft_targets(temperature=NAN), ValueError, "temperature", "positive", "nan"),
    "soft: temperature None": (lambda: soft_targets(temperature=None), TypeError, "temperature", "float", "NoneType"),
    "soft: temperature True": (lambda: soft_targets(temperature=True), TypeError, "temperature", "float", "bool"),
    "soft: mask too long": (lambda: soft_targets(valid=torch.ones(5).bool()), ValueError, "valid", "(4,)", "(5,)"),
    "soft: mask of numbers": (lambda: soft_targets(valid=VALID.float()), TypeError, "valid", "bool", "float32"),
    "soft: mask of nothing": (lambda: soft_targets(valid=torch.zeros(4).bool()), ValueError, "valid", "at least one", "none"),
    "soft: centroids with NaN": (lambda: soft_targets(at(C, 1, NAN)), ValueError, "teacher_centroids", "finite", "1 of 4"),
    "soft: valid centroid with NaN": (
        lambda: soft_targets(at(C, 1, NAN), valid=VALID),
        ValueError,
        "teacher_centroids",
        "1 of 3",
    ),
    "soft: prototypes with Inf": (lambda: soft_targets(prototypes=at(P, 1, INF)), ValueError, "prototypes", "finite", "1 of 4"),
    "soft: valid prototype with Inf": (
        lambda: soft_targets(prototypes=at(P, 1, INF), valid=VALID),
        ValueError,
        "prototypes",
        "1 of 3",
    ),
    "soft: centroids elsewhere": (
        lambda: soft_targets(C.to("meta")),
        ValueError,
        "teacher_centroids",
        "meta",
        "prototypes",
        "cpu",
    ),
    # back_translate and its module
    "pbt: labels a list": (lambda: back_translate([0]), TypeError, "labels", "Tensor", "list"),
    "pbt: labels int32": (lambda: back_translate(A.int()), TypeError, "labels", "int64", "int32"),
    "pbt: features None": (lambda: back_translate(features=None), TypeError, "features", "Tensor", "NoneType"),
    "pbt: integer features": (lambda: back_translate(features=INTS), TypeError, "features", "float32", "int64"),
    "pbt: fewer labels": (lambda: back_translate(A[:5]), ValueError, "labels", "6 entries", "features", "5"),
    "pbt: label of K": (lambda: back_translate(at(A, 1, 4)), ValueError, "labels", "[0, 4)", "-1", "4", "position 1"),
    "pbt: label below -1": (lambda: back_translate(at(A, 1, -2)), ValueError, "labels", "[0, 4)", "-1", "-2", "position 1"),
    "pbt: features with NaN": (lambda: back_translate(features=at(H, 1, NAN)), ValueError, "features", "finite", "1 of 6 rows"),
    "pbt: NaN beside a row left out": (
        lambda: back_translate(at(A, 0, -1), at(H, 1, NAN)),
        ValueError,
        "features",
        "finite",
        "1 of 5 rows",
    ),
    "pbt: no prototypes": (lambda: back_translate(num_prototypes=0), ValueError, "num_prototypes", "at least 1", "0"),
    "pbt: prototypes 1.5": (lambda: back_translate(num_prototypes=1.5), TypeError, "num_prototypes", "int", "float"),
    "pbt: prototypes True": (lambda: back_translate(num_prototypes=True), TypeError, "num_prototypes", "int", "bool"),
    "pbt: labels elsewhere": (lambda: back_translate(A.to("meta")), ValueError, "labels", "meta", "features", "cpu"),
    "PBT of none": (lambda: PrototypicalBackTranslation(0), ValueError, "num_prototypes", "at least 1", "0"),
    "PBT: compute before update": (streamed, ValueError, "compute", "update"),
    "PBT: another width": (lambda: streamed((A, H), (A, H[:, :3])), ValueError, "features", "width 5", "before", "(6, 3)"),
    "PBT: a stream with NaN": (lambda: streamed((A, H), (A, at(H, 0, NAN))), ValueError, "features", "finite", "1 of 6 rows"),
    "PBT: state of another K": (
        lambda: loaded(PrototypicalBackTranslation(3), PrototypicalBackTranslation(4)),
        ValueError,
        "counts",
        "4",
        "num_prototypes",
        "3",
    ),
    # PrototypeLoss
    "PrototypeLoss: temperature a string": (lambda: PrototypeLoss("cold"), TypeError, "target_temperature", "float", "str"),
    "PrototypeLoss: temperature Inf": (lambda: PrototypeLoss(INF), ValueError, "target_temperature", "finite", "inf"),
    "PrototypeLoss: temperature NaN": (lambda: PrototypeLoss(NAN), ValueError, "target_temperature", "positive", "nan"),
    "PrototypeLoss: temperature True": (lambda: PrototypeLoss(True), TypeError, "target_temperature", "float", "bool"),
    "PrototypeLoss: chunk of none": (lambda: PrototypeLoss(chunk_size=0), ValueError, "chunk_size", "at least 1", "0"),
    "raw: student of another width": (lambda: prototype_loss(student=C), ValueError, "student_centroids", "width 5", "(4, 3)"),
    "raw: fewer teacher centroids": (
        lambda: prototype_loss(teacher=C[:3]),
        ValueError,
        "teacher_centroids",
        "4 rows",
        "student_centroids",
        "(3, 3)",
    ),
    "raw: teacher a list": (lambda: prototype_loss(teacher=[0]), TypeError, "teacher_centroids", "Tensor", "list"),
    "raw: teacher elsewhere": (lambda: prototype_loss(teacher=C.to("meta")), ValueError, "teacher_centroids", "meta", "cpu"),
    "raw: label of K": (lambda: prototype_loss(labels=at(A, 2, 4)), ValueError, "labels", "[0, 4)", "4", "position 2"),
    "raw: labels int32": (lambda: prototype_loss(labels=A.int()), TypeError, "labels", "int64", "int32"),
    "raw: hard label of an invalid prototype": (
        lambda: prototype_loss(valid=VALID, temperature=None),
        ValueError,
        "labels",
        "invalid prototype",
        "position 3",
    ),
    "raw: scale Inf": (lambda: prototype_loss(scale=INF), ValueError, "logit_scale", "finite", "inf"),
    "raw: features with NaN": (lambda: prototype_loss(at(H, 0, NAN)), ValueError, "features", "finite", "1 of 6 rows"),
    "raw: teacher with NaN": (lambda: prototype_loss(teacher=at(C, 1, NAN)), ValueError, "teacher_centroids", "finite", "1 of 4"),
    "raw: student with Inf": (lambda: prototype_loss(student=at(P, 1, INF)), ValueError, "student_centroids", "finite", "1 of 4"),
    # ProtoLoss
    "w_clip below 0": (lambda: ProtoLoss(w_clip=-1), ValueError, "w_clip", "not negative", "-1"),
    "w_proto NaN": (lambda: ProtoLoss(w_proto=NAN), ValueError, "w_proto", "finite", "nan"),
    "w_clip Inf": (lambda: ProtoLoss(w_clip=INF), ValueError, "w_clip", "finite", "inf"),
    "w_proto a string": (lambda: ProtoLoss(w_proto="1"), TypeError, "w_proto", "float", "str"),
    "w_clip True": (lambda: ProtoLoss(w_clip=True), TypeError, "w_clip", "float", "bool"),
    "w_external None": (lambda: ProtoLoss(w_external=None), TypeError, "w_external", "float", "NoneType"),
    "w_external of one teacher below 0": (lambda: ProtoLoss(w_external={"a": 1, "b": -2}), ValueError, "w_external", "'b'", "-2"),
    "target_temperature a string": (
        lambda: ProtoLoss(target_temperature="cold"),
        TypeError,
        "target_temperature",
        "float",
        "str",
    ),
    "external_target_temperature Inf": (
        lambda: ProtoLoss(external_target_temperature=INF),
        ValueError,
        "external_target_temperature",
        "finite",
        "inf",
    ),
    "ProtoLoss: chunk of none": (lambda: ProtoLoss(chunk_size=0), ValueError, "chunk_size", "at least 1", "0"),
    "prototypes of another kind": (
        lambda: ProtoLoss().set_prototypes(P),
        TypeError,
        "prototypes",
        "Prototypes",
        "None",
        "Tensor",
    ),
    "whole: images a list": (lambda: proto_loss([1.0]), TypeError, "image_features", "Tensor", "list"),
    "whole: images None": (lambda: proto_loss(None), TypeError, "image_features", "Tensor", "NoneType"),
    "whole: fewer texts": (lambda: proto_loss(text=H[:4]), ValueError, "text_features", "6 rows", "(4, 5)"),
    "whole: scale NaN": (lambda: proto_loss(scale=NAN), ValueError, "logit_scale", "finite", "nan"),
    "whole: proto scale NaN": (lambda: proto_loss(logit_scale_proto=NAN), ValueError, "logit_scale_proto", "finite", "nan"),
    "whole: proto scale of two": (lambda: proto_loss(logit_scale_proto=torch.ones(2)), ValueError, "logit_scale_proto", "(2,)"),
    "whole: images with NaN": (lambda: proto_loss(at(H, 1, NAN)), ValueError, "image_features", "finite", "1 of 6 rows"),
    "whole: projected images with NaN": (
        lambda: proto_loss(image_features_projected=at(H, 1, NAN)),
        ValueError,
        "image",
        "finite",
        "1 of 6 rows",
    ),
    "whole: projected texts of another width": (
        lambda: proto_loss(text_features_projected=H[:, :3]),
        ValueError,
        "text",
        "width 5",
        "(6, 3)",
    ),
    "whole: fewer projected images": (
        lambda: proto_loss(image_features_projected=H[:4]),
        ValueError,
        "image",
        "6 rows",
        "image_features",
        "(4, 5)",
    ),
    "whole: integer projected texts": (lambda: proto_loss(text_features_projected=INTS), TypeError, "text", "float32", "int64"),
    "whole: projected texts elsewhere": (
        lambda: proto_loss(text_features_projected=H.to("meta")),
        ValueError,
        "text",
        "meta",
        "cpu",
    ),
    "whole: index int32": (lambda: proto_loss(index=A.int()), TypeError, "index", "int64", "int32"),
    "whole: index a list": (lambda: proto_loss(index=[0] * 6), TypeError, "index", "Tensor", "list"),
    "whole: fewer indices": (lambda: proto_loss(index=A[:5]), ValueError, "index", "6 entries", "image_features", "5"),
    "whole: a modality is missing": (
        lambda: proto_loss(names=("image", "text", "audio")),
        ValueError,
        "features",
        "'audio'",
        "['image', 'text']",
    ),
    "whole: a modality that is no tensor": (
        lambda: proto_loss(features={"audio": None}),
        TypeError,
        "'audio'",
        "Tensor",
        "NoneType",
    ),
    # what set_prototypes is given
    "term of labels out of range": (
        lambda: with_term(labels=at(A, 1, 4)),
        ValueError,
        "labels",
        "[0, 4)",
        "-1",
        "4",
        "position 1",
    ),
    "term of fewer centroids": (
        lambda: with_term(teacher_centroids=C[:3], labels=A.clamp(max=2)),
        ValueError,
        "teacher_centroids",
        "4 rows",
        "(3, 3)",
    ),
    "term without a valid prototype": (
        lambda: with_term(valid=torch.zeros(4).bool()),
        ValueError,
        "valid",
        "at least one",
        "none",
    ),
    "term with NaN": (lambda: with_term(prototypes=at(P, 1, NAN)), ValueError, "prototypes", "finite"),
}


@pytest.mark.parametrize(("call", "exception", "words"), [(c, e, w) for c, e, *w in TABLE.values()], ids=TABLE)
def test_error_names_the_argument_what_came_and_what_was_wanted(call, exception, words):
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception  # not a subclass that something below us happened to raise
    message = str(caught.value)
    for word in words:
        assert word in message


def test_an_error_leaves_the_loss_as_it_was():
    prototypes = episode(("image", "text"))
    loss = ProtoLoss()
    loss.set_prototypes(prototypes)
    want = loss(H, H, 1.0, index=prototypes.index[:6])
    with pytest.raises(TypeError):
        loss.set_prototypes(P)
    with pytest.raises(ValueError, match="index"):
        loss(H, H, 1.0)
    assert loss(H, H, 1.0, index=prototypes.index[:6]) == want


@pytest.mark.parametrize("check_values", [True, False])
def test_check_values_decides_whether_values_are_read(check_values):
    broken = at(H, 1, NAN)
    calls = [
        lambda: functional.info_nce(broken, H, 1.0, check_values=check_values),
        lambda: functional.info_nce(H, broken, 1.0, check_values=check_values),
        lambda: functional.info_nce(H, H, NAN, check_values=check_values),
        lambda: InfoNCE(check_values=check_values)(broken, H, 1.0),
        lambda: functional.prototype_cross_entropy(broken, P, A, 1.0, check_values=check_values),
        lambda: functional.prototype_cross_entropy(H, at(P, 0, NAN), A, 1.0, check_values=check_values),
        lambda: PrototypeLoss(check_values=check_values)(broken, P, C, A, 1.0),
        lambda: PrototypeLoss(check_values=check_values)(H, P, at(C, 0, NAN), A, 1.0),
        lambda: whole(check_values)(broken, H, 1.0, index=episode().index[:6]),
        lambda: whole(check_values)(H, broken, 1.0, index=episode().index[:6]),
    ]
    for call in calls:
        if check_values:
            with pytest.raises(ValueError, match="finite"):
                call()
        else:
            assert torch.isnan(call())


def whole(check_values):
    loss = ProtoLoss(check_values=check_values)
    loss.set_prototypes(episode())
    return loss


def test_nan_in_a_row_of_targets_that_no_label_asks_for_is_not_looked_at():
    want = functional.prototype_cross_entropy(H, P, A[:0].new_zeros(6), 1.0, targets=unit(4, 5, 9))
    assert functional.prototype_cross_entropy(H, P, A[:0].new_zeros(6), 1.0, targets=at(unit(4, 5, 9), 3, NAN)) == want


@pytest.mark.parametrize("labels", [[-2, 0], [0, 4], [0, 1]], ids=["below", "above", "of an invalid prototype"])
def test_unchecked_labels_are_asserted_on_the_device(labels):
    """Without value checks, the default on CUDA, a wrong label selected another prototype."""
    labels = torch.tensor(labels)
    valid = torch.tensor([True, False, True, True])
    for call in (
        lambda: functional.prototype_cross_entropy(H[:2], P, labels, 1.0, valid=valid, check_values=False),
        lambda: PrototypeLoss(None, check_values=False)(H[:2], P, C, labels, 1.0, valid=valid),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_unchecked_labels_that_are_ignored_or_soft_are_no_error():
    valid = torch.tensor([True, False, True, True])
    value = functional.prototype_cross_entropy(H[:2], P, torch.tensor([-1, 0]), 1.0, valid=valid, check_values=False)
    assert torch.equal(value, functional.prototype_cross_entropy(H[:2], P, torch.tensor([-1, 0]), 1.0, valid=valid))
    soft = functional.prototype_cross_entropy(H[:2], P, torch.tensor([1, 0]), 1.0, targets=P, valid=valid, check_values=False)
    assert soft.isfinite()


@pytest.mark.parametrize("label", [-2, 3, 7])
def test_unchecked_labels_of_back_translation_are_asserted_on_the_device(label):
    with pytest.raises(RuntimeError):
        functional.back_translate(torch.tensor([0, label]), torch.eye(2), 3, check_values=False)
