"""A teacher made of the captions' own words: TF-IDF and a truncated SVD, without a pretrained model."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..clustering.files import companion
from ..distributed import Group, broadcast, gather_strings, rank, validate_on_all_ranks
from .cache_record import strings_digest
from .caption_cache import Encode, encode_over_ranks, show_progress
from .fitted import fit_once, load_fitted
from .words import words

Tokenizer = Callable[[str], Sequence[str]]
FITTED_ON = 500_000  # captions that vocabulary and components are fitted on; more change neither much
BLOCK = 16_384  # captions that are encoded at a time
LOST = 1e-3  # length below which the components hold nothing of a caption: TF-IDF rows have length 1


class WordEncoder:
    r"""Features of captions from their words: TF-IDF, projected onto the first right singular vectors, and L2-normalised.

    .. math::
        x_{iw} \propto (1 + \log n_{iw}) \Bigl(1 + \log \frac{1 + N}{1 + N_w}\Bigr), \quad \|x_i\| = 1, \qquad
        f_i = \frac{V^\top x_i}{\| V^\top x_i \|}

    where :math:`n_{iw}` counts word w in caption i, :math:`N_w` of the N captions have it, and V (words, dim) holds the right
    singular vectors of X. A caption of which the components hold nothing, as none of its words is known, is a row of zeros.

    **Use it when:** captions reach a process one by one.
    **Not when:** all are there: :meth:`~protoclip_losses.TeacherAdapter.from_captions` has the features of every sample.
    **Related:** :func:`words`, the words that are counted.

    Args:
        vocabulary: W words, in the order of the other two.
        idf: (W,) float32, their weights :math:`1 + \log ((1 + N) / (1 + N_w))`.
        components: (W, dim) float32.
        tokenizer: caption to its words, as it was when the encoder was fitted; None: :func:`words`.

    Example:
        >>> encoder = WordEncoder.fit(["a red bus", "a blue bus", "a cat", "a dog"], dim=3)
        >>> encoder
        WordEncoder(6 words -> 3)
        >>> encoder(["the bus", "a zebra", "nothing known"]).norm(dim=1)
        tensor([1., 1., 0.])

    Source:
        Deerwester et al., Indexing by Latent Semantic Analysis (1990); scikit-learn's ``TfidfVectorizer`` and ``TruncatedSVD``.
    """

    def __init__(self, vocabulary: Sequence[str], idf: Tensor, components: Tensor, tokenizer: Tokenizer | None = None) -> None:
        self.vocabulary = check.strings("vocabulary", vocabulary)
        check.matrix("components", components, rows=len(vocabulary), of=" as vocabulary has words")
        if idf.shape != components.shape[:1]:
            raise ValueError(f"idf must have shape ({len(vocabulary)},) as vocabulary has words, got {check.shape(idf)}")
        self.idf, self.components, self.tokenizer = idf.float().cpu(), components.float().cpu(), tokenizer
        text = check.require("sklearn.feature_extraction.text", "captions")
        self._tfidf = text.TfidfVectorizer(
            analyzer=tokenizer or words, sublinear_tf=True, dtype=np.float32, vocabulary=self.vocabulary
        )
        self._tfidf.idf_ = self.idf.numpy()

    def __repr__(self) -> str:
        return f"WordEncoder({len(self.vocabulary)} words -> {self.dim})"

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self.components.shape[1])

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 128, *, tokenizer: Tokenizer | None = None, seed: int = 0) -> "WordEncoder":
        """Fit on captions: all of them, or 500,000 that are drawn from more.

        Columns that the captions cannot fill, as they have fewer words than ``dim``, are zero. The same captions and the same
        number of threads give the same bits.

        Raises:
            TypeError: texts that are no strings.
            ValueError: captions without a word among them.
        """
        captions = check.strings("texts", texts)
        check.positive_int("dim", dim)
        check.seed("seed", seed)
        if len(captions) > FITTED_ON:
            draw = torch.Generator(device="cpu").manual_seed(seed)
            rows = torch.randperm(len(captions), generator=draw, device="cpu")[:FITTED_ON].sort().values
            captions = [captions[i] for i in rows.tolist()]
        text, decomposition = (
            check.require(f"sklearn.{name}", "captions") for name in ("feature_extraction.text", "decomposition")
        )
        tfidf = text.TfidfVectorizer(analyzer=tokenizer or words, sublinear_tf=True, dtype=np.float32)
        try:
            x = tfidf.fit_transform(captions)
        except ValueError as error:
            raise ValueError(f"texts must hold words, got none in {len(captions)} captions") from error
        rank = min(dim, *x.shape)
        components = np.zeros((x.shape[1], dim), dtype=np.float32)
        if x.shape[1] == 1:  # TruncatedSVD wants two words at least
            components[0, 0] = 1
        else:
            # ARPACK is exact, and cannot find all directions; the randomized algorithm is exact where all are wanted.
            algorithm = "arpack" if rank < min(x.shape) else "randomized"
            svd = decomposition.TruncatedSVD(rank, algorithm=algorithm, random_state=seed % 2**32).fit(x)
            components[:, :rank] = svd.components_.T
        return cls(tfidf.get_feature_names_out().tolist(), torch.from_numpy(tfidf.idf_), torch.from_numpy(components), tokenizer)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Features (n, dim) float32, each of length 1, or 0 for a caption of which no word is known."""
        texts = check.strings("captions", captions)
        out = torch.zeros((len(texts), self.dim), dtype=torch.float32, device="cpu")
        for start in range(0, len(texts), BLOCK):
            x = self._tfidf.transform(texts[start : start + BLOCK])
            rows = torch.from_numpy(np.ascontiguousarray(x @ self.components.numpy()))
            length = rows.norm(dim=1, keepdim=True)
            out[start : start + BLOCK] = (rows / length).where(length > LOST, 0)
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """Words (their UTF-8 bytes, and the length of each), weights and components; not the tokenizer."""
        encoded = [word.encode("utf-8", "surrogatepass") for word in self.vocabulary]
        return {
            "words": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
            "lengths": torch.tensor([len(word) for word in encoded], dtype=torch.int64, device="cpu"),
            "idf": self.idf,
            "components": self.components,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], tokenizer: Tokenizer | None = None) -> "WordEncoder":
        """The encoder of a saved state; with the tokenizer that it was fitted with."""
        check.state_has("WordEncoder", state, ("words", "lengths", "idf", "components"))
        data, ends = state["words"].numpy().tobytes(), state["lengths"].cumsum(0).tolist()
        vocabulary = [data[i:j].decode("utf-8", "surrogatepass") for i, j in zip([0, *ends], ends, strict=False)]
        return cls(vocabulary, state["idf"], state["components"], tokenizer)


def encoder_from_state(owner: str, state: Mapping[str, Any], own: Encode | None) -> Encode | None:
    """The word encoder in a teacher's state, with the tokenizer of the teacher's own; any other encoder stays."""
    is_of_words = isinstance(own, WordEncoder)
    if is_of_words != ("words" in state):
        kinds = {True: "of the captions' words", False: "of another kind"}
        raise ValueError(f"{owner}: state_dict must be of a teacher {kinds[is_of_words]}, got one {kinds[not is_of_words]}")
    if not isinstance(own, WordEncoder):
        return own
    encoder = WordEncoder.from_state_dict(state["words"], own.tokenizer)
    if encoder.dim != own.dim:
        raise ValueError(f"{owner}: state_dict must have dim {own.dim}, got {encoder.dim}")
    return encoder


def encode_own_words(
    texts: Sequence[str],
    dim: int,
    cache: Path | None,
    tokenizer: Tokenizer | None,
    seed: int,
    progress: bool | None,
    group: Group | None,
) -> "tuple[WordEncoder, Tensor | np.memmap[Any, Any]]":
    """An encoder that the first rank fits on all texts, and the rows (N, dim) of each; the same on all ranks."""
    fitted_on = {"dim": dim, "seed": seed, "tokenizer": getattr(tokenizer, "__qualname__", type(tokenizer).__qualname__)}

    def checked() -> list[str]:
        captions = check.strings("texts", texts)
        fitted_on["texts"] = strings_digest(captions)
        return captions

    captions = validate_on_all_ranks(checked, group, signature=lambda: {**fitted_on, "cache": cache is not None})

    def fit() -> dict[str, Tensor]:
        return WordEncoder.fit(captions, dim, tokenizer=tokenizer, seed=seed).state_dict() if rank(group) == 0 else {}

    if cache is None:
        state = validate_on_all_ranks(fit, group)
        encoder = WordEncoder.from_state_dict(_of_first_rank(state, group), tokenizer)
        rows = torch.zeros((len(captions), dim), dtype=torch.float32, device="cpu")
        if rank(group) == 0:
            for start in show_progress(range(0, len(captions), BLOCK), progress, 0, len(captions), BLOCK):
                rows[start : start + BLOCK] = encoder(captions[start : start + BLOCK])
        return encoder, broadcast(rows, group)
    files = [companion(cache, ".words.npz")]

    def fit_to_file() -> None:
        if rank(group) == 0:
            cache.parent.mkdir(parents=True, exist_ok=True)
            fit_once(fit, cache, files, fitted_on)

    validate_on_all_ranks(fit_to_file, group)
    encoder = WordEncoder.from_state_dict(validate_on_all_ranks(lambda: load_fitted(files, fitted_on), group), tokenizer)
    return encoder, encode_over_ranks(encoder, captions, cache, BLOCK, "float32", progress, group)[1]


def _of_first_rank(state: Mapping[str, Tensor], group: Group | None) -> dict[str, Tensor]:
    """The tensors of a state that the first rank has and the others have not."""
    if group is None:
        return dict(state)
    kinds = json.loads(gather_strings(json.dumps([(k, list(x.shape), str(x.dtype)[6:]) for k, x in state.items()]), group)[0])
    return {
        name: broadcast(state[name] if name in state else torch.empty(size, dtype=getattr(torch, dtype), device="cpu"), group)
        for name, size, dtype in kinds
    }
