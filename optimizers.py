"""The optimizers: which parameters each one updates, which of them decay, and Muon."""

import torch
import torch.distributed as dist

from device import DTYPES, pick_dtype


def configure_optimizers(model, optimizer, learning_rate, weight_decay, betas):
    """A list of optimizers that together update every parameter of a GPT.

    'adamw': AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for everything. Matrices and embeddings decay;
    biases and the gains of normalisations do not.
    'muon': Muon for the matrices inside the blocks, AdamW for the rest. One learning rate serves both.
    """
    if optimizer not in ('adamw', 'muon'):
        raise ValueError(f'optimizer={optimizer} is not one of adamw, muon')
    parameters = dict(model.named_parameters())
    hidden = {name: p for name, p in parameters.items() if optimizer == 'muon' and '.h.' in name and p.dim() == 2}
    rest = [p for name, p in parameters.items() if name not in hidden]
    groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
    fused = rest[0].device.type in ('cuda', 'cpu')  # all parameters in one kernel
    optimizers = [torch.optim.AdamW([group for group in groups if group['params']], learning_rate, betas, fused=fused)]
    if hidden:
        kv = model.config.n_kv_head * model.config.head_size
        rows = {'c_attn': (model.config.n_embd, kv, kv)}  # queries, keys and values are matrices of their own
        if model.config.mlp == 'swiglu':
            rows['c_fc'] = (model.config.n_mlp, model.config.n_mlp)  # so are the gate and what it gates
        splits = [rows.get(name.split('.')[-2], (len(p),)) for name, p in hidden.items()]
        optimizers.append(Muon(hidden.values(), splits, learning_rate, weight_decay))
    return optimizers


def orthogonalize(x, steps=5):
    """Nearly the orthogonal matrix closest to each of x (n, rows, columns), rows <= columns: its singular values
    become about 1, by the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). Close to 1 is enough, so the coefficients favour speed."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, matrix by matrix. PyTorch has torch.optim.Muon; this one stacks the
    matrices of one shape, which is several times faster for small models, and shares the stack among processes.

    params: 2-D parameters. splits: for each the rows of the matrices that it holds, one above the other.
    The update is scaled by 0.2 * sqrt(larger side), to the size that AdamW's updates have (Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so AdamW's learning rate and weight decay serve here too.
    """

    def __init__(self, params, splits, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.splits = splits
        self.dtype = DTYPES[pick_dtype('auto', str(self.param_groups[0]['params'][0].device))]

    @torch.no_grad()
    def step(self, closure=None):
        group, = self.param_groups
        params = group['params']
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]['momentum'] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        updates = torch._foreach_lerp(grads, momenta, group['momentum'])  # Nesterov's look ahead
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])

        stacks = {}  # shape -> the (parameter's, update's) pieces of that shape, lying on their long side
        for p, update, rows in zip(params, updates, self.splits):
            for pair in zip(p.split(rows), update.split(rows)):
                pair = [m if m.size(0) <= m.size(1) else m.mT for m in pair]
                stacks.setdefault(pair[0].shape, []).append(pair)
        for shape, pieces in stacks.items():
            stack = torch.stack([update for _, update in pieces])  # (n, rows, columns)
            stack = shared(orthogonalize, stack.to(self.dtype))  # as precise as a rough iteration needs
            for (p, _), update in zip(pieces, stack):
                p.add_(update, alpha=-group['lr'] * 0.2 * max(shape)**0.5)


def shared(function, x):
    """function(x), of which each process computes its share of the first dimension and all get the whole."""
    if not dist.is_initialized():
        return function(x)
    n, world_size, rank = len(x), dist.get_world_size(), dist.get_rank()
    share = -(-n // world_size)
    mine = x.new_zeros(share, *x.shape[1:])
    part = x[rank * share:(rank + 1) * share]
    if len(part):
        mine[:len(part)] = function(part)
    whole = x.new_empty(world_size * share, *x.shape[1:])
    dist.all_gather_into_tensor(whole, mine)
    return whole[:n]
