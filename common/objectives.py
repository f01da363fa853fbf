"""
What the loss of a training step is: the cross-entropy of the next token or of masked ones, alone or beside a teacher,
and its mean over a step's tokens.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from common import checkpoint, distributed
from data.errors import UserError
from data.tokenizer import tokenizer_name


class Objective:
    """What train.py's settings, {name: value}, ask of a model with this GPTConfig and tokenizer, on the device.

    With a teacher, (1 - teacher_weight) * cross-entropy + teacher_weight * KL divergence from its distribution (Hinton
    et al. 2015, arXiv:1503.02531); every process has the whole teacher. documents: a Tokenizer, whose end-of-text id
    separates documents that don't attend to each other; None: they do. Raises UserError for a model, a teacher or a
    tokenizer that does not fit.
    """

    def __init__(self, config, model_config, tokenizer, device, compiled=False, documents=None):
        self.config, self.vocab_size, self.teacher = config, model_config.vocab_size, None
        self.mlm, self.kl_divergence = config['objective'] == 'mlm', kl_divergence
        if model_config.causal == self.mlm:
            raise UserError(f'objective={config["objective"]}: the weights are of a model that ' +
                            ('predicts the next token' if self.mlm else 'fills masks, which is --objective=mlm'))
        if self.mlm and model_config.padded_vocab_size == self.vocab_size:
            raise UserError(f'objective=mlm: {tokenizer} has {self.vocab_size} tokens, a multiple of 64, and so no id '
                            'for a mask')
        self.documents, self.create_mask = documents, None
        if documents:
            if self.mlm:
                raise UserError('document_mask is for objective=next_token: a mask may hide where a document ends')
            if documents.eot_is_text:
                raise UserError(f'document_mask: {tokenizer} has no end-of-text id of its own to tell documents apart')
            # FlexAttention has no dropout, needs a head of 16, and is slow unless it is compiled for a GPU
            if 'cuda' in device and compiled and not model_config.dropout and model_config.head_size >= 16:
                self.create_mask = torch.compile(create_block_mask)
        if config['teacher']:
            self.teacher = load_teacher(config['teacher'], config['block_size'], model_config, tokenizer).to(device)
            if compiled:
                self.teacher.compile()
                self.kl_divergence = torch.compile(kl_divergence)

    def batch(self, x, y, generator=None):
        """x, y: (B, T) int64 each, of the Loader's: what the model reads and its targets, -1 where none is scored."""
        return mask_tokens(x, y, self.vocab_size, generator) if self.mlm else (x, y)

    def mask(self, x):
        """Which tokens attend to which, for GPT.forward, of x (B, T) int64; None: the model's default."""
        return self.documents and document_mask(x, self.documents.eot, self.create_mask)

    def __call__(self, model, x, y):
        """The mean loss over the tokens with y != -1, a float32 scalar, of a model as the training step calls it."""
        mask = self.mask(x)
        if not self.teacher:
            return model(x, y, return_logits=False, mask=mask)[1]
        with torch.no_grad():
            target, _ = self.teacher(x, y, mask=mask)  # (B, T, V)
        logits, loss = model(x, y, mask=mask)
        weight, temperature = self.config['teacher_weight'], self.config['teacher_temperature']
        return (1 - weight) * loss + weight * self.kl_divergence(logits, target, y, temperature)


def load_teacher(source, block_size, model_config, tokenizer):
    """A frozen GPT, on the CPU; source as in checkpoint.pretrained. Raises UserError unless its tokens are the model's,
    its attention too, and its context is long enough."""
    teacher, its_tokenizer = checkpoint.pretrained(source)
    its, ours, its_tokenizer = teacher.config, model_config, tokenizer_name(its_tokenizer)
    if (its_tokenizer, its.vocab_size) != (tokenizer, ours.vocab_size):
        raise UserError(f'the teacher {source} reads {its_tokenizer} tokens, {its.vocab_size} of them, and the model '
                        f'{tokenizer} tokens, {ours.vocab_size} of them')
    if its.causal != ours.causal:
        its_kind = 'predicts the next token' if its.causal else 'fills masks'
        raise UserError(f'the teacher {source} {its_kind}, unlike the model')
    if its.block_size < block_size:
        raise UserError(f'block_size={block_size} is longer than the teacher\'s context of {its.block_size}: '
                        f'--block_size={its.block_size}')
    return teacher.eval().requires_grad_(False)


def document_mask(x, eot, create_mask=None):
    """Each token of x (B, T) int64 attends to those before it in its document, which begins with the id eot: a mask
    (B, 1, T, T), bool, or what create_mask, which is create_block_mask, makes of it. Positions still count from the
    beginning of the block: to RoPE it is all the same, and learned positions are all trained."""
    document = (x == eot).cumsum(dim=1)  # (B, T): its number
    if not create_mask:
        return (document[:, :, None] == document[:, None]).tril()[:, None]

    def attends(b, h, q, k):
        return (document[b, q] == document[b, k]) & (q >= k)
    return create_mask(attends, len(x), None, x.size(1), x.size(1), device=x.device)


def mask_tokens(x, y, vocab_size, generator=None):
    """What BERT reads and predicts (Devlin et al. 2019, arXiv:1810.04805, section 3.1) of x, y: (B, T) int64 each.

    15% of the tokens with y != -1 are targets, the others -1. Of these 80% are read as the mask, the id after the
    vocabulary's last, 10% as a random token and 10% as they are. generator: on the CPU; by default PyTorch's own, whose
    state a checkpoint holds.
    """
    chance = torch.rand(x.shape, generator=generator).to(x.device)
    random = torch.randint(vocab_size, x.shape, generator=generator).to(x.device)
    target = (chance < 0.15) & (y != -1)
    read = torch.where(chance < 0.15 * 0.8, vocab_size, torch.where(chance < 0.15 * 0.9, random, x))
    return torch.where(target, read, x), torch.where(target, x, -1)


def kl_divergence(logits, target, y, temperature=1.0):
    """Mean of KL(target || logits) in nats over the tokens with y != -1, of logits (B, T, V) divided by the
    temperature, times its square, which keeps the size of the gradient (section 2 of the paper). A float32 scalar."""
    scored = y != -1
    log_p, log_q = (F.log_softmax(x.float() / temperature, dim=-1) for x in (target, logits))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction='none').sum(dim=-1)  # (B, T)
    return temperature**2 * torch.where(scored, kl, 0).sum() / scored.sum().clamp(min=1)


def token_weights(targets, device):
    """What makes the mean loss of a step, over micro-batches and processes, the mean over its scored tokens.

    targets: of each micro-batch of this process, (B, T) int64, -1 where none is scored. Returns (micro-batches,)
    float32 on the device: each one's scored tokens over the mean number of them in a micro-batch of the step, exactly 1
    where all have as many. NaN, which skips the step, if it has none. All processes call it.
    """
    counts = torch.stack([(y != -1).sum() for y in targets])
    total = distributed.sum_over_ranks(counts.sum(), device=device)
    return (counts * len(targets) * distributed.world_size / total).float()


def weighted(loss, weight):
    """loss * weight, 0 for a micro-batch without scored tokens, where the loss is NaN."""
    return torch.where(weight == 0, 0, loss * weight)


def log_probs(model, x, y):
    """The log-probability in nats of each row's tokens with y != -1, (B,) float32, of x, y: (B, T) int64 each."""
    logits, _ = model(x, y)  # (B, T, V)
    losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction='none')
    return -losses.view(y.shape).sum(dim=1)


def preference_loss(policy, reference, beta, kind='dpo'):
    """(losses, reward margins), (B,) float32 each, of log_probs (2, B) of the chosen and the rejected answers by the
    model that is trained and by the one that it started from.

    'dpo': equation 7 of Rafailov et al. 2023, arXiv:2305.18290. 'ipo': equation 17 of Azar et al. 2023,
    arXiv:2310.12036, whose tau is beta.
    """
    chosen, rejected = policy - reference
    h = chosen - rejected
    return -F.logsigmoid(beta * h) if kind == 'dpo' else (h - 1 / (2 * beta))**2, beta * h
