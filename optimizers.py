"""The optimizer: which parameters it decays, and by which rule each is updated."""

import torch


def configure_optimizers(model, weight_decay, learning_rate, betas):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Matrices and embeddings decay; biases and the gains of
    normalisations do not. `lr_scale` in each group multiplies the schedule's learning rate."""
    parameters = list(model.parameters())
    groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay, 'lr_scale': 1.0},
              {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0, 'lr_scale': 1.0}]
    fused = parameters[0].device.type in ('cuda', 'cpu')  # all parameters in one kernel
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
