"""The optimizers: which parameters each one updates, which of them decay, and Muon."""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor

from common.device import pick_dtype


def configure_optimizers(model, optimizer, learning_rate, weight_decay, betas, sharded=False):
    """A list of optimizers that together update every parameter of a GPT.

    'adamw': AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for everything. Matrices and embeddings decay;
    biases and the gains of normalisations do not.
    'muon': Muon for the matrices inside the blocks, AdamW for the rest. One learning rate serves both.
    sharded: each process keeps the state of, and updates, some of the parameters, and gets the others from their
    keepers (ZeRO stage 1; Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    if optimizer not in ('adamw', 'muon'):
        raise ValueError(f'optimizer={optimizer} is not one of adamw, muon')
    parameters = dict(model.named_parameters())
    hidden = {name: p for name, p in parameters.items() if optimizer == 'muon' and '.h.' in name and p.dim() == 2}
    rest = [p for name, p in parameters.items() if name not in hidden]
    groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
    fused = rest[0].device.type in ('cuda', 'cpu')  # all parameters in one kernel
    kinds = [(partial(torch.optim.AdamW, betas=betas, fused=fused), [group for group in groups if group['params']])]
    if hidden:
        kv = model.config.n_kv_head * model.config.head_size
        rows = {'c_attn': (model.config.n_head * model.config.head_size, kv, kv)}  # queries, keys and values are matrices of their own
        if model.config.mlp == 'swiglu':
            rows['c_fc'] = (model.config.n_mlp, model.config.n_mlp)  # so are the gate and what it gates
        splits = {p: rows.get(name.split('.')[-2], (len(p),)) for name, p in hidden.items()}
        kinds.append((lambda groups, lr: Muon(groups, [splits[p] for p in groups[0]['params']], lr, share=not sharded),
                      [{'params': list(hidden.values()), 'weight_decay': weight_decay}]))
    if sharded:
        return [ZeroRedundancyOptimizer(params, kind, lr=learning_rate) for kind, params in kinds]
    return [kind(params, lr=learning_rate) for kind, params in kinds]


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

    params: 2-D parameters. splits: for each the rows of the matrices that it holds, one above the other. share: all
    processes have the same parameters, or shards of them, so that each orthogonalises only a part of the matrices.
    The update is scaled by 0.2 * sqrt(larger side), to the size that AdamW's updates have (Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so AdamW's learning rate and weight decay serve here too.
    """

    def __init__(self, params, splits, lr, weight_decay=0.1, momentum=0.95, share=True):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.splits, self.share = splits, share
        device = str(self.param_groups[0]['params'][0].device)
        self.dtype = torch.bfloat16 if pick_dtype('auto', device) == 'bfloat16' else torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        group, = self.param_groups
        params = group['params']
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        here = [local(p) for p in params]
        grads, momenta = [local(p.grad) for p in params], [local(self.state[p]['momentum']) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        updates = torch._foreach_lerp(grads, momenta, group['momentum'])  # Nesterov's look ahead
        torch._foreach_mul_(here, 1 - group['lr'] * group['weight_decay'])

        updates = [whole(update.to(self.dtype), p) for p, update in zip(params, updates)]  # a rough iteration follows
        stacks = {}  # shape -> the pieces of that shape, lying on their long side
        for update, rows in zip(updates, self.splits):
            for piece in update.split(rows):
                piece = piece if piece.size(0) <= piece.size(1) else piece.mT
                stacks.setdefault(piece.shape, []).append(piece)
        for shape, pieces in stacks.items():
            stack = torch.stack(pieces)  # (n, rows, columns)
            stack = shared(orthogonalize, stack) if self.share else orthogonalize(stack)
            torch._foreach_copy_(pieces, list(stack * (0.2 * max(shape)**0.5)))
        for p, mine, update in zip(params, here, updates):
            mine.add_(part(update, p), alpha=-group['lr'])


def local(x):
    """What this process has of a tensor that fully_shard has cut into shards; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(mine, like):
    """The whole matrix of which `mine` is this process's shard, cut as `like` is."""
    if not isinstance(like, DTensor):
        return mine
    return DTensor.from_local(mine, like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride()).full_tensor()


def part(x, like):
    """The shard of x that this process has of `like`."""
    if not isinstance(like, DTensor):
        return x
    mine = distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return mine.to(like.to_local().device)  # the CPU, for offloaded parameters


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
    dist.all_gather(list(whole.split(share)), mine)
    return whole[:n]
