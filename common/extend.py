"""Trained weights for a longer context or a larger vocabulary."""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@torch.no_grad()
def extend_context(model, block_size, rope_theta=0.0, rope_type='', rope_factor=0.0):
    """Lengthen the context, to continue training on longer sequences. Learned positions are interpolated. RoPE
    needs a new rope_theta, or a rope_type ('linear', 'llama3', 'yarn') whose rope_factor is, by default, the new
    context over the one before scaling. Raises ValueError otherwise."""
    config, changes = model.config, {}
    if config.position == 'rope':
        if not rope_theta and rope_type in ('', 'default'):
            raise ValueError(f'block_size={block_size} is longer than the weights\' {config.block_size}: RoPE is '
                             'continued beyond it with rope_theta, or rope_type=yarn, llama3 or linear')
        changes = {'rope_theta': rope_theta or config.rope_theta}
        if rope_type not in ('', 'default'):
            original = config.rope_original_context or config.block_size
            changes |= dict(rope_type=rope_type, rope_original_context=original,
                            rope_factor=rope_factor or block_size / original)
            if rope_type != config.rope_type:
                changes |= dict(rope_high_freq_factor=0.0, rope_attention_factor=0.0)  # this type's own
            elif rope_factor != config.rope_factor:
                changes |= dict(rope_attention_factor=0.0)
    elif rope_theta or rope_type:
        raise ValueError('rope_theta and rope_type are for position=rope, and the weights have learned positions')
    new = replace(config, block_size=block_size, **changes)  # checks them
    if config.position == 'learned':
        wpe = model.transformer.wpe.weight  # (T, C)
        longer = F.interpolate(wpe.t()[None], size=block_size, mode='linear', align_corners=True)[0].t()
        model.transformer.wpe = nn.Embedding.from_pretrained(longer.contiguous(), freeze=not wpe.requires_grad)
    vars(config).update(vars(new))  # each block has the same config
    model.init_rope()


@torch.no_grad()
def extend_vocab(model, first, vocab_size):
    """Give the ids from first to vocab_size - 1, of tokens that the weights have not seen, rows drawn from a normal
    distribution with the mean and the standard deviation of the rows before (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). Raises ValueError for a model that fills masks."""
    if not model.config.causal:
        raise ValueError(f'a model that fills masks has no id for tokens beyond its vocabulary of {first}')
    vocab_size = max(vocab_size, model.config.vocab_size)
    model.config.vocab_size, new = vocab_size, vocab_size - first
    for module in (model.transformer.wte, model.lm_head)[:2 - model.config.tie_embeddings]:
        w = F.pad(module.weight, (0, 0, 0, model.config.padded_vocab_size - len(module.weight)))
        old = w[:first]
        w[first:vocab_size] = old.mean(dim=0) + old.std(dim=0) * torch.randn(new, w.size(1))
        module.weight = nn.Parameter(w, module.weight.requires_grad)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
