"""Runs of open_clip's trainer, its own and ours, on a model and data small enough for a test, and what they leave behind."""

import logging
import re

import torch
from open_clip_train import main as host

ROWS, BATCH = 48, 16
HEADS = ["--proto-head-dim", "8", "--proto-head-hidden-dim", "16"]
# What makes a run depend on nothing but the order of its samples: no random crop.
STILL = ["--aug-cfg", "scale=(1.0, 1.0)"]
FIXED = "--model tiny --device cpu --warmup 1 --lr 1e-3 --precision fp32 --log-every-n-steps 1"


def arguments(logs, name, *more):
    return [str(a) for a in [*FIXED.split(), "--batch-size", BATCH, "--logs", logs, "--name", name, *more]]


def csv(table, *more):
    return ["--dataset-type", "csv", "--train-data", table, "--workers", 0, "--epochs", 2, *more]


def webdataset(shards, *more):
    return ["--dataset-type", "webdataset", "--train-data", shards[0], "--train-num-samples", shards[1], "--workers", 2, *more]


def train(entry, *argv):
    """Run a trainer; its log handlers, which open_clip adds to the root logger for good, are taken away again."""
    before = logging.root.handlers[:]
    try:
        assert entry(arguments(*argv)) is None  # open_clip returns -1 where it refuses
    finally:
        logging.root.handlers[:] = before


def in_an_order_of_its_own(monkeypatch):
    """Let an epoch's order depend on its number alone: open_clip saves no state of the generator that shuffles a table."""
    original = host.train_one_epoch

    def train_one_epoch(model, data, loss, epoch, *rest, **more):
        torch.manual_seed(epoch)
        original(model, data, loss, epoch, *rest, **more)

    monkeypatch.setattr(host, "train_one_epoch", train_one_epoch)


def checkpoint_file(logs, name, epoch):
    return logs / name / "checkpoints" / f"epoch_{epoch}.pt"


def checkpoint(logs, name, epoch):
    return torch.load(checkpoint_file(logs, name, epoch), weights_only=True)


def log(logs, name):
    return (logs / name / "out.log").read_text()


def logged(logs, name, what):
    return [float(x) for x in re.findall(rf"{what}: ([\d.]+)", log(logs, name))]


def assert_same(one, other, path=""):
    """Nested states are equal bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert list(one) == list(other), path
        for name in one:
            assert_same(one[name], other[name], f"{path}/{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (x, y) in enumerate(zip(one, other, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, path


def assert_same_end(logs, one, other, epoch):
    """Checkpoints of two runs are equal but for the runs' names: model, heads, optimizer, scaler."""
    saved = [checkpoint(logs, name, epoch) for name in (one, other)]
    for state in saved:
        del state["name"]
    assert_same(*saved)
