"""Dense float64 twins of every formula, written from the equations and from nothing in the library.

z: encoder output, h: projected features, s: exponentiated scale, C: a teacher's centroids, P: prototypes in the student's space,
a: the teacher's label of each sample, valid: which clusters exist. Everything is computed in float64 with autograd.
"""

import torch


def info_nce(z_image, z_text, s):
    """1/2 [CE(s Z_I Z_T^T, diag) + CE(s Z_T Z_I^T, diag)]"""
    logits = s * z_image.double() @ z_text.double().T
    return -(logits.log_softmax(1).diagonal().mean() + logits.T.log_softmax(1).diagonal().mean()) / 2


def teacher_distribution(C, temperature, valid=None):
    """y = softmax(C C^T / tau), (K, K), over the clusters that exist"""
    exists = torch.ones(len(C), dtype=torch.bool) if valid is None else valid
    kept = C.double().where(exists[:, None], 0)  # what an empty cluster's row holds is nobody's business but its own
    return (C.double() @ kept.T / temperature).masked_fill(~exists, -torch.inf).softmax(1)


def soft_targets(C, P, temperature, valid=None):
    """M = softmax(C C^T / tau) P"""
    P = P.double() if valid is None else P.double().where(valid[:, None], 0)
    return teacher_distribution(C, temperature, valid) @ P


def prototype_cross_entropy(h, P, a, s, C=None, temperature=None, valid=None, ignore_index=-1):
    """-1/n sum_i sum_j y_ij log p_ij, p = softmax(s h P^T), y one-hot, or softmax(C[a] C^T / tau) at a temperature"""
    counts = a != ignore_index
    if not counts.any():
        return s * (h.double()[:0]).sum()
    exists = torch.ones(len(P), dtype=torch.bool) if valid is None else valid
    kept = P.double().where(exists[:, None], 0)
    log_p = (s * h[counts].double() @ kept.T).masked_fill(~exists, -torch.inf).log_softmax(1)
    if temperature is None:
        y = torch.nn.functional.one_hot(a[counts], len(P)).double()
    else:
        y = teacher_distribution(C, temperature, valid)[a[counts]]
    return -(y * log_p).where(exists, 0).sum() / counts.sum()


def factored_cross_entropy(h, P, a, s, M, valid=None, ignore_index=-1):
    """1/n sum_i [logsumexp_j(s h_i.P_j) - s h_i.M[a_i]]: the form for targets that are given as rows"""
    counts = a != ignore_index
    h, P = h[counts].double(), P.double()
    logits = s * h @ P.T if valid is None else (s * h @ P.T).masked_fill(~valid, -torch.inf)
    return (logits.logsumexp(1) - s * (h * M.double()[a[counts]]).sum(1)).sum() / counts.sum()


def back_translate(labels, features, num_prototypes):
    """P_k = mean of h_i over a_i = k, one cluster at a time"""
    prototypes = torch.zeros(num_prototypes, features.shape[1], dtype=torch.float64)
    counts = torch.zeros(num_prototypes, dtype=torch.int64)
    for k in range(num_prototypes):
        members = [features[i].double() for i in range(len(labels)) if labels[i] == k]
        counts[k] = len(members)
        if members:
            prototypes[k] = sum(members) / len(members)
    return prototypes, counts


def objective(
    z,
    h,
    s,
    s_proto,
    episode,
    index,
    *,
    w_clip=1.0,
    w_proto=1.0,
    w_external=1.0,
    temperature=0.01,
    external_temperature=None,
    back_translation=True,
):
    """w_clip InfoNCE + w_proto mean of internal terms + sum over external teachers of w_ext mean over students, as three parts.

    z: pair of encoder outputs; h: projected features by modality; ``episode.index`` the samples that were clustered and
    ``episode.terms`` {(student, teacher): a term with prototypes, teacher_centroids, labels, valid}.
    """
    row = {int(sample): i for i, sample in enumerate(episode.index)}
    rows = torch.tensor([row[int(sample)] for sample in index])
    students = {student for student, _ in episode.terms}
    internal, external = [], {}
    for (student, teacher), term in episode.terms.items():
        P = term.prototypes if back_translation else term.teacher_centroids
        tau = temperature if teacher in students else external_temperature
        value = prototype_cross_entropy(
            h[student], P, term.labels[rows], s_proto, C=term.teacher_centroids, temperature=tau, valid=term.valid
        )
        (internal if teacher in students else external.setdefault(teacher, [])).append(value)
    weights = w_external if isinstance(w_external, dict) else dict.fromkeys(external, w_external)
    return {
        "contrastive_loss": w_clip * info_nce(*z, s),
        "proto_loss": w_proto * sum(internal) / max(1, len(internal)),
        "proto_external_loss": sum(weights[t] * sum(values) / len(values) for t, values in external.items()),
    }


def distances(features, centroids):
    """||x_i - c_k||^2, (N, K), from the differences"""
    return (features.double()[:, None] - centroids.double()).square().sum(2)


def lloyd(features, centroids, niter, spherical=False):
    """Centroids after ``niter`` times: the nearest centroid of each row, the mean of each centroid's rows; and the objectives"""
    unit = torch.nn.functional.normalize if spherical else lambda x, dim: x
    centroids, objectives = unit(centroids.double(), dim=1), []
    for _ in range(niter):
        distance, labels = distances(features, centroids).min(1)
        objectives.append(float(distance.sum()))
        means, counts = back_translate(labels, features, len(centroids))
        assert (counts > 0).all(), "where an empty cluster goes is not a matter of Lloyd's algorithm"
        centroids = unit(means, dim=1)
    return centroids, objectives


def relational_distillation(h, t, s, temperature):
    """1/n sum_i KL(softmax_{j != i}(t_i.t_j / tau) || softmax_{j != i}(s h_i.h_j)) over the rows that the teacher knows"""
    known = t.double().norm(dim=1) > 0
    h, t = h.double()[known], torch.nn.functional.normalize(t.double()[known], dim=1)
    if len(h) < 2:
        return s * h.sum() * 0
    others = ~torch.eye(len(h), dtype=torch.bool)
    log_p = (t @ t.T / temperature)[others].view(len(h), -1).log_softmax(1)
    log_q = (s * h @ h.T)[others].view(len(h), -1).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def info_nce_of_repeats(z_image, z_text, s, ids, repeats):
    """InfoNCE in which other pairs of the same id are left out of a softmax, or are targets of equal mass"""
    same = ids[:, None] == ids
    logits = s * z_image.double() @ z_text.double().T
    if repeats == "mask":
        logits = logits.masked_fill(same & ~torch.eye(len(ids), dtype=torch.bool), -torch.inf)
        return -(logits.log_softmax(1).diagonal() + logits.T.log_softmax(1).diagonal()).mean() / 2
    target = same.double() / same.sum(1, keepdim=True)
    return -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2


def mixture_cross_entropy(h, P, labels, s, weights=None, M=None, valid=None, ignore_index=-1):
    """-1/n sum_i sum_l w_il [s h_i.M[a_il] - logsumexp_j(s h_i.P_j)], w made to sum to 1 over the labels that count"""
    kept = labels != ignore_index
    w = (torch.ones(labels.shape) if weights is None else weights).double().where(kept, 0)
    counts = w.sum(1) > 0
    if not counts.any():
        return s * h.double()[:0].sum()
    w, a, h = (w / w.sum(1, keepdim=True))[counts], labels.clamp(min=0)[counts], h.double()[counts]
    targets = P if M is None else M
    logits = s * h @ P.double().T if valid is None else (s * h @ P.double().T).masked_fill(~valid, -torch.inf)
    positive = s * (h[:, None] * targets.double()[a]).sum(2)
    return (w * (logits.logsumexp(1, keepdim=True) - positive)).sum() / counts.sum()


def sigmoid_pair_loss(x, y, s, b):
    """-1/B sum_ij log sigmoid(z_ij (s x_i.y_j + b)), z = 1 on the diagonal, -1 elsewhere"""
    z = 2 * torch.eye(len(x), dtype=torch.float64) - 1
    return -torch.nn.functional.logsigmoid(z * (s * x.double() @ y.double().T + b)).sum() / len(x)
