"""sentence-transformers' own Trainer on real pictures and captions."""

import shutil

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from st_trainer import HEADS, ROWS, Recorded, model, online, pairs, trainer, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeansResult, ProtoLoss, TeacherAdapter
from protoclip_losses.functional import info_nce, sigmoid_pair_loss
from protoclip_losses.integrations.sentence_transformers import ProtoCLIPCallback, ProtoCLIPLoss

SAVE = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}


def without_labels():
    return pairs().remove_columns("label")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


def resumed(folder, step, **options):
    """The end of a run, and of another that was killed at a step and resumed, in another folder."""
    whole = trainer(folder / "whole", arguments=SAVE, **options)
    whole.train()
    (folder / "rest").mkdir()
    shutil.copytree(folder / "whole" / f"checkpoint-{step}", folder / "rest" / f"checkpoint-{step}")
    if not (loss := options.get("loss")) or loss.needs_episodes:
        rest = trainer(folder / "rest", arguments=SAVE, **{**options, "loss": None})
    else:
        rest = trainer(folder / "rest", arguments=SAVE, **{**options, "loss": online()})
    rest.train(resume_from_checkpoint=True)
    return whole, rest


def test_the_first_epoch_is_warm_up_and_the_next_has_prototypes(tmp_path):
    run = trainer(tmp_path)
    before = weights(run)
    run.train()
    calls = run.loss.loss.calls
    assert [parts["proto_loss"] > 0.3 for _, parts in calls] == [False] * 4 + [True] * 4
    for epoch in (calls[:4], calls[4:]):
        assert sorted(i for index, _ in epoch for i in index) == list(range(ROWS))
    after, trained = weights(run), {name for module in (run.model, run.loss.heads) for name, _ in module.named_parameters()}
    assert [name for name in trained if torch.equal(after[name], before[name])] == []
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    for name in ("contrastive_loss", "proto_loss", "proto_external_loss"):
        assert [entry[name] for entry in logged] == pytest.approx([parts[name] for _, parts in calls], abs=1e-3)
    assert [entry["loss"] for entry in logged] == pytest.approx([sum(parts.values()) for _, parts in calls], abs=1e-3)


def test_the_loss_falls(tmp_path):
    run = trainer(tmp_path, arguments={"num_train_epochs": 8, "learning_rate": 3e-3})
    run.train()
    calls = [parts for _, parts in run.loss.loss.calls]
    for name, start in (("contrastive_loss", 0), ("proto_loss", 4)):
        first, last = [sum(parts[name] for parts in calls[i : i + 4]) / 4 for i in (start, len(calls) - 4)]
        assert last < 0.7 * first, (name, first, last)


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_killed_in_the_middle_of_an_epoch_ends_where_an_uninterrupted_one_does(tmp_path, step):
    """In warm-up, and in an epoch with prototypes, which are the saved ones."""
    whole, rest = resumed(tmp_path, step)
    assert_same(weights(rest), weights(whole))
    assert rest.loss.loss.calls == whole.loss.loss.calls[step:]


def test_an_online_run_needs_no_labels_and_is_resumed(tmp_path):
    whole, rest = resumed(tmp_path, 6, loss=online(), data=without_labels())
    assert {index for index, _ in whole.loss.loss.calls} == {None}
    assert whole.loss.loss.calls[-1][1]["proto_loss"] > 0.3
    assert rest.loss.loss.prototypes.step == whole.loss.loss.prototypes.step == 12
    assert_same(weights(rest), weights(whole))


def test_online_with_words_looks_them_up_by_label(tmp_path):
    pytest.importorskip("sklearn")
    words = TeacherAdapter.from_captions(pairs()["caption"], dim=8)
    run = trainer(tmp_path, loss=online(), teachers={"words": words})
    run.train()
    assert ("image", "words") in run.loss.loss.prototypes.terms
    with pytest.raises(ValueError, match="labels must be given, got None"):
        trainer(tmp_path, loss=online(), teachers={"words": words}, data=without_labels()).train()


@pytest.fixture(scope="module")
def words():
    pytest.importorskip("sklearn")
    return TeacherAdapter.from_captions(pairs()["caption"], dim=8)


@pytest.mark.parametrize("kind", ["clustering", "command"])
def test_words_that_are_clustered_once(tmp_path, clusters, command_clusters, widths, kind):
    clusters = clusters if kind == "clustering" else KMeansResult.load(command_clusters / "clusters")
    run = trainer(tmp_path, loss=Recorded(w_proto=0.0), teachers={"words": clusters})
    run.train()
    assert widths == []
    assert [parts["proto_external_loss"] > 0.3 for _, parts in run.loss.loss.calls] == [False] * 4 + [True] * 4


def test_labels_are_whatever_numbers_tell_samples_apart(tmp_path):
    data = pairs().remove_columns("label").add_column("score", [1000 + 7 * i for i in range(ROWS)])
    run = trainer(tmp_path, data=data)
    run.train()
    assert run.loss.loss.prototypes.index.tolist() == data["score"][:]


def test_evaluation_is_info_nce_of_the_batch_and_needs_no_labels(tmp_path):
    run = trainer(tmp_path, eval_dataset=without_labels(), arguments={"per_device_eval_batch_size": ROWS})
    run.train()
    calls = len(run.loss.loss.calls)
    got = run.evaluate()
    image, text = (run.model.encode(pairs()[name], convert_to_tensor=True) for name in ("image", "caption"))
    scale = run.model[0].model.logit_scale.detach().exp()
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (image, text)]
    assert got["eval_loss"] == pytest.approx(float(info_nce(*unit, scale)), abs=2e-4)
    assert run.state.log_history[-1]["eval_contrastive_loss"] == pytest.approx(got["eval_loss"], abs=1e-4)
    assert len(run.loss.loss.calls) == calls


def test_a_sigmoid_model_has_the_sigmoid_loss_in_training_and_evaluation(tmp_path):
    own = model()
    own[0].model.logit_bias = torch.nn.Parameter(torch.tensor(-4.0))
    loss = Recorded(pair_loss="sigmoid")
    arguments = {"per_device_eval_batch_size": ROWS, "max_steps": 2}
    run = trainer(tmp_path, loss, own=own, eval_dataset=without_labels(), arguments=arguments)
    run.train()
    bias = own[0].model.logit_bias.detach()
    assert float(bias) != -4.0
    unit = [torch.nn.functional.normalize(own.encode(pairs()[x], convert_to_tensor=True), dim=1) for x in ("image", "caption")]
    wanted = sigmoid_pair_loss(*unit, own[0].model.logit_scale.detach().exp(), bias)
    assert run.evaluate()["eval_loss"] == pytest.approx(float(wanted), abs=2e-3)
    with pytest.raises(ValueError, match="logit_bias"):
        ProtoCLIPLoss(model(), ProtoLoss(pair_loss="sigmoid"), heads=HEADS)


def test_what_is_saved_is_a_model_of_sentence_transformers_alone(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert not [name for name in saved if "proto" in name or "heads" in name]
    assert_same(SentenceTransformer(str(tmp_path)).state_dict(), run.model.state_dict())
    assert not torch.equal(saved["logit_scale"], model()[0].model.logit_scale.detach())
    card = (tmp_path / "README.md").read_text()
    assert "w_proto=1.0" in card
    assert "@article{chen2023protoclip" in card


def test_a_model_of_texts_without_a_scale_gets_one(tmp_path):
    """Two columns of captions, one tower."""
    words = sorted({w for text in pairs()["caption"] for w in text.split()})
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path / "bert")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words) + 2, **size)).save_pretrained(tmp_path / "bert")
    texts = pairs()["caption"][:]
    data = Dataset.from_dict({"one": texts, "other": [text[::2] + " " + text for text in texts], "label": range(ROWS)})
    run = trainer(tmp_path, own=SentenceTransformer(str(tmp_path / "bert")), data=data)
    scale = run.loss.heads.logit_scale
    before = float(scale.detach())
    run.train()
    assert run.loss.loss.calls[-1][1]["proto_loss"] > 0.3
    assert float(scale.detach()) != before


def test_scales_are_clamped_before_a_step(tmp_path):
    run = trainer(tmp_path, arguments={"max_steps": 2, "learning_rate": 0.0})
    run.loss.heads.logit_scale_proto.data.fill_(7.0)
    run.train()
    assert float(run.loss.heads.logit_scale_proto.detach().exp()) == pytest.approx(100)


def test_data_that_cannot_be_used_is_an_error_before_the_first_batch(tmp_path):
    data, empty = pairs(), without_labels()
    for wrong, error, message in (
        (empty, ValueError, r"train_dataset must have a column label .*add_column\('label'.* got \['image', 'caption'\]"),
        (empty.add_column("score", [0.5] * ROWS), TypeError, "labels must be integer sample indices, got torch.float32"),
        (empty.add_column("score", [[i, i] for i in range(ROWS)]), ValueError, r"one sample index a row, got shape \(1, 2\)"),
        (data.add_column("more", data["caption"]), ValueError, "must have two columns of inputs, image and text"),
        (DatasetDict(a=data, b=data), TypeError, "train_dataset must be one datasets.Dataset, got ConcatDataset"),
    ):
        run = trainer(tmp_path, data=wrong)
        with pytest.raises(error, match=message):
            run.train()
        assert run.loss.loss.calls == []
    run = trainer(tmp_path, data=empty.add_column("label", [i // 2 for i in range(ROWS)]), warmup_epochs=0)
    with pytest.raises(ValueError, match="labels must tell 42 samples apart, got 21 values"):
        run.train()
    few = TeacherAdapter.from_tensor(torch.randn(ROWS - 1, 4))
    with pytest.raises(ValueError, match="must have a row for each of the 42 samples of train_dataset, got 41"):
        trainer(tmp_path, teachers={"words": few}).train()


def test_calls_that_cannot_work_are_errors():
    own = model()
    loss = ProtoCLIPLoss(own, heads={"dim": 8, "hidden_dim": 16})
    batch = [own.preprocess(pairs()[:4][name]) for name in ("image", "caption")]
    own.train()
    with pytest.raises(RuntimeError, match="prototypes are not set"):
        loss(batch, torch.arange(4))
    with pytest.raises(ValueError, match="sentence_features must have two columns, image and text, got 3"):
        loss([*batch, batch[0]])
    loss.loss.set_prototypes(None)
    assert loss(batch).keys() == {"contrastive_loss", "proto_loss", "proto_external_loss"}
    with pytest.raises(TypeError, match=r"labels must be integer sample indices, got torch\.bool"):
        loss(batch, torch.ones(4, dtype=torch.bool))
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    loss.loss.set_prototypes(EpisodicClusterer(2).build(FeatureBank.from_features(torch.arange(4), features, features)))
    with pytest.raises(ValueError, match="labels must be given, got None: the training set needs a column label"):
        loss(batch)
    with pytest.raises(TypeError, match="loss must be a ProtoCLIPLoss, got ProtoLoss"):
        ProtoCLIPCallback(ProtoLoss())


def test_another_model_in_the_loss_is_an_error(tmp_path):
    run = trainer(tmp_path)
    run.loss.model = model()
    with pytest.raises(ValueError, match="loss must be made with the model of the trainer"):
        run.train()


def test_a_checkpoint_that_is_not_the_one_is_an_error(tmp_path):
    trainer(tmp_path / "a", arguments=SAVE).train()
    trainer(tmp_path / "b", arguments={**SAVE, "learning_rate": 1e-4}).train()
    other = str(tmp_path / "b" / "checkpoint-6")
    with pytest.raises(ValueError, match=r"resume_from must be the checkpoint that .* resumes, of step 6, got .*a/check"):
        trainer(tmp_path / "a", arguments=SAVE).train(resume_from_checkpoint=other)
    run = trainer(tmp_path / "a", arguments=SAVE, resume_from=other)
    run.train(resume_from_checkpoint=other)
    assert len(run.loss.loss.calls) == 6
    (tmp_path / "b" / "checkpoint-6" / "proto_heads.pt").unlink()
    with pytest.raises(ValueError, match="must be a checkpoint that ProtoCLIPCallback was there to save"):
        trainer(tmp_path / "a", arguments=SAVE, resume_from=other).train(resume_from_checkpoint=other)


def test_a_second_run_begins_without_prototypes(tmp_path):
    """And clusters as the first did."""
    run = trainer(tmp_path, clusterer=EpisodicClusterer(4, warm_start=True, niter=1))
    run.train()
    run.train()
    assert [parts["proto_loss"] > 0.3 for _, parts in run.loss.loss.calls] == ([False] * 4 + [True] * 4) * 2
    assert run.loss.loss.prototypes.report.drift is None or not run.loss.loss.prototypes.report.drift
