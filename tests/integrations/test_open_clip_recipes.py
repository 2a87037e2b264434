"""The commands and the code of docs/hosts/open_clip.rst, as they are printed, on data of a test's size."""

import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("pandas")  # open_clip's training code needs more than open_clip does
import open_clip
from open_clip_runs import FIXED, HEADS, csv, train
from open_clip_train import main as host

from protoclip_losses.integrations.open_clip import join_heads, main

pytestmark = pytest.mark.usefixtures("tiny_model")
PAGE = Path(__file__).parents[2] / "docs" / "hosts" / "open_clip.rst"
if not PAGE.exists():
    pytest.skip("the documentation is no part of the package", allow_module_level=True)
# All that is not as it is printed: sizes, the model, and what stands for a user's arguments.
SMALLER = {"20000": "4", '"ViT-B-32"': '"tiny"'}
REST = "ARGUMENTS OF open_clip_train.main"
NOT_RUN = ("pip install",)

BLOCK = re.compile(r"^\.\. code-block:: (bash|python)\n\n((?:   .*\n|\n)+)", re.MULTILINE)
# What needs the unreleased 4.x is in test_open_clip_4.py.
BLOCKS, UNRELEASED = (
    [(language, re.sub(r"^   ", "", text, flags=re.MULTILINE).strip()) for language, text in BLOCK.findall(part)]
    for part in PAGE.read_text().split("\nopen_clip 4.x, not yet released\n")
)
RUN = [(language, text) for language, text in BLOCKS if not any(words in text for words in NOT_RUN)]


@pytest.fixture(scope="module")
def logs(tmp_path_factory, table):
    """A folder with the files that the page names: a run of the launcher and one of 0.7.0 at epoch 30, and open_clip's own."""
    folder = tmp_path_factory.mktemp("recipes")
    train(main, folder / "made", "ours", "--proto-num-prototypes", 4, *HEADS, *csv(table, "--epochs", 1))
    train(host.main, folder / "made", "plain", *csv(table, "--epochs", 1))
    ours, plain = (
        {**torch.load(folder / "made" / name / "checkpoints" / "epoch_1.pt", weights_only=True), "epoch": 30}
        for name in ("ours", "plain")
    )
    for name, saved in (("run", ours), ("old", join_heads(ours))):
        file = folder / "files" / "logs" / name / "checkpoints" / "epoch_30.pt"
        file.parent.mkdir(parents=True)
        torch.save(saved, file)
    torch.save(plain, folder / "files" / "plain.pt")
    return folder / "files"


def test_the_page_has_blocks_of_both_kinds():
    assert len(RUN) >= 9
    assert {language for language, _ in RUN} == {"bash", "python"}
    assert len(BLOCKS) - len(RUN) == len(NOT_RUN)
    for language, text in UNRELEASED:
        assert language == "python"
        compile(text, str(PAGE), "exec")


@pytest.mark.parametrize(("language", "text"), RUN, ids=[f"{i}-{text.split()[2]}" for i, (_, text) in enumerate(RUN)])
def test_what_the_page_prints_runs(tmp_path, table, logs, monkeypatch, language, text):
    shutil.copytree(logs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for printed, small in SMALLER.items():
        text = text.replace(printed, small)
    if language == "python":
        exec(text, names := {})
        if "old" in names:
            open_clip.create_model("tiny", pretrained="logs/old/checkpoints/epoch_30.separate.pt")
        return
    own = HEADS if "protoclip_losses" in text else []
    # A run of 32 epochs where the page gives no other number would be long; "--name run" is of the run that is resumed.
    epochs = [] if "--epochs" in text else ["--epochs", "2"]
    name = [] if "--name" in text else ["--name", "new"]
    data = [str(a) for a in csv(table) if a not in ("--epochs", 2)]
    rest = shlex.join([*FIXED.split(), "--batch-size", "16", *epochs, *name, *data, *own])
    words = shlex.split(text.replace(REST, rest).replace("\\\n", " "))
    assert words[:2] == ["python", "-m"]
    monkeypatch.setattr(sys, "argv", words[2:])
    handlers = list(host.logging.root.handlers)
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    finally:
        host.logging.root.handlers[:] = handlers
    run = Path("logs") / ("new" if name else "run") / "checkpoints"
    last = 32 if "--epochs" in text else 2
    saved = torch.load(run / f"epoch_{last}.pt", weights_only=True)
    assert saved["epoch"] == last
    assert ("protoclip" in saved) == bool(own)
    assert not [name for name in saved["state_dict"] if "proto." in name]
    assert os.listdir(run)
