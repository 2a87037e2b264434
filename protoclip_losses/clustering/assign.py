"""The nearest centroids of each row in blocks of rows: the final assignment of every engine, and of new rows.

Scores are products in float32. Where their rounding may decide between two centroids, the distances from a few with the highest
scores are compared in float64; where it may decide which these few are, scores are in float64 too. Labels are thus the nearest
centroids at any scale and offset that float32 holds. MPS has no float64: there float32 has to do.
"""

import torch
from torch import Tensor

from .._dtypes import plain_arithmetic, sum_dtype
from ..kernels.sizes import COPIES, rows_per_block, rows_per_comparison, rows_per_copy
from .origin import LARGEST_LENGTH, SMALLEST_LENGTH, centroid_origin

COMPARED_CENTROIDS = 6  # whose distances are compared where scores are not enough
GROUPS = 64  # a maximum of values is ten times faster than one with its position; it narrows the search to one group


def assign(points: Tensor, centroids: Tensor, known: Tensor | None = None, *, spherical: bool = False) -> tuple[Tensor, Tensor]:
    r"""Nearest centroid of each row in Euclidean distance.

    .. math::
        a_i = \arg\min_k \|x_i - c_k\|^2 = \arg\max_k \left( x_i \cdot c_k - \tfrac{1}{2} \|c_k\|^2 \right)

    Args:
        points: (N, D).
        centroids: (K, D).
        known: (N,) int64, labels that are certain, and -1 where the nearest centroid is to be found.
        spherical: centroids are of length 1, and the one nearest to the direction of a row is found.

    Returns:
        Labels (N,) int64, the lowest id among equals, and squared distances (N,), in float64 but on MPS, which has none.
    """
    centroids = centroids.to(device=points.device, dtype=torch.float32)
    labels = nearest(points, centroids, 1, known, spherical=spherical)[:, 0]
    rows = rows_per_copy(points.shape[1], points.device)
    # From the difference itself: expanding the square loses all digits of a small distance.
    parts = zip(torch.split(points, rows), torch.split(labels, rows), strict=True)
    return labels, torch.cat([squared_distances(part, centroids[own]) for part, own in parts])


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of each row of ``x`` (n, D) from that of ``y``, in float64: float32 cannot square 1e20 or 1e-25."""
    return row_lengths(x.to(y.dtype) - y).square()


def row_lengths(x: Tensor) -> Tensor:
    """The length of each row (n, D), in float64 but on MPS."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=sum_dtype(x.device))
    return lengths


def directions(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, D) divided by their lengths; zeros stay zeros. NaN where the length takes float64 and the dtype is float32."""
    lengths = row_lengths(x)[:, None]
    lengths = lengths.masked_fill(lengths == 0, 1)
    if dtype != lengths.dtype:
        lengths = lengths.masked_fill((lengths < SMALLEST_LENGTH) | (lengths > LARGEST_LENGTH), torch.nan)
    return x.to(dtype) / lengths.to(dtype)


@plain_arithmetic()
def nearest(
    points: Tensor, centroids: Tensor, num_labels: int, known: Tensor | None = None, *, spherical: bool = False
) -> Tensor:
    """The ``num_labels`` nearest centroids of each row, nearest first: (N, num_labels) int64; the lowest id among equals.

    Labels ``known`` (N,) that are not -1 are kept. With ``spherical`` see :func:`assign`.
    """
    centroids = centroids.to(device=points.device, dtype=torch.float32)
    labels = torch.full((len(points), num_labels), -1, dtype=torch.int64, device=points.device)
    if known is not None:
        labels[:, 0] = known
    rows, origin = (labels[:, 0] < 0).nonzero()[:, 0], centroid_origin(centroids)
    for dtype in dict.fromkeys((torch.float32, sum_dtype(points.device))):
        if len(rows):
            search = _Search(points, centroids, origin, dtype, spherical)
            rows = search.by_distances(search.by_scores(rows, labels), labels)
    if len(rows):
        labels[rows] = _lowest_of_equals(labels[rows], centroids)
    return labels


@plain_arithmetic()
def nearest_without_waiting(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row, (N,), the lowest id among equals, in operators whose shapes depend on no value.

    For a training step on an accelerator, which :func:`nearest` would wait for. Of all rows distances are compared, from the few
    centroids with the highest scores in float32: enough for features whose lengths are alike.
    """
    centroids = centroids.to(device=points.device, dtype=torch.float32)
    origin, wide, count = centroids.mean(0), sum_dtype(points.device), 1 + COMPARED_CENTROIDS
    scores = Scores(centroids - origin)
    rows = min(scores.step, rows_per_comparison(count, points.shape[1], points.device))
    labels = []
    for x in torch.split(points, rows):
        ids = scores.shortlist(x.float() - origin, count)[1]
        distances = (x[:, None].to(wide) - centroids[ids]).square().sum(2)
        labels.append(ids.gather(1, distances.argmin(1, keepdim=True))[:, 0])
    return torch.cat(labels)


class _Search:
    """The nearest of some centroids (K, D) in one dtype: writes them to ``labels`` (N, L) for some rows of points (N, D).

    Both ways return the rows for which rounding may have decided.
    """

    def __init__(self, points: Tensor, centroids: Tensor, origin: Tensor, dtype: torch.dtype, spherical: bool) -> None:
        self.points, self.centroids, self.origin, self.dtype, self.spherical = points, centroids, origin, dtype, spherical
        self.scores = Scores(centroids.to(dtype) - origin)

    def by_scores(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Those with the highest scores."""
        is_certain = torch.empty_like(rows, dtype=torch.bool)
        for start in range(0, len(rows), self.scores.step):
            part_of = slice(start, start + self.scores.step)
            part = rows[part_of]
            block = self._rows(part, self.dtype) - self.origin
            highest, labels[part] = self.scores.nearest(block, labels.shape[1])
            squared_norms = block.square().sum(1)
            distances = squared_norms - 2 * highest[:, -2]
            gaps = (highest[:, :-1] - highest[:, 1:]).amin(1)
            rounded = self.origin if self.spherical and self.dtype == torch.float32 else None
            is_certain[part_of] = exceeds_rounding(gaps, squared_norms, distances, block.shape[1], rounded)
        return rows[~is_certain]

    def by_distances(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Those at the smallest distances, in float64, among a few with the highest scores."""
        uncertain, wide, count = [rows[:0]], sum_dtype(rows.device), labels.shape[1]
        step = rows_per_comparison(count + COMPARED_CENTROIDS, self.points.shape[1], rows.device)
        for part in torch.split(rows, min(step, self.scores.step)) if len(rows) else ():
            x = self._rows(part, wide)
            block = (x - self.origin).to(self.dtype)
            lowest, ids = self.scores.shortlist(block, count + COMPARED_CENTROIDS)
            distances, order = (x[:, None] - self.centroids[ids]).square().sum(2).sort(dim=1, stable=True)
            labels[part] = ids.gather(1, order[:, :count])
            farthest, squared_norms = distances[:, count - 1].to(self.dtype), block.square().sum(1)
            # The others have no higher score than the lowest of these.
            gap = (squared_norms - farthest) / 2 - lowest
            uncertain.append(part[~exceeds_rounding(gap, squared_norms, farthest, block.shape[1])])
        return torch.cat(uncertain)

    def _rows(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.points[part]
        return directions(x, dtype) if self.spherical else x.to(dtype)


def _lowest_of_equals(labels: Tensor, centroids: Tensor) -> Tensor:
    """The same centroids (n, L) by their lowest ids, where several are equal: a product may round equal columns differently."""
    group = torch.unique(centroids.cpu(), dim=0, return_inverse=True)[1].to(labels.device)
    sizes, ids, own = torch.bincount(group), group.argsort(stable=True), group[labels]
    earlier = torch.stack([(own[:, :column] == own[:, column : column + 1]).sum(1) for column in range(own.shape[1])], 1)
    lowest: Tensor = ids[(sizes.cumsum(0) - sizes)[own] + earlier]
    return lowest


def exceeds_rounding(gap: Tensor, squared_norms: Tensor, distances: Tensor, width: int, origin: Tensor | None = None) -> Tensor:
    r"""Whether a centroid at these squared ``distances`` is nearer than all whose scores are lower by ``gap``, for each row.

    A nearer one is at most :math:`r = |x| + d` from the origin, where scores are rounded by no more than
    :math:`D u (|x| r + r^2 / 2) \\le 3 D u (|x|^2 + d^2)` with the unit roundoff u (Higham, "Accuracy and stability of numerical
    algorithms", 2002, section 3.1). The differences from the origin count as 8 terms more. What overflows is not certain.
    With ``origin``, rows or centroids were rounded to float32 before it was taken from them.
    """
    dtype, reach = torch.finfo(gap.dtype), squared_norms + distances
    # Times 16: so that it is infinite before a square of a centroid is.
    error = reach * 16 * (3 / 16 * (width + 8) * dtype.eps) + width * dtype.tiny
    if origin is not None:
        length = (2 * reach).sqrt()
        error += 4 * torch.finfo(torch.float32).eps * length * (length + torch.linalg.vector_norm(origin))
    return gap > error


class Scores:
    r"""Scores :math:`x \cdot c_k - \tfrac{1}{2} \|c_k\|^2` of blocks of at most ``step`` rows, in one buffer, in their dtype."""

    def __init__(self, centroids: Tensor) -> None:
        self.count = count = len(centroids)
        self.group_size = -(-count // GROUPS)
        # Centroids of a group have successive ids and lie one column of each group apart: a maximum then runs along rows.
        # A multiple of 64 columns, because products round the last few otherwise, and equal centroids would differ.
        ids = torch.arange(GROUPS * self.group_size, device=centroids.device).view(GROUPS, self.group_size).T.flatten()
        self.columns = centroids[ids.clamp(max=count - 1)].T
        self.half_norms = (self.columns.square().sum(0) / 2).masked_fill(ids >= count, torch.inf)
        self.offsets = self.half_norms
        rows = (
            rows_per_block(columns, centroids.dtype, centroids.device)
            for columns in (len(self.half_norms), COPIES * len(self.columns))
        )
        self.step = min(rows)
        self.buffer = self.half_norms.new_empty((0, len(self.half_norms)))

    def set_prices(self, prices: Tensor) -> None:
        """From now on the scores of each centroid are smaller by its price (K,)."""
        prices = torch.nn.functional.pad(prices, (0, len(self.half_norms) - self.count))
        self.offsets = self.half_norms + prices.view(GROUPS, self.group_size).T.flatten()

    def best(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's highest score, its centroid (the lowest id among equals), and the highest score of the others."""
        groups, highest = self._grouped(block)
        value, group, position = self._next_best(groups, highest)
        return value, group * self.group_size + position, highest.amax(1)

    def nearest(self, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Each row's ``count + 1`` highest scores, -inf where centroids end, and the ``count`` nearest centroids of these.

        Shapes (b, count + 1) and (b, count), nearest first; the lowest id among equals.
        """
        groups, highest = self._grouped(block)
        values: list[Tensor] = []
        ids: list[Tensor] = []
        while len(ids) < count:
            value, group, position = self._next_best(groups, highest)
            values.append(value)
            ids.append(group * self.group_size + position)
            if len(ids) < count:  # what was found is out of the race
                groups[torch.arange(len(block), device=block.device), position, group] = -torch.inf
        return torch.stack([*values, highest.amax(1)], 1), torch.stack(ids, 1)

    def shortlist(self, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``count`` centroids with the highest scores of each row, in the order of ids (b, count), and their lowest score (b,).

        If there are no more than ``count`` it is -inf: no other has a higher one.
        """
        scores = self._grouped(block)[0].flatten(1)
        values, position = scores.topk(min(count, self.count), dim=1)
        lowest = values[:, -1] if count < self.count else torch.full_like(values[:, 0], -torch.inf)
        ids = (position % GROUPS * self.group_size + position // GROUPS).clamp(max=self.count - 1)  # scores may be NaN
        return lowest, ids.sort(1).values

    def _grouped(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (b, group size, groups), and the highest of each group (b, groups)."""
        if len(block) > len(self.buffer):
            self.buffer = self.buffer.new_empty((len(block), len(self.half_norms)))
        scores = torch.addmm(self.offsets, block, self.columns, beta=-1, out=self.buffer[: len(block)])
        groups = scores.view(len(block), self.group_size, GROUPS)
        return groups, groups.amax(1)

    def _next_best(self, groups: Tensor, highest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's highest score, its group and its position there; ``highest`` is then that of the other scores."""
        value, group = highest.max(1)  # the first among equals, as argmax below
        members = groups[torch.arange(len(groups), device=groups.device), :, group]
        position = members.argmax(1)
        others = members.scatter_(1, position[:, None], -torch.inf).amax(1)
        highest.scatter_(1, group[:, None], others[:, None])
        return value, group, position
