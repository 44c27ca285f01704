"""Evaluation of encoders: features, kNN, the quick probe, and signals that need no labels."""

import torch
import torch.nn.functional as F

from common import augment, data, ddp
from common.loss import unit

MAX_BANK = 100_000                              # images at most in the bank of `monitor`
MAX_BANK_UNLABELLED = 10_000                    # the same without labels


@torch.no_grad()
def features(encoder, images, *, normalisation, size, device, workers, feature="h",
             precision="fp32", batch=None, change=None):
    """Features (n, D) float32 on `device` of all un-augmented images, in order, in eval mode.

    `feature` is named as in `Encoder.embed`. `batch` images are read at once, by default 500 small
    or 100 large ones. `change`, if given, is applied to the uint8 images
    (n, 3, size, size) first. The encoder's training mode is restored. Processes share the work and
    return all rows.
    """
    training = encoder.training
    encoder.eval()
    normalise = augment.Augment("none", normalisation=normalisation).to(device)
    most, mine = -(-len(images) // ddp.world()), slice(ddp.rank(), None, ddp.world())
    out, done = torch.zeros(most, encoder.width(feature), device=device), 0
    batch = batch or (500 if size <= data.SMALL else 100)       # needs less memory than training
    for x in data.whole(images.take(mine), size=size, batch=batch, device=device, workers=workers):
        if change:
            x = change(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out[done:done + len(x)] = encoder.embed(normalise.transform(x, {}), feature)
        done += len(x)
    encoder.train(training)
    # Row j of process r belongs to image W j + r; the last row may be padding.
    found = ddp.all_gather(out).unflatten(0, (ddp.world(), most)).transpose(0, 1)
    return found.flatten(0, 1)[:len(images)]


@torch.no_grad()
def knn(bank, bank_labels, queries, query_labels, k=200, temperature=.1):
    """Top-1 accuracy in percent of a weighted k-nearest-neighbour vote (Wu et al. 2018, Sec. 3.4).

    `bank` (n, D) and `queries` (m, D) are compared by cosine similarity; each of the k nearest
    votes for its label with weight exp(cosine / temperature).
    """
    bank, k, classes, right = unit(bank), min(k, len(bank)), n_classes(bank_labels), 0
    bank_labels, query_labels = bank_labels.to(bank.device), query_labels.to(bank.device)
    for part, labels in zip(unit(queries).split(256), query_labels.split(256)):
        cosine, nearest = (part @ bank.T).topk(k, dim=1)                        # (256, k)
        votes = part.new_zeros(len(part), classes)
        weights = ((cosine - cosine[:, :1]) / temperature).exp()        # at most 1: no overflow
        votes.scatter_add_(1, bank_labels[nearest], weights)
        right += (votes.argmax(1) == labels).sum()
    return 100 * right.item() / len(queries)


def n_classes(labels):
    """The number of classes: the largest of `labels` (n,) plus one."""
    return int(labels.max()) + 1


@torch.no_grad()
def monitor(encoder, dataset, crops, augmentation, **options):
    """How good the features are, as a dict: `knn` (with labels only) and three label-free signals.

    `knn` is the kNN accuracy of h in percent. `alignment` and `uniformity` are those of z, on
    uint8 crops (2, n, 3, H, W) that `augmentation` turns into views, always the same. `rank` is the
    effective rank of h. `options` as in `features`. Of large data sets, every n-th image is used:
    at most 100,000 in the bank (10,000 without labels) and 10,000 queries.
    """
    bank = thin(dataset.train, MAX_BANK if dataset.test else MAX_BANK_UNLABELLED)
    h, found = features(encoder, bank, **options), {}
    if dataset.test:
        queries = thin(dataset.test, MAX_BANK // 10)
        found["knn"] = knn(h, bank.labels, features(encoder, queries, **options), queries.labels)
    training = encoder.training
    encoder.eval()
    z1, z2 = (ddp.all_gather(encoder.embed(x, "z").float()) for x in augmentation(crops, 0))
    encoder.train(training)
    return {**found, "alignment": alignment(z1, z2), "uniformity": uniformity(z1),
            "rank": effective_rank(h)}


def alignment(z1, z2):
    """Mean squared distance of the unit-length z1, z2 (n, D) of two views: 0 (equal) to 4.

    Wang and Isola 2020, Sec. 4.1, alpha = 2. It is 2 for unrelated directions.
    """
    return (unit(z1) - unit(z2)).square().sum(1).mean().item()


def uniformity(z):
    """log of the mean of exp(-2 |zi - zj|^2) over pairs of unit-length z (n, D).

    0 if all are equal; about -4 if they are uniform on a sphere of many dimensions (Wang and Isola
    2020, Sec. 4.1, t = 2).
    """
    return torch.pdist(unit(z)).square().mul(-2).exp().mean().log().item()


def effective_rank(h):
    """exp(entropy of the singular values of h (n, D)): 1 to D (Garrido et al. 2023, RankMe)."""
    gram = sum(part.double().T @ part.double() for part in h.split(4096))       # (D, D)
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum()
    return torch.special.entr(share).sum().exp().item()


def thin(images, most):
    """Every n-th of `images`, so that at most `most` are left."""
    return images.take(slice(None, None, max(1, -(-len(images) // most))))


def quick_probe(train, labels, test, test_labels, seed=0, copies=1):
    """Logistic regression on standardised features; its L2 penalty is chosen on held-out data.

    `train` (n, D) and `test` (m, D) float32. If an image has several `copies` in `train`, they are
    n / copies rows apart, and are held out together. Returns a dict: `top1` in percent on `test`,
    `penalty`, and `held_out`, the accuracy in percent on a tenth of `train` for each penalty.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    # The classifier is the same on features rotated to their principal axes; L-BFGS is faster.
    variance, axes = torch.linalg.eigh(train.T @ train / len(train))
    train, test, variance = train @ axes, test @ axes, variance.clamp(min=0)
    labels, test_labels = labels.to(train.device), test_labels.to(train.device)
    classes = n_classes(labels)
    n = len(train) // copies
    order = torch.from_numpy(augment.generator("held out", seed).permutation(n)).to(train.device)
    first = n * torch.arange(copies, device=train.device)[:, None]
    held, fit = ((first + part).flatten() for part in (order[:n // 10], order[n // 10:]))
    x, y, held_out, weights, weight = train[fit], labels[fit], {}, {}, None
    for penalty in (1., .1, .01, 1e-3, 1e-4):                   # each starts from the last solution
        weight = weights[penalty] = _logistic(x, y, classes, penalty, variance, weight)
        held_out[penalty] = _accuracy(train[held], labels[held], weight)
        if held_out[penalty] < max(held_out.values()) - 1:      # the best penalty has been passed
            break
    best = max(held_out, key=held_out.get)
    weight = _logistic(train, labels, classes, best, variance, weights[best], iterations=300)
    return {"top1": _accuracy(test, test_labels, weight), "penalty": best, "held_out": held_out}


def _accuracy(x, y, weight):
    return 100 * ((x @ weight[:-1] + weight[-1]).argmax(1) == y).double().mean().item()


def _logistic(x, y, classes, penalty, variance, start=None, iterations=100):
    """Minimise mean cross-entropy + penalty/2 |weights|^2 by L-BFGS: weights (D + 1, classes).

    The last row is the bias. `variance` (D,) of the columns of x preconditions the search: the
    curvature along column i is about variance_i / classes + penalty.
    """
    onehot = F.one_hot(y, classes).to(x.dtype)
    width = torch.cat([(variance / classes + penalty).rsqrt(), variance.new_ones(1)])[:, None]
    v = x.new_zeros(x.shape[1] + 1, classes) if start is None else start / width
    search = torch.optim.LBFGS([v], max_iter=iterations, tolerance_grad=1e-6,
                               line_search_fn="strong_wolfe")

    def loss():
        w = width * v
        logp = torch.log_softmax(torch.addmm(w[-1], x, w[:-1]), 1)
        error = (logp.exp() - onehot) / len(x)                  # gradient of the logits
        v.grad = width * torch.cat([(error.T @ x).T + penalty * w[:-1], error.sum(0, keepdim=True)])
        return penalty / 2 * w[:-1].square().sum() - (logp * onehot).sum() / len(x)

    search.step(loss)
    return width * v
