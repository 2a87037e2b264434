"""Models that were given heads, saved whole: by torch.save, and to processes that are spawned."""

import copy

import pytest
import torch
from helpers import in_new_process
from spawned import gives_the_same

OPENED = """
import sys, torch
model, inputs, wanted = torch.load(sys.argv[1], weights_only=False)
for name, x in model(*inputs).items():
    torch.testing.assert_close(x, wanted[name])  # other threads, other roundings
print(type(model).__mro__[1].__module__, type(model).__name__)
"""


def open_clip_model(tmp_path):
    pytest.importorskip("open_clip")
    pytest.importorskip("pandas")
    import open_clip
    from open_clip_step import add_tiny_model

    from protoclip_losses.integrations.open_clip import add_heads

    (tmp_path / "configs").mkdir()
    add_tiny_model(tmp_path / "configs")
    model = add_heads(open_clip.create_model("tiny", output_dict=True), 8, 16).eval()
    return model, open_clip.CLIP, (torch.rand(3, 3, 32, 32), torch.randint(1, 400, (3, 16)))


def transformers_model(tmp_path):
    pytest.importorskip("transformers")
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from protoclip_losses.integrations.transformers import add_heads

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=50, max_position_embeddings=8, eos_token_id=49, **small)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    model = add_heads(CLIPModel(config), 8, 16).train()
    model.proto.eval()  # running statistics would change from call to call
    return model, CLIPModel, (torch.randint(1, 49, (3, 8)), torch.rand(3, 3, 16, 16))


@pytest.mark.parametrize("make", [open_clip_model, transformers_model])
@torch.no_grad()
def test_a_model_with_heads_is_saved_whole_and_opened_elsewhere(tmp_path, make):
    model, base, inputs = make(tmp_path)
    wanted = dict(model(*inputs).items())
    assert {"image_features_projected", "logit_scale_proto"} <= wanted.keys()
    copied = copy.deepcopy(model)
    assert isinstance(copied, base)
    assert all(torch.equal(x, wanted[name]) for name, x in copied(*inputs).items())
    torch.save((model, inputs, wanted), tmp_path / "model.pt")
    host = base.__module__.split(".")[0]
    printed = in_new_process(OPENED, tmp_path / "model.pt")
    assert printed.split() == [f"protoclip_losses.integrations.{host}.model", base.__name__]


def test_a_model_with_heads_goes_to_a_spawned_process(tmp_path):
    model, _, inputs = open_clip_model(tmp_path)
    context = torch.multiprocessing.get_context("spawn")
    same = context.Value("b", 0)
    with torch.no_grad():
        wanted = {name: x.clone() for name, x in model(*inputs).items()}
    process = context.Process(target=gives_the_same, args=(model, inputs, wanted, same))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert same.value


def test_a_compiled_model_with_heads_is_saved_as_any_compiled_one(tmp_path):
    model, *_ = open_clip_model(tmp_path)
    torch.save(torch.compile(model), tmp_path / "compiled.pt")
    opened = torch.load(tmp_path / "compiled.pt", weights_only=False)
    assert opened.state_dict().keys() == torch.compile(model).state_dict().keys()
