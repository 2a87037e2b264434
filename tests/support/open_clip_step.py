"""One step of open_clip's own loop on a model and data that a test makes: for gradients, and for several processes.

``open_clip_train.main`` itself cannot wrap a model in DDP on CPU.
"""

import json

import open_clip
import torch
from open_clip_train.data import DataInfo
from open_clip_train.params import parse_args
from pair_files import emoji_with_groups

from protoclip_losses.integrations.open_clip import Launcher, add_heads, parse_arguments
from protoclip_losses.integrations.open_clip.data import IndexedBatches

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def add_tiny_model(folder):
    (folder / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)


def triples(rows):
    """(pictures, texts, index) of real pairs."""
    pairs, _ = emoji_with_groups()
    pictures = torch.nn.functional.interpolate(pairs.pictures[:rows].float() / 255, size=32, mode="area")
    tokens = open_clip.get_tokenizer("tiny")([pairs.captions[i] for i in range(rows)])
    return torch.utils.data.TensorDataset(pictures, tokens, torch.arange(rows))


def one_step(folder, data, accum_freq=1, log_scale=2.0, wrap=lambda model: model, teachers=None):
    """The model, with its gradients, after an epoch of one step on ``data`` at learning rate 0; teachers have a row per index."""
    torch.manual_seed(0)
    model = add_heads(open_clip.create_model("tiny", output_dict=True), 8, 16, "layer")
    model.proto.logit_scale_proto.data.fill_(log_scale)
    loader = torch.utils.data.DataLoader(data, batch_size=len(data) // accum_freq)
    loader.num_batches, loader.num_samples = accum_freq, len(data)
    own = ["--proto-warmup-epochs", 0, "--proto-num-prototypes", 4]
    host = ["--model", "tiny", "--precision", "fp32", "--device", "cpu", "--accum-freq", accum_freq, "--skip-scheduler"]
    options, rest = parse_arguments([str(a) for a in own + host])
    args = parse_args(rest)
    args.distill, args.rank, args.world_size, args.horovod, args.wandb = False, 0, 1, False, False
    launcher = Launcher(options)
    launcher.teachers = dict(teachers or {})
    info = {"train": DataInfo(IndexedBatches(loader, loader, loader, accum_freq))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    launcher.train_one_epoch(wrap(model), info, launcher.create_loss(args), 0, optimizer, None, None, None, args)
    return model
