"""How many operators a call launches on an accelerator, counted without one; the table of docs/performance.rst.

    python -m benchmarks.speed.operators          # needs a CUDA build of torch 2.10 or later, no GPU

Tensors say that they are on CUDA and hold nothing, as in ``tests/gpu``. Operators of forward are counted with the gradients that
it forms and with its checks; views are not, which launch nothing. To count those of another version, see ``losses.py``.
"""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import protoclip_losses
from protoclip_losses import Clustering, ProtoLoss, Prototypes, PrototypeTerm, functional

# The counter of the tests: a module path would find the ``tests`` package of another distribution, which some install.
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
fake = import_module("fake_cuda")

DTYPES = (torch.float32, torch.bfloat16)
Counted = Callable[[torch.dtype], object]


def scale() -> Tensor:
    return torch.empty((), device=fake.DEVICE).requires_grad_()


def term(dtype: torch.dtype, *, soft: bool) -> Tensor:
    """B 4,096, K 20,000, D 128."""
    targets = fake.rows(20000, 128, leaf=False) if soft else None
    h, prototypes = fake.rows(4096, 128, dtype), fake.rows(20000, 128, dtype, leaf=False)
    return functional.prototype_cross_entropy(h, prototypes, fake.labels(4096), scale(), targets=targets)


def pairs(dtype: torch.dtype, batch: int) -> Tensor:
    return functional.info_nce(fake.rows(batch, 512, dtype), fake.rows(batch, 512, dtype), scale())


def objective() -> ProtoLoss:
    """A loss with two internal and two external terms of 300 prototypes each."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        n, k, width = 600, 300, 64
        labels = torch.arange(n) % k
        clusterings = {name: Clustering(torch.randn(k, width), labels) for name in ("image", "text", "roberta")}

        def made(teacher: str) -> PrototypeTerm:
            return PrototypeTerm(torch.randn(k, width), torch.ones(k, dtype=torch.bool), clusterings[teacher])

        wanted = [("text", "image"), ("image", "text"), ("image", "roberta"), ("text", "roberta")]
        loss = ProtoLoss(target_temperature=0.3)
        loss.set_prototypes(Prototypes(torch.arange(n), {(student, teacher): made(teacher) for student, teacher in wanted}))
    return loss


def step(loss: ProtoLoss, dtype: torch.dtype) -> object:
    image, text, image_projected, text_projected = (fake.rows(512, 64, dtype) for _ in range(4))
    return loss(
        image,
        text,
        scale(),
        image_features_projected=image_projected,
        text_features_projected=text_projected,
        logit_scale_proto=scale(),
        index=fake.labels(512),
        output_dict=True,
    )


def count(call: Counted, dtype: torch.dtype, calls: int = 1) -> str:
    """Operators of the last of so many calls; why they cannot be counted where a version reads a value back."""
    try:
        for _ in range(calls):
            seen = fake.operators(lambda: call(dtype))
    except (RuntimeError, torch._subclasses.fake_tensor.UnsupportedFakeTensorException) as error:
        return f"reads back ({type(error).__name__})"
    return f"{seen.total:,}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not fake.CAN_PRETEND:
        raise SystemExit("this needs a CUDA build of torch 2.10 or later, a GPU it does not need")
    print(f"protoclip_losses {protoclip_losses.__version__}, torch {torch.__version__}\n| | float32 | bfloat16 |\n|---|---|---|")
    with fake.pretended():
        loss = objective()
        cases: dict[str, tuple[int, Counted]] = {
            "prototype term, hard, B 4,096, K 20,000, D 128": (1, lambda t: term(t, soft=False)),
            "prototype term, soft": (1, lambda t: term(t, soft=True)),
            "InfoNCE, B 512, d 512": (1, lambda t: pairs(t, 512)),
            "InfoNCE, B 32,768, d 512": (1, lambda t: pairs(t, 32768)),
            "ProtoLoss, two internal and two external terms, B 512, K 300": (2, lambda t: step(loss, t)),  # the first moves them
        }
        for name, (calls, call) in cases.items():
            print(f"| {name} | {' | '.join(count(call, dtype, calls) for dtype in DTYPES)} |", flush=True)


if __name__ == "__main__":
    main()
