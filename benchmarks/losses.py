"""The loss kernels against the dense expression, against open_clip, and against the floor: the bare matrix products.

    python benchmarks/losses.py                  # the table, about 6 minutes on 2 cores
    python benchmarks/losses.py --device cuda    # the same on a GPU, beside the Triton kernels that are installed
    python benchmarks/losses.py --csv out.csv    # rows for the figures of the documentation

Everything in a row is forward + backward with gradients for features and scale, timed A B C A B C in one process. The error is
that of the very call that is timed, against a float64 evaluation of the formula. Memory is the rise of the process's peak
during one call, each in a process of its own.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Call, in_new_process, interleaved, machine, peak_extra_bytes, ratio
from torch import Tensor

from protoclip_losses import PrototypeLoss, functional

SCALE = 1 / 0.07
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PrototypeCase:
    """B student features against K prototypes, hard or soft targets."""

    def __init__(self, kind: str, dtype: str, batch: int, columns: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        self.kind, self.device = kind, device
        make: Callable[..., Tensor] = lambda n: F.normalize(torch.randn(n, width, device=device), dim=1)  # noqa: E731
        self.prototypes, self.centroids = make(columns) * 0.9, make(columns)
        self.labels = torch.randint(columns, (batch,), device=device)
        self.features = F.normalize(self.prototypes[self.labels] + 0.15 * torch.randn(batch, width, device=device), dim=1)
        self.scale = torch.tensor(SCALE, device=device)
        self.low = DTYPES[dtype]
        self.targets = functional.soft_targets(self.centroids, self.prototypes, 0.1) if kind == "soft" else None
        self.module = PrototypeLoss(target_temperature=0.1)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.features.to(self.low).to(dtype).detach().clone().requires_grad_(),
            self.scale.to(torch.promote_types(dtype, torch.float32)).detach().clone().requires_grad_(),
            self.prototypes.to(self.low).to(dtype),
        )

    def ours(self) -> tuple[Tensor, Tensor, Tensor]:
        h, s, p = self.leaves(self.low)
        if self.kind == "module":
            loss = self.module(h, self.prototypes, self.centroids, self.labels, s)
        else:
            loss = functional.prototype_cross_entropy(h, p, self.labels, s, targets=self.targets)
        loss.backward()
        return loss.detach(), _grad(h), _grad(s)

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """As the public code has it: a B x K softmax of the teacher for soft targets, in every call."""
        h, s, p = self.leaves(dtype)
        logits = s.to(dtype) * h @ p.T
        if self.kind == "hard":
            loss = F.cross_entropy(logits, self.labels)
        else:
            centroids = self.centroids.to(dtype)
            loss = F.cross_entropy(logits, ((centroids[self.labels] @ centroids.T) / 0.1).softmax(1))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), _grad(h), _grad(s)

    def floor(self, rows: int) -> None:
        """The two products that forward and backward cannot do without, on blocks of ``rows`` rows."""
        h, _, p = self.leaves(self.low)
        h = h.detach()
        out, block = torch.empty_like(h), h.new_empty((rows, len(p)))
        for start in range(0, len(h), rows):
            torch.mm(h[start : start + rows], p.T, out=block[: len(h) - start])
            torch.mm(block[: len(h) - start], p, out=out[start : start + rows])


class PairCase:
    """B pairs of images and texts."""

    def __init__(self, batch: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        self.image = F.normalize(torch.randn(batch, width, device=device), dim=1)
        self.text = F.normalize(self.image + 0.1 * torch.randn(batch, width, device=device), dim=1)
        self.scale, self.device = torch.tensor(SCALE, device=device), device

    def _run(self, loss: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leaves = [x.to(dtype).detach().clone().requires_grad_() for x in (self.image, self.text, self.scale)]
        value = loss(*leaves)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach(), _grad(leaves[0]), _grad(leaves[1]), _grad(leaves[2])

    def ours(self) -> tuple[Tensor, ...]:
        return self._run(functional.info_nce)

    def streamed(self) -> tuple[Tensor, ...]:
        """As beyond the budget: nothing kept between the passes."""
        from protoclip_losses.functional import contrastive

        budget, contrastive.LOGITS_BUDGET = contrastive.LOGITS_BUDGET, 0
        try:
            return self._run(functional.info_nce)
        finally:
            contrastive.LOGITS_BUDGET = budget

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            own = torch.arange(len(image), device=image.device)
            return (F.cross_entropy(scale * image @ text.T, own) + F.cross_entropy(scale * text @ image.T, own)) / 2

        return self._run(loss, dtype)

    def open_clip(self) -> tuple[Tensor, ...]:
        from open_clip import ClipLoss

        return self._run(ClipLoss())

    def floor(self, products: int) -> None:
        """Three or four products of B x B x d, on blocks of rows."""
        rows = max(1, min(1024, 40 * 2**20 // (4 * len(self.image))))
        out, back = torch.empty_like(self.image), torch.zeros_like(self.text)
        block = self.image.new_empty((rows, len(self.image)))
        for start in range(0, len(self.image), rows):
            part, logits = self.image[start : start + rows], block[: len(self.image) - start]
            for _ in range(products - 2):
                torch.mm(part, self.text.T, out=logits)
            torch.mm(logits, self.text, out=out[start : start + rows])
            back.addmm_(logits.T, part)


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def error(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Largest difference in loss and gradients, each relative to the largest entry of the truth."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, truth, strict=True))


def make(case: str, device: str) -> PrototypeCase | PairCase:
    kind, *sizes = case.split("/")
    if kind == "pairs":
        return PairCase(int(sizes[0]), int(sizes[1]), device)
    return PrototypeCase(kind, sizes[0], int(sizes[1]), int(sizes[2]), int(sizes[3]), device)


def calls_of(case: PrototypeCase | PairCase) -> dict[str, Call]:
    """What is timed against what, by column."""
    if isinstance(case, PairCase):
        calls: dict[str, Call] = {"ours": case.ours, "streamed": case.streamed, "dense": case.dense}
        try:
            import open_clip  # noqa: F401

            calls["open_clip"] = case.open_clip
        except ImportError:
            pass
        return calls | {"floor3": lambda: case.floor(3), "floor4": lambda: case.floor(4)}
    from protoclip_losses.kernels.blocks import rows_per_block

    rows = rows_per_block(len(case.prototypes), case.low, None)
    floors: dict[str, Call] = {"floor": lambda: case.floor(rows), "floor64": lambda: case.floor(64)}
    return {"ours": case.ours, "dense": case.dense} | floors


CASES = (
    "soft/float32/4096/20000/128",
    "hard/float32/4096/20000/128",
    "soft/bfloat16/4096/20000/128",
    "hard/float32/256/512/128",
    "soft/float32/256/512/128",
    "module/float32/64/20000/128",
    "pairs/8192/512",
    "pairs/256/512",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=CASES, help="kind/dtype/B/K/D or pairs/B/d")
    parser.add_argument("--csv", help="also write every time and peak as a row of this file")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CALL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        case = make(args.memory_of[0], args.device)
        small = make("/".join([*args.memory_of[0].split("/")[:-2], "64", args.memory_of[0].split("/")[-1]]), args.device)
        calls_of(small)[args.memory_of[1]]()  # thread pools and lazy imports are not the call's memory
        print(json.dumps({"bytes": peak_extra_bytes(calls_of(case)[args.memory_of[1]], args.device)}))
        return
    print(machine(args.device))
    print("| case | call | median ms [min, max] | ours / it | peak extra MB | relative error |\n|---|---|---|---|---|---|")
    rows = []
    for name in args.cases:
        case = make(name, args.device)
        calls = calls_of(case)
        quick = "/256/" in name
        times = interleaved(calls, repeats=args.repeats * (40 if quick else 1), device=args.device)
        truth = case.dense(torch.float64)
        for call, ms in times.items():
            memory = "" if call.startswith("floor") else _memory(name, call, args.device)
            wrong = "" if call.startswith("floor") else f"{error(calls[call](), truth):.1e}"  # type: ignore[arg-type]
            median = f"{statistics.median(ms):.3g} [{min(ms):.3g}, {max(ms):.3g}]"
            print(f"| {name} | {call} | {median} | {ratio(times, 'ours', call)} | {memory} | {wrong} |", flush=True)
            rows.append([name, call, f"{statistics.median(ms):.4g}", memory, wrong, args.device])
        del case, calls, truth
    if "open_clip" not in {row[1] for row in rows}:
        print("open_clip is not installed here: its column is empty")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([["case", "call", "median_ms", "peak_extra_mb", "relative_error", "device"], *rows])


def _memory(case: str, call: str, device: str) -> str:
    result = in_new_process(__file__, "--device", device, "--memory-of", case, call)
    return f"{result['bytes'] / 2**20:.0f}"


if __name__ == "__main__":
    main()
