"""External teachers: features of every sample, from a file, a tensor or an encoder run once over the captions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..clustering.files import companion
from ..distributed import Group, active_group, validate_on_all_ranks
from .caption_cache import Encode, call_encoder, encode_over_ranks
from .captions import Tokenizer, WordEncoder, encode_own_words, encoder_from_state
from .files import open_rows
from .pca import PCA, fit_pca, fit_pca_once, pca_from_state
from .rows import TeacherRows


class TeacherAdapter:
    """Features (n, D_E) of an external teacher by sample index.

    Make one with :meth:`from_captions`, :meth:`from_encoder`, :meth:`from_file` or :meth:`from_tensor`. ``teacher[index]`` takes
    an int64 tensor of sample indices and returns float32 features; ``len(teacher)`` is the number of samples. ``dim`` reduces
    the width, by PCA that is fitted once over all rows and frozen: read :attr:`dim` for the width that comes out. A row of
    zeros means that the teacher knows nothing of a sample, which then gets no label.

    **Use it when:** prototypes should follow the clusters of another model, such as a sentence encoder of the captions.
    **Not when:** only image and text features of the model in training are clustered: build without teachers.
    **Related:** :class:`EpisodicClusterer`, whose ``build`` takes teachers; :class:`FeatureCollector` makes those of a stream.

    Example:
        >>> import torch
        >>> teacher = TeacherAdapter.from_tensor(torch.eye(4))
        >>> len(teacher), teacher.dim, teacher[torch.tensor([2])]
        (4, 4, tensor([[0., 0., 1., 0.]]))
        >>> teacher
        TeacherAdapter(4 samples, dim=4, float32)

    Source:
        ProtoCLIP section III-C and IV-A: RoBERTa features, PCA to 64, https://arxiv.org/abs/2206.10996.
    """

    def __init__(
        self,
        rows: Any,
        *,
        index: Tensor | None = None,
        pca: PCA | None = None,
        encode: Encode | None = None,
        normalize: bool = False,
    ) -> None:
        self._rows, self._encode, self.pca = TeacherRows(rows, index, normalize), encode, pca

    def _reduce(self, rows: Tensor) -> Tensor:
        return rows.float() if self.pca is None else self.pca(rows)

    def _reduced(self, dim: int | None) -> "TeacherAdapter":
        self.pca = None if dim is None else fit_pca(self._rows, dim)
        return self

    @property
    def normalize(self) -> bool:
        """Whether rows are L2-normalised, before PCA."""
        return self._rows.normalize

    @property
    def has_index(self) -> bool:
        """Whether rows name their samples; if not, row i is sample i's."""
        return self._rows.samples is not None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], dim: int | None = None, *, normalize: bool = False) -> "TeacherAdapter":
        """A .npy file (N, D_E), float16 or wider, memory-mapped: rows are read when they are asked for.

        Args:
            path: of the file; row i belongs to sample i.
            dim: width after PCA; None leaves the width as it is.
            normalize: L2-normalise rows before PCA.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, not a 2-D array, dim larger than the width or than the number of rows.
            TypeError: not an array of floats.
        """
        return cls(open_rows(path), normalize=normalize)._reduced(dim)

    @classmethod
    def from_tensor(
        cls, x: Tensor, dim: int | None = None, *, index: Tensor | None = None, normalize: bool = False
    ) -> "TeacherAdapter":
        """A tensor (N, D_E) already in memory; ``dim`` and ``normalize`` as in :meth:`from_file`.

        ``index`` (N,) names the sample of each row, each once; None: row i belongs to sample i.
        """
        check.matrix("x", x)
        if index is not None:
            check.integers("index", index, length=len(x), of=" as x has rows")
            ordered = index.sort().values
            if repeats := int((ordered[1:] == ordered[:-1]).sum()):
                raise ValueError(f"index must name each sample once, got {repeats} repeats")
        return cls(x.detach(), normalize=normalize, index=index)._reduced(dim)

    @classmethod
    def from_encoder(
        cls,
        encode: Encode,
        texts: Sequence[str],
        cache: str | os.PathLike[str],
        dim: int | None = 64,
        *,
        batch_size: int = 256,
        normalize: bool = True,
        dtype: str = "float16",
        progress: bool | None = None,
        process_group: Group | bool | None = None,
    ) -> "TeacherAdapter":
        """Run an encoder once over the captions, into a memory-mapped file that a second run reuses and a killed one resumes.

        A cache that is there already costs one caption: the first is encoded again, as the cache may be another encoder's.
        A process that finds another one writing the cache waits for it.

        Under torch.distributed the group's first rank encodes and the others wait, which for millions of captions outlasts the
        group's timeout: run it once in one process before training.

        Args:
            encode: list of n captions to (n, D_E) floats, the same whenever it is asked.
            texts: N captions; row i belongs to sample i.
            cache: the .npy file. With ``caps.npy`` come ``caps.npy.json`` (how far it is, of which captions),
                ``caps.npy.pca.npz``, and ``caps.npy.lock`` while it is written.
            dim: width after PCA; None leaves the width as it is.
            batch_size: captions per call of ``encode``.
            normalize: L2-normalise rows before PCA, as the recipe does.
            dtype: of the file, float16 or float32.
            progress: a bar with rate and ETA. None shows it if tqdm is installed.
            process_group: None for the default group, ``False`` for this process alone, or a group.

        Raises:
            TypeError: an encoder that returns anything but rows of numbers, texts that are no list of strings.
            ValueError: an encoder that returns another number of rows or another width than before, or NaN or Inf; a cache
                made from other captions, by another encoder or in another dtype, or a damaged one.
            OSError: what the file system says, such as a full disk, with the name of the file.
        """
        path, group = Path(cache), active_group(process_group)

        def checked() -> list[str]:
            if dim is not None:
                check.positive_int("dim", dim)
            return check.strings("texts", texts)

        captions = validate_on_all_ranks(checked, group, signature=lambda: {"dim": dim, "normalize": normalize, "dtype": dtype})
        record, rows = encode_over_ranks(encode, captions, path, batch_size, dtype, progress, group)
        adapter = cls(rows, encode=encode, normalize=normalize)
        if dim is not None:
            fitted_on = {"texts": record.texts, "normalize": normalize, "dim": dim}
            # A cache that 0.6 completed keeps the PCA that 0.6 fitted.
            files = [companion(path, ".pca.npz"), *([path.with_suffix(".pca.npz")] if record.format == 0 else [])]
            adapter.pca = fit_pca_once(lambda: fit_pca(adapter._rows, dim), path, files, fitted_on, group)
        return adapter

    @classmethod
    def from_captions(
        cls,
        texts: Sequence[str],
        dim: int = 128,
        cache: str | os.PathLike[str] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        progress: bool | None = None,
        process_group: Group | bool | None = None,
    ) -> "TeacherAdapter":
        """The captions' own words, without any model: features of :class:`~protoclip_losses.teachers.WordEncoder`.

        A caption of which no word is known has a row of zeros, and gets no label. Under torch.distributed every rank passes
        all captions; the first fits and encodes, the others get the same rows. Needs scikit-learn.

        Args:
            texts: N captions; row i belongs to sample i.
            dim: width of the features.
            cache: a .npy file for the features, as in :meth:`from_encoder`; vocabulary and components are kept with it in
                ``NAME.words.npz``. None keeps the features in memory.
            tokenizer: caption to its words; None takes runs of letters and digits, and pairs of characters in scripts without
                spaces, such as Chinese and Japanese.
            seed: of the truncated SVD.
            progress: a bar with rate and ETA. None shows it if tqdm is installed.
            process_group: None for the default group, ``False`` for this process alone, or a group.

        Raises:
            TypeError: texts that are no list of strings.
            ValueError: captions without a word, texts that differ by rank; a cache as in :meth:`from_encoder`.

        Example:
            >>> teacher = TeacherAdapter.from_captions(["red bus", "old bus", "black cat", "small cat"], dim=2)
            >>> teacher.encode(["the cat", "a dog"]) @ teacher[torch.arange(4)].T > 0.5
            tensor([[False, False,  True,  True],
                    [False, False, False, False]])
        """
        path = None if cache is None else Path(cache)
        encoder, rows = encode_own_words(texts, dim, path, tokenizer, seed, progress, active_group(process_group))
        return cls(rows, encode=encoder)

    @property
    def dim(self) -> int:
        """Width D_E of the features that come out."""
        return self._rows.width if self.pca is None else self.pca.components.shape[1]

    def __repr__(self) -> str:
        parts = [f"{len(self)} samples", f"dim={self.dim}", self._rows.dtype]
        parts += ([] if self.pca is None else [str(self.pca)]) + (["normalize=True"] if self.normalize else [])
        return f"TeacherAdapter({', '.join(parts)})"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Features (n, D_E) of sample indices (n,), float32; a sample that the teacher does not have is an IndexError."""
        return self._reduce(self._rows[index])

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Features (n, D_E) of captions that have no index (streams), through the same normalisation and PCA."""
        if self._encode is None:
            raise ValueError("encode needs a teacher made by from_encoder or from_captions: a file or a tensor has no encoder")
        if not (texts := check.strings("captions", captions)):
            return torch.zeros((0, self.dim), dtype=torch.float32, device="cpu")
        rows = torch.from_numpy(call_encoder(self._encode, texts, self._rows.width)).float()
        return self._reduce(torch.nn.functional.normalize(rows, dim=1) if self.normalize else rows)

    def state_dict(self) -> dict[str, Any]:
        """The frozen PCA, None for its width where there is none, and the encoder of the captions' words; not the rows."""
        state: dict[str, Any] = {"format": 1, "dim": None if self.pca is None else self.dim, "normalize": self.normalize}
        state |= {} if self.pca is None else self.pca.state_dict()
        return state | ({"words": self._encode.state_dict()} if isinstance(self._encode, WordEncoder) else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a frozen PCA, or the encoder of the captions' words that was fitted then.

        Raises:
            ValueError: a PCA of another width, or of rows that were normalised where these are not; another kind of teacher.
            TypeError: a PCA that is not of floats.
        """
        if check.state_format("TeacherAdapter", state) > 0:
            check.state_matches("TeacherAdapter", state, {"normalize": self.normalize})
            check.state_has("TeacherAdapter", state, ["dim"])
        encode = encoder_from_state("TeacherAdapter", state, self._encode)
        # 0.6 saved a PCA alone, and nothing where there was none.
        has_pca = state.get("dim", state.get("mean")) is not None
        pca = pca_from_state("TeacherAdapter", state, self._rows.width, self._rows.device) if has_pca else None
        self._encode, self.pca = encode, pca
