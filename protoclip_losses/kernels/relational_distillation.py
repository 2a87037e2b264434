"""The kernel of relational distillation: each row's softmax over the other rows, student's against teacher's, block by block.

With x_ij = s h_i.h_j, y_ij = t_i.t_j / tau, and q_ij, p_ij their softmax over j != i::

    loss = sum_ij p_ij (log p_ij - log q_ij)
    G = q - p,      d loss / d h = s (G h + G^T h),      d loss / d s = sum_ij G_ij h_i.h_j

One pass over blocks of rows gives the loss and its gradients.
"""

from typing import Any

import torch
from torch import Tensor

from .._dtypes import sum_dtype, without_autocast
from .autograd import keep_in_graph, recomputed_blocks, run
from .blocks import LogitBlocks, product_dtype
from .sizes import BlockLimit, rows_per_block

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
BUFFERS, COPIES = 3, 2  # blocks of logits that are in use at once, and how often as much is held with masks and roundings


def relation_kl(
    features: Tensor,
    teacher: Tensor,
    scale: Tensor,
    known: Tensor,
    first: int,
    rows: int,
    temperature: float,
    chunk: int,
    with_gradient: bool,
) -> Result:
    """Sum over rows [first, first + rows) of the divergence, and its gradients with respect to features and scale.

    Features (N, D), unit rows of the teacher (N, D_E) in the dtype of the scale. Rows that are not ``known`` (N,) take no part;
    at least two are known. The second output and the teacher's gradient are empty: :class:`Precomputed` expects them.
    """
    total, grad_scale = (
        scale.new_zeros((), dtype=sum_dtype(scale.device)) for _ in range(2)
    )  # float32 would lose digits block by block
    grad = scale.new_zeros((features.shape[0] if with_gradient else 0, features.shape[1]))
    with without_autocast(features.device.type):
        logit_blocks = LogitBlocks(features, scale, min(chunk, rows))
        for start in range(first, first + rows, chunk):
            block = slice(start, min(start + chunk, first + rows))
            h, row_known = features[block], known[block, None]
            x, y = logit_blocks(h), torch.mm(teacher[block] / temperature, teacher.T)
            left_out = _left_out(known, block)
            log_q, p = log_softmax_(x, left_out), log_softmax_(y, left_out).exp()
            total += y.sub_(log_q).masked_fill_(left_out, 0).mul_(p).mul_(row_known).sum()
            if with_gradient:
                residual = logit_blocks.rounded(log_q.exp_().sub_(p).mul_(row_known))
                direction = torch.mm(residual, features).to(scale.dtype)
                grad_scale += (direction * h).sum()
                grad[block] += direction * scale
                grad += torch.mm(residual.T, h).to(scale.dtype) * scale
    unused = scale.new_zeros(()), scale.new_empty((0, teacher.shape[1]))
    return total.to(scale.dtype), unused[0], grad, unused[1], grad_scale.to(scale.dtype)


def _left_out(known: Tensor, block: slice) -> Tensor:
    """Pairs (b, N) that take no part: of a row with itself, or with one that is not known."""
    left_out = (~known).repeat(block.stop - block.start, 1)
    left_out.diagonal(block.start).fill_(True)
    return left_out


def log_softmax_(logits: Tensor, left_out: Tensor) -> Tensor:
    """Log-softmax over the columns that are not left out, in place."""
    return torch.log_softmax(logits.masked_fill_(left_out, -torch.inf), 1, out=logits)


relation_kl_operator = torch.library.custom_op(
    "protoclip_losses::relation_kl",
    relation_kl,
    mutates_args=(),
    schema="(Tensor features, Tensor teacher, Tensor scale, Tensor known, SymInt first, SymInt rows, float temperature, "
    "SymInt chunk, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@relation_kl_operator.register_fake
def _fake(features: Tensor, teacher: Tensor, scale: Tensor, *rest: Any) -> Result:
    with_gradient = rest[-1]
    return (
        scale.new_empty(()),
        scale.new_empty(()),
        scale.new_empty((features.shape[0] if with_gradient else 0, features.shape[1])),
        scale.new_empty((0, teacher.shape[1])),
        scale.new_empty(()),
    )


def relation_kl_sum(
    features: Tensor,
    teacher: Tensor,
    scale: Tensor,
    known: Tensor,
    own: slice,
    temperature: float,
    limit: BlockLimit,
) -> Tensor:
    """Sum over the known rows in ``own`` of the divergence from all rows, differentiable; 0 if fewer than two are known."""
    if features.shape[0] < 2:
        return keep_in_graph(scale.new_zeros(()), features, scale)
    features = features.to(product_dtype(features))
    # Where nothing is known, logits would be NaN: all rows take part then, and count nothing.
    enough = known.sum() > 1
    wanted = torch.is_grad_enabled() and (features.requires_grad or scale.requires_grad)
    chunk = rows_per_block(BUFFERS * features.shape[0], features.dtype, features.device, limit, COPIES)
    rows = own.stop - own.start
    inputs = features, teacher, scale, known | ~enough, own.start, rows, temperature, chunk, wanted
    total, _ = run("relational_distillation", relation_kl, relation_kl_operator, *inputs)
    return total.where(enough, 0)


def relation_kl_rows(
    features: Tensor, teacher: Tensor, scale: Tensor, known: Tensor, temperature: float, limit: BlockLimit
) -> Tensor:
    """Each row's divergence, (B,), 0 for rows that are not known, by blocks of a dense expression that backward runs again."""
    if features.shape[0] < 2:
        return keep_in_graph(scale.new_zeros(features.shape[0]), features, scale)
    features, known = features.to(product_dtype(features)), known & (known.sum() > 1)

    def rows(block: slice) -> Tensor:
        left_out = _left_out(known | ~known.any(), block)
        with torch.autocast(features.device.type, enabled=False):
            x = (features[block] @ features.T).to(scale.dtype) * scale
            y = teacher[block] @ teacher.T / temperature
        log_q, log_p = (z.masked_fill(left_out, -torch.inf).log_softmax(1) for z in (x, y))
        kl = (log_p.exp() * (log_p - log_q).masked_fill(left_out, 0)).sum(1)
        return kl.where(known[block], 0)

    chunk = rows_per_block(BUFFERS * features.shape[0], features.dtype, features.device, limit, COPIES)
    return recomputed_blocks(rows, features.shape[0], chunk)
