"""
Teach a chat model which of two answers is better, by direct preference optimization (Rafailov et al. 2023,
arXiv:2305.18290).

    python data/stdlib_chat/prepare.py
    python dpo.py --pairs=data/stdlib_chat/pairs_train.jsonl --val_pairs=data/stdlib_chat/pairs_val.jsonl

Under torchrun on many GPUs, as train.py. data/pairs.py describes the files. The weights of the start are the frozen
reference: it is scored once, before the first step, and its log-probabilities are kept instead of it.
"""

import hashlib
import math
import os
import sys
import time
from dataclasses import asdict

from configurator import UserError, configure, given

import numpy as np
import torch
from tqdm import tqdm

from common import checkpoint, distributed, files, log, lora, objectives, optimizers
from common.device import autocast, pick_compile, pick_dtype
from common.distributed import print0
from common.settings import unused
from data.pairs import collate, read_pairs, shuffled
from data.tokenizer import get_tokenizer, to_record

# -----------------------------------------------------------------------------
# input and output
out_dir = 'out-dpo'  # checkpoints (ckpt.pt) and the log (log.jsonl)
# the weights to start from: a .pt file, or a folder or name that transformers can read; 'resume' (out_dir/ckpt.pt),
# 'resume:FILE.pt' (another of its checkpoints)
init_from = 'out-chat/ckpt.pt'
pairs = ''  # jsonl files of prompt, chosen, rejected; with commas between, * and **
val_pairs = ''  # the same, held out
eval_interval = 100  # steps between evaluations, each with a checkpoint
log_interval = 1  # steps between printed lines
keep_checkpoints = 0  # number of earlier checkpoints to keep beside ckpt.pt, as ckpt_000250.pt
log_to = ''  # also log to any of wandb, tensorboard, trackio, as 'wandb,tensorboard'
# objective
loss = 'dpo'  # or 'ipo', which does not drive margins to infinity (Azar et al. 2023, arXiv:2310.12036)
beta = 0.1  # how much a departure from the reference costs
# optimizer
batch_size = 8  # pairs in a micro-batch
gradient_accumulation_steps = 8  # micro-batches in a step, over all processes
optimizer = 'adamw'  # or 'muon', for the matrices inside the blocks
learning_rate = 1e-6
warmup_iters = 150  # steps to reach learning_rate, which then stays
max_iters = 1000  # steps
weight_decay = 0.0  # of matrices only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # maximum gradient norm; 0 disables clipping
lora_rank = 0  # train adapters of this rank (LoRA) instead of the weights; 0: the weights
# system
parallel = 'ddp'  # 'zero1' shards the optimizer state over processes, 'fsdp' weights and gradients too
activation_checkpointing = False  # recompute each block in the backward pass, to save activation memory
dist_timeout = 600  # abort after waiting this many seconds for a missing rank
backend = 'auto'  # of torch.distributed: nccl for GPUs, gloo for CPUs
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32
compile = 'auto'  # True, False, or where torch.compile works
seed = 1337  # of the order of the pairs
config = configure(globals())
# -----------------------------------------------------------------------------

# -----------------------------------------------------------------------------
# processes, device, model

device = distributed.init(device, backend, dist_timeout)
distributed.check_layout(parallel)
rank, processes = distributed.rank, distributed.world_size
for name in 'pairs', 'val_pairs':
    if not config[name]:
        raise UserError(f'{name} is empty: it names jsonl files of prompt, chosen and rejected')
dtype = pick_dtype(dtype, device)
torch.set_float32_matmul_precision('high')  # TF32 where a GPU has it
torch.manual_seed(seed)
if gradient_accumulation_steps % processes or not gradient_accumulation_steps:
    raise UserError(f'gradient_accumulation_steps={gradient_accumulation_steps} is not a multiple of the {processes} '
                    'processes, or is 0')
for line in unused(config, given, processes):
    print0(line)
accumulation_steps = gradient_accumulation_steps // processes
pairs_per_step = batch_size * gradient_accumulation_steps

if path := checkpoint.resume_path(init_from, out_dir):
    resumed = checkpoint.resume(path, config, given, 'dpo.py')
    model, vocabulary = checkpoint.model_from(resumed), resumed['tokenizer']
else:
    resumed, (model, vocabulary) = None, checkpoint.pretrained(init_from, dropout=0.0)
    lora.add(model, lora_rank)
if not model.config.causal:
    raise UserError(f'{init_from} is a masked language model, which generates no text')
tokenizer, block_size = get_tokenizer(vocabulary), model.config.block_size
model.activation_checkpointing = activation_checkpointing

# -----------------------------------------------------------------------------
# pairs

train_pairs, left_out = read_pairs(pairs, tokenizer, block_size, 'pairs')
val_pairs, more = read_pairs(val_pairs, tokenizer, block_size, 'val_pairs')
print0(f'{len(train_pairs):,} pairs to train on, {len(val_pairs):,} held out; left out: {left_out + more:,} longer '
       f'than block_size={block_size} or without a difference')


def score(pairs):
    """(2, n) float32 on the CPU: log_probs of the chosen and the rejected answers, by all processes together."""
    model.eval()
    scores = []
    batches = range(0, len(pairs), batch_size * processes)
    for first in tqdm(batches, unit=' batches', leave=False, disable=None if distributed.master else True):
        mine = range(first + rank * batch_size, first + (rank + 1) * batch_size)  # the same number on each process
        x, y = collate([pairs[i % len(pairs)] for i in mine], block_size, device)
        with torch.no_grad(), autocast(dtype, device):
            scores.append(objectives.log_probs(model, x, y).view(2, -1).cpu())  # (2, B)
    model.train()
    scores = torch.stack(distributed.all_gather(torch.stack(scores)))  # (processes, batches, 2, B)
    return scores.permute(2, 1, 0, 3).reshape(2, -1)[:, :len(pairs)]


def measures(policy, reference):
    """(3,): mean loss, reward margin and accuracy (margins above 0; at 0 half) of log_probs (2, n) each."""
    losses, margins = objectives.preference_loss(policy, reference, beta, loss)
    return torch.stack((losses, margins, 0.5 + margins.sign() / 2)).mean(dim=1)

# -----------------------------------------------------------------------------
# training state, log and checkpoints

try:
    compiled = pick_compile(compile, device, print0)
    train_model = distributed.wrap(model, device, parallel, dtype, compiled=compiled)
    opts = optimizers.configure_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2))
except ValueError as error:  # settings that fit no model
    raise UserError(error) from None
scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == 'float16')
skip_rule = optimizers.SkipRule(0, device, {})  # a step that is not finite
digest = hashlib.sha256(b''.join(ids.tobytes() for pair in train_pairs + val_pairs for ids, _ in pair)).hexdigest()

step, drawn, best_val_loss, skipped = 0, 0, math.inf, 0  # drawn: pairs so far, over all processes
if resumed:
    if resumed['data'].get('pairs') != digest:
        raise UserError(f'the pairs changed since {path}, which has the reference\'s log-probabilities of the earlier '
                        f'ones: --init_from={path} starts from its weights')
    step, best_val_loss, skipped = resumed['iter_num'], resumed['best_val_loss'], resumed['skipped']
    drawn, reference = resumed['data']['drawn'], resumed['reference']
    distributed.restore_optimizers(model, opts, resumed['optimizer'])
    if resumed['scaler']:  # empty if the run did not need one
        scaler.load_state_dict(resumed['scaler'])
else:
    print0('scoring the reference')
    reference = {'train': score(train_pairs), 'val': score(val_pairs)}
del resumed
print0(f'{model.get_num_params() / 1e6:.2f}M parameters, {pairs_per_step} pairs a step, {max_iters:,} steps, '
       f'{processes} x {device}, {dtype}, {"compiled" if compiled else "not compiled"}')

first, run_log = step, None
if distributed.master:
    lock = files.lock(out_dir)
    trackers = log.start_trackers(log_to, 'dpo', os.path.basename(out_dir), config, out_dir, step)
    log.archive_or_rewind(out_dir, path, step)
    checkpoint.keep_tokenizer(tokenizer, out_dir)
    run_log = log.Log(os.path.join(out_dir, 'log.jsonl'), trackers)
    run_log.write({'step': step, 'config': config, 'parameters': model.get_num_params()})


def save():
    """Write what an exact resume needs, in the background once it is copied."""
    state = distributed.training_state(model, opts) | {
        **to_record(tokenizer), 'model_args': asdict(model.config), 'config': config, 'iter_num': step,
        'skipped': skipped, 'best_val_loss': best_val_loss, 'data': {'drawn': drawn, 'pairs': digest},
        'reference': reference, 'scaler': scaler.state_dict(),
        'random': distributed.all_gather(checkpoint.random_state(device))}
    checkpoint.save(state, out_dir, keep=keep_checkpoints)


def report(entry):
    """Print what is known of this step, and log it."""
    print0(f'step {step}/{max_iters} | ' + ' | '.join(f'{name.replace("_", " ")} {x:.4g}' for name, x in entry.items()))
    if run_log:
        run_log.write({'step': step, **entry})

# -----------------------------------------------------------------------------
# the loop

distributed.stop_on_signals()
stop = False
model.train()
while True:
    if step % eval_interval == 0 or step == max_iters:
        if step > first:
            save()
        names = 'val_loss', 'val_margin', 'val_accuracy'
        entry = dict(zip(names, measures(score(val_pairs), reference['val']).tolist()))
        report(entry)
        if step > 0 and entry['val_loss'] < best_val_loss:
            best_val_loss = entry['val_loss']
            checkpoint.keep_best(out_dir)
    if step >= max_iters or stop:
        break

    # forward and backward; gradients add up over the micro-batches
    began, totals, tokens = time.perf_counter(), 0, 0
    for micro_step in range(accumulation_steps):
        places = drawn + (micro_step * processes + rank) * batch_size + np.arange(batch_size)
        index = shuffled(places, len(train_pairs), seed)
        x, y = collate([train_pairs[i] for i in index], block_size, device)
        distributed.sync_gradients(train_model, micro_step == accumulation_steps - 1)
        with autocast(dtype, device):
            policy = objectives.log_probs(train_model, x, y).view(2, -1)  # (2, B)
        results = measures(policy, reference['train'][:, index].to(device))  # (3,)
        scaler.scale(results[0] / accumulation_steps).backward()
        totals, tokens = totals + results.detach() / accumulation_steps, tokens + x.numel()

    # clip; average over the processes; skip a step that is not finite
    for opt in opts:
        scaler.unscale_(opt)
    grad_norm = distributed.clip_grad_norm(model, grad_clip)
    numbers = distributed.sum_over_ranks(*totals / processes, grad_norm / processes, tokens,
                                         distributed.stop_signal > 0, device=device)
    skip = skip_rule(numbers[0], numbers[3])
    lr = learning_rate * min(1, (step + 1) / (warmup_iters + 1))
    optimizers.schedule(opts, lr, step)
    optimizers.step(opts, skip)
    scaler.update()
    step, drawn, skipped = step + 1, drawn + pairs_per_step, skipped + skip.item()
    *values, tokens, stop = numbers.tolist()
    seconds = time.perf_counter() - began
    if step % log_interval == 0 or step == max_iters or skip:
        report(dict(zip(('loss', 'margin', 'accuracy', 'grad_norm'), values)) |
               {'lr': lr, 'skipped': skipped, 'ms': seconds * 1e3, 'tokens_per_s': tokens / seconds})

if stop:
    save()
saved = checkpoint.wait()
if stop and saved:
    print0(f'saved {out_dir}/{checkpoint.NAME} at step {step}; --init_from=resume continues from it')
distributed.shutdown()
if not saved:
    sys.exit(1)
