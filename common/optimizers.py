"""The optimizers: which parameters each one updates, which of them decay, Muon, and which steps are skipped."""

import math
from collections import Counter

import torch

from common import distributed
from common.device import pick_dtype
from common.distributed import to_local


def configure_optimizers(model, optimizer, learning_rate, weight_decay, betas, eps=1e-8):
    """A list of optimizers that together update every parameter of a GPT that is not frozen. Raises ValueError for an
    unknown name.

    'adamw': AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for everything. Matrices and embeddings decay;
    biases and the gains of normalisations do not.
    'muon': Muon for the matrices inside the blocks, AdamW for the rest. One learning rate serves both.
    """
    if optimizer not in ('adamw', 'muon'):
        raise ValueError(f'optimizer={optimizer} is not one of adamw, muon')
    if optimizer == 'muon' and model.config.lora_rank:
        raise ValueError('optimizer=muon is for whole matrices: lora_rank needs --optimizer=adamw')
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if optimizer == 'muon' and '.h.' in name and p.dim() == 2}
    rest = [p for name, p in trained.items() if name not in matrices]
    groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
    fused = next(model.parameters()).device.type in ('cuda', 'cpu')  # all parameters in one kernel
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)]
    if matrices:
        c = model.config
        # each head's queries, keys or values are a matrix of their own, and so are SwiGLU's gate and what it gates
        rows = {'c_attn': (c.head_size,) * (c.n_head + 2 * c.n_kv_head)}
        if c.mlp == 'swiglu':
            rows['c_fc'] = (c.n_mlp, c.n_mlp)
        splits = [rows.get(name.split('.')[-2], (len(p),)) for name, p in matrices.items()]
        optimizers.append(Muon(list(matrices.values()), splits, learning_rate, weight_decay))
    return optimizers


def schedule(optimizers, lr, step):
    """Set what differs from step to step: the learning rate, and Muon's momentum, which rises from 0.85 to 0.95 in the
    first 300 steps, as in modded-nanogpt's records (https://github.com/KellerJordan/modded-nanogpt)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr
            if isinstance(optimizer, Muon):
                group['momentum'] = 0.85 + 0.1 * min(1, step / 300)


def step(optimizers, skip=None):
    """Update the parameters and drop the gradients. skip: a bool tensor on the device; where it is True nothing
    changes, and the host need not know."""
    for optimizer in optimizers:
        if skip is not None and not optimizer.defaults.get('fused', True):  # PyTorch's other AdamWs take no such tensor
            if not skip:  # waits for the device
                optimizer.step()
        else:
            # the attribute that torch.amp.GradScaler sets; AdamW itself would not wait for a flag that it offloads
            device = to_local(optimizer.param_groups[0]['params'][0]).device
            optimizer.found_inf = None if skip is None else skip.float().to(device)
            optimizer.step()
        optimizer.zero_grad()


class SkipRule:
    """Which steps are skipped: those whose loss or gradient norm is not finite, and, unless skip_spikes is 0, those
    where either exceeds mean + skip_spikes * standard deviations of the last 100 good steps. Decided on the device.

    state: what state_dict gave to a checkpoint; anything that it lacks starts empty.
    """

    def __init__(self, skip_spikes, device, state):
        history = [state.get('losses', []), state.get('norms', [])]
        history = [[math.nan] * (100 - len(past)) + past[-100:] for past in history]  # with a NaN, nothing is a spike
        self.skip_spikes = skip_spikes
        self.history = torch.tensor(history, dtype=torch.float32 if 'mps' in device else torch.float64, device=device)

    def __call__(self, loss, norm):
        """loss, norm: scalar tensors, the same on all processes. Returns a bool tensor: skip this step."""
        values = torch.stack((loss, norm)).to(self.history)  # (2,)
        skip = ~values.isfinite().all()
        if self.skip_spikes:
            skip |= (values > self.history.mean(dim=1) + self.skip_spikes * self.history.std(dim=1)).any()
        self.history = torch.where(skip, self.history, torch.cat((self.history[:, 1:], values[:, None]), dim=1))
        return skip

    def state_dict(self):
        return {name: [x for x in past if x == x] for name, past in zip(('losses', 'norms'), self.history.tolist())}


def orthogonalize(x, steps=5):
    """Nearly the orthogonal matrix closest to each of x (n, rows, columns): its singular values become about 1, by the
    quintic Newton-Schulz iteration of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Close to 1
    is enough, so the coefficients favour speed."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


RMS = 0.2  # root mean square of the entries of Muon's updates, about AdamW's


class Muon(torch.optim.Optimizer):
    """Nesterov momentum over an exponential average of gradients, orthogonalised matrix by matrix; then each row of the
    update is divided by the root of an exponential average of its mean square (Li et al. 2025, arXiv:2510.05491).
    PyTorch has torch.optim.Muon, without the rows' averages; this one stacks the matrices of one shape, which is
    several times faster for small models, and each process orthogonalises a part of the stack.

    params: 2-D parameters. splits: for each the rows of the matrices that it holds, one above the other.
    The update is scaled by RMS * sqrt(larger side), to the size that AdamW's updates have (Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so AdamW's learning rate and weight decay serve here too. beta2: of the averages
    over rows; 0 leaves the rows as they are.
    """

    def __init__(self, params, splits, lr, weight_decay=0.1, momentum=0.95, beta2=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2))
        self.stacks = {}  # (shape of a parameter, rows of its matrices) -> parameters
        for p, rows in zip(self.param_groups[0]['params'], splits):
            self.stacks.setdefault((p.shape, rows), []).append(p)
        device = str(self.param_groups[0]['params'][0].device)
        self.dtype = torch.bfloat16 if pick_dtype('auto', device) == 'bfloat16' else torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        group, = self.param_groups
        lr, momentum, beta2 = group['lr'], group['momentum'], group['beta2']
        skip = torch.zeros(()) if getattr(self, 'found_inf', None) is None else self.found_inf
        for (_, rows), params in self.stacks.items():
            for p in params:
                if not self.state[p]:
                    self.state[p]['momentum'] = torch.zeros_like(p)
                if beta2 and 'row_squares' not in self.state[p]:
                    self.state[p]['row_squares'] = torch.full_like(p[:, :1], RMS**2)  # their average
            here, grads = [to_local(p) for p in params], [to_local(p.grad) for p in params]
            momenta = [to_local(self.state[p]['momentum']) for p in params]
            keep = 1 - skip.to(here[0].device)  # 0 in a step that is skipped
            for grad in grads:
                grad.masked_fill_(keep == 0, 0)  # it may not be finite
            torch._foreach_mul_(momenta, torch.where(keep == 0, 1.0, momentum))
            torch._foreach_add_(momenta, grads, alpha=1 - momentum)
            updates = torch._foreach_lerp(grads, momenta, momentum)  # Nesterov's look ahead
            stack = torch.stack(updates).to(self.dtype)  # (n, rows, columns), this process's rows; rough will do
            stack = distributed.map_matrices(lambda x: orthogonalize_parts(x, rows), stack, params[0])
            if beta2:
                squares = [to_local(self.state[p]['row_squares']) for p in params]
                norms = torch.linalg.vector_norm(stack, dim=2, keepdim=True, dtype=torch.float32)  # (n, rows, 1)
                means = torch.where(keep == 0, torch.stack(squares), norms.square() / stack.size(2))
                torch._foreach_lerp_(squares, list(means), 1 - beta2)
                stack *= RMS / (torch.stack(squares).sqrt() + 1e-8)
            for mine, update in zip(here, stack):
                mine.mul_(1 - lr * group['weight_decay'] * keep)
                mine.add_(update * keep, alpha=-lr)


def orthogonalize_parts(x, rows):
    """Orthogonalise and scale each of the matrices that lie one above the other in x (n, sum(rows), columns)."""
    if len(set(rows)) == 1:
        parts = [x.reshape(-1, rows[0], x.size(2))]
    else:
        parts = x.split(rows, dim=1)
    parts = [orthogonalize(part) * (RMS * max(part.shape[1:])**0.5) for part in parts]
    return torch.cat([part.reshape(len(x), -1, x.size(2)) for part in parts], dim=1)


def muon_memory(shapes, processes):
    """Bytes that a Muon step takes for a moment on one of the processes that share the parameters, beside gradients and
    momenta. shapes: tuples, of all its 2-D parameters; it works on one shape after the other.

    This process's rows of the updates in float32, three times; the matrices that visit it in bfloat16, as they come and
    go, whole, and four times inside the iteration. GPT-2 XL: 10.8 GB on one process, 0.22 GB on each of 64.
    """
    def bytes_of(shape, n):
        rows, columns = shape
        mine, visiting = n * -(-rows // processes) * columns, -(-n // processes) * rows * columns
        return 4 * 3 * mine + 2 * (6 if processes > 1 else 5) * visiting

    return max((bytes_of(shape, n) for shape, n in Counter(shapes).items()), default=0)
