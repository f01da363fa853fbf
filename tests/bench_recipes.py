"""
Fewer tokens to the same loss: config/gpt2_fast.py's recipe beside config/gpt2.py's, and with each part taken out.

    python data/stdlib/prepare.py
    python tests/bench_recipes.py --picture=recipes.png     # GPT-2's recipe and the fast one, three seeds each
    python tests/bench_recipes.py --ablations=True --seeds=1

A model of 1.8M parameters on the standard library's bytes, at a size that two cores manage; GPT-2's recipe gets the
best of three learning rates. Every run has the same tokens; the time is that of a step, which a noisy machine blurs.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import configure

seeds = 3
steps = 300  # of 2,048 tokens
ablations = False  # the recipe with each part taken out, instead of the two recipes
picture = ''  # draw the curves into this file (needs matplotlib)

SIZES = ['--dataset=stdlib', '--block_size=128', '--batch_size=16', '--gradient_accumulation_steps=1', '--n_layer=4',
         '--n_head=6', '--n_embd=192', '--eval_interval=25', '--eval_iters=40', '--log_interval=1',
         '--warmup_iters=20', '--sample_interval=0', '--hellaswag_interval=0', '--compile=False']
GPT2 = {f"GPT-2's recipe, learning rate {rate:g}": ['config/gpt2.py', f'--learning_rate={rate}', f'--min_lr={rate / 10}']
        for rate in (5e-4, 1e-3, 3e-3)}
FAST = ['config/gpt2_fast.py', '--learning_rate=5e-3']
PARTS = {'without RoPE (learned positions)': ['--position=learned'],
         'without QK-norm': ['--qk_norm=False'],
         'without RMSNorm (LayerNorm)': ['--norm=layernorm'],
         'without ReLU² (GELU)': ['--mlp=gelu'],
         'SwiGLU of the same size instead of ReLU²': ['--mlp=swiglu', '--n_mlp=512'],
         'without zero initialisation': ['--zero_init=False'],
         'without Muon (AdamW)': ['--optimizer=adamw', '--learning_rate=3e-3'],
         'cosine instead of warmup-stable-decay': ['--lr_schedule=cosine'],
         'linear instead of warmup-stable-decay': ['--lr_schedule=linear'],
         'with untied embeddings': ['--tie_embeddings=False'],
         'with logits capped at 15': ['--softcap=15.0'],
         'with biases': ['--bias=True']}


def train(settings, seed, folder):
    """([(step, validation loss)], median ms of a step)"""
    out_dir = Path(folder, f'run-{len(list(Path(folder).iterdir()))}')
    command = [sys.executable, 'train.py', settings[0], *SIZES, f'--max_iters={steps}', *settings[1:],
               f'--seed={1337 + seed}', f'--out_dir={out_dir}']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f'{" ".join(command)} failed:\n{result.stderr}')
    log = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return ([(entry['step'], entry['val_loss']) for entry in log if 'val_loss' in entry],
            statistics.median(entry['ms'] for entry in log if 'ms' in entry))


def steps_to(loss, curve):
    """The first step at which a curve is at most this loss, between its points by a straight line."""
    for (s0, l0), (s1, l1) in zip(curve, curve[1:]):
        if l1 <= loss:
            return s0 + (s1 - s0) * (l0 - loss) / (l0 - l1)
    return float('inf')


def draw(results, file):
    import matplotlib
    matplotlib.use('svg' if file.endswith('svg') else 'agg')
    from matplotlib import pyplot as plt
    plt.figure(figsize=(7, 4))
    for (name, runs), color in zip(results.items(), ('tab:gray', 'tab:orange', 'tab:green', 'tab:blue')):
        for k, (curve, _) in enumerate(runs):
            x, y = zip(*curve[1:])
            plt.plot([2.048e-3 * s for s in x], y, color=color, alpha=0.8, label=name if k == 0 else None)
    plt.xlabel('million tokens')
    plt.ylabel('validation loss (nats a byte)')
    plt.legend(frameon=False)
    plt.grid(alpha=0.3)
    plt.tight_layout()
    plt.savefig(file, dpi=120)


if __name__ == '__main__':
    configure(globals())
    if ablations:
        recipes = {'the recipe': FAST} | {name: FAST + change for name, change in PARTS.items()}
    else:
        recipes = GPT2 | {'the fast recipe': FAST}
    with tempfile.TemporaryDirectory() as folder:
        results = {name: [] for name in recipes}
        for seed in range(seeds):
            for name, settings in recipes.items():
                results[name].append(train(settings, seed, folder))
                print(f'seed {seed}: {name:45} {results[name][-1][0][-1][1]:.4f}', flush=True)
    for name, runs in results.items():
        print(f'{name:45} validation loss {statistics.mean(curve[-1][1] for curve, _ in runs):.4f}   '
              f'{statistics.median(ms for _, ms in runs):.0f} ms a step')
    if not ablations:
        best = min(GPT2, key=lambda name: statistics.mean(curve[-1][1] for curve, _ in results[name]))
        shares = [steps_to(base[0][-1][1], fast[0]) / steps
                  for base, fast in zip(results[best], results['the fast recipe'])]
        print(f'tokens to the loss of {best}: {statistics.median(shares):.0%} of its tokens '
              f'({", ".join(f"{share:.0%}" for share in shares)})')
    if picture:
        draw(results, picture)
