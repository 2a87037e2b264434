"""Checkpoints of the launcher in open_clip, and open_clip's in the launcher."""

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("pandas")  # open_clip's training code needs more than open_clip does
import open_clip
import open_clip_train.zero_shot
from open_clip_runs import (
    BATCH,
    HEADS,
    ROWS,
    STILL,
    assert_same,
    assert_same_end,
    checkpoint,
    checkpoint_file,
    csv,
    in_an_order_of_its_own,
    log,
    logged,
    train,
)
from open_clip_train import main as host
from PIL import Image

from protoclip_losses.integrations.open_clip import (
    Launcher,
    add_heads,
    join_heads,
    launcher,
    main,
    parse_arguments,
    separate_heads,
)

pytestmark = pytest.mark.usefixtures("tiny_model")
STEPS = ROWS // BATCH  # of an epoch
TERMS = ["--proto-num-prototypes", 4, "--proto-warmup-epochs", 0, *HEADS]
NO_TERMS = ["--proto-weight", 0, *HEADS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, table):
    """One epoch of each trainer: "ours" with prototypes, "old" as 0.7.0 saved the same, "plain" of open_clip alone."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        in_an_order_of_its_own(patch)
        train(main, folder, "ours", *TERMS, *csv(table, "--epochs", 1))
        train(host.main, folder, "plain", *csv(table, "--epochs", 1))
    # 0.6 and 0.7.0 left the dictionary of open_clip's main as it was.
    old = {name: x for name, x in join_heads(checkpoint(folder, "ours", 1)).items() if name != "protoclip"}
    file = checkpoint_file(folder, "old", 1)
    file.parent.mkdir(parents=True)
    torch.save(old, file)
    return folder


def accuracy(output, target, topk):
    """open_clip 3.3's own does not run with NumPy 2.4, which makes no number of an array of one."""
    hits = output.topk(max(topk), 1)[1] == target[:, None]
    return [float(hits[:, :k].sum()) for k in topk]


def steps_by_name(saved, names):
    """{parameter: steps of the optimizer} of a checkpoint of ours."""
    state = join_heads(saved)["optimizer"]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    return {
        name: int(state["state"][number]["step"])
        for name, number in zip((name for group in names for name in group), numbers, strict=True)
        if number in state["state"]
    }


def steps(folder, name, epoch):
    saved = checkpoint(folder, name, epoch)
    return steps_by_name(saved, saved["protoclip"]["parameters"])


def new_launcher(*options):
    return Launcher(parse_arguments([str(a) for a in ["--model", "tiny", *HEADS, *options]])[0])


def test_open_clip_opens_our_checkpoint(runs):
    file, saved = str(checkpoint_file(runs, "ours", 1)), checkpoint(runs, "ours", 1)["state_dict"]
    model, *_ = open_clip.create_model_and_transforms("tiny", pretrained=file)
    assert_same(dict(model.state_dict()), dict(saved))
    model = open_clip.create_model("tiny")
    assert str(open_clip.load_checkpoint(model, file, strict=True)) == "<All keys matched successfully>"
    assert_same(dict(model.state_dict()), dict(saved))
    assert list(open_clip.factory.load_state_dict(file)) == list(open_clip.create_model("tiny").state_dict())


def test_open_clip_trains_from_our_weights(runs, table, tmp_path):
    train(host.main, tmp_path, "run", "--pretrained", checkpoint_file(runs, "ours", 1), *csv(table, "--epochs", 1, "--lr", 0))
    one, other = (checkpoint(folder, name, 1)["state_dict"] for folder, name in ((tmp_path, "run"), (runs, "ours")))
    assert_same(dict(one), dict(other))  # a learning rate of 0 changes nothing


def test_open_clip_resumes_our_run_with_its_optimizer(runs, table, tmp_path):
    train(host.main, tmp_path, "run", "--resume", checkpoint_file(runs, "ours", 1), *csv(table))
    state = checkpoint(tmp_path, "run", 2)["optimizer"]["state"]
    assert [int(x["step"]) for x in state.values()] == [2 * STEPS] * len(list(open_clip.create_model("tiny").parameters()))


def test_a_run_can_go_over_from_one_trainer_to_the_other_bit_for_bit(runs, table, tmp_path, monkeypatch):
    in_an_order_of_its_own(monkeypatch)
    train(host.main, tmp_path, "plain", *csv(table))
    train(main, tmp_path, "ours", *NO_TERMS, *csv(table, "--save-frequency", 1))
    for entry, options, of, name in ((host.main, [], "ours", "to_plain"), (main, NO_TERMS, "plain", "to_ours")):
        train(entry, tmp_path, name, *options, "--resume", checkpoint_file(tmp_path, of, 1), *csv(table))
    wanted = checkpoint(tmp_path, "plain", 2)
    for name in ("to_plain", "to_ours"):
        end = checkpoint(tmp_path, name, 2)
        end.pop("protoclip", None)
        assert_same({**end, "name": "plain"}, wanted)


@pytest.mark.parametrize("resume", [["--resume", "plain"], ["--pretrained", "plain"]], ids=" ".join)
def test_our_trainer_starts_from_a_plain_checkpoint_with_fresh_heads(runs, table, tmp_path, resume):
    argument, name = resume
    epochs = 2 if argument == "--resume" else 1
    train(main, tmp_path, "run", argument, checkpoint_file(runs, name, 1), *TERMS, *csv(table, "--epochs", epochs))
    assert "has none, they start fresh" in log(tmp_path, "run") or "(it has none), they start fresh" in log(tmp_path, "run")
    own, heads = epochs * STEPS, STEPS
    for parameter, n in steps(tmp_path, "run", epochs).items():
        assert n == (heads if parameter.startswith("proto.") else own), parameter
    if argument == "--resume":
        assert "have none in the checkpoint (proto.image.0.bias" in log(tmp_path, "run")
    assert logged(tmp_path, "run", "Proto_loss")[-1] > 0.1


def test_weights_alone_can_be_resumed_as_in_open_clip(runs, table, tmp_path):
    plain = checkpoint(runs, "plain", 1)["state_dict"]
    torch.save(plain, tmp_path / "weights.pt")
    train(main, tmp_path, "run", "--resume", tmp_path / "weights.pt", *TERMS, *csv(table, "--epochs", 1, "--lr", 0))
    assert_same(dict(checkpoint(tmp_path, "run", 1)["state_dict"]), dict(plain))


def test_checkpoints_of_0_7_0_are_resumed_and_loaded(runs, table, tmp_path, monkeypatch):
    in_an_order_of_its_own(monkeypatch)
    assert "proto.text.0.weight" in checkpoint(runs, "old", 1)["state_dict"]
    for form in ("ours", "old"):
        train(main, tmp_path, form, "--resume", checkpoint_file(runs, form, 1), *TERMS, *csv(table))
        train(
            main, tmp_path, f"{form}-weights", "--pretrained", checkpoint_file(runs, form, 1), *TERMS, *csv(table, "--epochs", 1)
        )
    assert_same_end(tmp_path, "ours", "old", 2)
    assert_same_end(tmp_path, "ours-weights", "old-weights", 1)


def test_the_most_recent_checkpoint_alone_is_enough_to_resume(table, tmp_path, monkeypatch):
    """`--save-most-recent` with `--resume latest`: model, heads, optimizer, scaler and the queue."""
    in_an_order_of_its_own(monkeypatch)
    online = ["--proto-online", "--proto-num-prototypes", 4, "--proto-warmup-steps", 2, "--proto-every", 2, *HEADS]
    common = [*online, *csv(table, "--epochs", 3, "--save-most-recent", "--save-frequency", 0, "--precision", "amp")]
    train(main, tmp_path, "whole", *common)
    original = Launcher.train_one_epoch

    def dies(self, model, data, loss, epoch, *rest, **more):
        if epoch == 2:
            raise KeyboardInterrupt
        original(self, model, data, loss, epoch, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "train_one_epoch", dies)
        with pytest.raises(KeyboardInterrupt):
            train(main, tmp_path, "rest", *common)
    train(main, tmp_path, "rest", "--resume", "latest", *common)
    assert "queue begins empty" not in log(tmp_path, "rest")
    for name in ("whole", "rest"):
        assert (tmp_path / name / "checkpoints" / "epoch_latest.pt").exists()
    assert_same_end(tmp_path, "whole", "rest", 3)


def test_the_papers_last_episodes_with_a_locked_image_tower(runs, table, tmp_path):
    first = checkpoint_file(runs, "ours", 1)
    train(main, tmp_path, "lit", "--resume", first, "--lock-image", *NO_TERMS, *csv(table))
    before, after = checkpoint(runs, "ours", 1), checkpoint(tmp_path, "lit", 2)
    for name, x in after["state_dict"].items():
        assert torch.equal(x, before["state_dict"][name]) == name.startswith("visual."), name
    for name, x in after["protoclip"]["heads"].items():  # which BatchNorm's statistics are not a part of
        assert "running" in name or "tracked" in name or torch.equal(x, before["protoclip"]["heads"][name]), name
    trained = steps(tmp_path, "lit", 2)
    assert set(trained.values()) == {2 * STEPS}  # the text encoder's moments were kept
    assert not [name for name in trained if name.startswith(("visual.", "proto."))]
    assert "in it are not trained now (proto.image.0.bias" in log(tmp_path, "lit")
    # And back: what is trained again starts anew.
    train(main, tmp_path, "back", "--resume", checkpoint_file(tmp_path, "lit", 2), *TERMS, *csv(table, "--epochs", 3))
    back = steps(tmp_path, "back", 3)
    assert {back[name] for name in trained} == {3 * STEPS}
    assert {n for name, n in back.items() if name not in trained} == {STEPS}
    # A checkpoint without names says what to do.
    with pytest.raises(ValueError, match=r"--resume: the optimizer must be of the .* or --pretrained FILE in place of"):
        train(main, tmp_path, "old", "--resume", checkpoint_file(runs, "old", 1), "--lock-image", *NO_TERMS, *csv(table))


def test_heads_of_a_pretrained_checkpoint_are_taken_over(runs, caplog):
    caplog.set_level("INFO")
    saved = checkpoint(runs, "ours", 1)["protoclip"]["heads"]
    for form in ("ours", "old"):
        file = str(checkpoint_file(runs, form, 1))
        with new_launcher().installed() as installed:
            model, *_ = installed.create_model_and_transforms("tiny", file, output_dict=True)
        assert_same(dict(model.proto.state_dict()), dict(saved))
        assert f"Heads: those of {file}" in caplog.text
    with new_launcher("--proto-head-dim", 9).installed() as installed:
        model, *_ = installed.create_model_and_transforms("tiny", file, output_dict=True)
    assert model.proto.text[-1].out_features == 9
    assert "text.3.weight is (8, 16), here (9, 16)), they start fresh" in caplog.text


def test_heads_of_other_sizes_are_not_resumed(runs, table, tmp_path):
    other = ["--proto-head-norm", "layer", "--proto-head-dim", 9]
    with pytest.raises(
        ValueError, match=r"--resume: .* must have heads of this run's sizes, got others \(.* --proto-head- arguments"
    ):
        train(main, tmp_path, "run", "--resume", checkpoint_file(runs, "ours", 1), *TERMS, *other, *csv(table))


@pytest.mark.parametrize("opt", ["timm/adamw", "timm/lookahead_adamw"])
def test_other_optimizers(table, tmp_path, monkeypatch, opt):
    in_an_order_of_its_own(monkeypatch)
    common = csv(table, "--opt", opt, "--beta1", 0.9, "--beta2", 0.99, "--eps", 1e-8, *STILL)
    train(main, tmp_path, "whole", *TERMS, *common)
    first = checkpoint_file(tmp_path, "whole", 1)
    train(host.main, tmp_path, "plain", "--resume", first, *common)
    train(main, tmp_path, "rest", "--resume", first, *TERMS, *common)
    if opt == "timm/adamw":  # Lookahead's own resume starts its slow weights at another step
        assert_same_end(tmp_path, "whole", "rest", 2)
    train(main, tmp_path, "lit", "--resume", first, "--lock-image", *NO_TERMS, *common)


def test_evaluation_by_both_trainers_gives_the_same(runs, table, tmp_path, monkeypatch):
    names = open_clip.IMAGENET_CLASSNAMES[:6]
    monkeypatch.setattr(open_clip_train.zero_shot, "IMAGENET_CLASSNAMES", names)
    pictures = [line.split("\t")[0] for line in table.read_text().splitlines()[1:]]
    for i, picture in enumerate(pictures[:18]):
        folder = tmp_path / "imagenet" / f"{i % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(picture).save(folder / f"{i}.png")
    data = ["--imagenet-val", tmp_path / "imagenet", "--val-data", table, "--dataset-type", "csv", "--workers", 0, "--epochs", 1]
    file = checkpoint_file(runs, "ours", 1)
    monkeypatch.setattr(open_clip_train.zero_shot, "accuracy", accuracy)
    results = []
    for name, entry, options in (
        ("plain", host.main, ["--pretrained", file]),
        ("ours", main, [*HEADS, "--pretrained", file]),
        ("resumed", main, [*HEADS, "--resume", file]),
    ):
        train(entry, tmp_path, name, *options, *data)
        results.append([logged(tmp_path, name, what) for what in ("val-top1", "val-top5", "clip_val_loss", "text_to_image_R@5")])
    assert all(len(values) == 1 for values in results[0])
    assert results[0] == results[1] == results[2]


def test_distillation_with_prototypes(table, tmp_path, runs):
    teacher = ["--distill-model", "tiny", "--distill-pretrained", checkpoint_file(runs, "old", 1)]
    train(main, tmp_path, "run", *TERMS, *teacher, *csv(table, "--epochs", 1))
    parts = [logged(tmp_path, "run", name) for name in ("Contrastive_loss", "Distill_loss", "Proto_loss", " Loss")]
    for contrastive, distilled, proto, total in zip(*parts, strict=True):
        assert min(contrastive, distilled, proto) > 0.1
        assert contrastive + distilled + proto == pytest.approx(total, rel=1e-3)


def test_separate_and_join_are_inverse_and_leave_what_they_are_given(runs):
    old = checkpoint(runs, "old", 1)
    before = {name: x.copy() if isinstance(x, dict) else x for name, x in old.items()}
    alone = separate_heads(old)
    assert list(alone["state_dict"]) == list(open_clip.create_model("tiny").state_dict())
    assert_same(alone["optimizer"], old["optimizer"])
    assert_same(dict(join_heads(alone)["state_dict"]), dict(old["state_dict"]))
    names = checkpoint(runs, "ours", 1)["protoclip"]["parameters"]
    whole = separate_heads(old, names)
    assert_same(whole, checkpoint(runs, "ours", 1))
    assert_same(join_heads(whole), old)
    assert_same(dict(old), dict(before))
    plain = checkpoint(runs, "plain", 1)
    assert_same(join_heads(plain), plain)
    with pytest.raises(ValueError, match="must have format 1 or earlier, got 2"):
        join_heads({**whole, "protoclip": {**whole["protoclip"], "format": 2}})


def test_what_was_replaced_is_put_back():
    owners = [(host, name) for name in new_launcher().original]
    owners += [(torch, "save"), (torch.optim.Optimizer, "load_state_dict"), (open_clip.factory, "load_state_dict")]
    before = [getattr(*owner) for owner in owners]
    with new_launcher().installed():
        assert all(getattr(*owner) != original for owner, original in zip(owners, before, strict=True))
    assert [getattr(*owner) for owner in owners] == before
    with pytest.raises(KeyError), new_launcher().installed():
        raise KeyError
    assert [getattr(*owner) for owner in owners] == before
    assert launcher.torch.save is torch.save


def test_a_file_of_anything_else_is_saved_as_it_is(tmp_path):
    model = add_heads(open_clip.create_model("tiny", output_dict=True), 8, 16)
    with new_launcher().installed():
        torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
        torch.save(np.float64(1.0), tmp_path / "number.pt")
    assert "proto.text.0.weight" in torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
