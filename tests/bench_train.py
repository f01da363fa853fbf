"""
Training speed: tokens a second of the step that train.py runs, beside a peer's, on the same random tokens.

    python tests/bench_train.py --peer=../nanoGPT                      # the CPU's or GPU's usual way
    python tests/bench_train.py --peer=../build-nanogpt --batch_size=64

Each is compiled and measured in a process of its own, turn by turn, so that a machine that drifts slows all alike.
The rates are medians; the ceiling is that of large matrix products in our dtype on the same device between them.
"""

import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from configurator import configure
from common.device import DTYPES, autocast, pick_compile, pick_device, pick_dtype, synchronize

peer = ''  # a checkout of nanoGPT or build-nanogpt
peer_compile = 'auto'  # nanoGPT's default is True, and False is what its README gives for a CPU
peer_dtype = 'auto'  # nanoGPT's train.py autocasts on GPUs only
batch_size = 16
block_size = 1024
steps = 20  # measured, after three that are not
rounds = 3  # of each in turn
device = 'auto'
dtype = 'auto'
compile = 'auto'
role = ''  # (internal) measure just 'ours' or 'peer' and print the rate


def definitions(file):
    """What a script defines, without running it: its imports, classes and functions."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body
                 if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef))]
    names = {'__name__': 'peer'}
    sys.modules['peer'] = SimpleNamespace(**names)  # dataclasses look their module up
    exec(compile_source(tree, str(file), 'exec'), names)
    return names


compile_source = __builtins__.compile  # `compile` is a setting here


def our_model():
    from model import GPT, GPTConfig
    from common.optimizers import configure_optimizers
    model = GPT(GPTConfig(block_size=block_size)).to(device)
    optimizers = configure_optimizers(model, 'adamw', 6e-4, 0.1, (0.9, 0.95))
    return model, optimizers, lambda x, y: model(x, y, return_logits=False)


def peer_model():
    sys.path.insert(0, peer)
    file = next(f for f in (Path(peer, 'train_gpt2.py'), Path(peer, 'model.py')) if f.exists())
    names = definitions(file)
    names['master_process'] = False
    model = names['GPT'](names['GPTConfig'](block_size=block_size, vocab_size=50304)).to(device)
    kind = torch.device(device).type
    if file.name == 'model.py':
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), kind)
    else:
        optimizer = model.configure_optimizers(0.1, 6e-4, kind)
    return model, [optimizer], model


def measure():
    """Print 'tokens/s, peak memory in bytes' of the role."""
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision('high')
    model, optimizers, forward = our_model() if role == 'ours' else peer_model()
    if compile:
        model.compile()
    x, y = torch.randint(0, 50257, (2, batch_size, block_size), device=device)
    times = []
    for step in range(steps + 3):
        synchronize(device)
        began = time.perf_counter()
        with autocast(dtype, device):
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() if 'cuda' in device else 0
    print('rate', batch_size * block_size / statistics.median(times[3:]), memory)


def run(role, **settings):
    args = [f'--{k}={v}' for k, v in settings.items()]
    result = subprocess.run([sys.executable, __file__, *sys.argv[1:], f'--role={role}', *args],
                            capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith('rate')]
    if not lines:
        sys.exit(f'{role} failed:\n{result.stderr}')
    return [float(v) for v in lines[0].split()[1:]]


def product_rates():
    """FLOP/s of some large matrix products in dtype: what no training step can exceed."""
    n = 8192 if 'cuda' in device else 4096
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    rates = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        rates.append(2 * n**3 / (time.perf_counter() - began))
    return rates[1:]


def main():
    from model import GPT, GPTConfig
    with torch.device('meta'):
        flops = GPT(GPTConfig(block_size=block_size)).flops_per_token()
    print(f'{torch.__version__}, {torch.cuda.get_device_name() if "cuda" in device else "CPU"}, '
          f'{torch.get_num_threads()} threads')
    products, ours, theirs = [], [], []
    for _ in range(rounds):
        products += product_rates()
        ours.append(run('ours', device=device, dtype=dtype, compile=compile))
        if peer:
            theirs.append(run('peer', device=device, dtype=peer_dtype, compile=peer_compile))
        print(f'  {ours[-1][0]:,.0f}', f'{theirs[-1][0]:,.0f}' if peer else '', flush=True)
    ceiling = statistics.median(products)
    print(f'ceiling: {ceiling / 1e12:.2f} TFLOP/s = {ceiling / flops:,.0f} tokens/s')
    rates = []
    for name, runs, *how in ('ours', ours, dtype, compile), (Path(peer).name, theirs, peer_dtype, peer_compile):
        if runs:
            rate, memory = (statistics.median(values) for values in zip(*runs))
            rates.append(rate)
            print(f'{name}: {rate:,.0f} tokens/s, {rate * flops / ceiling:.1%} of the ceiling'
                  f'{f", {memory / 2**30:.1f} GiB" if memory else ""} ({how[0]}, {"" if how[1] else "not "}compiled)')
    if peer:
        print(f'ratio: {rates[0] / rates[1]:.2f}')


if __name__ == '__main__':
    configure(globals())
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    compile = pick_compile(compile, device)
    if peer_dtype == 'auto':
        peer_dtype = dtype if 'cuda' in device else 'float32'
    if peer_compile == 'auto':
        peer_compile = 'cuda' in device
    measure() if role else main()
