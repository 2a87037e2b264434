"""ProtoLoss with distillation and repeats: its parts against their dense forms, in warm-up, in episodes and online."""

import dense
import pytest
import torch
from cases import assert_near, assert_same, episode, unit

from protoclip_losses import OnlinePrototypes, ProtoLoss

B = 12
Z = unit(B, 5, 1), unit(B, 5, 2)
H = unit(B, 6, 3), unit(B, 6, 4)
TEACHERS = {"words": unit(B, 9, 5), "model": unit(B, 3, 6)}
TEACHERS["words"][::5] = 0
IDS = torch.arange(B) % 5
EPISODE = episode(samples=B, width=6, teachers=("words",))
PROJECTED = ("image_features_projected", "text_features_projected")


def distilled(image, text, s, temperature):
    parts = [dense.relational_distillation(h, t, s, temperature) for t in TEACHERS.values() for h in (image, text)]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("prototypes", [None, EPISODE], ids=["warm-up", "episode"])
def test_distillation_is_a_part_of_the_loss(prototypes):
    loss = ProtoLoss(w_distill=2.0, distill_temperature=0.3, w_clip=0.0, w_proto=0.0, w_external=0.0)
    loss.set_prototypes(prototypes)
    index = None if prototypes is None else EPISODE.index

    def ours(image, text, s):
        projected = dict(zip(PROJECTED, (image, text), strict=True))
        parts = loss(*Z, 9.0, **projected, logit_scale_proto=s, index=index, teacher_features=TEACHERS, output_dict=True)
        assert set(parts) == {"contrastive_loss", "proto_loss", "proto_external_loss", "distillation_loss"}
        return sum(parts.values())

    assert_same(ours, lambda image, text, s: 2.0 * distilled(image, text, s, 0.3), *H, torch.tensor(7.0).double())


def test_all_parts_add_up():
    loss = ProtoLoss(w_distill=0.5, target_temperature=0.2, external_target_temperature=0.1, repeats="share")
    loss.set_prototypes(EPISODE)
    arguments = {"logit_scale_proto": 7.0, "index": EPISODE.index, "ids": IDS, "teacher_features": TEACHERS}
    parts = loss(*Z, 9.0, **dict(zip(PROJECTED, H, strict=True)), **arguments, output_dict=True)
    wanted = dense.objective(
        *(Z, dict(zip(("image", "text"), H, strict=True)), 9.0, 7.0, EPISODE, EPISODE.index),
        temperature=0.2,
        external_temperature=0.1,
    )
    assert_near(parts["proto_loss"], wanted["proto_loss"])
    assert_near(parts["proto_external_loss"], wanted["proto_external_loss"])
    assert_near(parts["distillation_loss"], 0.5 * distilled(*H, 7.0, 0.1))
    assert_near(parts["contrastive_loss"], dense.info_nce_of_repeats(*Z, 9.0, IDS, "share"))
    total = loss(*Z, 9.0, **dict(zip(PROJECTED, H, strict=True)), **arguments)
    assert_near(total, sum(parts.values()))


@pytest.mark.parametrize("repeats", ["mask", "share"])
def test_repeats(repeats):
    loss = ProtoLoss(repeats=repeats)
    loss.set_prototypes(None)
    assert_near(loss(*Z, 9.0, ids=IDS), dense.info_nce_of_repeats(*Z, 9.0, IDS, repeats))
    assert_near(loss(*Z, 9.0), dense.info_nce(*Z, 9.0))


def test_online_prototypes_and_distillation():
    loss = ProtoLoss(w_distill=1.0, w_clip=0.0, w_proto=0.0, w_external=0.0)
    loss.set_prototypes(OnlinePrototypes(num_prototypes=2, queue_size=B, every=2, warmup=1))
    for _ in range(3):
        value = loss(*Z, 9.0, logit_scale_proto=7.0, teacher_features=TEACHERS)
        assert_near(value, distilled(*Z, 7.0, 0.1))


def test_without_a_weight_there_is_no_such_part():
    loss = ProtoLoss()
    loss.set_prototypes(None)
    assert set(loss(*Z, 9.0, output_dict=True)) == {"contrastive_loss", "proto_loss", "proto_external_loss"}


def test_compiled():
    torch._dynamo.reset()
    loss = ProtoLoss(w_distill=1.0, repeats="mask")
    loss.set_prototypes(EPISODE)
    arguments = {"index": EPISODE.index, "ids": IDS, "teacher_features": TEACHERS}
    wanted = loss(*H, 9.0, **arguments)
    assert_near(torch.compile(loss, backend="aot_eager", fullgraph=True)(*H, 9.0, **arguments), wanted)


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({"w_distill": -1.0}, {}, ValueError, "w_distill must be finite and not negative"),
        ({"w_distill": "much"}, {}, TypeError, "w_distill must be a float"),
        ({"w_distill": 1.0, "distill_temperature": 0.0}, {}, ValueError, "distill_temperature must be positive"),
        ({"repeats": "drop"}, {}, ValueError, "repeats must be 'mask', 'share' or None"),
        ({}, {"ids": IDS}, ValueError, "ids need repeats='mask' or 'share'"),
        ({"w_distill": 1.0}, {}, ValueError, "teacher_features must be given while w_distill is"),
        (
            {"w_distill": 1.0},
            {"teacher_features": {"t": TEACHERS["words"][:3]}},
            ValueError,
            r"teacher_features\['t'\] must have 12",
        ),
    ],
)
def test_bad_input(settings, arguments, error, message):
    def call():
        loss = ProtoLoss(**settings)
        loss.set_prototypes(None)
        loss(*Z, 9.0, **arguments)

    with pytest.raises(error, match=message):
        call()
