"""ProjectionHead."""

import pytest
import torch
from cases import assert_near, unit
from torch import nn

from protoclip_losses import ProjectionHead

LAYER = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "sync": nn.SyncBatchNorm}


@pytest.mark.parametrize("norm", ["batch", "layer", "sync"])
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_layers_are_linear_norm_relu_and_a_last_linear(num_layers, norm):
    head = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8, num_layers=num_layers, norm=norm)
    assert [type(layer) for layer in head] == [nn.Linear, LAYER[norm], nn.ReLU] * num_layers + [nn.Linear]
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert widths == [*[(6, 8), (8, 8), (8, 8)][:num_layers], (8 if num_layers else 6, 3)]
    if norm != "sync":  # which PyTorch has for GPUs only
        assert head(torch.randn(5, 6)).shape == (5, 3)


def test_defaults_are_those_of_the_paper():
    head = ProjectionHead(1024)
    assert [str(layer) for layer in head] == [
        "Linear(in_features=1024, out_features=2048, bias=True)",
        str(nn.BatchNorm1d(2048)),
        "ReLU()",
        "Linear(in_features=2048, out_features=128, bias=True)",
    ]


def test_the_output_is_the_equation():
    head = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8, norm="layer").double()
    z = unit(5, 6)
    first, norm, _, last = head
    hidden = nn.functional.layer_norm(z @ first.weight.T + first.bias, (8,), norm.weight, norm.bias).clamp(min=0)
    assert_near(head(z), hidden @ last.weight.T + last.bias)


def test_the_output_is_not_normalised():
    lengths = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8, num_layers=0)(10 * torch.randn(50, 6)).norm(dim=1)
    assert lengths.std() > 0.1


def test_the_image_head_can_start_as_a_copy_of_the_text_head():
    image, text = (ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8) for _ in range(2))
    z = torch.randn(5, 6)
    text(z)
    assert not torch.equal(image.eval()(z), text.eval()(z))
    image.load_state_dict(text.state_dict())
    assert torch.equal(image(z), text(z))


def test_every_parameter_gets_a_gradient():
    head = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8, num_layers=2)
    head(torch.randn(5, 6)).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, "in_dim must be at least 1"),
        ({"out_dim": -1}, ValueError, "out_dim must be at least 1"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim must be at least 1"),
        ({"in_dim": 4.0}, TypeError, "in_dim must be an int"),
        ({"num_layers": -1}, ValueError, "num_layers must be an int of at least 0, got -1"),
        ({"num_layers": True}, ValueError, "num_layers must be an int of at least 0, got True"),
        ({"num_layers": 1.5}, ValueError, r"num_layers must be an int of at least 0, got 1\.5"),
        ({"norm": "group"}, ValueError, "norm must be one of batch, layer, sync, got 'group'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ProjectionHead(**{"in_dim": 4, **arguments})
