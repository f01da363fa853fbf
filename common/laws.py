"""
The loss that parameters and tokens give: L = E + A/N^alpha + B/D^beta, in nats per token.

N is the number of parameters, embeddings included, D that of training tokens, and C = 6ND their compute in FLOPs.
Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv:2203.15556; the law is section 3.3's.
"""

import itertools
import json
from dataclasses import astuple, dataclass, fields

import torch
import torch.nn.functional as F

from data.errors import UserError


@dataclass
class Law:
    """The five numbers, each a float or a float64 tensor of one shape, tensors hold a batch of laws."""
    E: float  # the loss that no model and no data gets below
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, n, d):
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def optimum(self, flops):
        """(N, D) of least loss for that compute: equation 4."""
        G = (self.alpha * self.A / (self.beta * self.B))**(1 / (self.alpha + self.beta))
        n = G * (flops / 6)**(self.beta / (self.alpha + self.beta))
        return n, flops / 6 / n


def power(n0, flops0, exponent):
    """The optimum N ~ C^exponent through the one known point (n0, flops0), as a function like Law.optimum."""
    def optimum(flops):
        n = n0 * (flops / flops0)**exponent
        return n, flops / 6 / n
    return optimum


CHINCHILLA = Law(1.6934, 406.4, 0.3392, 410.7, 0.2849)  # section D.3, with two more digits, from its source: its optima
EQUATION_10 = Law(1.69, 406.4, 0.34, 410.7, 0.28)  # the same fit as printed: its losses, such as 1.94 for Chinchilla
REFIT = Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
OPTIMA = {  # exponents of table 2, points of tables 3 and A3
    'Hoffmann et al. 2022, approach 1 (training curves)': power(1e9, 1.21e20, 0.50),
    'Hoffmann et al. 2022, approach 2 (IsoFLOP profiles)': power(1e9, 1.20e20, 0.49),
    'Hoffmann et al. 2022, approach 3 (this law)': CHINCHILLA.optimum,
    "Besiroglu et al. 2024, approach 3's data refitted (arXiv:2404.10102)": REFIT.optimum,
}


def read(path):
    """(Law, (least, most) FLOPs of the runs it was fitted to) of the file that scaling.py writes."""
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
        law = Law(**{field.name: float(content['law'][field.name]) for field in fields(Law)})
        low, high = map(float, content['flops'])
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} holds no law: scaling.py writes one into its out_dir, as scaling.json') from None
    return law, (low, high)

# -----------------------------------------------------------------------------
# fitting

DELTA = 1e-3  # of the Huber loss: residuals of log L beyond it count linearly, so that a run gone wrong weighs little


def fit(n, d, loss, start=None, steps=100):
    """The Law of runs with n parameters, d tokens and a final loss, float64 (R,) each: approach 3, the least Huber loss
    on log L from a grid of starts. loss may be (…, R), and the law is then (…). start: a law near it, not the grid.

    Levenberg-Marquardt on reweighted squares where the paper has L-BFGS: it takes thousands of fits in one batch.
    """
    log_n, log_d, target = n.log(), d.log(), loss.log()
    at_n, at_d = log_n.mean(), log_d.mean()  # A and B are fitted as terms there, which hardly depend on the exponents
    x, y = log_n - at_n, log_d - at_d
    if start is None:
        least = target.amin(dim=-1, keepdim=True)  # (…, 1)
        grid = torch.tensor([*itertools.product((0.3, 0.9), (0.1, 0.4, 1.0), (0.1, 0.4, 1.0))], dtype=torch.float64)
        share, alpha, beta = (least * 0 + column for column in grid.unbind(-1))  # share: of E in the least loss
        half = least + ((1 - share) / 2).log()  # the rest is A's and B's
        theta = torch.stack((least + share.log(), half, alpha, half, beta), dim=-1)
        target = target[..., None, :]
    else:
        E, A, alpha, B, beta = astuple(start)
        theta = torch.stack((E.log(), A.log() - alpha * at_n, alpha, B.log() - beta * at_d, beta), dim=-1)  # (…, 5)

    def evaluate(theta):
        """Residuals of log L (…, R), each term's share of L (…, R, 3), and the Huber loss (…)."""
        e, a, alpha, b, beta = theta[..., None].unbind(-2)
        terms = torch.stack(torch.broadcast_tensors(e, a - alpha * x, b - beta * y), dim=-1)
        predicted = terms.logsumexp(dim=-1)
        residuals = predicted - target
        error = F.huber_loss(residuals, torch.zeros_like(residuals), delta=DELTA, reduction='none').sum(-1)
        return residuals, (terms - predicted[..., None]).exp(), error

    damping = torch.full(theta.shape[:-1], 1e-2, dtype=torch.float64)
    for _ in range(steps):
        residuals, shares, error = evaluate(theta)
        e, a, b = shares.unbind(-1)
        J = torch.stack((e, a, -a * x, b, -b * y), dim=-1)  # (…, R, 5)
        weighted = J * (DELTA / residuals.abs().clamp(min=DELTA))[..., None]
        H, g = weighted.mT @ J, weighted.mT @ residuals[..., None]
        H = H + torch.diag_embed(H.diagonal(dim1=-2, dim2=-1) * damping[..., None] + 1e-12)
        trial = theta - torch.linalg.solve(H, g).squeeze(-1)
        better = evaluate(trial)[-1] < error
        theta = torch.where(better[..., None], trial, theta)
        damping = torch.where(better, damping / 5, damping * 5).clamp(1e-12, 1e6)
    if start is None:
        best = evaluate(theta)[-1].argmin(dim=-1)[..., None, None]
        theta = theta.take_along_dim(best, dim=-2).squeeze(-2)
    e, a, alpha, b, beta = theta.unbind(-1)
    return Law(e.exp(), (a + alpha * at_n).exp(), alpha, (b + beta * at_d).exp(), beta)


def resample(n, d, loss, law, times):
    """(laws, noise): `times` laws (…, times) fitted to runs whose losses are law's and residuals drawn with
    replacement, and as many such residuals, in nats of log L. law: fit(n, d, loss)."""
    wide = Law(*(x[..., None] for x in astuple(law)))
    fitted = wide.loss(n, d)  # (…, R)
    R = loss.size(-1)
    residuals = (loss / fitted).log() * (R / (R - 5))**0.5  # five numbers have taken their share of the scatter
    residuals = residuals - residuals.mean(dim=-1, keepdim=True)
    draws = torch.randint(R, (*loss.shape[:-1], times * (R + 1)), generator=torch.Generator().manual_seed(0))
    draws = residuals.gather(-1, draws).unflatten(-1, (times, R + 1))
    return fit(n, d, fitted[..., None, :] * draws[..., :R].exp(), wide, steps=40), draws[..., R]


def interval(samples):
    """(low, high) between which 90% of the samples (…, times) lie."""
    return samples.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=-1)


def predict(law, laws, noise, n, d):
    """(loss, low, high) of a run of n parameters and d tokens that none of the fits has seen: the bounds of its 90%
    interval, from resample's laws and noise."""
    return law.loss(n, d), *interval((laws.loss(n, d).log() + noise).exp())
