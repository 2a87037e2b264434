"""ProtoCLIPTrainer with the dual encoders of transformers, and what is no dual encoder."""

import hf_models
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from hf_trainer import HEADS, Recorded, trainer, weights
from host_pairs import PicturePairs
from host_transformers import small_model
from transformers import FlavaConfig, FlavaModel, Trainer, default_data_collator

from protoclip_losses import ProtoLoss
from protoclip_losses.integrations.transformers import add_heads

ROWS = 22


@pytest.fixture(scope="module")
def pairs():
    return PicturePairs(ROWS)


def with_loss(items):
    return {**default_data_collator(items), "return_loss": True}


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_any_dual_encoder_is_trained_and_saved_as_what_it_is(tmp_path, pairs, name):
    model, data, loss = hf_models.model(name), hf_models.data(name, pairs), Recorded()
    plain = type(model)
    wanted = trainer(tmp_path, data, Trainer, model=model, eval_dataset=data, data_collator=with_loss).evaluate()["eval_loss"]
    run = trainer(tmp_path, data, model=model, eval_dataset=data, data_collator=with_loss, loss=loss)
    assert run.evaluate()["eval_loss"] == wanted
    run.train()
    assert [parts["proto_loss"] > 0.1 for _, parts in loss.calls] == [False] * 2 + [True] * 2
    assert isinstance(run.model, plain)
    run.save_model()
    read = plain.from_pretrained(tmp_path)
    assert type(read) is plain
    assert "proto.text.0.weight" in weights(tmp_path)
    batch = {k: v for k, v in default_data_collator(data[:3]).items() if k != "caption"}
    with torch.no_grad():
        assert torch.equal(read.eval()(**batch).image_embeds, run.model.eval()(**batch).image_embeds)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_features_are_those_of_the_model(pairs, name):
    model = hf_models.model(name).eval()
    batch = {k: v for k, v in default_data_collator(hf_models.data(name, pairs)[:5]).items() if k != "caption"}
    with torch.no_grad():
        plain = model(**batch)
        add_heads(model, **HEADS)
        mine, features = model(**batch, index=torch.arange(5)), model.features(**batch)
    assert torch.equal(mine.logits_per_image, plain.logits_per_image)
    torch.testing.assert_close(features["image_features"], plain.image_embeds)
    torch.testing.assert_close(features["text_features"], plain.text_embeds)
    assert ("logit_bias" in features) == ("Siglip" in name)
    if "Siglip" in name:
        sigmoid = ProtoLoss(pair_loss="sigmoid")
        sigmoid.set_prototypes(None)
        torch.testing.assert_close(sigmoid(**features), model(**batch, return_loss=True).loss)
    loss = ProtoLoss()
    loss.set_prototypes(None)
    loss(**model.train()(**batch)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None and n.startswith(("proto", "logit"))]


def test_inputs_by_position_are_those_of_the_model(pairs):
    batch = default_data_collator([pairs[i] for i in range(5)])
    model = add_heads(small_model(), **HEADS)
    given = (batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    for mode in (True, False):
        one, other = model.train(mode)(*given), model(**batch)
        assert all(torch.equal(one[name], other[name]) for name in one if isinstance(one[name], torch.Tensor))


def test_a_width_that_the_configuration_does_not_have_is_given(pairs):
    model = small_model()
    model.config.projection_dim = None
    with pytest.raises(ValueError, match="in_dim must be given, got None: the configuration of CLIPModel has no projection_dim"):
        add_heads(model)
    assert add_heads(model, in_dim=64, **HEADS).proto.text[0].in_features == 64


def test_models_that_are_wrapped_or_of_another_kind_are_errors_that_say_what_to_do(tmp_path, pairs):
    with pytest.raises(TypeError, match=r"model must be a dual encoder such as CLIPModel, .*got Linear without"):
        add_heads(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"not be compiled yet, got OptimizedModule: .*TrainingArguments\(torch_compile=True\)"):
        trainer(tmp_path, pairs, model=torch.compile(small_model()))
    with pytest.raises(TypeError, match=r"not be compiled yet, got OptimizedModule: .*TrainingArguments\(torch_compile=True\)"):
        trainer(tmp_path, pairs, model=torch.compile(add_heads(small_model(), **HEADS)))
    with pytest.raises(TypeError, match="not be wrapped yet, got DataParallel: add the heads to the model in it"):
        add_heads(torch.nn.DataParallel(small_model()))
    model = small_model()
    model.forward = model.forward
    with pytest.raises(TypeError, match=r"must have the forward of its class.*keep_fp32_wrapper=False"):
        add_heads(model)
    flava = FlavaModel(FlavaConfig(text_config=hf_models.BERT, image_config=hf_models.VISION, multimodal_config=hf_models.TOWER))
    batch = default_data_collator([pairs[i] for i in range(2)])
    with pytest.raises(ValueError, match=r"features of FlavaModel must be one vector for each sample, got shape \(2, 17, 768\)"):
        add_heads(flava, **HEADS).train()(**batch)


@pytest.mark.slow
def test_the_arguments_of_trainer_compile_the_model(tmp_path, pairs):
    loss = Recorded()
    trainer(tmp_path / "plain", pairs, loss=loss).train()
    run = trainer(tmp_path / "compiled", pairs, loss=Recorded(), arguments={"torch_compile": True, "save_steps": 100})
    run.train()
    for (index, parts), (other_index, other_parts) in zip(run.loss.calls, loss.calls, strict=True):
        assert index == other_index
        assert parts == pytest.approx(other_parts, rel=1e-3)
    run.save_model()
    assert all(not name.startswith("_orig_mod") for name in weights(tmp_path / "compiled"))


def test_extraction_runs_in_the_precision_of_the_trainer(tmp_path, pairs):
    run, seen = trainer(tmp_path, pairs, arguments={"bf16": True, "save_steps": 100}, warmup_epochs=0), []
    features = run.model.features

    def watched(**inputs):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return features(**inputs)

    run.model.features = watched
    run.train()
    assert seen == [(False, True)] * 2 + [(True, True)] * 2 + [(False, True)] * 2 + [(True, True)] * 2
