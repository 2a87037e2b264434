"""The heads, and what puts them into a model."""

import copy
import pickle

import pytest
import torch
from cases import assert_near, unit
from torch import nn

from protoclip_losses import ProjectionHead, ProjectionHeads
from protoclip_losses.heads import mix_in

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


@pytest.mark.parametrize("num_layers", [1, 2])
def test_one_row_is_normalised_by_the_running_statistics_in_training(num_layers):
    head = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8, num_layers=num_layers).double()
    head(unit(9, 6))
    before = {name: x.clone() for name, x in head.named_buffers()}
    z = unit(1, 6, 1).requires_grad_()
    out = head(z)
    out.square().sum().backward()
    assert z.grad.norm() > 0
    assert all(p.grad is not None for p in head.parameters())
    assert_near(out, head.eval()(z))
    assert all(torch.equal(x, before[name]) for name, x in head.named_buffers())


def test_no_row_leaves_batch_statistics_as_they_are():
    head = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8)
    assert head(torch.zeros(0, 6)).shape == (0, 3)
    assert torch.equal(head[1].running_mean, torch.zeros(8))


def test_two_rows_are_what_batch_norm_makes_of_them():
    head = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8)
    assert torch.equal(head(z := torch.randn(2, 6)), nn.Sequential(*head)(z))
    assert head[1].num_batches_tracked == 2


def test_one_row_in_a_converted_model():
    """As open_clip's --use-bn-sync and Lightning's sync_batchnorm convert it; on one process it is an ordinary BatchNorm."""
    heads = nn.SyncBatchNorm.convert_sync_batchnorm(ProjectionHeads(6, 3, 8))
    assert isinstance(heads.text[1], nn.SyncBatchNorm)
    out = heads(torch.randn(1, 6), torch.randn(1, 6))
    assert out["text_features_projected"].shape == (1, 3)


def test_any_number_of_rows_compiles_without_a_break():
    head = ProjectionHead(in_dim=6, out_dim=3, hidden_dim=8)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    for rows in (1, 5, 6):
        assert compiled(torch.randn(rows, 6)).shape == (rows, 3)


class Doubled:
    def forward(self, x):
        return 2 * super().forward(x)


class Halved:
    def forward(self, x):
        return super().forward(x) / 2


def test_a_mixin_changes_one_model_and_not_its_class():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    mix_in(model, Doubled)
    x = torch.randn(4, 3)
    assert torch.equal(model(x), 2 * other(x))
    assert type(other) is nn.Linear
    assert isinstance(model, nn.Linear)
    assert (type(model).__name__, type(model).__module__) == (nn.Linear.__name__, nn.Linear.__module__)
    second = nn.Linear(3, 2)
    mix_in(second, Doubled)
    assert type(second) is type(model)
    mix_in(second, Halved)
    second.load_state_dict(model.state_dict())
    assert torch.equal(second(x), other(x))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_model_with_a_mixin_is_copied_and_pickled(protocol):
    model = nn.Linear(3, 2)
    mix_in(model, Doubled)
    model.remark = "kept"
    x = torch.randn(4, 3)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model, protocol))):
        assert type(other) is type(model)
        assert torch.equal(other(x), model(x))
        assert other.remark == "kept"


def test_a_class_made_of_a_mixed_one_is_not_taken_for_it():
    """FSDP2 and torch's parametrizations change the class again."""
    model = nn.Linear(3, 2)
    mix_in(model, Doubled)
    model.__class__ = type("Sharded", (type(model),), {})
    assert type(copy.deepcopy(model)).__name__ == "Sharded"
    with pytest.raises((pickle.PicklingError, AttributeError), match="Sharded"):
        pickle.dumps(model)
