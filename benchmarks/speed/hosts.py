"""Time and memory of a training step with ProtoLoss, relative to the step without it in the same host.

    python -m benchmarks.speed.hosts --host own_loop       # or open_clip, transformers, lightning
    python -m benchmarks.speed.hosts --host open_clip --model ViT-B-32 --batch 32 --prototypes 2000

The calls run in one process in the order A B C D A B C D, with the same model and batch. A step is forward, loss, backward and
AdamW. "without": the host's own loss, no heads. "with": projection heads, and the prototype terms of an episode that is already
clustered. "online": prototypes from a queue, including their updates. "extraction": no step, only the forward pass into the
feature bank at the start of an episode. Memory is the increase of the process's peak during one call, with a new process for
each. open_clip's models are real ones; the other hosts use the small models of the examples, whose step is mostly the loss.
"""

import argparse
import copy
import json
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from protoclip_losses import EpisodicClusterer, FeatureBank, OnlinePrototypes, ProtoLoss

from .internals import fill_queue
from .measure import Call, in_new_process, interleaved, machine, peak_extra_bytes, ratio

CALLS = ("without", "with", "online", "extraction")
HOSTS = ("own_loop", "open_clip", "transformers", "lightning")


def build(host: str, model: str) -> tuple[Any, Any, Any, Any]:
    """(plain model, model with heads, function to the plain loss, function to the arguments of ProtoLoss)."""
    torch.manual_seed(0)
    if host == "open_clip":
        import open_clip

        from protoclip_losses.integrations.open_clip import add_heads

        plain = open_clip.create_model(model, output_dict=True)
        own = open_clip.ClipLoss()
        return plain, add_heads(copy.deepcopy(plain)), lambda m, b: own(**m(*b)), lambda m, b: m(*b)
    if host == "transformers":
        from host_transformers import small_model

        from protoclip_losses.integrations.transformers import add_heads as add

        small = small_model()
        return (
            small,
            add(copy.deepcopy(small)),
            lambda m, b: m(pixel_values=b[0], input_ids=b[1], return_loss=True).loss,
            # In eval mode forward returns what a CLIPModel always returns; the arguments of the loss come from `features`.
            lambda m, b: m(pixel_values=b[0], input_ids=b[1]) if m.training else m.features(pixel_values=b[0], input_ids=b[1]),
        )
    from protoclip_losses import InfoNCE

    forward: Any

    if host == "lightning":
        from host_lightning import Clip

        plain = Clip()
        forward = lambda m, b: m({"pixel_values": b[0], "input_ids": b[1]})  # noqa: E731
    else:
        from host_own_loop import Clip as Plain

        plain = Plain()
        forward = lambda m, b: m(*b)  # noqa: E731
    own, headed = InfoNCE(), copy.deepcopy(plain)
    plain.proto = _NoHeads()
    return plain, headed, lambda m, b: own(**forward(m, b)), forward


class _NoHeads(nn.Module):
    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {}


def steps(host: str, model: str, batch: int, prototypes: int, rows: int) -> dict[str, Call]:
    """The calls, by name."""
    plain, headed, plain_loss, arguments = build(host, model)
    side, length, words = 32, 12, 1000
    if host == "open_clip":
        size, length, words = plain.visual.image_size, 77, 49000
        side = size if isinstance(size, int) else size[0]
    data = torch.randn(batch, 3, side, side), torch.randint(1, words, (batch, length))
    headed.train(), plain.train()
    width = arguments(headed, data)["image_features_projected"].shape[1]
    h = [nn.functional.normalize(torch.randn(rows, width), dim=1) for _ in range(2)]
    bank = FeatureBank(torch.arange(rows), width)
    bank.update(bank.index, *h)
    proto = ProtoLoss()
    proto.set_prototypes(EpisodicClusterer(prototypes, niter=2).build(bank))
    queue = OnlinePrototypes(prototypes, rows, every=rows // batch, warmup=1)
    fill_queue(queue, *h)
    online = ProtoLoss()
    online.set_prototypes(queue)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5) for model in (plain, headed)]
    index = torch.arange(batch)

    def step(loss: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def extraction() -> None:
        headed.eval()
        out = arguments(headed, data)
        bank.update(index, out["image_features_projected"], out["text_features_projected"])
        headed.train()

    return {
        "without": lambda: step(plain_loss(plain, data), optimizers[0]),
        "with": lambda: step(proto(**arguments(headed, data), index=index), optimizers[1]),
        "online": lambda: step(online(**arguments(headed, data)), optimizers[1]),
        "extraction": extraction,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=HOSTS, required=True)
    parser.add_argument("--model", default="ViT-B-32", help="name of the open_clip model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=20_000, help="samples in the episode")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", choices=CALLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    calls = steps(args.host, args.model, args.batch, args.prototypes, args.rows)
    if args.memory_of:
        calls[args.memory_of]()  # warm-up: optimizer state and thread pools must not count
        print(json.dumps({"bytes": peak_extra_bytes(calls[args.memory_of])}))
        return
    print(machine("cpu"))
    times = interleaved(calls, repeats=args.repeats)
    sizes = ("--model", args.model, "--batch", args.batch, "--prototypes", args.prototypes, "--rows", args.rows)
    options = ["--host", args.host, *map(str, sizes)]
    for name, ms in times.items():
        memory = in_new_process("benchmarks.speed.hosts", *options, "--memory-of", name)["bytes"] / 2**20
        print(f"{args.host} {name}: median {statistics.median(ms):.0f} ms, {memory:.0f} MB")
    for name in CALLS[1:]:
        print(f"{args.host} {name} / without: {ratio(times, name, 'without')}")


if __name__ == "__main__":
    main()
