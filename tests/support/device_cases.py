"""What runs once an episode, the metrics and a few online steps: each a function of the device, for comparison with the CPU."""

import torch
from cases import integers, unit

from protoclip_losses import (
    EpisodicClusterer,
    FeatureBank,
    KMeans,
    OnlinePrototypes,
    ProtoLoss,
    PrototypicalBackTranslation,
    TeacherAdapter,
    metrics,
)
from protoclip_losses.functional import back_translate
from protoclip_losses.teachers import PCA

ROWS, K = 240, 12
IMAGE, TEXT, TEACHER = (unit(ROWS, width, seed, torch.float32) for seed, width in enumerate((6, 6, 9)))
LABELS = integers(K, ROWS, 5)


def kmeans(device, **settings):
    x = IMAGE.clone().to(device)
    x[3] = torch.nan
    first = KMeans(K, max_dropped=0.1, **settings).fit(x)
    again = KMeans(K, max_dropped=0.1, **settings).fit(x, init=first.centroids, index=torch.arange(ROWS, device=x.device).flip(0))
    results = first, again
    return [part for r in results for part in (r.centroids, r.labels, r.counts, torch.tensor([r.objective]), r.predict(x, 3))]


def build(device, **settings):
    bank = FeatureBank(torch.arange(ROWS).to(device), 6)
    bank.update(bank.index, IMAGE.to(device), TEXT.to(device))
    teachers = {"t": TeacherAdapter.from_tensor(TEACHER.to(device), dim=4)}
    clusterer = EpisodicClusterer(K, warm_start=True, **settings)
    found = []
    for _ in range(2):
        prototypes = clusterer.build(bank, teachers)
        found += [x for term in prototypes.terms.values() for x in (term.prototypes, term.valid, term.labels)]
        scalars = {name: value for name, value in prototypes.report.scalars().items() if "seconds" not in name}
        found.append(torch.tensor(list(scalars.values())))
        bank.update(bank.index[:9], TEXT[:9].to(device), IMAGE[:9].to(device))
    return found


def back_translation(device):
    stream = PrototypicalBackTranslation(K)
    for part in torch.arange(ROWS).split(100):
        stream.update(LABELS[part].to(device), IMAGE[part].to(device))
    loaded = PrototypicalBackTranslation(K)
    loaded.load_state_dict(stream.state_dict())
    return *back_translate(LABELS.to(device), IMAGE.to(device), K), stream.compute(), stream.counts, loaded.compute()


def pca(device):
    fitted = PCA.fit([TEACHER[:100].to(device), TEACHER[100:].to(device)], 3)
    return fitted.mean, fitted.components, fitted(TEACHER.to(device))


def online(device):
    prototypes = OnlinePrototypes(K, queue_size=64, every=2, warmup=2)
    loss = ProtoLoss(target_temperature=0.1)
    loss.set_prototypes(prototypes)
    parts = [loss(IMAGE[p].to(device).requires_grad_(), TEXT[p].to(device), 10.0).detach() for p in torch.arange(ROWS).split(24)]
    return *parts, *(x for term in prototypes.terms.values() for x in (term.prototypes, term.valid))


def all_metrics(device):
    image, text, labels = IMAGE.to(device), TEXT.to(device), LABELS.to(device)
    classifier = metrics.zero_shot_classifier([TEXT[k : k + 2].to(device) for k in range(K)])
    results = [
        metrics.retrieval_recall(image, text),
        metrics.retrieval_recall(image, text, concepts=labels),
        metrics.zero_shot_accuracy(image, labels, classifier),
        metrics.grouping(image, labels),
        metrics.linear_probe(image[:160], labels[:160], image[160:], labels[160:]),
    ]
    scores = metrics.modality_gap(image, text), metrics.adjusted_rand_score(labels, labels.flip(0))
    return *(torch.tensor(list(result.values())) for result in results), torch.tensor(scores)


CASES = {
    "kmeans": kmeans,
    "spherical": lambda device: kmeans(device, spherical=True),
    "faiss": lambda device: kmeans(device, backend="faiss"),
    "build": build,
    "build_by_faiss": lambda device: build(device, backend="faiss"),
    "back_translation": back_translation,
    "pca": pca,
    "online": online,
    "metrics": all_metrics,
}
