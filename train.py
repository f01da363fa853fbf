"""
Train a GPT.

One process:             python train.py config/quickstart.py
Eight GPUs:              torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py
Continue after a stop:   the same command with --init_from=resume

A setting is overridden by a file of assignments or by --name=value; the last one wins.
"""

import gc
import math
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict
from datetime import timedelta

from configurator import UserError, configure, given

import torch

import hellaswag
from common import checkpoint, distributed, files, log, objectives, optimizers
from common.device import autocast, fetch, peak_flops, pick_compile, pick_dtype
from common.distributed import print0
from common.settings import divide_step, eval_size, unused
from data.loader import Loader
from data.tokenizer import get_tokenizer, to_record
from plot import redraw

# -----------------------------------------------------------------------------
# The defaults train GPT-2 (124M) on FineWeb-Edu
# input and output
out_dir = 'out'  # checkpoints (ckpt.pt) and the log (log.jsonl)
# 'scratch', 'resume' (out_dir/ckpt.pt), 'resume:FILE.pt' (another of its checkpoints), 'auto' (resume if there is one),
# or the weights of 'gpt2' to 'gpt2-xl', a folder or a name that transformers can read, a .pt file
init_from = 'scratch'
eval_interval = 250  # steps between evaluations, each with a checkpoint
eval_tokens = 10_485_760  # tokens of validation data in an evaluation, always the same ones
eval_iters = 0  # the same as a number of batches of batch_size sequences, as in nanoGPT; 0: eval_tokens decides
eval_only = False  # evaluate once and exit
log_interval = 1  # steps between printed lines
always_save_checkpoint = True  # at each evaluation; False: only when the validation loss is the lowest so far
keep_checkpoints = 0  # number of earlier checkpoints to keep beside ckpt.pt, as ckpt_000250.pt
hellaswag_interval = 250  # steps between HellaSwag scores; 0 disables
hellaswag_limit = 0  # score only the first items; 0: all 10,042
hellaswag_data = ''  # a file of items; empty: the validation set, downloaded once
sample_interval = 250  # steps between samples of the model's text; 0 disables
curves = True  # redraw out_dir/curves.png at each evaluation, where matplotlib is installed
log_to = ''  # also log to any of wandb, tensorboard, trackio, as 'wandb,tensorboard'
wandb_log = False  # the same as log_to = 'wandb'
wandb_project = 'gpt2'
wandb_run_name = 'gpt2'
# data
dataset = 'fineweb_edu_10B'  # a folder in data/, a path, or a mixture such as 'fineweb_edu_10B:0.8,stdlib:0.2'
document_mask = False  # tokens attend within their own document, not to the one before it in the block
shuffle = True  # a new order in each epoch; False: as written
total_batch_size = 524288  # tokens in a step, over all processes and micro-batches
gradient_accumulation_steps = 0  # micro-batches in a step, over all processes; 0: total_batch_size decides
batch_size = 64  # sequences in a micro-batch: at a block_size of 1024, 80 GB hold 64 and 24 GB hold 16
block_size = 1024  # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 and more for finetuning
bias = True  # in Linears and LayerNorms, as in GPT-2
n_kv_head = 0  # heads for keys and values; 0: n_head
head_size = 0  # width of a head; 0: n_embd / n_head
position = 'learned'  # or 'rope'
rope_theta = 10000.0  # base of RoPE's wavelengths
rope_type = 'default'  # or 'linear', 'llama3', 'yarn': frequencies scaled to a longer context
rope_factor = 1.0  # how many times longer it is
rope_original_context = 0  # context before scaling, in tokens; 0: block_size
rope_low_freq_factor = 1.0  # frequencies with fewer turns in the original context are divided by rope_factor
rope_high_freq_factor = 0.0  # those with more are kept; 0: 4 for llama3, 32 for yarn
rope_attention_factor = 0.0  # yarn's scale of queries and keys; 0: 0.1 ln(rope_factor) + 1
norm = 'layernorm'  # or 'rmsnorm'
norm_gain = True  # normalisations have weights
norm_eps = 1e-5  # added to the variance in normalisations
qk_norm = False  # normalise queries and keys
mlp = 'gelu'  # or 'relu2' or 'swiglu'
n_mlp = 0  # width of the MLP; 0: 4 * n_embd
embedding_norm = False  # normalise the embeddings, before the first block
tie_embeddings = True  # the head uses the token embedding's weights
zero_init = False  # projections back into the residual stream start at zero
softcap = 0.0  # bound the logits by softcap * tanh(logits / softcap); 0 disables
lora_rank = 0  # finetune adapters of this rank (LoRA), and freeze the weights of init_from; 0: train the weights
lora_alpha = 0.0  # the adapters' scale, times lora_rank; 0: 2 * lora_rank
objective = 'next_token'  # or 'mlm': predict masked tokens, with attention both ways, as BERT
# a teacher, for a loss of (1 - teacher_weight) * cross-entropy + teacher_weight * KL divergence from its distribution
teacher = ''  # its weights: a .pt file, or a folder or name that transformers can read; empty: no teacher
teacher_weight = 0.5
teacher_temperature = 1.0  # divides the logits of both in the KL divergence
# optimizer
optimizer = 'adamw'  # or 'muon', for the matrices inside the blocks
learning_rate = 6e-4  # peak learning rate
max_iters = 19073  # steps: 10 billion tokens
weight_decay = 0.1  # of matrices only
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8
grad_clip = 1.0  # maximum gradient norm; 0 disables clipping
decay_lr = True  # warm up and decay; False: learning_rate throughout
lr_schedule = 'cosine'  # 'cosine', 'linear', or 'wsd' (warmup, stable, decay), down to min_lr
wsd_decay = 0.3  # with 'wsd': the decay's fraction of the steps from warmup_iters to lr_decay_iters
warmup_iters = 715  # steps to reach learning_rate: 375 million tokens, as GPT-3
lr_decay_iters = 0  # step at which min_lr is reached; 0: max_iters
min_lr = 6e-5  # final learning rate
skip_spikes = 0.0  # skip a step whose loss or gradient norm exceeds mean + K standard deviations; 0 disables
max_bad_steps = 50  # stop after this many skipped steps in a row; a step that is not finite is always skipped
# system
parallel = 'ddp'  # 'zero1' shards the optimizer state over processes, 'fsdp' weights and gradients too
replicas = 1  # with fsdp: number of model replicas (HSDP); one per node reduces traffic
sharded_checkpoints = False  # with fsdp: each process writes its shards, into a folder beside ckpt.pt
cpu_offload = False  # with fsdp: weights and optimizer state stay in CPU memory between uses
activation_checkpointing = False  # recompute each block in the backward pass, to save activation memory
dist_timeout = 600  # abort after waiting this many seconds for a missing rank
backend = 'auto'  # of torch.distributed: nccl for GPUs, gloo for CPUs
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32
compile = 'auto'  # True, False, or where torch.compile works
seed = 1337
profile = False  # write a trace of steps 5 to 7 to out_dir/trace.json, for https://ui.perfetto.dev
config = configure(globals())
# -----------------------------------------------------------------------------

# -----------------------------------------------------------------------------
# processes, device and precision

device = distributed.init(device, backend, dist_timeout, cpu_tensors=cpu_offload)
distributed.check_layout(parallel, replicas, cpu_offload, sharded_checkpoints)
dtype = pick_dtype(dtype, device)
torch.set_float32_matmul_precision('high')  # TF32 where a GPU has it
torch.manual_seed(seed)

lr_decay_iters = lr_decay_iters or max_iters
accumulation_steps, batch_size, note = divide_step(config, given, distributed.world_size)
tokens_per_step = accumulation_steps * batch_size * block_size * distributed.world_size
eval_tokens, eval_note = eval_size(config, given)
for line in filter(None, (*unused(config, given, distributed.world_size), note, eval_note)):
    print0(line)

# -----------------------------------------------------------------------------
# data

loading = dict(batch_size=batch_size, block_size=block_size, rank=distributed.rank, world_size=distributed.world_size,
               device=device)
train_data = Loader(dataset, 'train', **loading, shuffle=shuffle, seed=seed)
val_data = Loader(dataset, 'val', **loading, shuffle=False)
tokenizer = get_tokenizer(train_data.tokenizer)

# -----------------------------------------------------------------------------
# model: from scratch, from this run's checkpoint, or from other weights

ckpt_path = os.path.join(out_dir, checkpoint.NAME)
saving = distributed.master and not eval_only  # this process writes into out_dir
lock = files.lock(out_dir, timeout=30 if init_from == 'auto' else 0) if saving and os.path.isdir(out_dir) else None

try:
    model, resumed, resumed_path = checkpoint.initial_model(config, given, tokenizer, train_data.vocab_size)
    model.activation_checkpointing = activation_checkpointing
    compiled = pick_compile(compile, device, print0)
    train_model = distributed.wrap(model, device, parallel, dtype, replicas, cpu_offload, compiled)
    criterion = objectives.Objective(config, model.config, tokenizer.name, device, compiled,
                                     documents=tokenizer if document_mask else None)
    opts = optimizers.configure_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2), adam_eps)
except ValueError as error:  # settings that make no model
    raise UserError(error) from None
scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == 'float16')

step, best_val_loss, skipped, bad_steps = 0, math.inf, 0, 0  # bad_steps: skipped in a row
if resumed:
    step, best_val_loss, skipped = resumed['iter_num'], resumed['best_val_loss'], resumed['skipped']
    distributed.restore_optimizers(model, opts, resumed['optimizer'])
    if resumed['scaler']:  # empty if the run did not need one
        scaler.load_state_dict(resumed['scaler'])
    train_data.load_state_dict(resumed['data'])
if profile and max_iters - step < 7:
    raise UserError(f'profile traces the steps 5 to 7 of a run, and this one has {max_iters - step}')
skip_rule = optimizers.SkipRule(skip_spikes, device, resumed or {})


def get_lr(step):
    """Learning rate of a step: linear warmup to learning_rate, then lr_schedule down to min_lr at lr_decay_iters."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    left = max(0.0, (lr_decay_iters - step) / max(1, lr_decay_iters - warmup_iters))  # from 1 to 0
    if lr_schedule == 'cosine':
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    elif lr_schedule == 'wsd':
        left = min(1.0, left / wsd_decay)
    return min_lr + left * (learning_rate - min_lr)

# -----------------------------------------------------------------------------
# evaluation


class Stopped(Exception):
    """A signal asks for an end during an evaluation."""


@torch.no_grad()
def validation_loss(k):
    """Mean loss in nats over the first eval_tokens tokens of the k-th val split, by all processes. Raises Stopped."""
    total = count = 0
    generator = torch.Generator().manual_seed(seed + distributed.rank)  # the same masks each time
    for batch in val_data.eval_batches(max(1, eval_tokens // block_size), k):
        x, y = criterion.batch(*batch, generator)
        with autocast(dtype, device):
            _, loss = model(x, y, return_logits=False, mask=criterion.mask(x))
        n = (y != -1).sum()
        total, count = total + torch.where(n > 0, loss * n, 0), count + n  # a batch without targets has no loss
        if not eval_only and distributed.stop_agreed(device):
            raise Stopped
    total, count = distributed.sum_over_ranks(total, count, device=device).tolist()
    return total / count


def sample():
    """Print two short texts. All processes take part; the training's random numbers stay as they are."""
    with torch.compiler.set_stance('force_eager'), autocast(dtype, device):
        start = torch.full((2, 1), tokenizer.eot, device=device)  # (B, T)
        seeds = seed + step, seed + step + 1
        for row in model.generate(start, max_new_tokens=min(64, block_size), top_k=50, seeds=seeds).tolist():
            print0(f'  > {tokenizer.decode(row[1:])!r}')


def due(interval):
    return interval > 0 and (step % interval == 0 or step == max_iters or eval_only)


def evaluate():
    """Score the model, print the scores and return them for the log. Raises Stopped after a signal."""
    result, parts, began = {'step': step}, [f'step {step}/{max_iters}'], time.perf_counter()
    model.eval()
    if due(eval_interval):
        losses = {name: validation_loss(k) for k, name in enumerate(val_data.names)}
        val_loss = sum(weight * losses[name] for name, weight in zip(val_data.names, val_data.weights))
        result |= {'val_loss': val_loss, 'perplexity': math.exp(min(val_loss, 700))}
        parts += [f'val loss {val_loss:.4f}', f'perplexity {result["perplexity"]:.2f}']
        if len(losses) > 1:  # a mixture
            result |= {'val_losses': losses, 'drawn': train_data.stats()}
            parts += [f'{name} {losses[name]:.4f}, {drawn["share"]:.1%} of the blocks, {drawn["epochs"]:.2f} epochs'
                      for name, drawn in result['drawn'].items()]
    if rows and due(hellaswag_interval):
        with torch.compiler.set_stance('force_eager'):
            scores = hellaswag.evaluate(model, rows, device=device, dtype=dtype)
        result['hellaswag'] = scores['acc_norm']
        parts.append(f'hellaswag {scores["acc_norm"]:.4f} (of {len(rows)})')
    result['eval_s'] = time.perf_counter() - began
    if len(parts) > 1:
        print0(' | '.join(parts + [f'{result["eval_s"]:.1f} s']))
    if due(sample_interval):
        sample()
    model.train()
    return result

# -----------------------------------------------------------------------------
# log and checkpoints


def save(best=False):
    """Write what an exact resume needs, in the background once it is copied."""
    checkpoint.wait()  # one copy in CPU memory at a time
    state = (distributed.sharded_state if sharded_checkpoints else distributed.training_state)(model, opts)
    state |= {**to_record(tokenizer), 'model_args': asdict(model.config), 'config': config, 'iter_num': step,
              'best_val_loss': best_val_loss, 'data': train_data.state_dict(), 'scaler': scaler.state_dict(),
              'random': distributed.all_gather(checkpoint.random_state(device)), 'skipped': skipped,
              **skip_rule.state_dict()}
    checkpoint.save(state, out_dir, best, keep_checkpoints)


def claim_out_dir():
    """Rename what an earlier run left in out_dir, or rewind this run's log, and start to write. This waits for the
    first step: a start that fails leaves out_dir as it was."""
    if run_log and run_log.held is not None:
        log.archive_or_rewind(out_dir, resumed_path, first)
        if start_is_best:
            checkpoint.keep_best(out_dir, resumed_path)
        checkpoint.keep_tokenizer(tokenizer, out_dir)
        run_log.release()


def write_log(entry):
    if run_log:
        run_log.write(entry)


def finish_step(step, lr, numbers, data_s):
    """Log a step whose numbers are known by now. Returns whether a signal came."""
    global bad_steps, skipped, finished
    loss, grad_norm, skip, stop = numbers()
    bad_steps, skipped = (bad_steps + 1 if skip else 0), skipped + int(skip)
    finished, before = time.perf_counter(), finished
    seconds = finished - before
    if step > first + 1 or not compiled:  # the first step compiles
        durations.append(seconds)
    entry = {'step': step, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm, 'ms': seconds * 1e3,
             'tokens_per_s': tokens_per_step / seconds, 'skipped': skipped, 'data_ms': data_s * 1e3,
             'mfu': model.flops_per_token() * tokens_per_step / seconds / peak}
    if 'cuda' in device:
        entry['peak_gb'] = torch.cuda.max_memory_allocated(device) / 1e9
    if step % log_interval == 0 or step == max_iters or skip:
        left = timedelta(seconds=round((max_iters - step) * statistics.median(durations))) if durations else '?'
        print0(log.step_line(entry, max_iters, left, f'skipped ({skipped} so far)' if skip else ''))
        write_log(entry)
    if bad_steps == max_bad_steps:
        checkpoint.wait()
        raise UserError(f'{bad_steps} steps in a row without a good gradient (the last: loss {loss:.4g}, norm '
                        f'{grad_norm:.4g}), stopped at step {step}: the last good checkpoint is {ckpt_path}, '
                        'if there is one')
    return bool(stop)


def warn_if_slow(seconds):
    """Tell the user early that a step takes longer than a minute, and what makes it shorter."""
    if seconds > 60:
        print0(f'a step takes about {timedelta(seconds=round(seconds))}: {accumulation_steps} micro-batches of '
               f'{batch_size} x {block_size} tokens; a smaller total_batch_size, block_size or model is faster')


items, why_none = hellaswag.items_of_run(config, given)
rows = hellaswag.prepare(items, tokenizer, model.config.block_size)
if hellaswag_interval and not items:
    print0(f'HellaSwag is not scored: {why_none}')
peak = peak_flops(dtype, device) * distributed.world_size
n_params = model.get_num_params()
print0(f'{n_params / 1e6:.2f}M parameters, {tokens_per_step:,} tokens a step, {max_iters:,} steps, '
       f'{distributed.world_size} x {device}, {dtype}, {"compiled" if compiled else "not compiled"}')
run_log = None
if saving:
    lock = lock or files.lock(out_dir)
    trackers = log.start_trackers(log_to + ',wandb' * wandb_log, wandb_project, wandb_run_name, config, out_dir, step)
    run_log = log.Log(os.path.join(out_dir, 'log.jsonl'), trackers, hold=True)
write_log({'step': step, 'config': config, 'tokens_per_step': tokens_per_step, 'parameters': n_params,
           'data': train_data.state_dict()})

tracer = None
if profile and saving:
    tracer = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=3, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(os.path.join(out_dir, 'trace.json')))
    tracer.start()

torch.manual_seed(seed + distributed.rank + step)  # dropout differs from process to process
if resumed and len(resumed['random']) == distributed.world_size:
    checkpoint.set_random_state(resumed['random'][distributed.rank], device)
del resumed

# -----------------------------------------------------------------------------
# the loop

if not eval_only:
    distributed.stop_on_signals()
stop, first, start_is_best = False, step, False  # start_is_best: the lowest validation loss is the first step's
unfinished = deque()  # steps whose numbers are still on the device
if compiled:
    print0('compiling in the first evaluation and the first step, which may take minutes')
durations, finished = deque(maxlen=50), time.perf_counter()  # seconds of the last steps; when the last one finished
model.train()
while True:
    # evaluate; the checkpoint comes first, so that nothing is lost while it takes its time
    if due(eval_interval) or due(hellaswag_interval) or due(sample_interval):
        while unfinished:
            stop |= finish_step(*unfinished.popleft())
        save_first = always_save_checkpoint and not bad_steps  # else the validation loss decides
        if save_first and due(eval_interval) and step > first and not eval_only:
            save()
        if step == first and due(eval_interval):
            print0(f'evaluating on {min(eval_tokens, sum(data.n_tokens for data in val_data.splits)):,} tokens')
        try:
            result = evaluate()
        except Stopped:
            stop = True
        else:
            write_log(result)
            if due(eval_interval) and step > 0 and not eval_only and math.isfinite(result['val_loss']):
                improved = result['val_loss'] < best_val_loss
                best_val_loss = min(best_val_loss, result['val_loss'])
                if step == first and resumed_path != ckpt_path:  # ckpt.pt is another step's until claim_out_dir()
                    start_is_best = improved and os.path.dirname(resumed_path) == os.path.dirname(ckpt_path)
                elif improved and save_first:
                    checkpoint.keep_best(out_dir)
                elif improved or always_save_checkpoint and not save_first:
                    save(best=improved)
            if curves and run_log and 'val_loss' in result and step > first:
                distributed.in_background(redraw, out_dir)
        finished = time.perf_counter()
    if step >= max_iters or eval_only or stop:
        break

    # forward and backward; gradients add up over the micro-batches
    before = train_data.state_dict(), checkpoint.random_state(device)
    waiting = time.perf_counter()
    batches = [criterion.batch(*train_data.next_batch()) for _ in range(accumulation_steps)]  # x, y: (B, T) each
    began = time.perf_counter()
    data_s, train_loss, weights = began - waiting, 0, objectives.token_weights([y for _, y in batches], device)
    for micro_step, (x, y) in enumerate(batches):
        distributed.sync_gradients(train_model, micro_step == accumulation_steps - 1)
        with autocast(dtype, device):
            loss = objectives.weighted(criterion(train_model, x, y), weights[micro_step])
        scaler.scale(loss / accumulation_steps).backward()
        train_loss = train_loss + loss.detach() / accumulation_steps
        if step == first and micro_step == 0 and not compiled:  # compiling takes long, once
            warn_if_slow((time.perf_counter() - began) * accumulation_steps)
        if distributed.world_size == 1 and distributed.stop_signal and micro_step < accumulation_steps - 1:
            stop = True  # one process need not finish a long step: it will be repeated
            train_data.load_state_dict(before[0])
            checkpoint.set_random_state(before[1], device)
            break
    if stop:
        break

    # clip; sum over the processes; decide on the device whether to skip the step
    for opt in opts:
        scaler.unscale_(opt)
    grad_norm = distributed.clip_grad_norm(model, grad_clip)
    numbers = distributed.sum_over_ranks(train_loss / distributed.world_size, grad_norm / distributed.world_size,
                                         distributed.stop_signal > 0, device=device)
    skip = skip_rule(*numbers[:2])
    lr = get_lr(step)
    optimizers.schedule(opts, lr, step)
    optimizers.step(opts, skip)
    scaler.update()
    step += 1
    if step == first + 1:
        claim_out_dir()
        gc.freeze()  # what lives this long lives to the end: the collector need not look at it again
    if tracer:
        tracer.step()

    # log; from a GPU the numbers of the step before, so that the host never waits for the device
    unfinished.append((step, lr, fetch(torch.stack((*numbers[:2], skip, numbers[2]))), data_s))
    while len(unfinished) > ('cuda' in device):
        stop |= finish_step(*unfinished.popleft())
    if stop:
        break

while unfinished:
    finish_step(*unfinished.popleft())
claim_out_dir()  # of a run without a step
if stop and bad_steps == 0:
    save()
saved = checkpoint.wait()
if stop and saved and not bad_steps:
    print0(f'saved {ckpt_path} at step {step}; --init_from=resume continues from it')
distributed.shutdown()
if not saved:
    sys.exit(1)
