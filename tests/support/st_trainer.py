"""sentence-transformers' Trainer for the pictures of the examples, and a loss that remembers its calls."""

import functools
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from host_sentence_transformers import picture_pairs, write_small_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from protoclip_losses import OnlinePrototypes, ProtoLoss
from protoclip_losses.integrations.sentence_transformers import ProtoCLIPCallback, ProtoCLIPLoss

HEADS = {"dim": 8, "hidden_dim": 16, "norm": "layer"}
ROWS = 42


@functools.cache
def pairs(rows=ROWS):
    return picture_pairs(0, rows)


@functools.cache
def model_folder(shared=None):
    """A folder with a small CLIP. Of several processes the first writes it: save_pretrained does nothing on the others."""
    kept = None if shared else tempfile.TemporaryDirectory(prefix="st-")
    folder = shared or Path(kept.name)
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_small_model(folder, pairs()["caption"])
    if dist.is_initialized():
        dist.barrier()
    return folder, kept


def model(shared=None):
    """The same small CLIP each time; several processes name a folder that they share."""
    return SentenceTransformer(str(model_folder(shared)[0]))


class Recorded(ProtoLoss):
    """ProtoLoss that remembers the samples and the parts of each call."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def forward(self, *args, index=None, **kwargs):
        parts = super().forward(*args, index=index, **kwargs)
        values = {name: float(x.detach()) for name, x in parts.items()}
        self.calls.append((None if index is None else index.tolist(), values))
        return parts


def online(cls=Recorded, **options):
    loss = cls(**options)
    loss.set_prototypes(OnlinePrototypes(4, queue_size=22, every=2, warmup=3))
    return loss


def training_arguments(folder, **given):
    """Two epochs in batches of 11: 4 steps each."""
    fixed = {"num_train_epochs": 2, "per_device_train_batch_size": 11, "learning_rate": 1e-3, "logging_steps": 1}
    fixed |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    fixed |= {"dataloader_pin_memory": False, "ddp_find_unused_parameters": False}
    return SentenceTransformerTrainingArguments(output_dir=str(folder), **{**fixed, **given})


def trainer(folder, loss=None, teachers=None, data=None, arguments=(), heads=HEADS, own=None, callbacks=(), **more):
    """A Trainer, its loss and its callback, with four prototypes; ``own`` is a model."""
    torch.manual_seed(0)
    own = own or model()
    objective = ProtoCLIPLoss(own, Recorded() if loss is None else loss, teachers=teachers, heads=heads)
    evaluation = {"eval_dataset": more.pop("eval_dataset")} if "eval_dataset" in more else {}
    callback = ProtoCLIPCallback(objective, **{"num_prototypes": 4, **more})
    return SentenceTransformerTrainer(
        model=own,
        args=training_arguments(folder, **dict(arguments)),
        train_dataset=pairs() if data is None else data,
        loss=objective,
        callbacks=[callback, *callbacks],
        **evaluation,
    )


def weights(run):
    """Of the model and the heads."""
    return {name: x.detach().clone() for module in (run.model, run.loss.heads) for name, x in module.state_dict().items()}
