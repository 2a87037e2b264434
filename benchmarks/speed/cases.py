"""The cases that `losses.py` measures: one class per operation, with our call, other implementations, and a lower bound."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_losses import PrototypeLoss, functional

from .internals import rows_per_block, without_logits_budget
from .measure import Call

SCALE = 1 / 0.07
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Results = tuple[Tensor, ...]


class Case:
    """One operation at one size."""

    def calls(self) -> dict[str, Call]:
        """Our call first, then other implementations, then lower bounds (named floor...)."""
        raise NotImplementedError

    def truth(self) -> Results | None:
        """Loss and gradients in float64, or None where that would not fit in memory."""
        return None

    def bytes_of(self, call: str) -> int:
        """Estimated memory of a call that materialises its whole matrix, and 0 for the others."""
        return 0


class PrototypeCase(Case):
    """B student features against K prototypes, with hard or soft targets; "module" is PrototypeLoss on centroids.

    "mixture" has hard targets and eight labels a row, beside the same call with the first of them.
    """

    def __init__(self, kind: str, dtype: str, batch: int, columns: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        self.kind, self.device = kind, device
        self.prototypes, self.centroids = _unit(columns, width, device) * 0.9, _unit(columns, width, device)
        self.labels = torch.randint(columns, (batch,), device=device)
        self.features = F.normalize(self.prototypes[self.labels] + 0.15 * torch.randn(batch, width, device=device), dim=1)
        self.scale = torch.tensor(SCALE, device=device)
        self.dtype = DTYPES[dtype]
        self.targets = functional.soft_targets(self.centroids, self.prototypes, 0.1) if kind == "soft" else None
        self.module = PrototypeLoss(target_temperature=0.1)
        if kind == "mixture":
            self.labels = torch.cat([self.labels[:, None], torch.randint(columns, (batch, 7), device=device)], dim=1)

    def calls(self) -> dict[str, Call]:
        rows = rows_per_block(len(self.prototypes), self.dtype, self.prototypes.device)
        calls: dict[str, Call] = {"ours": self.ours, "compiled": self.compiled, "dense": self.dense}
        if self.kind == "mixture":
            calls["floor one label"] = lambda: self.ours(self.labels[:, 0])
        calls |= self.torch_calls()
        if self.device == "cuda":
            calls |= self.triton_calls()
        floors = {"floor": lambda: self.floor(rows), "floor+softmax": lambda: self.floor(rows, softmax=True)}
        return calls | floors | {"floor64": lambda: self.floor(64)}

    def truth(self) -> Results:
        return self.dense(torch.float64)

    def bytes_of(self, call: str) -> int:
        return 0 if call != "dense" else 16 * len(self.features) * len(self.prototypes)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.features.to(self.dtype).to(dtype).detach().clone().requires_grad_(),
            self.scale.to(torch.promote_types(dtype, torch.float32)).detach().clone().requires_grad_(),
            self.prototypes.to(self.dtype).to(dtype),
        )

    def loss(self, h: Tensor, s: Tensor, p: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.kind == "module":
            return self.module(h, self.prototypes, self.centroids, self.labels, s)  # type: ignore[no-any-return]
        return functional.prototype_cross_entropy(h, p, self.labels if labels is None else labels, s, targets=self.targets)

    def ours(self, labels: Tensor | None = None) -> Results:
        h, s, p = self.leaves(self.dtype)
        return _backward(self.loss(h, s, p, labels), h, s)

    def compiled(self) -> Results:
        if not hasattr(self, "_compiled"):
            self._compiled = torch.compile(self.loss, fullgraph=True)
        h, s, p = self.leaves(self.dtype)
        return _backward(self._compiled(h, s, p), h, s)

    def dense(self, dtype: torch.dtype = torch.float32) -> Results:
        """As ProtoCLIP's published code does it: for soft targets, a B x K softmax of the teacher in every call."""
        h, s, p = self.leaves(dtype)
        logits = s.to(dtype) * h @ p.T
        if self.kind == "hard":
            return _backward(F.cross_entropy(logits, self.labels), h, s)
        if self.kind == "mixture":
            return _backward(-logits.log_softmax(1).gather(1, self.labels).mean(), h, s)
        centroids = self.centroids.to(dtype)
        return _backward(F.cross_entropy(logits, ((centroids[self.labels] @ centroids.T) / 0.1).softmax(1)), h, s)

    def floor(self, rows: int, softmax: bool = False) -> None:
        """The two matrix products that forward and backward need at least, on blocks of ``rows`` rows; with a softmax of each."""
        h, _, p = self.leaves(self.dtype)
        h = h.detach()
        out, block = torch.empty_like(h), h.new_empty((rows, len(p)))
        for start in range(0, len(h), rows):
            logits = torch.mm(h[start : start + rows], p.T, out=block[: len(h) - start])
            if softmax:
                torch.softmax(logits, 1, out=logits)
            torch.mm(logits, p, out=out[start : start + rows])

    def torch_calls(self) -> dict[str, Call]:
        """torch's own chunked cross-entropy (2.13 and later, hard labels), with its defaults and with chunks of 256 rows."""
        if self.kind != "hard" or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return {}
        options = torch.nn.LinearCrossEntropyOptions
        chunks = {"torch": options(), "torch, 256 rows": options(batch_chunk_size=256, chunking_method=None)}

        def run(chunk: object) -> Results:
            return self._scaled(lambda x, p: F.linear_cross_entropy(x, p, self.labels, options=chunk))  # type: ignore[arg-type]

        return {name: partial(run, chunk) for name, chunk in chunks.items()}

    def triton_calls(self) -> dict[str, Call]:
        """Those fused linear cross-entropies (hard labels) that are installed. The scale is multiplied into h for them."""
        calls: dict[str, Call] = {}
        if self.kind == "hard" and installed("cut_cross_entropy"):
            cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
            calls["cut-cross-entropy"] = lambda: self._scaled(lambda x, p: cce(x, p, self.labels))
        if self.kind == "hard" and installed("liger_kernel"):
            liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
            calls["liger-kernel"] = lambda: self._scaled(lambda x, p: liger(p, x, self.labels))
        return calls

    def _scaled(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Results:
        h, s, p = self.leaves(self.dtype)
        return _backward(loss((h * s).to(h.dtype), p), h, s)


class PairCase(Case):
    """B pairs of images and texts."""

    def __init__(self, batch: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        self.image = _unit(batch, width, device)
        self.text = F.normalize(self.image + 0.1 * torch.randn(batch, width, device=device), dim=1)
        self.scale, self.device = torch.tensor(SCALE, device=device), device

    def calls(self) -> dict[str, Call]:
        calls: dict[str, Call] = {"ours": self.ours, "streamed": self.streamed, "dense": self.dense}
        if installed("open_clip"):
            peer = importlib.import_module("open_clip").ClipLoss()
            calls["open_clip"] = lambda: self._run(peer)
        if self.device == "cuda" and installed("inf_cl"):
            inf = importlib.import_module("inf_cl").cal_flash_loss
            calls["inf-cl"] = lambda: self._run(lambda i, t, s: (inf(i, t, scale=s).mean() + inf(t, i, scale=s).mean()) / 2)
        return calls | {"floor3": lambda: self.floor(3), "floor4": lambda: self.floor(4)}

    def truth(self) -> Results | None:
        return self.dense(torch.float64) if len(self.image) <= 16384 else None

    def bytes_of(self, call: str) -> int:
        return 16 * len(self.image) ** 2 if call in ("dense", "open_clip") else 0

    def _run(self, loss: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Results:
        leaves = [x.to(dtype).detach().clone().requires_grad_() for x in (self.image, self.text, self.scale)]
        return _backward(loss(*leaves), *leaves)

    def ours(self) -> Results:
        return self._run(functional.info_nce)

    def streamed(self) -> Results:
        """As for batches beyond the memory budget: no logits are kept between the two passes."""
        with without_logits_budget():
            return self._run(functional.info_nce)

    def dense(self, dtype: torch.dtype = torch.float32) -> Results:
        def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            own = torch.arange(len(image), device=image.device)
            return (F.cross_entropy(scale * image @ text.T, own) + F.cross_entropy(scale * text @ image.T, own)) / 2

        return self._run(loss, dtype)

    def floor(self, products: int) -> None:
        """Three or four matrix products of B x B x d, on blocks of rows."""
        rows = rows_per_block(len(self.image), torch.float32, self.image.device)
        out, back = torch.empty_like(self.image), torch.zeros_like(self.text)
        block = self.image.new_empty((rows, len(self.image)))
        for start in range(0, len(self.image), rows):
            part, logits = self.image[start : start + rows], block[: len(self.image) - start]
            for _ in range(products - 2):
                torch.mm(part, self.text.T, out=logits)
            torch.mm(logits, self.text, out=out[start : start + rows])
            back.addmm_(logits.T, part)


class BackTranslationCase(Case):
    """Means of N features in K clusters."""

    def __init__(self, samples: int, columns: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        self.features, self.columns = _unit(samples, width, device), columns
        self.labels = torch.randint(columns, (samples,), device=device)

    def calls(self) -> dict[str, Call]:
        return {"ours": self.ours, "loop": self.loop, "floor": self.features.sum}

    def truth(self) -> Results:
        sums = torch.zeros(self.columns, self.features.shape[1], dtype=torch.float64, device=self.features.device)
        sums.index_add_(0, self.labels, self.features.double())
        return (sums / torch.bincount(self.labels, minlength=self.columns).clamp(min=1)[:, None],)

    def ours(self) -> Results:
        return (functional.back_translate(self.labels, self.features, self.columns)[0],)

    def loop(self) -> Results:
        out = self.features.new_zeros((self.columns, self.features.shape[1]))
        for k in range(self.columns):
            members = self.features[self.labels == k]
            if len(members):
                out[k] = members.mean(0)
        return (out,)


class TargetsCase(Case):
    """Soft targets of K prototypes, once per episode."""

    def __init__(self, columns: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        self.prototypes, self.centroids = _unit(columns, width, device), _unit(columns, width, device)

    def calls(self) -> dict[str, Call]:
        return {"ours": self.ours, "dense": self.dense, "floor": self.floor}

    def truth(self) -> Results | None:
        return self.dense(torch.float64) if len(self.prototypes) <= 8192 else None

    def bytes_of(self, call: str) -> int:
        return 12 * len(self.prototypes) ** 2 if call == "dense" else 0

    def ours(self) -> Results:
        return (functional.soft_targets(self.centroids, self.prototypes, 0.1),)

    def dense(self, dtype: torch.dtype = torch.float32) -> Results:
        centroids = self.centroids.to(dtype)
        return ((centroids @ centroids.T / 0.1).softmax(1) @ self.prototypes.to(dtype),)

    def floor(self) -> None:
        rows = rows_per_block(len(self.prototypes), torch.float32, self.prototypes.device)
        for start in range(0, len(self.prototypes), rows):
            torch.mm(torch.mm(self.centroids[start : start + rows], self.centroids.T), self.prototypes)


def make(name: str, device: str) -> Case:
    """The case with a name such as soft/float32/4096/20000/128, pairs/8192/512, pbt/200000/20000/128 or targets/50000/128."""
    kind, *rest = name.split("/")
    if kind == "pairs":
        return PairCase(int(rest[0]), int(rest[1]), device)
    if kind == "pbt":
        return BackTranslationCase(int(rest[0]), int(rest[1]), int(rest[2]), device)
    if kind == "targets":
        return TargetsCase(int(rest[0]), int(rest[1]), device)
    return PrototypeCase(kind, rest[0], int(rest[1]), int(rest[2]), int(rest[3]), device)


def _unit(rows: int, width: int, device: str) -> Tensor:
    return F.normalize(torch.randn(rows, width, device=device), dim=1)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _backward(loss: Tensor, *leaves: Tensor) -> Results:
    loss.backward()  # type: ignore[no-untyped-call]
    return (loss.detach(), *(x.grad for x in leaves if x.grad is not None))
