"""Peak memory of what large batches need: the sigmoid loss without its B x B, and GradCache.

    python -m benchmarks.speed.large_batches                                    # the tables, some minutes on 2 cores
    python -m benchmarks.speed.large_batches --rst benchmarks/speed/results/large_batches.rst
    python -m benchmarks.speed.large_batches --device cuda

The sigmoid loss is forward and backward, with gradients of features, scale and bias, against the dense expression, open_clip's
SigLipLoss, and the dense expression on blocks of rows under torch.utils.checkpoint. GradCache trains two transformers with
InfoNCE, against the plain large batch. Memory is the increase of the process's peak during one call, with a new process for each;
calls that would not fit in free memory are skipped.
"""

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protoclip_losses import GradCache, InfoNCE, SigmoidPairLoss

from .cases import installed
from .measure import Call, csv_table, free_bytes, in_new_process, machine, peak_extra_bytes

WIDTH = 512
DEFAULT = ("sigmoid/8192", "sigmoid/32768", "encoders/256")
CHUNKS = (64, 16)
HEADER = ["case", "call", "peak extra MB"]


def sigmoid_calls(batch: int, device: str) -> dict[str, Call]:
    """The sigmoid loss of ``batch`` pairs in each form."""
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(batch, WIDTH, device=device), dim=1) for _ in range(2)]
    scalars = [torch.tensor(x, device=device) for x in (10.0, -10.0)]

    def dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
        logits = scale * image @ text.T + bias
        labels = torch.full_like(logits, -1)
        labels.diagonal(first).fill_(1)
        return -F.logsigmoid(labels * logits).sum() / len(text)

    def in_blocks(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        parts = []
        for first in range(0, len(image), 512):
            rows = image[first : first + 512]
            parts.append(checkpoint(dense, rows, text, scale, bias, first, use_reentrant=False))
        return torch.stack(parts).sum()

    def call(loss: Callable[..., Tensor]) -> Call:
        def run() -> None:
            leaves = [x.clone().requires_grad_() for x in (*features, *scalars)]
            loss(*leaves).backward()  # type: ignore[no-untyped-call]

        return run

    calls = {"ours": call(SigmoidPairLoss()), "blocks under checkpoint": call(in_blocks), "dense": call(dense)}
    if installed("open_clip"):
        calls["open_clip"] = call(importlib.import_module("open_clip.loss").SigLipLoss())
    return calls


class Encoders(nn.Module):
    """Two transformers of four layers over 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.1, batch_first=True) for _ in range(2)]
        self.towers = nn.ModuleList(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False) for layer in layers)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        z = [F.normalize(tower(x).mean(1), dim=1) for tower, x in zip(self.towers, (images, texts), strict=True)]
        return {"image_features": z[0], "text_features": z[1], "logit_scale": self.logit_scale.exp()}


def encoder_calls(batch: int, device: str) -> dict[str, Call]:
    """A training step of two encoders on ``batch`` pairs, up to the gradient."""
    torch.manual_seed(0)
    model, loss = Encoders().to(device), InfoNCE()
    inputs = [torch.randn(batch, 32, 256, device=device) for _ in range(2)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # no call pays for these

    def plain() -> None:
        value = loss(**model(*inputs))
        assert isinstance(value, Tensor)
        value.backward()  # type: ignore[no-untyped-call]

    def cached(chunk_size: int) -> Call:
        return lambda: GradCache(loss, chunk_size)(model, *inputs)

    return {"plain": plain, **{f"GradCache, chunks of {n}": cached(min(n, batch)) for n in CHUNKS}}


CASES = {"sigmoid": sigmoid_calls, "encoders": encoder_calls}


def bytes_of(kind: str, call: str, batch: int) -> int:
    """A lower bound of what a call needs, to leave out what cannot fit."""
    return 20 * batch**2 if kind == "sigmoid" and call in ("dense", "open_clip") else 0


def measured(kind: str, batch: int, call: str, device: str) -> dict[str, float]:
    """Peak of one call in this process, after a tiny one as a warm-up."""
    CASES[kind](8, device)[call]()
    return {"bytes": peak_extra_bytes(CASES[kind](batch, device)[call], device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="*", default=DEFAULT, help="sigmoid/B or encoders/B")
    parser.add_argument("--calls", nargs="*", help="only these calls of each case")
    parser.add_argument("--rst", help="also write the table to this RST file, which the documentation includes")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "BATCH", "CALL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, batch, call = args.one
        print(json.dumps(measured(kind, int(batch), call, args.device)))
        return
    rows = []
    for case in args.cases:
        kind, batch = case.split("/")[0], int(case.split("/")[1])
        for call in CASES[kind](8, args.device):
            if args.calls and call not in args.calls:
                continue
            name = f"{kind}, B {batch:,}" + (f", d {WIDTH}" if kind == "sigmoid" else "")
            if bytes_of(kind, call, batch) > 0.8 * free_bytes(args.device):
                rows.append([name, call, f"does not fit: more than {bytes_of(kind, call, batch) / 2**20:,.0f}"])
            else:
                result = in_new_process(
                    "benchmarks.speed.large_batches", "--device", args.device, "--one", kind, str(batch), call
                )
                rows.append([name, call, f"{result['bytes'] / 2**20:,.0f}"])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    if args.rst:
        Path(args.rst).write_text(csv_table(machine(args.device), HEADER, rows))


if __name__ == "__main__":
    main()
