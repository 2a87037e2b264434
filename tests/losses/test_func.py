"""torch.func over the losses: gradients, samples at once, modules called with other parameters."""

import pytest
import torch
from cases import assert_near, episode, integers, leaf, unit
from torch.func import functional_call, grad, jacrev, vmap

from protoclip_losses import InfoNCE, ProtoLoss, RelationalDistillation
from protoclip_losses.functional import info_nce, prototype_cross_entropy, relational_distillation, soft_targets

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


@pytest.mark.parametrize("name", ["info_nce", "hard term", "soft term", "distillation"])
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
