"""
Train a GPT.

One process:          python train.py config/quickstart.py
Eight GPUs:           torchrun --nproc_per_node=8 train.py config/gpt2.py
Go on after a stop:   the same command with --init_from=resume

A setting is overridden by a file of assignments or by --name=value, the last one wins.
"""

import json
import math
import os
import signal
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, fields
from datetime import timedelta

import torch

import hellaswag
from common import checkpoint, distributed, log
from common.device import autocast, peak_flops, pick_compile, pick_dtype
from common.distributed import print0
from common.optimizers import configure_optimizers
from configurator import UserError, configure
from data.loader import Loader
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# The defaults train GPT-2 (124M) on FineWeb-Edu
# input and output
out_dir = 'out'  # where checkpoints (ckpt.pt) and the log (log.jsonl) go
init_from = 'scratch'  # or 'resume'; 'auto': resume if one can; or weights: 'gpt2' to 'gpt2-xl', a folder, a .pt file
eval_interval = 250  # steps from one evaluation, and checkpoint, to the next
eval_iters = 160  # batches of validation data in an evaluation, always the same ones
eval_only = False  # evaluate once and exit
log_interval = 1  # steps from one printed line to the next
always_save_checkpoint = True  # after each evaluation; False: only when the validation loss is the lowest yet
keep_checkpoints = 0  # so many of the last ones stay beside ckpt.pt, as ckpt_000250.pt and so on
hellaswag_interval = 0  # steps from one HellaSwag score to the next; 0 is never
hellaswag_limit = 0  # score only so many of its 10,042 items; 0 is all
hellaswag_data = ''  # its items from this file; nothing: the validation set, fetched once
sample_interval = 0  # steps from one sample of the model's writing to the next; 0 is never
wandb_log = False  # also log to Weights & Biases
wandb_project = 'gpt2'
wandb_run_name = 'gpt2'
# data
dataset = 'fineweb_edu_10B'  # a folder in data/, or a path, or a mixture such as 'fineweb_edu_10B:0.8,stdlib:0.2'
shuffle = True  # each epoch in an order of its own; False: as it was written
total_batch_size = 524288  # tokens in a step, over all processes and accumulation steps
gradient_accumulation_steps = 0  # micro-batches in a step, over all processes; 0: as total_batch_size needs
batch_size = 16  # sequences in a micro-batch: as many as fit in memory
block_size = 1024  # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 and more for finetuning
bias = True  # in Linears and LayerNorms, as GPT-2 has them
n_kv_head = 0  # heads for keys and values; 0: as many as n_head
position = 'learned'  # or 'rope'
norm = 'layernorm'  # or 'rmsnorm'
qk_norm = False  # normalise queries and keys
mlp = 'gelu'  # or 'relu2' or 'swiglu'
n_mlp = 0  # width of the MLP; 0: 4 * n_embd
tie_embeddings = True  # the head uses the token embedding's weights
zero_init = False  # projections back into the residual stream start at zero
softcap = 0.0  # bounds the logits by a tanh; 0 is off
# optimizer
optimizer = 'adamw'  # or 'muon', for the matrices inside the blocks
learning_rate = 6e-4  # the highest
max_iters = 19073  # steps: 10 billion tokens
weight_decay = 0.1  # of matrices only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # longest gradient; 0 is off
decay_lr = True  # warm up and decay; False: learning_rate throughout
lr_schedule = 'cosine'  # how it falls to min_lr: 'cosine', 'linear', or 'wsd': not at all until the end nears
wsd_decay = 0.3  # the share of lr_decay_iters in which 'wsd' falls
warmup_iters = 715  # steps to reach learning_rate: 375 million tokens, as GPT-3
lr_decay_iters = 0  # steps to reach min_lr; 0: max_iters
min_lr = 6e-5  # where the learning rate ends
skip_spikes = 0.0  # skip a step whose gradient is more than so many standard deviations longer than usual; 0 is off
max_bad_steps = 50  # stop after so many skipped steps in a row; one whose gradient is not finite is always skipped
# system
parallel = 'ddp'  # 'zero1' shards the optimizer's state over the processes, 'fsdp' the weights and gradients too
replicas = 1  # with fsdp: so many groups of processes hold the whole model; one a machine saves much traffic
sharded_checkpoints = False  # with fsdp: each process writes its share of a checkpoint, into a folder beside ckpt.pt
cpu_offload = False  # with fsdp: weights and optimizer state stay in the CPU's memory between uses
activation_checkpointing = False  # compute each block twice, to save most of the activations' memory
dist_timeout = 600  # seconds until processes that wait for another one give it up, and end
backend = 'auto'  # of torch.distributed: nccl for GPUs, gloo for CPUs
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32
compile = 'auto'  # True, False, or where torch.compile works
seed = 1337
profile = False  # write what the device does in steps 5 to 7 to out_dir/trace.json, for https://ui.perfetto.dev
config = configure(globals())
# -----------------------------------------------------------------------------

device = distributed.init(device, backend, dist_timeout)
for name, known in ('lr_schedule', ('cosine', 'linear', 'wsd')), ('parallel', ('ddp', 'zero1', 'fsdp')):
    if config[name] not in known:
        raise UserError(f'{name}={config[name]} is not one of {", ".join(known)}')
for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters', 'log_interval', 'max_bad_steps',
             'replicas'):
    if config[name] < 1:
        raise UserError(f'{name}={config[name]} must be at least 1')
for name in ('learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'skip_spikes', 'keep_checkpoints',
             'hellaswag_interval', 'sample_interval', 'gradient_accumulation_steps', 'seed'):
    if not 0 <= config[name] < math.inf:
        raise UserError(f'{name}={config[name]} must be a number from 0 up')
for name in ('beta1', 'beta2', 'wsd_decay'):
    if not 0 < config[name] < 1:
        raise UserError(f'{name}={config[name]} must be between 0 and 1')
distributed.check_layout(parallel, replicas, cpu_offload, sharded_checkpoints)
dtype = pick_dtype(dtype, device)
torch.set_float32_matmul_precision('high')  # TF32 where a GPU has it
torch.manual_seed(seed)
lr_decay_iters = lr_decay_iters or max_iters


# how many micro-batches make a step
micro_batch = batch_size * block_size * distributed.world_size  # tokens, over all processes
if gradient_accumulation_steps:
    if gradient_accumulation_steps % distributed.world_size:
        raise UserError(f'gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared equally by '
                        f'{distributed.world_size} processes: take a multiple of {distributed.world_size}')
    accumulation_steps = gradient_accumulation_steps // distributed.world_size  # of each process
elif total_batch_size < 1 or total_batch_size % micro_batch:
    below = total_batch_size // micro_batch * micro_batch
    near = ' or '.join(f'{n}' for n in (below, below + micro_batch) if n > 0)
    raise UserError(f'total_batch_size={total_batch_size} is no multiple of batch_size * block_size * processes = '
                    f'{batch_size} * {block_size} * {distributed.world_size} = {micro_batch}: the nearest are {near}')
else:
    accumulation_steps = total_batch_size // micro_batch
tokens_per_step = accumulation_steps * micro_batch

# data
share = dict(batch_size=batch_size, block_size=block_size, rank=distributed.rank, world_size=distributed.world_size,
             device=device)
train_data = Loader(dataset, 'train', **share, shuffle=shuffle, seed=seed)
val_data = Loader(dataset, 'val', **share, shuffle=False)
tokenizer = get_tokenizer(train_data.tokenizer)

# model
step, best_val_loss, resumed = 0, math.inf, None
skipped, bad_steps, norms = 0, 0, deque(maxlen=100)  # steps skipped, of them the last in a row; gradients' lengths
ckpt_path, log_path = os.path.join(out_dir, checkpoint.NAME), os.path.join(out_dir, 'log.jsonl')
if init_from == 'auto':
    init_from = distributed.all_gather('resume' if os.path.exists(ckpt_path) else 'scratch')[0]
model_args = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
try:
    if init_from == 'scratch':
        model = GPT(GPTConfig(**model_args, vocab_size=train_data.vocab_size))
        vocabulary = tokenizer.name
    elif init_from == 'resume':
        resumed = checkpoint.load(ckpt_path)
        if 'data' not in resumed:
            raise UserError(f'{ckpt_path} holds weights alone, not where a run was: --init_from={ckpt_path} starts from them')
        if resumed['config']['optimizer'] != optimizer:
            raise UserError(f'{ckpt_path} has the state of {resumed["config"]["optimizer"]}: --init_from={ckpt_path} starts from '
                            'its weights alone')
        model, vocabulary = checkpoint.model_from(resumed, dropout=dropout), resumed['tokenizer']
        step, best_val_loss, skipped = resumed['iter_num'], resumed['best_val_loss'], resumed['skipped']
        norms.extend(resumed['norms'])
    else:
        model, vocabulary = checkpoint.pretrained(init_from, dropout=dropout)
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
except ValueError as error:  # settings that make no model
    raise UserError(error) from None
if vocabulary != tokenizer.name:
    raise UserError(f'{dataset} is tokenized with {tokenizer.name}, but the weights were trained on {vocabulary} tokens')
if block_size > model.config.block_size:
    raise UserError(f'block_size={block_size} is longer than the {model.config.block_size} that the weights were trained for')
model.activation_checkpointing = activation_checkpointing

compiled = pick_compile(compile, device)
if compiled:
    model.compile()
train_model = distributed.wrap(model, device, parallel, dtype, replicas, cpu_offload)
try:
    optimizers = configure_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2),
                                      sharded=parallel == 'zero1')
except ValueError as error:
    raise UserError(error) from None
scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == 'float16')
if resumed:
    checkpoint.set_optimizer_state(model, optimizers, resumed['optimizer'])
    if resumed['scaler']:  # else it ran without one
        scaler.load_state_dict(resumed['scaler'])
    train_data.load_state_dict(resumed['data'])


def get_lr(step):
    """Linear warmup to learning_rate, then down to min_lr at lr_decay_iters by lr_schedule."""
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


@torch.no_grad()
def validation_loss(data):
    """The mean loss in nats over the same tokens each time, computed by all processes together."""
    total = count = 0
    for x, y in data.eval_batches(eval_iters):
        with autocast(dtype, device):
            _, loss = model(x, y, return_logits=False)
        n = (y != -1).sum()
        total, count = total + torch.where(n > 0, loss * n, 0), count + n  # a batch without targets has no loss
    total, count = distributed.all_sum(total, count, device=device)
    return total / count


def sample():
    """Print two short texts by the model. All processes take part; their random numbers stay as they are."""
    with torch.compiler.set_stance('force_eager'), autocast(dtype, device):
        start = torch.full((2, 1), tokenizer.eot, device=device)
        seeds = seed + step, seed + step + 1
        for row in model.generate(start, max_new_tokens=min(64, block_size), top_k=50, seeds=seeds).tolist():
            print0(f'  > {tokenizer.decode(row[1:])!r}')


def due(interval):
    return interval and (step % interval == 0 or step == max_iters)


def evaluate():
    """Score the model as it is now. Returns what the log will hold of it."""
    model.eval()
    began = time.perf_counter()
    losses = {name: validation_loss(data) for name, _, data in val_data.parts}
    val_loss = sum(weight * losses[name] for name, weight, _ in val_data.parts)
    result = {'step': step, 'val_loss': val_loss, 'perplexity': math.exp(min(val_loss, 700))}
    line = f'step {step}/{max_iters} | val loss {val_loss:.4f} | perplexity {result["perplexity"]:.2f}'
    if len(losses) > 1:  # a mixture
        result |= {'val_losses': losses, 'drawn': train_data.stats()}
        line += ''.join(f' | {name} {losses[name]:.4f}, {drawn["share"]:.1%} of the blocks, {drawn["epochs"]:.2f} epochs'
                        for name, drawn in result['drawn'].items())
    if due(hellaswag_interval):
        with torch.compiler.set_stance('force_eager'):
            scores = hellaswag.evaluate(model, tokenizer, items, device=device, dtype=dtype)
        result['hellaswag'] = scores['acc_norm']
        line += f' | hellaswag {scores["acc_norm"]:.4f} (of {len(items)})'
    print0(f'{line} | {time.perf_counter() - began:.1f} s')
    if due(sample_interval):
        sample()
    model.train()
    return result


def write_log(entry):
    if distributed.master:
        try:
            with open(log_path, 'a') as f:
                f.write(json.dumps(entry) + '\n')
        except OSError as error:  # a full disk: better a gap in the log than the end of the run
            print(f'{log_path} could not be written: {error.strerror}', file=sys.stderr, flush=True)
        if wandb_log:
            wandb.log(entry, step=entry['step'])


def save(best=False):
    """Write what a resume needs to go on as if nothing had happened; in the background, once it is copied."""
    state = (checkpoint.sharded_state(model, optimizers, out_dir) if sharded_checkpoints
             else checkpoint.training_state(model, optimizers))
    state |= {'model_args': asdict(model.config), 'tokenizer': tokenizer.name, 'config': config, 'iter_num': step,
              'best_val_loss': best_val_loss, 'data': train_data.state_dict(), 'scaler': scaler.state_dict(),
              'random': distributed.all_gather(checkpoint.random_state(device)), 'skipped': skipped, 'norms': list(norms)}
    checkpoint.save(state, out_dir, best, keep_checkpoints)


def is_spike(norm):
    """Is the gradient much longer than those of the last 100 good steps?"""
    return (skip_spikes and len(norms) == norms.maxlen
            and norm > statistics.fmean(norms) + skip_spikes * statistics.stdev(norms))


stop_signal = asked = 0


def request_stop(number, frame):
    global stop_signal, asked
    if stop_signal:
        if time.monotonic() - asked > 2:  # sooner it is torchrun, that passes on what the terminal told all
            sys.exit(128 + number)
        return
    stop_signal, asked = number, time.monotonic()
    print0(f'\n{signal.Signals(number).name}: finishing this step, then saving (again to stop at once)')


signal.signal(signal.SIGINT, request_stop)
signal.signal(signal.SIGTERM, request_stop)

if distributed.master and not eval_only:
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f'out_dir={out_dir} cannot be made: {error.strerror}')
    if init_from == 'resume':
        log.rewind(log_path, step)
    else:
        log.archive_previous_run(out_dir)
items = hellaswag.load_items(hellaswag_data, hellaswag_limit) if hellaswag_interval else []
if wandb_log and distributed.master:
    try:
        import wandb
    except ImportError:
        raise UserError('wandb_log needs Weights & Biases: pip install wandb')
    wandb.init(project=wandb_project, name=wandb_run_name, config=config)

peak = peak_flops(dtype, device) * distributed.world_size
print0(f'{model.get_num_params() / 1e6:.2f}M parameters, {tokens_per_step:,} tokens a step, {max_iters:,} steps, '
    f'{distributed.world_size} x {device}, {dtype}, {"compiled" if compiled else "not compiled"}')

torch.manual_seed(seed + distributed.rank + step)  # dropout differs from process to process
if resumed and len(resumed['random']) == distributed.world_size:
    checkpoint.set_random_state(resumed['random'][distributed.rank], device)
del resumed

tracer = None
if profile and distributed.master:
    tracer = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=3, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(os.path.join(out_dir, 'trace.json')))
    tracer.start()

if not eval_only:
    write_log({'step': step, 'config': config, 'tokens_per_step': tokens_per_step,
               'parameters': model.get_num_params(), 'data': train_data.state_dict()})
model.train()
while True:
    if due(eval_interval) or due(hellaswag_interval) or due(sample_interval) or eval_only:
        result = evaluate()
        if eval_only:
            break
        write_log(result)
        improved = result['val_loss'] < best_val_loss
        if step > 0 and math.isfinite(result['val_loss']) and (improved or always_save_checkpoint):
            best_val_loss = min(best_val_loss, result['val_loss'])
            save(best=improved)
    if step >= max_iters:
        break

    began = time.perf_counter()
    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
    train_loss = 0
    for micro_step in range(accumulation_steps):
        x, y = train_data.next_batch()  # (B, T) each
        distributed.sync_gradients(train_model, micro_step == accumulation_steps - 1)
        with autocast(dtype, device):
            _, loss = train_model(x, y, return_logits=False)
        scaler.scale(loss / accumulation_steps).backward()
        train_loss = train_loss + loss.detach() / accumulation_steps
    for opt in optimizers:
        scaler.unscale_(opt)
    grad_norm = distributed.clip_grad_norm(model, grad_clip)
    # the one moment at which the host waits for the device: what all processes have to say of this step
    train_loss, grad_norm, stops = distributed.all_sum(train_loss / distributed.world_size, grad_norm / distributed.world_size,
                                               stop_signal > 0, device=device)
    good = math.isfinite(train_loss) and math.isfinite(grad_norm) and not is_spike(grad_norm)
    for opt in optimizers:
        if good:
            scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    if good:
        bad_steps = 0
        norms.append(grad_norm)
    else:
        bad_steps, skipped = bad_steps + 1, skipped + 1
    step += 1
    if tracer:
        tracer.step()
    seconds = time.perf_counter() - began
    tokens_per_s = tokens_per_step / seconds
    mfu = model.flops_per_token() * tokens_per_s / peak
    if step % log_interval == 0 or step == max_iters or not good:
        left = timedelta(seconds=round((max_iters - step) * seconds))
        note = '' if good else f' | skipped ({skipped} so far)'
        print0(f'step {step}/{max_iters} | loss {train_loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | '
            f'{seconds * 1e3:.0f} ms | {tokens_per_s:,.0f} tokens/s | mfu {mfu:.1%} | {left} left{note}')
        write_log({'step': step, 'loss': train_loss, 'lr': lr, 'grad_norm': grad_norm, 'ms': seconds * 1e3,
             'tokens_per_s': tokens_per_s, 'mfu': mfu, 'skipped': skipped})
    if bad_steps == max_bad_steps:
        checkpoint.wait()
        raise UserError(f'{bad_steps} steps in a row without a good gradient (the last: loss {train_loss:.4g}, norm '
                        f'{grad_norm:.4g}), stopped at step {step}: the last good checkpoint is {ckpt_path}, if there is one')
    if stops and good:
        save()
        if checkpoint.wait():
            print0(f'saved {ckpt_path} at step {step}; --init_from=resume goes on from it')
        break

if not checkpoint.wait():
    sys.exit(1)
distributed.shutdown()
