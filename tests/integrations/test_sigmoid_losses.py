"""The sigmoid loss equals open_clip's and transformers', values and gradients."""

import pytest
import torch
from cases import assert_near, leaf, unit

from protoclip_losses import SigmoidPairLoss
from protoclip_losses.functional import sigmoid_pair_loss


def inputs(dtype=torch.float64):
    scale, bias = torch.tensor(12.0, dtype=dtype), torch.tensor(-7.0, dtype=dtype)
    return [leaf(x) for x in (unit(13, 6, 0, dtype), unit(13, 6, 1, dtype), scale, bias)]


def value_and_gradients(call, dtype):
    x = inputs(dtype)
    value = call(*x)
    return [value.detach(), *torch.autograd.grad(value, x)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_open_clips_loss(dtype, chunk_size):
    open_clip = pytest.importorskip("open_clip.loss")
    wanted = value_and_gradients(open_clip.SigLipLoss(), dtype)
    for ours in (lambda *x: sigmoid_pair_loss(*x, chunk_size=chunk_size), SigmoidPairLoss(chunk_size=chunk_size)):
        for got, want in zip(value_and_gradients(ours, dtype), wanted, strict=True):
            assert_near(got, want)


def test_the_modules_arguments_and_dict_are_open_clips():
    open_clip = pytest.importorskip("open_clip.loss")
    got, want = (loss(*inputs(), output_dict=True) for loss in (SigmoidPairLoss(), open_clip.SigLipLoss()))
    assert got.keys() == want.keys()
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    assert_near(SigmoidPairLoss()(**dict(zip(names, inputs(), strict=True))), want["contrastive_loss"])


def test_transformers_loss():
    """SiglipModel(return_loss=True) against ours on the same embeddings, and the gradients of its parameters."""
    pytest.importorskip("transformers")
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4})).eval()
    batch = {"pixel_values": torch.randn(5, 3, 8, 8), "input_ids": torch.randint(1, 50, (5, 8))}
    theirs = model(**batch, return_loss=True)
    wanted = torch.autograd.grad(theirs.loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    ours = SigmoidPairLoss()(theirs.image_embeds, theirs.text_embeds, model.logit_scale.exp(), model.logit_bias)
    assert_near(ours, theirs.loss)
    for (name, _), got, want in zip(
        model.named_parameters(), torch.autograd.grad(ours, list(model.parameters()), allow_unused=True), wanted, strict=True
    ):
        assert (got is None) == (want is None), name
        if got is not None and want.norm() > 1e-6:
            assert_near(got, want, 1e-4)
