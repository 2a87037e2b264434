"""InfoNCE as a module that gathers over processes."""

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, RankRows
from ..functional.info_nce import check_ids, check_pairs, check_repeats
from ..kernels.autograd import keep_in_graph
from ..kernels.info_nce import pair_nll_sum
from ..kernels.sizes import BlockLimit
from .misuse import digest, warn_of_equal_ranks, warn_of_lengths
from .module import BatchLoss


class InfoNCE(BatchLoss):
    r"""InfoNCE over the batch of all processes.

    .. math::
        \mathcal{L} = \tfrac{1}{2} \left[ \mathrm{CE}(s Z^I {Z^T}^\top, \mathrm{diag})
        + \mathrm{CE}(s Z^T {Z^I}^\top, \mathrm{diag}) \right]

    **Use it when:** you train a CLIP with the softmax loss, on one process or many.
    **Not when:** you want the loss of given rows alone (:func:`protoclip_losses.functional.info_nce`), or prototype terms too.
    **Related:** :class:`ProtoLoss`, open_clip's ``ClipLoss``, which takes the same arguments.

    When torch.distributed is initialised, features are gathered here, with gradients: the loss returned is this rank's share,
    the mean over ranks is the loss of the whole batch, and after DDP's averaging every gradient equals that of one process on
    the whole batch. Ranks may hold different numbers of rows. Each rank forms the logits of its own images with all texts, in
    blocks; ranks exchange the texts, their gradients and a few numbers for each. Gradients are computed together with the loss,
    for the sum over ranks: any factor applied to the loss afterwards must be the same on all of them. On one process it is
    :func:`protoclip_losses.functional.info_nce`.

    Args:
        repeats: what pairs with equal ``ids`` are to each other, over all ranks: ``"mask"`` no negatives, ``"share"`` positives
            of equal mass. None: there are no ids.
        process_group: None for the default group, ``False`` to stay local (evaluation on one rank), or a group.
        equal_batch_sizes: a promise that in each step all ranks have as many rows as each other. The first call compares sizes
            and settings; later ones exchange neither sizes nor verdicts, and never wait for the device. Bad input on one rank is
            then an error there alone, and the others wait for it until the group's timeout.
        gather_with_grad: False is what open_clip does without ``--gather-with-grad`` and ``--local-loss``, its default: a rank's
            loss is that of the whole batch with the features of other ranks as constants. On W ranks the gradient that reaches
            the encoders, after DDP's averaging, is 1/W of the true one; that of the scale is exact. For a run that has to
            follow one of open_clip with the same weight decay and clipping.
        chunk_size: rows worked on at a time; any value gives the same answer.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read values to check them each step. None means on CPU in eager mode only.

    Attributes:
        metrics: detached tensors of the last forward: ``contrastive_accuracy``, the share of this rank's images whose own text
            has the largest logit among all texts; a tie counts for the first of the tied texts alone.

    Example:
        >>> import torch
        >>> loss = InfoNCE()
        >>> loss(torch.eye(2), torch.eye(2), 1.0, output_dict=True)
        {'contrastive_loss': tensor(0.3133)}

    Source:
        https://arxiv.org/abs/2103.00020, figure 3; ProtoCLIP section III-A, https://arxiv.org/abs/2206.10996.
    """

    def __init__(
        self,
        *,
        repeats: str | None = None,
        process_group: Group | bool | None = None,
        equal_batch_sizes: bool = False,
        gather_with_grad: bool = True,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        check_values: bool | None = None,
    ) -> None:
        super().__init__(process_group, equal_batch_sizes, chunk_size, memory_budget, check_values)
        check_repeats(repeats)
        self.repeats, self.gather_with_grad = repeats, gather_with_grad
        self.metrics: dict[str, Tensor] = {}

    def extra_repr(self) -> str:
        return f"repeats={self.repeats!r}, gather_with_grad={self.gather_with_grad}, {super().extra_repr()}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Any = None,
        *,
        ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, a () tensor, or ``{"contrastive_loss": loss}``.

        Args:
            image_features: (B, d) this rank's rows, L2-normalised.
            text_features: (B, d) this rank's rows, L2-normalised.
            logit_scale: already exponentiated: a float, () or (1,).
            logit_bias: accepted, and given an exact zero gradient: a softmax does not depend on it.
            ids: (B,) int64 of captions that repeat (:func:`protoclip_losses.functional.caption_ids`); needs ``repeats``.
            output_dict: return a dict, as open_clip's losses do.
        """
        if isinstance(logit_bias, bool):  # the fourth argument was output_dict in 0.6
            check.warn_renamed("output_dict as the fourth positional argument of InfoNCE", "output_dict=...")
            logit_bias, output_dict = None, logit_bias

        def checked() -> Tensor:
            check_ids(ids, self.repeats, image_features)
            return check_pairs(image_features, text_features, logit_scale, self.check_values)

        scale, ranks = self._validate_rows(
            checked,
            num_rows(image_features),
            signature=lambda: {
                **collective_signature(image_features, text_features, scale=logit_scale),
                "gather_with_grad": self.gather_with_grad,
                "equal_batch_sizes": self.equal_batch_sizes,
                "repeats and ids": (self.repeats, ids is not None),
                **(own_gradients(image_features, text_features) if self.repeats == "share" else {}),
            },
            like=image_features,
            digest=None if self.was_called else lambda: digest(None, image_features),
            settings=(self.gather_with_grad, self.repeats),
        )
        if not self.was_called:
            self.was_called = True
            warn_of_equal_ranks(ranks)
            warn_of_lengths(image_features=image_features, text_features=text_features)
        settings = self.block_limit(), self.gather_with_grad, ids, self.repeats
        loss, self.metrics = info_nce_share(image_features, text_features, scale, ranks, *settings)
        loss = keep_in_graph(loss, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def num_rows(x: Any) -> int:
    """Rows of a tensor; 0 for what is no tensor with rows, which a check is about to refuse."""
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else 0


def collective_signature(*features: Tensor, scale: Any, bias: Any = None) -> dict[str, object]:
    """What must be equal on all ranks to gather features and their gradients."""
    wanted = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (*features, scale, bias))
    return {
        "width": [x.shape[1] for x in features],
        "dtype": [x.dtype for x in features],
        "device": [x.device.type for x in features],
        "requires_grad": wanted,
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
    }


def own_gradients(*features: Tensor) -> dict[str, object]:
    """What must be equal on all ranks where a gradient of each of these is exchanged in backward."""
    return {"requires_grad of each": [torch.is_grad_enabled() and x.requires_grad for x in features]}


def info_nce_share(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ranks: RankRows,
    limit: BlockLimit,
    gather_with_grad: bool = True,
    ids: Tensor | None = None,
    repeats: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share of InfoNCE over all ranks' rows, and its metrics. Inputs have been checked."""
    if not gather_with_grad:
        image, text = (x.detach().lerp(x, 1 / ranks.world_size) for x in (image, text))  # equal values, 1/W of the gradient
    total, correct = pair_nll_sum(image, text, scale, limit, with_accuracy=True, ids=ids, repeats=repeats, ranks=ranks)
    share = total * (ranks.world_size / ranks.total)
    return share, {"contrastive_accuracy": correct / image.shape[0]}
