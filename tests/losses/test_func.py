"""torch.func over the losses: gradients, samples at once, modules called with other parameters."""

import pytest
import torch
from cases import assert_near, episode, integers, leaf, unit
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from protoclip_losses import InfoNCE, OnlinePrototypes, ProtoLoss, PrototypeLoss, RelationalDistillation
from protoclip_losses.functional import (
    info_nce,
    prototype_cross_entropy,
    relational_distillation,
    sigmoid_pair_loss,
    soft_targets,
)

pytestmark = pytest.mark.usefixtures("form")

H, TEXT, P, C, A = unit(11, 5, 0), unit(11, 5, 1), unit(7, 5, 2), unit(7, 4, 3), integers(7, 11)
M = soft_targets(C, P, 0.3)
S = torch.tensor(9.0, dtype=torch.float64)
EPISODE = episode(teachers=("roberta",))


def proto_loss(**settings):
    loss = ProtoLoss(target_temperature=0.3, **settings)
    loss.set_prototypes(EPISODE)
    return lambda h, s: loss(h, TEXT, s, index=EPISODE.index[:11])


CALLS = {
    "info_nce": lambda h, s: info_nce(h, TEXT, s),
    "info_nce rows": lambda h, s: info_nce(h, TEXT, s, reduction="none").square().sum(),
    "sigmoid": lambda h, s: sigmoid_pair_loss(h, TEXT, s, s - 12, chunk_size=4),
    "sigmoid rows": lambda h, s: sigmoid_pair_loss(h, TEXT, s, s - 12, reduction="none").square().sum(),
    "hard term": lambda h, s: prototype_cross_entropy(h, P, A, s),
    "soft term": lambda h, s: prototype_cross_entropy(h, P, A, s, targets=M),
    "term rows": lambda h, s: prototype_cross_entropy(h, P, A, s, targets=M, reduction="none").square().sum(),
    "distillation": lambda h, s: relational_distillation(h, C[A], s, 0.2),
    "InfoNCE": lambda h, s: InfoNCE()(h, TEXT, s),
    "RelationalDistillation": lambda h, s: RelationalDistillation()(h, C[A], s),
    "ProtoLoss": proto_loss(),
}


def autograd(call, h, s):
    leaves = leaf(h), leaf(s)
    return torch.autograd.grad(call(*leaves), leaves)


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    got = grad(CALLS[name], argnums=(0, 1))(H, S)
    for own, wanted in zip(got, autograd(CALLS[name], H, S), strict=True):
        assert_near(own, wanted)
    assert_near(jacrev(CALLS[name])(H, S), autograd(CALLS[name], H, S)[0])


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "hard term", "soft term", "distillation"])
def test_a_batch_of_calls_at_once(name):
    batch = torch.stack([unit(11, 5, seed) for seed in (4, 5, 6)])
    scales = torch.tensor([3.0, 9.0, 20.0], dtype=torch.float64)
    values = vmap(CALLS[name])(batch, scales)
    gradients = vmap(grad(CALLS[name], argnums=(0, 1)))(batch, scales)
    for i in range(3):
        assert_near(values[i], CALLS[name](batch[i], scales[i]))
        for own, wanted in zip(gradients, autograd(CALLS[name], batch[i], scales[i]), strict=True):
            assert_near(own[i], wanted)


def test_a_module_called_with_other_parameters():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.loss = torch.nn.Linear(5, 5, dtype=torch.float64), ProtoLoss(target_temperature=0.3)
            self.loss.set_prototypes(EPISODE)

        def forward(self, x):
            return self.loss(torch.nn.functional.normalize(self.head(x), dim=1), TEXT, 9.0, index=EPISODE.index[:11])

    model = Model()
    parameters = {name: x.detach() * 1.5 for name, x in model.named_parameters()}
    gradients = grad(lambda p: functional_call(model, p, (H,)))(parameters)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(parameters[name])
    model(H).backward()
    for name, x in model.named_parameters():
        assert_near(gradients[name], x.grad)


def test_prototype_loss_with_the_targets_it_has_not_computed_yet():
    loss = PrototypeLoss(0.3)
    for _ in range(2):  # nothing that was computed under the transform is kept
        got = grad(lambda h, s: loss(h, P, C, A, s), argnums=(0, 1))(H, S)
        for own, wanted in zip(got, autograd(lambda h, s: PrototypeLoss(0.3)(h, P, C, A, s), H, S), strict=True):
            assert_near(own, wanted)
    assert_near(loss(H, P, C, A, S), PrototypeLoss(0.3)(H, P, C, A, S))


def test_labels_scales_and_indices_of_many_calls_at_once():
    labels = torch.stack([A, A.flip(0)])
    values = vmap(lambda a: prototype_cross_entropy(H, P, a, S, targets=M))(labels)
    scales = vmap(lambda s: prototype_cross_entropy(H, P, A, s))(torch.stack([S, 2 * S]))
    indices = torch.stack([EPISODE.index[:11], EPISODE.index[11:22]])
    loss = ProtoLoss(target_temperature=0.3)
    loss.set_prototypes(EPISODE)
    losses = vmap(lambda i: loss(H, TEXT, S, index=i))(indices)
    for i in range(2):
        assert_near(values[i], prototype_cross_entropy(H, P, labels[i], S, targets=M))
        assert_near(scales[i], prototype_cross_entropy(H, P, A, (i + 1) * S))
        assert_near(losses[i], loss(H, TEXT, S, index=indices[i]))


@pytest.mark.parametrize("bad", [7, -2])
def test_a_bad_label_among_many_calls(bad):
    with pytest.raises(RuntimeError):
        vmap(lambda a: prototype_cross_entropy(H, P, a, S))(torch.stack([A, A.index_fill(0, torch.tensor([4]), bad)]))


SECOND = {"hessian": lambda f: hessian(f)(H, S), "jacrev twice": lambda f: jacrev(jacrev(f))(H, S)}
FORWARD = {"jvp": lambda f: jvp(f, (H, S), (TEXT, S))[1]}


def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(H, TEXT), S)).tangent


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "hard term", "soft term", "InfoNCE", "ProtoLoss"])
def test_what_is_not_there_is_said(name, form):
    """Second derivatives and the forward mode: the dense form of a term has them, a kernel says what to use."""
    if form == "dense" and "term" in name:
        assert_near(SECOND["hessian"](CALLS[name]), SECOND["jacrev twice"](CALLS[name]))
        assert_near(FORWARD["jvp"](CALLS[name]), (grad(CALLS[name])(H, S) * TEXT).sum() + grad(CALLS[name], argnums=1)(H, S) * S)
        assert_near(dual(CALLS[name]), (grad(CALLS[name])(H, S) * TEXT).sum())
        return
    for call in (SECOND["hessian"], FORWARD["jvp"], dual):
        with pytest.raises(NotImplementedError, match=r"no derivative in forward mode .*use grad, jacrev or backward"):
            call(CALLS[name])
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        SECOND["jacrev twice"](CALLS[name])


def test_online_prototypes_say_that_they_are_no_function():
    loss = ProtoLoss()
    loss.set_prototypes(OnlinePrototypes(3, 22, 2, 1))
    for transform in (grad, vmap):
        with pytest.raises(NotImplementedError, match="online prototypes take each batch in"):
            transform(lambda h: loss(h, TEXT, S))(torch.stack([H, H]) if transform is vmap else H)
    assert loss.prototypes.step == 0
    loss(H, TEXT, S)


def test_metrics_can_be_read_after_a_transform():
    loss = ProtoLoss()
    loss.set_prototypes(EPISODE)
    loss(H, TEXT, S, index=EPISODE.index[:11])
    wanted = {name: float(x) for name, x in loss.metrics.items()}
    grad(lambda h: loss(h, TEXT, S, index=EPISODE.index[:11]))(H)
    assert {name: float(x) for name, x in loss.metrics.items()} == wanted
