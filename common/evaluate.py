"""What a frozen encoder knows: features, weighted kNN, and the quick probe."""

import torch

from common import augment, data, ddp
from common.loss import unit

MONITOR = 100_000                                               # at most so many images in a kNN taken while training


@torch.no_grad()
def features(encoder, images, *, scale, size, device, workers, feature="h", precision="fp32", batch=500):
    """Features (n, D) float32 on `device` of all un-augmented images in their order, in eval mode, each image once.

    `feature` as in `Encoder.embed`. Draws from no generator; the encoder's training mode is as before afterwards.
    """
    training, normalise = encoder.training, augment.Augment("none", scale=scale).to(device)
    encoder.eval()
    mine, parts = ddp.rows(len(images)), []
    for x in data.whole(images, size=size, batch=batch, device=device, workers=workers, rows=mine):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(encoder.embed(normalise.apply_draws(x, None), feature))
    encoder.train(training)
    out = torch.cat(parts).float()
    if ddp.world() == 1:
        return out
    # processes hold parts that differ by one row: pad, gather, cut
    longest = -(-len(images) // ddp.world())
    padded = out.new_zeros(longest, out.shape[1])
    padded[:len(out)] = out
    n, world, gathered = len(images), ddp.world(), ddp.all_gather(padded).split(longest)
    return torch.cat([part[:n * (r + 1) // world - n * r // world] for r, part in enumerate(gathered)])


@torch.no_grad()
def knn(bank, bank_labels, queries, query_labels, k=200, temperature=.1):
    """Top-1 accuracy in percent of a weighted k-nearest-neighbour vote (Wu et al. 2018, Sec. 3.4).

    `bank` (n, D) and `queries` (m, D) are compared by cosine; each of the k nearest votes with exp(cosine/temperature).
    """
    bank, k, classes, right = unit(bank), min(k, len(bank)), int(bank_labels.max()) + 1, 0
    bank_labels, query_labels = bank_labels.to(bank.device), query_labels.to(bank.device)
    for part, y in zip(unit(queries).split(256), query_labels.split(256)):
        cosine, nearest = (part @ bank.T).topk(k, dim=1)                        # (256, k)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
        right += (votes.argmax(1) == y).sum()
    return 100 * right.item() / len(queries)


def monitor(encoder, dataset, **how):
    """kNN accuracy of h in percent while training, or None where there are no labels; `how` as in `features`.

    Of large data sets every n-th image, at most 100,000 in the bank and 10,000 asked.
    """
    if dataset.test is None:
        return None
    bank, queries = thin(dataset.train, MONITOR), thin(dataset.test, MONITOR // 10)
    return knn(features(encoder, bank, **how), bank.labels, features(encoder, queries, **how), queries.labels)


def thin(images, most):
    """Every n-th of `images`, so that at most `most` are left."""
    return images if len(images) <= most else images.take(slice(None, None, -(-len(images) // most)))


def quick_probe(train, labels, test, test_labels, seed=0):
    """Multinomial logistic regression on standardised features, its L2 penalty chosen on a tenth of `train`.

    `train` (n, D) and `test` (m, D) float32. Returns a dict: `top1` in percent on `test`, `penalty`, and `held_out`,
    the accuracy in percent on held-out training data for each penalty tried. Seconds where an SGD probe takes minutes.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    # turned to their principal axes, which changes neither the penalty nor the result, but how soon it is found
    variance, axes = torch.linalg.eigh(train.T @ train / len(train))
    train, test, variance = train @ axes, test @ axes, variance.clamp(min=0)
    labels, test_labels, classes = labels.to(train.device), test_labels.to(train.device), int(labels.max()) + 1
    shuffled = torch.from_numpy(augment.generator(seed, 3).permutation(len(train))).to(train.device)
    held, fit = shuffled[:len(train) // 10], shuffled[len(train) // 10:]
    x, y, held_out, weight, best = train[fit], labels[fit], {}, None, None
    for penalty in (1., .1, .01, 1e-3, 1e-4):                   # from the strongest, each from where the last ended
        weight = _logistic(x, y, classes, penalty, variance, weight)
        held_out[penalty] = _accuracy(train[held], labels[held], weight)
        if best is None or held_out[penalty] > held_out[best[0]]:
            best = penalty, weight
        elif held_out[penalty] < held_out[best[0]] - 1:
            break                                               # clearly past the best
    weight = _logistic(train, labels, classes, best[0], variance, best[1], iterations=300)
    return {"top1": _accuracy(test, test_labels, weight), "penalty": best[0], "held_out": held_out}


def _accuracy(x, y, weight):
    return 100 * ((x @ weight[:-1] + weight[-1]).argmax(1) == y).double().mean().item()


def _logistic(x, y, classes, penalty, variance, start=None, iterations=100):
    """Weights (D + 1, classes), the last row the bias: minimises mean cross-entropy + penalty/2 |weights|^2.

    `variance` (D,) of x's columns scales the search: the curvature along column i is about variance_i / classes + penalty.
    """
    onehot = torch.nn.functional.one_hot(y, classes).to(x.dtype)
    scale = torch.cat([(variance / classes + penalty).rsqrt(), variance.new_ones(1)])[:, None]
    v = x.new_zeros(x.shape[1] + 1, classes) if start is None else start / scale
    search = torch.optim.LBFGS([v], max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss():
        w = scale * v
        logp = torch.log_softmax(torch.addmm(w[-1], x, w[:-1]), 1)
        error = (logp.exp() - onehot) / len(x)                  # gradient with respect to the logits
        v.grad = scale * torch.cat([(error.T @ x).T + penalty * w[:-1], error.sum(0, keepdim=True)])
        return penalty / 2 * w[:-1].square().sum() - (logp * onehot).sum() / len(x)

    search.step(loss)
    return scale * v
