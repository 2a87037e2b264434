"""Clustering, building and teachers on several processes, each with its own rows, against all rows at once."""

from functools import partial

import dense
import pytest
import torch
import torch.distributed as dist
from cases import assert_near, integers, unit
from rank_cases import rank_case
from ranks import LOCAL, assert_same_on_every_rank, own_rows, raises_everywhere
from text_encoder import CAPTIONS, TextEncoder

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans, TeacherAdapter
from protoclip_losses.clustering import faiss_engine
from protoclip_losses.clustering.checkpoint import Checkpoint

SAMPLES, K = 60, 6
STUDENTS = {"image": unit(SAMPLES, 4, 1, torch.float32), "text": unit(SAMPLES, 4, 2, torch.float32)}
TEACHER = unit(SAMPLES, 7, 3, torch.float32)


@rank_case
def fit_gives_every_rank_the_clustering_of_all_rows(rank, world_size, folder):
    for backend, shares in ((b, s) for b in ("torch", "faiss") for s in ([30, 1, 0, 25], [15, 15, 15, 15], [0, 50, 3, 0])):
        shares = [60] if world_size == 1 else shares[:world_size]
        x = unit(sum(shares), 4, 5, torch.float32)
        x[3] = torch.nan  # on one rank alone
        own = x[own_rows(rank, shares)]
        settings = {"backend": backend, "max_dropped": 0.1, "tol": 0}
        clusters, whole = (KMeans(K, **settings, **group).fit(rows) for rows, group in ((own, {}), (x, LOCAL)))
        assert torch.allclose(clusters.centroids, whole.centroids, atol=1e-5)
        assert torch.equal(clusters.labels, whole.labels[own_rows(rank, shares)])
        assert torch.equal(clusters.counts, whole.counts)
        assert clusters.objective == pytest.approx(whole.objective)
        assert clusters.report.objectives == pytest.approx(whole.report.objectives)
        assert clusters.dropped == 1
        assert torch.equal(clusters.predict(own), clusters.labels)
        assert_same_on_every_rank(clusters.centroids, clusters.counts, torch.tensor(clusters.objective, dtype=torch.float64))
        again = EpisodicClusterer(K, **settings).fit(own)
        assert torch.equal(again.centroids, clusters.centroids)
        assert torch.equal(again.labels, clusters.labels)


@rank_case
def rows_in_blocks_weights_and_a_checkpoint_are_those_of_one_process(rank, world_size, folder):
    """All ranks stop in the third state, which rank 0 has not written: they go on from the second."""
    shares = [60] if world_size == 1 else [30, 1, 0, 25][:world_size]
    x = unit(sum(shares), 4, 5, torch.float32)
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.1
    rows = own_rows(rank, shares)
    own = [x[rows].numpy(), x[:0].numpy()]
    whole = KMeans(K, tol=0, **LOCAL).fit(x, weights=weights)
    blocks = KMeans(K, tol=0).fit(own, weights=weights[rows])
    assert torch.allclose(blocks.centroids, whole.centroids, atol=1e-5)
    assert torch.equal(blocks.labels, whole.labels[rows])
    assert blocks.objective == pytest.approx(whole.objective)

    steps, stops, real = [], [2], Checkpoint.write

    def write(self, step, tensors):
        steps.append(step)
        if rank > 0 or step not in stops:
            real(self, step, tensors)
        if step in stops:
            raise KeyboardInterrupt

    def fit(seed=0):
        return KMeans(K, tol=0, seed=seed).fit(own, weights=weights[rows], checkpoint=folder / "state")

    Checkpoint.write = write
    try:
        with pytest.raises(KeyboardInterrupt):
            fit()
        with pytest.raises(ValueError, match=r"checkpoint must be of the same data and settings, got .* with seed: 0, now 1"):
            fit(seed=1)
        steps.clear()
        stops.clear()
        again = fit()
    finally:
        Checkpoint.write = real
    assert steps[0] == 2
    assert torch.equal(again.centroids, blocks.centroids)
    assert torch.equal(again.labels, blocks.labels)
    assert not [file for file in folder.glob("state*") if f"rank{rank}of" in file.name or world_size == 1]


@rank_case
def a_start_and_empty_clusters_are_the_same_for_all(rank, world_size, folder):
    """Four of six centroids begin as one: they are re-seeded with rows that lie on any rank."""
    x = unit(40 * world_size, 4, 6, torch.float32)
    init = x[[0, 0, 0, 0, 1, 2]]
    clusters, whole = (
        KMeans(K, backend="torch", tol=0, **group).fit(rows, init=init)
        for rows, group in ((x[40 * rank : 40 * rank + 40], {}), (x, LOCAL))
    )
    assert clusters.report.reseeded == whole.report.reseeded >= 3
    assert torch.allclose(clusters.centroids, whole.centroids, atol=1e-5)


@rank_case
def build_is_that_of_one_process(rank, world_size, folder):
    """Whichever rank holds a sample: prototypes and labels are those of one process with all of them."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(8))
    teachers = {"t": TeacherAdapter.from_tensor(TEACHER)}
    built = []
    for index, group in ((order.tensor_split([world_size, 40, 41])[rank], {}), (torch.arange(SAMPLES), LOCAL)):
        if world_size < 4 and not group:
            index = order[rank::world_size]
        bank = FeatureBank(index, 4)
        bank.update(index, STUDENTS["image"][index], STUDENTS["text"][index])
        built.append(EpisodicClusterer(K, **group).build(bank, teachers))
    for pair, term in built[1].terms.items():
        assert torch.equal(built[0].terms[pair].labels, term.labels)
        assert torch.allclose(built[0].terms[pair].teacher_centroids, term.teacher_centroids, atol=1e-5)
        assert torch.allclose(built[0].terms[pair].prototypes, term.prototypes, atol=1e-5)
        assert torch.equal(built[0].terms[pair].valid, term.valid)


@rank_case
def rows_stay_on_their_rank(rank, world_size, folder):
    """The PyTorch engine sends centroids and sums, whose number does not grow with the rows."""
    sent = []
    reals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "broadcast")}

    def counting(name):
        def call(*args, **kwargs):
            sent.append((args[1] if name == "all_gather" else args[0]).numel())
            return reals[name](*args, **kwargs)

        return call

    for name in reals:
        setattr(dist, name, counting(name))
    try:
        KMeans(K, backend="torch").fit(unit(3000, 4, rank, torch.float32))
    finally:
        for name, real in reals.items():
            setattr(dist, name, real)
    if world_size > 1:
        assert max(sent) <= (K + 1) * (4 + 1)


@rank_case
def build_gives_every_rank_the_prototypes_of_all_rows(rank, world_size, folder):
    """Shares of an episode in random order, padded as a DistributedSampler does; the first copy of a sample is the one kept."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(4))
    shards = [order[r::world_size] for r in range(world_size)]
    index = torch.cat([shards[rank], shards[0][: 3 * rank], shards[rank][:2]])
    bank = FeatureBank(index, 4)
    # A copy on a later rank carries other features, as another augmentation would give it.
    features = {name: x[index] + 0.5 * (torch.arange(len(index)) >= len(shards[rank]))[:, None] for name, x in STUDENTS.items()}
    first = len(shards[rank])
    bank.update(index[first:], features["image"][first:], features["text"][first:])
    bank.update(index[:first], features["image"][:first], features["text"][:first])
    prototypes = EpisodicClusterer(K).build(bank, {"t": TeacherAdapter.from_tensor(TEACHER)})

    assert torch.equal(prototypes.index, torch.arange(SAMPLES))
    sources = {**STUDENTS, "t": TEACHER}
    assert set(prototypes.terms) == {(s, t) for s in STUDENTS for t in sources if s != t}
    for (student, teacher), term in prototypes.terms.items():
        distances = (sources[teacher].double()[:, None] - term.teacher_centroids.double()).square().sum(2)
        assert torch.equal(term.labels, distances.argmin(1))
        means, counts = dense.back_translate(term.labels, STUDENTS[student], K)
        assert_near(term.prototypes, means, 1e-6)
        assert torch.equal(term.valid, counts > 0)
        assert_same_on_every_rank(term.prototypes, term.teacher_centroids, term.labels, term.valid.int())
    anyones = integers(SAMPLES, 20, seed=rank)  # whoever extracted them
    assert torch.equal(prototypes.positions(anyones), anyones)


@rank_case
def a_rank_without_samples_takes_part(rank, world_size, folder):
    has = rank < max(1, world_size - 1)
    index = torch.arange(rank, SAMPLES, max(1, world_size - 1)) if has else torch.arange(0)
    bank = FeatureBank(index, 4)
    if has:
        bank.update(index, STUDENTS["image"][index], STUDENTS["text"][index])
    prototypes = EpisodicClusterer(K).build(bank, [TeacherAdapter.from_tensor(TEACHER)])
    none = FeatureBank(torch.arange(0), 4)
    with pytest.raises(ValueError, match=r"bank must hold a sample on some rank|no features were written for any of its 0 rows"):
        EpisodicClusterer(K).build(none)
    assert torch.equal(prototypes.index, torch.arange(SAMPLES))
    for term in prototypes.terms.values():
        assert_same_on_every_rank(term.prototypes, term.labels)
        assert torch.bincount(term.labels, minlength=K).sum() == SAMPLES


@rank_case
def rows_that_one_rank_lost_are_left_out(rank, world_size, folder):
    index = torch.arange(rank, SAMPLES, world_size)
    bank = FeatureBank(index, 4)
    text = STUDENTS["text"].clone()
    text[world_size - 1] = torch.nan  # held by the last rank
    bank.update(index, STUDENTS["image"][index], text[index])
    prototypes = EpisodicClusterer(K, max_dropped=0.1).build(bank)
    assert (prototypes.terms["image", "text"].labels == -1).nonzero().flatten().tolist() == [world_size - 1]
    term = prototypes.terms["text", "image"]
    means, _ = dense.back_translate(term.labels.where(text.isfinite().all(1), -1), text, K)
    assert_near(term.prototypes, means, 1e-6)


@rank_case
def bad_clustering_input_on_one_rank_raises_on_all(rank, world_size, folder):
    bad = world_size - 1
    x = unit(10, 4, rank, torch.float32)
    fit = EpisodicClusterer(3).fit
    for features, error, message in ((x[0], ValueError, "2 dimensions"), (x.long(), TypeError, "features must be float16")):
        raises_everywhere(partial(fit, features if rank == bad else x), bad, error, message)
        assert fit(x).counts.sum() == 10 * world_size

    index = 10 * rank + torch.arange(10)

    def build(written=index, teachers=()):
        bank = FeatureBank(index, 4)
        mine = written if rank == bad else index
        bank.update(mine, x[: len(mine)], x[: len(mine)])
        return EpisodicClusterer(3).build(bank, teachers)

    short = TeacherAdapter.from_tensor(unit(10 * bad + 5, 6))
    raises_everywhere(partial(build, index[:7]), bad, ValueError, "3 of 10 rows were never written")
    raises_everywhere(partial(build, teachers={"t": short}), bad, IndexError, "teacher, which has .* 5 of 10 are outside")
    assert len(build().index) == 10 * world_size


@rank_case
def too_many_bad_rows_on_one_rank_raise_on_all(rank, world_size, folder):
    """The verdict is of all rows, so that every rank says the same."""
    x = unit(10, 4, rank, torch.float32)
    if rank == world_size - 1:
        x[:4] = torch.nan
    for estimator in (EpisodicClusterer, KMeans):
        with pytest.raises(ValueError, match=f"must hold NaN or Inf in .* of its rows, got 4 of {10 * world_size}"):
            estimator(3).fit(x)
    assert EpisodicClusterer(3, max_dropped=0.4).fit(x).dropped == 4
    with pytest.raises(ValueError, match=f"as num_prototypes=100, got {10 * world_size - 4};"):
        EpisodicClusterer(100, max_dropped=0.4).fit(x)


@rank_case
def an_error_in_faiss_raises_on_all(rank, world_size, folder):
    real = faiss_engine._train

    def failing(*args, **kwargs):
        raise MemoryError("no room")

    faiss_engine._train = failing
    try:
        raises_everywhere(lambda: EpisodicClusterer(3, backend="faiss").fit(unit(10, 4, rank)), 0, MemoryError, "no room")
    finally:
        faiss_engine._train = real
    assert EpisodicClusterer(3).fit(unit(10, 4, rank)).counts.sum() == 10 * world_size


@rank_case
def one_rank_encodes_for_all(rank, world_size, folder):
    encode = TextEncoder()
    teacher = TeacherAdapter.from_encoder(encode, CAPTIONS, folder / "t.npy", dim=4, progress=False)
    assert len(encode.seen) == (len(CAPTIONS) if rank == 0 else 0)
    assert_same_on_every_rank(teacher[torch.arange(len(CAPTIONS))], teacher.encode(CAPTIONS[:3]))

    def broken(captions):
        raise OSError("no model")

    raises_everywhere(
        lambda: TeacherAdapter.from_encoder(broken, CAPTIONS, folder / "u.npy", progress=False), 0, OSError, "no model"
    )
    raises_everywhere(
        lambda: TeacherAdapter.from_encoder(encode, CAPTIONS, folder / "t.npy", dim=99, progress=False), 0, ValueError, "dim must"
    )


@rank_case
def a_far_row_on_one_rank_leaves_all_labels_nearest(rank, world_size, folder):
    x = unit(300, 8, 5, torch.float32)
    x[7, 0] = 65504.0
    own = x.tensor_split([120, 121, 250][: world_size - 1])[rank]
    for backend in ("torch", "faiss"):
        result = KMeans(21, backend=backend).fit(own)
        distances = torch.cdist(own.double(), result.centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.equal(result.labels, distances.argmin(1))
        if backend == "torch":
            assert torch.allclose(result.centroids, KMeans(21, **LOCAL).fit(x).centroids, rtol=1e-5, atol=1e-5)
