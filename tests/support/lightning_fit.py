"""Lightning's Trainer without what it prints, and callbacks that watch. Needs lightning."""

import torch
from host_lightning import Clip
from lightning.pytorch import Callback, Trainer

from protoclip_losses.integrations.lightning import ProtoCLIPCallback

QUIET = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "enable_model_summary": False}


class Seen(Callback):
    """The samples of each batch, and the prototype loss."""

    def __init__(self):
        self.calls = []

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.calls.append((batch["index"].tolist(), float(trainer.callback_metrics["proto_loss"])))

    @property
    def samples(self):
        """Of all batches, in order."""
        return [i for index, _ in self.calls for i in index]


class Counting(ProtoCLIPCallback):
    """Counts the episodes that are clustered."""

    builds = 0

    def build(self, trainer, module):
        self.builds += 1
        return super().build(trainer, module)


def fit(folder, loader, callback, model=None, resume=None, **options):
    """Train for two epochs: the module and what was seen."""
    torch.manual_seed(0)
    model, seen = Clip() if model is None else model, Seen()
    options = {"max_epochs": 2, "enable_checkpointing": False, **QUIET, **options}
    Trainer(default_root_dir=folder, callbacks=[callback, seen, *options.pop("callbacks", [])], **options).fit(
        model, loader, ckpt_path=resume
    )
    return model, seen
