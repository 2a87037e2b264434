"""ProtoCLIPTrainer with a model that PEFT has wrapped: the heads are trained, saved and resumed, or it is an error."""

import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from hf_trainer import HEADS, Recorded, trainer
from host_pairs import PicturePairs
from host_transformers import small_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from protoclip_losses.integrations.transformers import add_heads

ROWS = 22


@pytest.fixture(scope="module")
def pairs():
    return PicturePairs(ROWS)


def lora(**more):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more)


def with_adapter(**more):
    torch.manual_seed(0)
    return get_peft_model(add_heads(small_model(), **HEADS), lora(**more))


def test_heads_named_in_modules_to_save_are_trained_with_the_adapter(tmp_path, pairs):
    model, loss = with_adapter(modules_to_save=["proto"]), Recorded()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    trainer(tmp_path, pairs, model=model, loss=loss).train()
    assert [parts["proto_loss"] > 0.3 for _, parts in loss.calls] == [False] * 2 + [True] * 2
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    trained = {name for name, x in model.named_parameters() if "lora_B" in name or ".proto.modules_to_save." in name}
    assert trained <= changed <= {name for name in before if "lora_" in name or ".proto.modules_to_save." in name}
    model.base_model.model.proto.logit_scale_proto.data.fill_(7.0)
    trainer(tmp_path, pairs, model=model, arguments={"max_steps": 1}).train()
    assert float(model.base_model.model.proto.logit_scale_proto.detach().exp()) == pytest.approx(100)


def test_an_adapter_is_saved_with_the_heads_and_resumed(tmp_path, pairs):
    whole = trainer(tmp_path / "whole", pairs, model=with_adapter(modules_to_save=["proto"]))
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "adapter_model.safetensors")
    assert {"base_model.model.proto.text.0.weight", "base_model.model.proto.logit_scale_proto"} <= saved.keys()
    (tmp_path / "rest").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "rest" / "checkpoint-3")
    rest = trainer(tmp_path / "rest", pairs, model=with_adapter(modules_to_save=["proto"]))
    rest.train(resume_from_checkpoint=True)
    for (name, x), (_, y) in zip(whole.model.named_parameters(), rest.model.named_parameters(), strict=True):
        assert torch.equal(x, y), name
    read = PeftModel.from_pretrained(add_heads(small_model(), **HEADS), tmp_path / "rest" / "checkpoint-4")
    assert torch.equal(read.proto.logit_scale_proto, rest.model.proto.logit_scale_proto)


def test_heads_that_would_stay_frozen_or_be_lost_are_an_error(tmp_path, pairs):
    for model in (with_adapter(), with_adapter(modules_to_save=["text_projection"])):
        with pytest.raises(ValueError, match=r"modules_to_save must name the heads, .*modules_to_save=\['proto'\]"):
            trainer(tmp_path, pairs, model=model)
    inside = add_heads(small_model(), **HEADS)
    inside.add_adapter(lora())
    with pytest.raises(ValueError, match="modules_to_save must name the heads"):
        trainer(tmp_path, pairs, model=inside)
    bare = get_peft_model(small_model(), lora())
    for model in (bare, bare.base_model.model):
        with pytest.raises(TypeError, match=r"model must get its heads before PEFT, .*modules_to_save=\['proto'\]"):
            trainer(tmp_path, pairs, model=model)
