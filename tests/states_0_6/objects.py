"""Everything in the library that has a state: how to make it, how to bring it into a state, and what it does from there.

``make_states.py`` runs this on 0.6.0 and saves states and facts; ``test_states_0_6.py`` runs it on the package as it is. It uses
public names that mean the same in both. Inputs are fractions without a generator, so that they are equal everywhere.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import protoclip_losses as pl

try:
    from protoclip_losses.heads import ProjectionHeads
except ImportError:  # 0.6
    from protoclip_losses.integrations.heads import ProjectionHeads


@dataclass(frozen=True)
class Saved:
    """A saved state: ``make`` an object, ``advance`` it to what was saved, and ``behaviour``, facts of an object that loaded it.

    ``exact`` says that nothing between the state and the facts rounds, so that they are equal on any machine.
    """

    name: str
    make: Callable[[], Any]
    advance: Callable[[Any], None]
    behaviour: Callable[[Any], dict[str, Any]]
    exact: bool = False
    has_format: bool = True  # a module that only has parameters has nothing to number


def fractions(rows: int, width: int, start: int = 0) -> torch.Tensor:
    """(rows, width), multiples of 1/64 in (-1, 1) in no visible order; sums and products of a few of them are exact."""
    i = torch.arange(start, start + rows * width)
    return ((i * i * 31 + 17 * i) % 127 - 63).reshape(rows, width) / 64


def blobs(groups: torch.Tensor, width: int, start: int = 0) -> torch.Tensor:
    """Rows near the centre of their group, far from the others."""
    return 4 * fractions(9, width)[groups] + fractions(len(groups), width, start) / 8


# ---- which samples ------------------------------------------------------------------------------------------------------


def two_drawn(episodes: Any) -> None:
    iterator = iter(episodes)
    next(iterator), next(iterator)


def sampler() -> Any:
    return pl.EpisodeSampler(20, 6, seed=3)


def next_episodes(sampler: Any) -> dict[str, Any]:
    iterator = iter(sampler)
    episodes = [next(iterator) for _ in range(2)]
    return {"numbers": [e.number for e in episodes], "index": torch.stack([e.index for e in episodes])}


def stream() -> Any:
    return pl.StreamEpisodes([f"shard-{i}" for i in range(5)], 3, seed=2)


def next_shards(stream: Any) -> dict[str, Any]:
    iterator = iter(stream)
    episodes = [next(iterator) for _ in range(2)]
    return {"numbers": [e.number for e in episodes], "shards": [list(e.shards) for e in episodes]}


def read(shard: str) -> list[int]:
    """Shard i has 4 + i samples, which are integers."""
    number = int(shard[-1])
    return [100 * number + i for i in range(4 + number)]


def decode(raw: int) -> int:
    if raw in (201, 402):
        raise ValueError("a broken sample")
    return 2 * raw


def stream_pass(workers: int) -> Any:
    episode = stream().episode(1)
    parameters = inspect.signature(episode.batches).parameters
    options = {
        "num_workers" if "num_workers" in parameters else "workers": workers,
        "shuffle_buffer" if "shuffle_buffer" in parameters else "shuffle": 4,
    }
    return episode.batches(read, decode, 3, generator=torch.Generator().manual_seed(0), **options)


def three_batches(passing: Any) -> None:
    for number, _ in enumerate(passing, 1):
        if number == 3:
            break


def rest_of_pass(passing: Any) -> dict[str, Any]:
    batches = list(passing)
    facts = {"index": torch.cat([index for index, _ in batches]), "batches": torch.cat([batch for _, batch in batches])}
    return {**facts, "sizes": [len(index) for index, _ in batches], "samples": passing.samples, "dropped": passing.dropped}


# ---- their features -----------------------------------------------------------------------------------------------------


def bank(dtype: torch.dtype = torch.float32) -> Any:
    return pl.FeatureBank(torch.tensor([7, 3, 9, 4]), dim=2, dtype=dtype)


def write(bank: Any, samples: list[int]) -> None:
    rows = torch.tensor(samples)
    audio = fractions(10, 3, 40)[rows]
    bank.update(rows, fractions(10, 2)[rows], fractions(10, 2, 20)[rows], audio=audio)


def held(bank: Any) -> dict[str, Any]:
    return {"index": bank.index, "missing": bank.missing, "written": bank.written, **bank.features}


def finished(bank: Any) -> dict[str, Any]:
    before = {f"before/{name}": x.clone() if isinstance(x, torch.Tensor) else x for name, x in held(bank).items()}
    write(bank, [4, 7])
    return {**before, **held(bank)}


def collector() -> Any:
    return pl.FeatureCollector(dim=2)


def collect(collector: Any, samples: list[int]) -> None:
    rows = torch.tensor(samples)
    words = {"words": fractions(10, 3, 60)[rows]}
    collector.update(rows, fractions(10, 2)[rows], fractions(10, 2, 20)[rows], teacher_features=words)


def collect_twice(collector: Any) -> None:
    collect(collector, [8, 3])
    collect(collector, [5])


def collected(collector: Any) -> dict[str, Any]:
    collect(collector, [1, 2])
    return {**held(collector.bank()), "words": collector.teachers()["words"][torch.tensor([2, 8, 1, 5])]}


def teacher(dim: int | None = None) -> Any:
    return pl.TeacherAdapter.from_tensor(fractions(12, 4) + 1, dim)


def teacher_rows(teacher: Any) -> dict[str, Any]:
    return {"rows": teacher[torch.tensor([4, 0, 11])], "dim": teacher.dim}


# ---- prototypes ---------------------------------------------------------------------------------------------------------

INDEX = torch.tensor([30, 10, 50, 20, 40])


def term(student: int, width: int, labels: list[int]) -> Any:
    """K = 4 prototypes of which the third has no sample."""
    own, valid = torch.tensor(labels), torch.tensor([True, True, False, True])
    prototypes = fractions(4, 3, student) * valid[:, None]
    centroids = fractions(4, width, width + 7)
    if hasattr(pl, "Clustering"):
        return pl.PrototypeTerm(prototypes, valid, pl.Clustering(centroids, own))
    return pl.PrototypeTerm(prototypes, centroids, own, valid)


def prototypes() -> Any:
    """Both modalities, and a teacher of another width that has no features of sample 50."""
    terms = {(s, t): term(ord(s[0]), 3, [0, 1, 3, 3, 1]) for s, t in (("image", "text"), ("text", "image"))}
    terms |= {(s, "words"): term(ord(s[0]) + 1, 5, [1, 1, -1, 0, 3]) for s in ("image", "text")}
    return pl.Prototypes(INDEX, terms)


def other_prototypes() -> Any:
    return pl.Prototypes(torch.tensor([1]), {})


def terms_of(prototypes: Any, prefix: str = "") -> dict[str, Any]:
    facts = {}
    for (student, teacher), made in prototypes.terms.items():
        labels = () if isinstance(prototypes, pl.OnlinePrototypes) else ("labels",)
        for name in ("prototypes", "teacher_centroids", "valid", *labels):
            facts[f"{prefix}{student}/{teacher}/{name}"] = getattr(made, name)
    return facts


def known(prototypes: Any) -> dict[str, Any]:
    facts = {"students": sorted(prototypes.students), "external": sorted(prototypes.external_teachers)}
    return {**facts, "positions": prototypes.positions(torch.tensor([10, 50, 30, 50])), **terms_of(prototypes)}


def clusterer() -> Any:
    return pl.EpisodicClusterer(3, warm_start=True, seed=1)


def build(clusterer: Any, first: int) -> Any:
    """Prototypes of six samples, from ``first`` on; two builds share three samples, one of which moves."""
    index = torch.arange(first, first + 6)
    image, text = index % 3, (index + (first > 0) * (index == 3)) % 3
    bank = pl.FeatureBank(index, dim=2)
    bank.update(index, blobs(image, 2, first), blobs(text, 2, first + 30))
    words = pl.TeacherAdapter.from_tensor(blobs(torch.arange(12) % 3, 4, 5))
    return clusterer.build(bank, {"words": words})


def next_build(clusterer: Any) -> dict[str, Any]:
    facts = terms_of(clusterer.previous, "previous/")
    prototypes = build(clusterer, 3)
    report = getattr(prototypes, "report", None) or clusterer.report
    return {**facts, **terms_of(prototypes), "drift": dict(report.drift), "changed": dict(report.changed)}


def back_translation() -> Any:
    return pl.PrototypicalBackTranslation(3)


def update(back_translation: Any, start: int = 0) -> None:
    back_translation.update(torch.tensor([0, 2, 2, 0]), fractions(4, 2, start))


def mean_of_all(back_translation: Any) -> dict[str, Any]:
    before = back_translation.counts.clone()
    update(back_translation, 8)
    return {"before": before, "prototypes": back_translation.compute(), "counts": back_translation.counts}


# ---- the loss -----------------------------------------------------------------------------------------------------------


def online(every: int = 3) -> Any:
    return pl.OnlinePrototypes(4, queue_size=16, every=every, warmup=3, seed=5)


def loss() -> Any:
    return pl.ProtoLoss(w_proto=0.5, w_external={"words": 2.0}, target_temperature=0.5, external_target_temperature=0.3)


def online_loss() -> Any:
    module = loss()
    module.set_prototypes(online())
    return module


def call(module: Any, start: int, **labels: Any) -> dict[str, Any]:
    """The parts of the loss of a batch of five, and the gradient of their sum for every input."""
    widths = {"image_features": 2, "text_features": 2, "image_features_projected": 3, "text_features_projected": 3}
    inputs = {name: fractions(5, width, start + 20 * i).requires_grad_() for i, (name, width) in enumerate(widths.items())}
    inputs |= {"logit_scale": torch.tensor(3.0, requires_grad=True), "logit_scale_proto": torch.tensor(2.0, requires_grad=True)}
    parts = module(**inputs, **labels, output_dict=True)
    sum(parts.values()).backward()
    return {**{k: x.detach() for k, x in parts.items()}, **{f"grad/{k}": x.grad for k, x in inputs.items()}}


def step(module: Any, start: int) -> dict[str, Any]:
    return call(module, start, teacher_features={"words": fractions(5, 4, start + 90)})


def steps(module: Any, count: int, start: int = 0) -> None:
    for number in range(count):
        step(module, 100 * (start + number))


def stacked(facts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([f[name] for f in facts]) for name in facts[0]}


def next_steps(module: Any) -> dict[str, Any]:
    """Seven further steps, in which prototypes change twice."""
    source = module.prototypes
    before = {"before/step": source.step, "before/version": source.version, **terms_of(source, "before/")}
    facts = stacked([step(module, 100 * (source.step + 1)) for _ in range(7)])
    return {**before, **facts, "step": source.step, "version": source.version, **terms_of(source)}


def in_a_loss(behaviour: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The behaviour of a loss that these prototypes are set in."""

    def with_loss(source: Any) -> Any:
        module = loss()
        module.set_prototypes(source)
        return behaviour(module)

    return with_loss


def episode_step(module: Any) -> dict[str, Any]:
    return call(module, 0, index=torch.tensor([10, 50, 30, 50, 20]))


def pairs_only(module: Any) -> dict[str, Any]:
    return call(module, 0)


def not_set(module: Any) -> dict[str, Any]:
    try:
        call(module, 0)
    except RuntimeError as error:
        return {"error": "prototypes are not set" in str(error)}
    return {"error": False}


def fill(module: torch.nn.Module) -> None:
    """Parameters and running statistics without a generator."""
    for number, x in enumerate(module.state_dict().values()):
        if x.is_floating_point():
            x.copy_(fractions(1, x.numel(), 50 * number).reshape(x.shape).abs() + 0.25)


def projected(module: torch.nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        if isinstance(module, ProjectionHeads):
            return dict(module.eval()(fractions(4, 3), fractions(4, 3, 50)))
        return {"h": module.eval()(fractions(4, 3))}


def nothing(_: Any) -> None:
    pass


def take_over(one: Any, other: Any) -> None:
    one.load_state_dict(other.state_dict())


STATES = [
    Saved("episode_sampler", sampler, two_drawn, next_episodes, exact=True),
    Saved("stream_episodes", stream, two_drawn, next_shards, exact=True),
    Saved("stream_pass", lambda: stream_pass(0), three_batches, rest_of_pass, exact=True),
    Saved("stream_pass_two_workers", lambda: stream_pass(2), three_batches, rest_of_pass, exact=True),
    Saved("bank_partly_written", bank, lambda x: write(x, [9, 3]), finished, exact=True),
    Saved("bank_complete", lambda: bank(torch.float16), lambda x: write(x, [9, 3, 4, 7]), held, exact=True),
    Saved("collector", collector, collect_twice, collected, exact=True),
    Saved("teacher", lambda: teacher(2), lambda x: take_over(x, teacher()), teacher_rows, exact=True),
    Saved("teacher_pca", teacher, lambda x: take_over(x, teacher(2)), teacher_rows),
    Saved("prototypes", other_prototypes, lambda x: take_over(x, prototypes()), known, exact=True),
    Saved("clusterer", clusterer, lambda x: build(x, 0), next_build),
    Saved("clusterer_unused", clusterer, nothing, lambda x: {"previous": x.previous}, exact=True),
    Saved("back_translation", back_translation, update, mean_of_all, exact=True),
    Saved("back_translation_unused", back_translation, nothing, lambda x: {"counts": x.counts}, exact=True),
    Saved("online_warmup", online, in_a_loss(lambda x: steps(x, 2)), in_a_loss(next_steps)),
    Saved("online", online, in_a_loss(lambda x: steps(x, 8)), in_a_loss(next_steps)),
    Saved("loss_not_set", loss, nothing, not_set, exact=True),
    Saved("loss_none_set", loss, lambda x: x.set_prototypes(None), pairs_only),
    Saved("loss_episode", loss, lambda x: x.set_prototypes(prototypes()), episode_step),
    Saved("loss_online_warmup", online_loss, lambda x: steps(x, 1), next_steps),
    Saved("loss_online", online_loss, lambda x: steps(x, 8), next_steps),
    Saved("loss_online_just_renewed", online_loss, lambda x: steps(x, 6), next_steps),
    Saved("head", lambda: pl.ProjectionHead(3, 2, 4), fill, projected, has_format=False),
    Saved("heads", lambda: ProjectionHeads(3, 2, 4, "layer"), fill, projected, has_format=False),
]
