"""The loss of a large batch whose encoders run on a chunk at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import without_any_autocast
from .replay import Buffers, RandomState, devices_of
from .row_chunks import CachedOutputs, Chunk, chunks_of, mapped


class GradCache:
    r"""The gradient of one large batch, in the memory of a small one.

    **Use it when:** the batch that the loss should see does not fit in memory, because of the encoders' activations.
    **Not when:** it fits: each encoder runs twice here, which is about a third more work. Plain gradient accumulation is no
    substitute: its small batches have few negatives.
    **Related:** :class:`InfoNCE`, :class:`SigmoidPairLoss` and :class:`ProtoLoss`, whose own memory is linear in the batch.

    A call has three steps. Features of all chunks are computed without a graph. The loss is computed on all features at once,
    and differentiated with respect to them alone. Then each chunk runs again, with a graph, and the gradient of its features is
    propagated into the parameters:

    .. math::
        \frac{\partial \mathcal{L}}{\partial \theta} = \sum_c \frac{\partial \mathcal{L}}{\partial f_c}
        \frac{\partial f_c}{\partial \theta}

    so the gradient is that of the large batch, up to rounding.

    **Who does what.** The call runs ``backward()``: when it returns, gradients have been added to ``.grad`` of every parameter,
    also of the logit scale and bias, and the loss that it returns is detached. ``zero_grad()``, clipping and ``step()`` are
    yours. Under ``torch.no_grad()`` nothing is differentiated: the loss of a large batch for evaluation.

    **What runs again is the same.** The second run of a chunk starts from the random state and the buffers that the first one
    started from, so it drops the same units; the random state is torch's, of the CPU and of the devices of inputs and
    parameters. Both runs, and the loss, are under the caller's autocast. Each buffer changes once for each chunk. BatchNorm
    normalises by the statistics of a chunk, as in training on small batches, so with it the gradient depends on ``chunk_size``.
    Forward hooks run twice.

    **Processes.** Pass the DDP module itself as the model: gradients are averaged once, in the last chunk, under
    ``model.no_sync()`` before it. Ranks may hold different numbers of rows, and of chunks. The losses of this package gather
    features over ranks by themselves. Where a forward communicates (FSDP, SyncBatchNorm), each rank needs the same number of
    chunks.

    Args:
        loss: called with what the model returns, and with the keywords of the call: :class:`InfoNCE`,
            :class:`SigmoidPairLoss`, :class:`ProtoLoss`, or any function of features. It returns a tensor, or a mapping of
            tensors whose sum is differentiated.
        chunk_size: rows of the batch that the model runs on at a time; the last chunk may have fewer.
        scaler: of float16 training: ``scaler.scale(loss)`` is differentiated, and the loss is returned as it is. Then call
            ``scaler.step(optimizer)`` and ``scaler.update()`` as usual.

    Example:
        >>> import torch
        >>> from protoclip_losses import InfoNCE
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        ...         self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        ...
        ...     def forward(self, images, texts):
        ...         features = self.image(images), self.text(texts)
        ...         image, text = (torch.nn.functional.normalize(x, dim=1) for x in features)
        ...         return {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}
        >>> model = Model()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> cached = GradCache(InfoNCE(), chunk_size=16)
        >>> loss = cached(model, torch.randn(64, 8), torch.randn(64, 6))  # the negatives are 63, not 15
        >>> optimizer.step()
        >>> loss.requires_grad, model.logit_scale.grad is not None
        (False, True)

    Source:
        Gao et al., https://arxiv.org/abs/2101.06983.
    """

    def __init__(self, loss: Callable[..., Any], chunk_size: int, *, scaler: Any = None) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a module or a function of features, got {type(loss).__name__}")
        if scaler is not None and not hasattr(scaler, "scale"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
        self.loss, self.chunk_size, self.scaler = loss, check.positive_int("chunk_size", chunk_size), scaler

    def __repr__(self) -> str:
        return f"GradCache({type(self.loss).__name__}, chunk_size={self.chunk_size}, scaler={self.scaler})"

    def __call__(self, model: Callable[..., Any], *inputs: Any, **loss_arguments: Any) -> Any:
        """Return the loss of the whole batch, detached; its gradient is in the parameters.

        Args:
            model: returns the loss's arguments: a mapping by name, such as ``{"image_features", "text_features",
                "logit_scale"}``, or a tuple in the loss's order, or one tensor. An output of two or more dimensions has a row
                for each row of the chunk; a number, or a tensor of shape () or (1,), is the same for every chunk.
            *inputs: of the model, split by rows: tensors and lists. A mapping, such as a tokenizer's output, is split by its
                values and passed as keywords. What has no rows (None, numbers, strings, 0-d tensors) is passed whole.
            **loss_arguments: further arguments of the loss, of the whole batch: ``index``, ``ids``, ``teacher_features``,
                ``output_dict``.

        Raises:
            ValueError: inputs of different numbers of rows; an output whose rows are not those of the chunk, or that should be
                the same for every chunk and is not.
            TypeError: no input with rows, or outputs of another kind.
        """
        chunks = chunks_of(inputs, self.chunk_size)
        if not torch.is_grad_enabled():
            return self._loss(CachedOutputs([chunk.run(model) for chunk in chunks], chunks).whole, loss_arguments)
        # Ranks with one chunk and ranks with several have to communicate in the same order.
        if len(chunks) == 1 and not hasattr(model, "no_sync"):
            return self._backward(self._loss(chunks[0].run(model), loss_arguments))
        return self._in_two_passes(model, chunks, loss_arguments)

    def _in_two_passes(self, model: Callable[..., Any], chunks: Sequence[Chunk], loss_arguments: Mapping[str, Any]) -> Any:
        buffers, devices, states, outputs = Buffers(model), devices_of(model, chunks), [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(RandomState(devices))
                outputs.append(chunk.run(model))
        cached = CachedOutputs(outputs, chunks)
        del outputs
        result = self._backward(self._loss(cached.whole, loss_arguments))
        buffers.restore(model)
        for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            is_last = number == len(chunks) - 1
            with nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync():
                torch.clear_autocast_cache()  # torch 2.4's holds weights that were cast without a graph
                with state.replayed():
                    output = chunk.run(model)
                # The shared outputs, such as scales, are differentiated once.
                tensors, gradients = cached.gradients(output, number, with_shared=is_last)
                if is_last and not tensors:
                    raise RuntimeError(
                        "model must return tensors that require gradients, got none: use torch.no_grad() to evaluate"
                    )
                with without_any_autocast():
                    torch.autograd.backward(tensors, gradients)
        return result

    def _loss(self, outputs: Any, arguments: Mapping[str, Any]) -> Any:
        if isinstance(outputs, Mapping):
            return self.loss(**outputs, **arguments)
        return self.loss(*(outputs if isinstance(outputs, (tuple, list)) else (outputs,)), **arguments)

    def _backward(self, loss: Any) -> Any:
        """Differentiate the loss; return it detached."""
        total = sum(loss.values()) if isinstance(loss, Mapping) else loss
        if not isinstance(total, Tensor):
            raise TypeError(f"loss must return a tensor, or a mapping of tensors, got {type(loss).__name__}")
        with without_any_autocast():
            (total if self.scaler is None else self.scaler.scale(total)).backward()
        return mapped(lambda _, x: x.detach() if isinstance(x, Tensor) else x, "", loss)
