"""What the loss of a training step is."""

import torch

from common import distributed


def token_weights(targets, device):
    """What makes the mean loss of a step, over micro-batches and processes, the mean over its scored tokens.

    targets: of each micro-batch of this process, (B, T) int64, -1 where none is scored. Returns (micro-batches,) float32
    on the device: each one's scored tokens over the mean number of them in a micro-batch of the step, exactly 1 where all
    have as many. NaN, which skips the step, if it has none. All processes call it.
    """
    counts = torch.stack([(y != -1).sum() for y in targets])
    total = distributed.sum_over_ranks(counts.sum(), device=device)
    return (counts * len(targets) * distributed.world_size / total).float()


def weighted(loss, weight):
    """loss * weight, 0 for a micro-batch without scored tokens, where the loss is NaN."""
    return torch.where(weight == 0, 0, loss * weight)
