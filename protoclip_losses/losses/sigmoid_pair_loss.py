"""The sigmoid loss as a module that gathers over processes."""

from torch import Tensor

from .. import _checks as check
from ..distributed import Group, RankRows
from ..functional.info_nce import check_pairs
from ..kernels.sigmoid_pair_loss import sigmoid_pair_sum
from ..kernels.sizes import BlockLimit
from .info_nce import collective_signature, num_rows
from .misuse import digest, warn_of_equal_ranks, warn_of_lengths
from .module import BatchLoss


class SigmoidPairLoss(BatchLoss):
    r"""SigLIP's loss over the batch of all processes.

    .. math::
        \mathcal{L} = -\frac{1}{B} \sum_{i,j} \log \sigma\bigl(z_{ij} (s\, x_i \cdot y_j + b)\bigr),
        \qquad z_{ij} = 1 \text{ if } i = j \text{, else } -1

    **Use it when:** you train a model with a logit bias, such as SigLIP, on one process or many.
    **Not when:** you want the loss of given rows alone (:func:`protoclip_losses.functional.sigmoid_pair_loss`), or prototype
    terms too (``ProtoLoss(pair_loss="sigmoid")``).
    **Related:** :class:`InfoNCE`; :class:`ProtoLoss`; open_clip's ``SigLipLoss``, which takes the same arguments.

    When torch.distributed is initialised, the texts are gathered here, with gradients: the loss returned is this rank's share,
    the mean over ranks is the loss of the whole batch, and after DDP's averaging every gradient equals that of one process on
    the whole batch. Ranks may hold different numbers of rows. Each rank forms the logits of its own images with all texts, in
    blocks; ranks exchange the texts and their gradients. Gradients are computed together with the loss, for the sum over ranks:
    any factor applied to the loss afterwards must be the same on all of them. On one process it is
    :func:`protoclip_losses.functional.sigmoid_pair_loss`.

    Args:
        process_group: None for the default group, ``False`` to stay local (evaluation on one rank), or a group.
        equal_batch_sizes: a promise that saves the exchange of each step, see :class:`InfoNCE`.
        chunk_size: rows worked on at a time; any value gives the same answer.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read values to check them each step. None means on CPU in eager mode only.

    Attributes:
        metrics: detached tensors of the last forward: ``contrastive_accuracy``, the share of this rank's images whose own text
            has the largest logit among all texts; a tie counts for the first of the tied texts alone.

    Example:
        >>> import torch
        >>> loss = SigmoidPairLoss()
        >>> loss(torch.eye(2), torch.eye(2), 10.0, -5.0, output_dict=True)
        {'contrastive_loss': tensor(0.0134)}

    Source:
        Zhai et al., SigLIP, https://arxiv.org/abs/2303.15343, section 3.2.
    """

    def __init__(
        self,
        *,
        process_group: Group | bool | None = None,
        equal_batch_sizes: bool = False,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        check_values: bool | None = None,
    ) -> None:
        super().__init__(process_group, equal_batch_sizes, chunk_size, memory_budget, check_values)
        self.metrics: dict[str, Tensor] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        *,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, a () tensor, or ``{"contrastive_loss": loss}``.

        Args:
            image_features: (B, d) this rank's rows, L2-normalised.
            text_features: (B, d) this rank's rows, L2-normalised.
            logit_scale: already exponentiated: a float, () or (1,).
            logit_bias: a float, () or (1,).
            output_dict: return a dict, as open_clip's losses do.
        """

        def checked() -> "tuple[Tensor, Tensor]":  # torch 2.4 traces no types
            scale = check_pairs(image_features, text_features, logit_scale, self.check_values)
            return scale, check.bias("logit_bias", logit_bias, image_features, self.check_values)

        (scale, bias), ranks = self._validate_rows(
            checked,
            num_rows(image_features),
            signature=lambda: {
                **collective_signature(image_features, text_features, scale=logit_scale, bias=logit_bias),
                "equal_batch_sizes": self.equal_batch_sizes,
            },
            like=image_features,
            digest=None if self.was_called else lambda: digest(None, image_features),
        )
        if not self.was_called:
            self.was_called = True
            warn_of_equal_ranks(ranks)
            warn_of_lengths(image_features=image_features, text_features=text_features)
        loss, self.metrics = sigmoid_pair_share(image_features, text_features, scale, bias, ranks, self.block_limit())
        return {"contrastive_loss": loss} if output_dict else loss


def sigmoid_pair_share(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ranks: RankRows, limit: BlockLimit
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share of the sigmoid loss over all ranks' rows, and its metrics. Inputs have been checked."""
    total, correct = sigmoid_pair_sum(image, text, scale, bias, limit, with_accuracy=True, ranks=ranks)
    return total * ranks.world_size / ranks.total, {"contrastive_accuracy": correct / image.shape[0]}
