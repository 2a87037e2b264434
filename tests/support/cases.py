"""Inputs that the tests of the losses share, and how close each dtype has to come to the truth."""

from dataclasses import dataclass, replace

import dense
import torch

from protoclip_losses import Clustering, Prototypes, PrototypeTerm
from protoclip_losses.kernels.sizes import SIZES

# Relative to the norm of a float64 evaluation of the same inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def set_sizes(patch, **changes):
    """Other sizes of blocks on every device, for as long as this patch lasts."""
    for kind, sizes in SIZES.items():
        patch.setitem(SIZES, kind, replace(sizes, **changes))


def unit(rows, width, seed=0, dtype=torch.float64):
    """Rows on the unit sphere."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


def integers(high, size, seed=0):
    return torch.randint(high, (size,), generator=torch.Generator().manual_seed(seed))


def leaf(x):
    """A fresh leaf that requires gradient."""
    return x.detach().clone().requires_grad_()


def relative_error(got, want):
    """Norm of the difference over the norm of the truth; absolute where the truth is zero."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    size = float(want.norm())
    return float((got - want).norm()) / (size if size > 0 else 1.0)


def assert_near(got, want, tolerance=None):
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    error = relative_error(got, want)
    assert error <= tolerance, f"relative error {error:.3e} > {tolerance:.1e}"


def value_and_gradients(function, *inputs):
    """``function`` of fresh leaves, and its gradients; None where an input got none."""
    leaves = [leaf(x) for x in inputs]
    value = function(*leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves]


def assert_same(function, twin, *inputs, tolerance=None):
    """Value and every gradient of ``function`` agree with those of its dense twin."""
    value, gradients = value_and_gradients(function, *inputs)
    truth, true_gradients = value_and_gradients(twin, *(x.double() for x in inputs))
    assert value.shape == ()
    assert_near(value, truth, tolerance)
    for x, got, want in zip(inputs, gradients, true_gradients, strict=True):
        assert got.dtype == x.dtype
        assert_near(got, want, tolerance)


@dataclass
class Term:
    """What one prototype term is computed from."""

    h: torch.Tensor
    P: torch.Tensor
    C: torch.Tensor
    a: torch.Tensor
    s: torch.Tensor
    valid: torch.Tensor

    def to(self, dtype):
        return replace(self, h=self.h.to(dtype), P=self.P.to(dtype), C=self.C.to(dtype))


def term(batch=13, prototypes=7, width=5, teacher_width=4, scale=10.0, empty=(), seed=0):
    """A term with prototypes of unequal norm; labels name no empty cluster."""
    valid = torch.ones(prototypes, dtype=torch.bool)
    valid[list(empty)] = False
    return Term(
        h=unit(batch, width, seed),
        P=unit(prototypes, width, seed + 1) * torch.linspace(0.5, 1.0, prototypes, dtype=torch.float64)[:, None],
        C=unit(prototypes, teacher_width, seed + 2),
        a=valid.nonzero()[:, 0][integers(int(valid.sum()), batch, seed + 3)],
        s=torch.tensor(scale, dtype=torch.float64),
        valid=valid,
    )


def make_term(prototypes, teacher_centroids, labels, valid):
    """A (student, teacher) term by its four tensors."""
    return PrototypeTerm(prototypes, valid, Clustering(teacher_centroids, labels))


def episode(modalities=("image", "text"), teachers=(), samples=40, prototypes=6, width=5, teacher_width=9, empty=(), seed=0):
    """An episode's prototypes, by hand: random clusterings, centroids that are the means of their members."""
    valid = torch.ones(prototypes, dtype=torch.bool)
    valid[list(empty)] = False
    features = {name: unit(samples, width, seed + i) for i, name in enumerate(modalities)}
    sources = features | {name: unit(samples, teacher_width, seed + 50 + i) for i, name in enumerate(teachers)}
    terms = {}
    for i, (teacher, source) in enumerate(sources.items()):
        labels = valid.nonzero()[:, 0][integers(int(valid.sum()), samples, seed + 100 + i)]
        centroids, counts = dense.back_translate(labels, source, prototypes)
        for student in modalities:
            if student != teacher:
                own, _ = dense.back_translate(labels, features[student], prototypes)
                terms[student, teacher] = make_term(own, centroids, labels, counts > 0)
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(seed + 200))[:samples]
    return Prototypes(index, terms)
