"""Low-rank adapters: finetuning that trains and keeps optimizer state for a small fraction of the weights (LoRA; Hu et
al. 2021, arXiv:2106.09685)."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """A frozen Linear's W and b with a trained update: (W + alpha / rank * lora_b lora_a) x + b."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device='meta')
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))  # no update at the start
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self):
        """One Linear that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device='meta')
        linear.weight, linear.bias = self.weight, self.bias
        linear.weight += self.scale * self.lora_b @ self.lora_a
        return linear


def replace_linears(model, kind, function):
    """Put function(linear) in the place of each Linear of this kind inside the blocks."""
    for parent in [*model.transformer.h.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is kind:
                setattr(parent, name, function(child))


def add(model, rank, alpha=0.0):
    """Freeze a GPT and give the matrices of its attention and MLPs adapters. alpha 0: 2 * rank. Returns the model,
    unchanged if rank is 0."""
    if not rank:
        return model
    alpha = float(alpha or 2 * rank)
    vars(model.config).update(lora_rank=rank, lora_alpha=alpha)  # each block has the same config
    model.requires_grad_(False)
    replace_linears(model, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha))
    return model


def merge(model):
    """The same GPT without adapters, in place: its weights have them. Returns the model."""
    replace_linears(model, LoRALinear, LoRALinear.merged)
    vars(model.config).update(lora_rank=0, lora_alpha=0.0)
    return model.requires_grad_(True)
