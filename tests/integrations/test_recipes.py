"""The code on the pages of the hosts, as it is printed."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from host_pairs import PicturePairs

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "hosts"
ROWS = 24


@pytest.fixture(scope="module")
def pairs():
    return PicturePairs(ROWS)


def blocks(page, language):
    """The code blocks of a page, in order."""
    found, lines = [], (PAGES / page).read_text().splitlines()
    for start, line in enumerate(lines):
        if line.strip() == f".. code-block:: {language}":
            body = []
            for text in lines[start + 2 :]:
                if text and not text.startswith("   "):
                    break
                body.append(text[3:])
            found.append("\n".join(body).strip())
    return found


def block(page, language, word):
    """The one block that has a word."""
    (found,) = [text for text in blocks(page, language) if word in text]
    return found


def run_script(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.fixture
def hf(tmp_path, pairs):
    """Names that the page of transformers takes for granted."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import transformers
    from hf_trainer import training_arguments
    from host_transformers import small_model

    from protoclip_losses import OnlinePrototypes, ProtoLoss

    names = {"CLIPModel": transformers.CLIPModel, "ProtoLoss": ProtoLoss, "OnlinePrototypes": OnlinePrototypes}
    return {
        **names,
        "model": small_model(),
        "args": training_arguments(tmp_path, save_steps=100),
        "pairs": pairs,
        "folder": tmp_path,
    }


def patched(diff, sign):
    """One side of a diff."""
    return "\n".join(line[2:] for line in diff.splitlines() if line.startswith(sign))


def test_transformers_diff(hf):
    diff = block("transformers.rst", "diff", "ProtoCLIPTrainer")
    exec(patched(diff, "-"), plain := dict(hf))  # what it starts from is transformers' own
    assert type(plain["trainer"]).__module__ == "transformers.trainer"
    exec(patched(diff, "+"), hf)
    hf["trainer"].train()
    assert len(hf["trainer"].loss.prototypes.index) == ROWS


class Captioned(PicturePairs):
    """With columns, as data sets of transformers' users have them."""

    def __getitem__(self, key):
        return {"caption": self.captions}[key] if isinstance(key, str) else super().__getitem__(key)


def test_transformers_words(hf):
    pytest.importorskip("sklearn")
    hf["pairs"] = Captioned(ROWS)
    exec(patched(block("transformers.rst", "diff", "ProtoCLIPTrainer"), "+").splitlines()[0], hf)
    exec(block("transformers.rst", "python", "from_captions"), hf)
    hf["trainer"].train()
    assert ("image", "words") in hf["trainer"].loss.prototypes.terms
    exec(block("transformers.rst", "python", "OnlinePrototypes"), hf)
    hf["trainer"].train()
    assert hf["loss"].prototypes.step == 6
    assert hf["loss"].prototypes.queue.widths.keys() == {"image", "text", "words"}  # warm-up is longer than these steps


def test_transformers_heads_of_a_saved_model(hf):
    exec(patched(block("transformers.rst", "diff", "ProtoCLIPTrainer"), "+"), hf)
    hf["trainer"].save_model(str(hf["folder"]))
    saved = hf["trainer"].model.state_dict()
    exec(block("transformers.rst", "python", "load_heads"), hf)
    assert all(torch.equal(x, saved[name]) for name, x in hf["model"].state_dict().items())


def test_transformers_peft(hf):
    pytest.importorskip("peft")
    exec(block("transformers.rst", "python", "peft"), hf)
    exec(patched(block("transformers.rst", "diff", "ProtoCLIPTrainer"), "+"), hf)
    before = hf["model"].proto.logit_scale_proto.detach().clone()
    hf["trainer"].train()
    assert not torch.equal(hf["model"].proto.logit_scale_proto, before)


def test_transformers_script_and_its_resume(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    arguments = ("--output", tmp_path, "--rows", ROWS, "--batch-size", 8, "--save-steps", 2)
    run_script(monkeypatch, "host_transformers.py", *arguments, "--epochs", 2)
    assert (tmp_path / "checkpoint-6" / "proto_loss.pt").exists()
    run_script(monkeypatch, "host_transformers.py", *arguments, "--epochs", 3, "--resume")
    assert (tmp_path / "checkpoint-8").exists()


@pytest.fixture
def st(tmp_path):
    """Names that the page of sentence-transformers takes for granted."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    import st_trainer
    from sentence_transformers import SentenceTransformerTrainer

    from protoclip_losses import OnlinePrototypes, ProtoLoss

    return {
        "SentenceTransformerTrainer": SentenceTransformerTrainer,
        "ProtoLoss": ProtoLoss,
        "OnlinePrototypes": OnlinePrototypes,
        "model": st_trainer.model(),
        "args": st_trainer.training_arguments(tmp_path, num_train_epochs=2),
        "pairs": st_trainer.pairs().remove_columns("label"),
    }


def test_sentence_transformers_page(st):
    """The diff, the words, and online mode on the data without labels."""
    page, unlabelled = "sentence_transformers.rst", st["pairs"]
    pytest.importorskip("sklearn")
    diff = block(page, "diff", "ProtoCLIPLoss")
    exec(patched(diff, "-"), plain := dict(st))  # what it starts from is sentence-transformers' own
    assert plain["trainer"].compute_loss.__func__ is st["SentenceTransformerTrainer"].compute_loss
    exec(block(page, "python", "add_column"), st)
    exec(patched(diff, "+"), st)
    st["trainer"].train()
    assert len(st["loss"].loss.prototypes.index) == len(unlabelled)
    exec(block(page, "python", "from_captions"), st)
    st["trainer"].train()
    assert ("image", "words") in st["loss"].loss.prototypes.terms
    st["pairs"] = unlabelled
    exec(block(page, "python", "OnlinePrototypes"), st)
    st["trainer"].train()
    assert st["objective"].prototypes.step == 8


def test_sentence_transformers_script_and_its_resume(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    arguments = ("--output", tmp_path, "--rows", ROWS, "--batch-size", 8, "--save-steps", 2)
    run_script(monkeypatch, "host_sentence_transformers.py", *arguments, "--epochs", 2)
    assert (tmp_path / "checkpoint-6" / "proto_loss.pt").exists()
    run_script(monkeypatch, "host_sentence_transformers.py", *arguments, "--epochs", 3, "--resume")
    assert (tmp_path / "checkpoint-8" / "proto_heads.pt").exists()
    assert capsys.readouterr().out.count("image_to_text_recall@10") == 2


def test_lightning_script_and_its_resume(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    arguments = ("--output", tmp_path / "runs", "--rows", ROWS)
    run_script(monkeypatch, "host_lightning.py", *arguments, "--epochs", 2)
    first = torch.load(tmp_path / "runs" / "last.ckpt", weights_only=True)
    run_script(monkeypatch, "host_lightning.py", *arguments, "--epochs", 3, "--resume")
    last = torch.load(tmp_path / "runs" / "last.ckpt", weights_only=True)
    assert (first["global_step"], last["global_step"]) == (2, 3)


def test_lightning_online(tmp_path, pairs):
    pytest.importorskip("lightning")
    from host_lightning import Clip
    from lightning.pytorch import Trainer
    from lightning_fit import QUIET
    from torch.utils.data import DataLoader

    from protoclip_losses import OnlinePrototypes, ProtoLoss
    from protoclip_losses.integrations.lightning import ProtoCLIPCallback

    start, step = block("lightning.rst", "python", "OnlinePrototypes").split("\n\n")
    exec(step, names := {"ProtoLoss": ProtoLoss, "OnlinePrototypes": OnlinePrototypes})

    class Online(Clip):
        project, training_step = None, names["training_step"]

        def __init__(self):
            super().__init__()
            exec(start, {"self": self, **names})

    model = Online()
    trainer = Trainer(
        max_epochs=2, callbacks=[ProtoCLIPCallback()], default_root_dir=tmp_path, enable_checkpointing=False, **QUIET
    )
    trainer.fit(model, DataLoader(pairs, 8))
    assert model.loss.prototypes.step == 6


def test_lightning_words(tmp_path, pairs):
    """The recipe, and with its words the step of online mode."""
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    from host_lightning import Clip
    from lightning.pytorch import Trainer
    from lightning_fit import QUIET
    from torch.utils.data import DataLoader

    from protoclip_losses import OnlinePrototypes, WithIndex
    from protoclip_losses.integrations.lightning import ProtoCLIPCallback

    exec(
        block("lightning.rst", "python", "from_captions"),
        names := {"captions": pairs.captions, "ProtoCLIPCallback": ProtoCLIPCallback},
    )
    exec(block("lightning.rst", "python", "self.words"), names)

    class Online(Clip):
        project, training_step = None, names["training_step"]
        words = names["words"]

    data = DataLoader(WithIndex(pairs), 8)
    models = Clip(), Online()
    models[1].loss.set_prototypes(OnlinePrototypes(4, queue_size=24, every=2, warmup=3))
    for model, callback in zip(models, (names["callback"], ProtoCLIPCallback()), strict=True):
        options = {"max_epochs": 2, "callbacks": [callback], "default_root_dir": tmp_path, "enable_checkpointing": False}
        Trainer(**options, **QUIET).fit(model, data)
        assert ("image", "words") in model.loss.prototypes.terms
