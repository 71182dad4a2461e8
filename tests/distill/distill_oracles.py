"""The losses of jtl.distill again, in float64 NumPy and by loops, from the papers' formulas."""

import numpy as np


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(p, q):
    """KL of two distributions, entry by entry."""
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(x, temperature=1.0):
    return np.exp(log_softmax(np.asarray(x, np.float64) / temperature))


def soft_targets(s, t, temperature):
    return temperature**2 * np.mean(
        [kl(softmax(b, temperature), softmax(a, temperature)) for a, b in zip(s, t, strict=True)]
    )


def dkd(s, t, label, temperature, alpha, beta):
    total = []
    for a, b, y in zip(s, t, label, strict=True):
        a, b = np.asarray(a, np.float64) / temperature, np.asarray(b, np.float64) / temperature
        p, q = softmax(b), softmax(a)
        target = kl([p[y], np.delete(p, y).sum()], [q[y], np.delete(q, y).sum()])
        total.append(alpha * target + beta * kl(softmax(np.delete(b, y)), softmax(np.delete(a, y))))
    return temperature**2 * np.mean(total)


def dist(s, t, temperature, beta, gamma):
    p, q = softmax(s, temperature), softmax(t, temperature)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def hint(s, t):
    return np.mean([0.5 * np.linalg.norm((b - a).ravel()) ** 2 for a, b in zip(s, t, strict=True)])


def attention_transfer(s, t, squared=False):
    def q(a):
        a = (np.abs(a) ** 2).sum(-1).ravel()
        return a / np.linalg.norm(a)

    gaps = [q(a) - q(b) for a, b in zip(s, t, strict=True)]
    return np.mean([(g**2).mean() if squared else np.linalg.norm(g) / 2 for g in gaps])


def fsp(s, t):
    def g(first, second):
        c, e = first.shape[-1], second.shape[-1]
        return first.reshape(-1, c).T @ second.reshape(-1, e) / (first.size / c)

    return np.mean(
        [
            np.linalg.norm(g(*a) - g(*b)) ** 2
            for a, b in zip(zip(*s, strict=True), zip(*t, strict=True), strict=True)
        ]
    )


def pkt(s, t):
    def conditional(x):
        x = x.reshape(len(x), -1).astype(np.float64)
        p = np.zeros((len(x), len(x)))
        for i in range(len(x)):
            for j in range(len(x)):
                if i != j:
                    p[i, j] = (x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) + 1) / 2
        return p / p.sum(1, keepdims=True)

    return np.mean([kl(a, b) for a, b in zip(conditional(t), conditional(s), strict=True)])


def similarity(s, t):
    def g(x):
        x = x.reshape(len(x), -1).astype(np.float64)
        return np.stack([row / np.linalg.norm(row) for row in x @ x.T])

    return np.linalg.norm(g(t) - g(s)) ** 2 / len(s) ** 2


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def rkd_distance(s, t):
    n = range(len(s))

    def relative(x):
        d = {(i, j): np.linalg.norm((x[i] - x[j]).ravel()) for i in n for j in n if i != j}
        return {pair: value / np.mean(list(d.values())) for pair, value in d.items()}

    a, b = relative(s), relative(t)
    return np.mean([huber(a[pair] - b[pair]) for pair in a])


def rkd_angle(s, t):
    n = range(len(s))

    def cosines(x):
        x = x.reshape(len(x), -1).astype(np.float64)
        e = {(i, j): (x[i] - x[j]) / np.linalg.norm(x[i] - x[j]) for i in n for j in n if i != j}
        return {(i, j, k): e[i, j] @ e[k, j] for i in n for j in n for k in n if len({i, j, k}) == 3}

    a, b = cosines(s), cosines(t)
    return np.mean([huber(a[triple] - b[triple]) for triple in a])


def hierarchical_context(s, t):
    total, weights, factor = np.mean((s - t) ** 2), 1.0, 1.0
    size = s.shape[1]
    for grid in (4, 2, 1):
        if grid >= size:
            continue
        cells = [(g * size // grid, -(-(g + 1) * size // grid)) for g in range(grid)]
        pooled = np.stack([[(s - t)[:, a:b, c:d].mean((1, 2)) for c, d in cells] for a, b in cells])
        factor /= 2
        total, weights = total + factor * np.mean(pooled**2), weights + factor
    return total / weights


def crd(s, t, own, negatives, examples, temperature):
    """One direction: unit embeddings ``s`` against the positives ``t`` and the ``negatives`` (B, N, D)."""
    n = negatives.shape[1]

    def h(similarity):
        return np.exp(similarity / temperature) / (np.exp(similarity / temperature) + n / examples)

    return np.mean(
        [-np.log(h(s[i] @ t[i])) - sum(np.log(1 - h(s[i] @ row)) for row in negatives[i]) for i in own]
    )
