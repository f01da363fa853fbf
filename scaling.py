"""
A scaling law of your own: trains a grid of small models on a few token counts each, or reads finished runs, fits
L = E + A/N^alpha + B/D^beta to their validation losses, and predicts runs that it has not seen.

    python scaling.py config/quickstart.py                         # train the grid, fit, draw
    python scaling.py --runs='out-*' --predict=124e6:10e9          # fit finished runs instead
    python plan.py --budget=1e19 --fit=out-scaling/scaling.json    # what to train with that compute

It takes train.py's settings and its own; each model of the grid is one run of train.py with them. Finished runs are
kept, so that the same command continues after a stop, or adds to the grid.
"""

import glob
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import UserError, configure, settings_of

import torch

import compare
from common import files, laws, log

# -----------------------------------------------------------------------------
out_dir = 'out-scaling'  # the grid's runs, scaling.json and the picture go here
runs = ''  # fit these finished runs instead of a grid: folders with * and ?, comma-separated
sizes = '2x32,2x64,3x96'  # models of the grid: layers x channels
steps = '300,600,1200,2400'  # of each of them; every run's learning rate falls over its own steps
grid_head_size = 32  # channels of a head in the grid's models
hold_out = 2  # runs of most compute that the fit does not see and has to predict; 0: it sees all
predict = ''  # predict the loss of these too: parameters:tokens, comma-separated, such as 124e6:10e9
resamples = 200  # of the bootstrap that gives the 90% intervals
picture = 'scaling.png'  # in out_dir, by matplotlib; nothing: none
# -----------------------------------------------------------------------------

TRAIN = Path(__file__).with_name('train.py')
COLORS = 'cividis'  # light to dark as models grow; the same order for colour-blind readers and in print
MARKERS = 'osD^vP*X'


@dataclass
class Run:
    name: str
    n: int  # parameters, with the token embeddings and without learned positions
    d: int  # training tokens
    loss: float  # the validation loss at the end, nats per token

    @property
    def flops(self):
        return 6 * self.n * self.d


def read_run(folder):
    """(Run, train.py's settings) of a finished run, from its log. Raises UserError for one that isn't finished, or
    didn't start from scratch."""
    entries = log.read(os.path.join(folder, 'log.jsonl'))
    starts = [entry for entry in entries if 'config' in entry]  # one more after each resume
    scores = [entry for entry in entries if 'val_loss' in entry]
    if not starts or not scores:
        raise UserError(f'{folder}: its log has no settings or no validation loss')
    config = starts[-1]['config']
    if scores[-1]['step'] < config['max_iters']:
        raise UserError(f'{folder} stopped at step {scores[-1]["step"]} of {config["max_iters"]}, and only the loss at '
                        'the end of a schedule is on the curve: finish it with --init_from=resume')
    if starts[0]['config']['init_from'] not in ('scratch', 'auto'):
        raise UserError(f'{folder} started from {starts[0]["config"]["init_from"]}: a scaling law is of models trained '
                        'from scratch')
    if scores[-1]['val_loss'] is None:  # as a log has what is not finite
        raise UserError(f'{folder} has diverged: its final validation loss is not finite')
    tokens = starts[-1]['tokens_per_step'] * config['max_iters']
    return Run(folder, starts[-1]['parameters'], tokens, scores[-1]['val_loss']), config


def train_grid(settings):
    """[(Run, settings)] of the grid, each run finished by train.py if it isn't yet. settings: train.py's."""
    try:
        counts = [int(count) for count in steps.split(',') if count.strip()]
    except ValueError:
        raise UserError(f'steps={steps} is not a comma-separated list such as 75,150,300') from None
    jobs = []
    for size in sizes.split(','):
        try:
            layers, width = map(int, size.split('x'))
        except ValueError:
            raise UserError(f'sizes={sizes}: {size} is not layers x channels, such as 4x128') from None
        if width % grid_head_size:
            raise UserError(f'sizes={sizes}: {width} channels are no multiple of grid_head_size={grid_head_size}')
        for count in counts:
            shape = dict(n_layer=layers, n_embd=width, n_head=width // grid_head_size)
            end = dict(max_iters=count, lr_decay_iters=0, eval_interval=count, sample_interval=0, hellaswag_interval=0)
            jobs.append((layers * width**2 * count, f'{out_dir}/{layers}x{width}-{count}', settings | shape | end))
    found = []
    for i, (_, folder, wanted) in enumerate(sorted(jobs, key=lambda job: job[0])):
        arguments = [f'--{name}={value}' for name, value in wanted.items()
                     if name not in ('seed', 'out_dir', 'init_from')]
        compare.train(Path(folder), arguments, wanted, wanted['seed'])
        run, config = read_run(folder)
        print(f'{i + 1}/{len(jobs)} {describe(run)} | loss {run.loss:.4f}', flush=True)
        found.append((run, config))
    return found


def describe(run):
    return f'{os.path.basename(run.name):12} {short(run.n)} parameters, {short(run.d)} tokens'


def short(x):
    """1234567 as 1.23M."""
    power = min(max(int(math.log10(max(x, 1)) // 3), 0), 4)
    return f'{x / 1000**power:.3g}{" kMBT"[power].strip()}'


def draw(path, fitted, unseen, law, predictions):
    """Three panels of loss: against compute with the frontier, against parameters, against tokens."""
    from matplotlib import colormaps, ticker
    from matplotlib.figure import Figure
    shown = fitted + unseen
    counts, tokens = sorted({run.n for run in shown}), sorted({run.d for run in shown})
    color = {n: colormaps[COLORS](0.88 - 0.88 * i / max(1, len(counts) - 1)) for i, n in enumerate(counts)}
    marker = {n: MARKERS[i % len(MARKERS)] for i, n in enumerate(counts)}
    figure = Figure(figsize=(8, 3.9), layout='constrained')
    by_flops, by_n, by_d = axes = figure.subplots(1, 3, sharey=True)

    def span(low, high):
        return torch.logspace(math.log10(low / 1.3), math.log10(high * 1.3), 100, dtype=torch.float64)

    flops = span(min(run.flops for run in shown), max(run.flops for run in shown))
    n, d = span(counts[0] / 2.5, counts[-1]), span(tokens[0], tokens[-1])  # room for the labels of the lines over n
    limit = dict(color='0.35', linestyle=':', linewidth=1.4)
    by_flops.plot(flops, law.loss(*law.optimum(flops)), color='black', linestyle='--', linewidth=1.4, label='frontier')
    by_n.plot(n, law.loss(n, math.inf), **limit, label='limit D → ∞, or N → ∞')
    by_d.plot(d, law.loss(math.inf, d), **limit)
    for count in tokens:
        by_n.plot(n, law.loss(n, count), color='0.75', linewidth=0.9, zorder=1)
        by_n.annotate(f'D = {short(count)}', (n[4], law.loss(n[4], count)), xytext=(0, 4), textcoords='offset points',
                      fontsize=7, color='0.3')
    for count in counts:
        by_flops.plot(6 * count * d, law.loss(count, d), color=color[count], linewidth=1, zorder=1)
        by_d.plot(d, law.loss(count, d), color=color[count], linewidth=1, zorder=1)

    labels = 'compute 6ND (FLOPs)', 'parameters N', 'training tokens D'
    for name, axis, label in zip(('flops', 'n', 'd'), axes, labels):
        for count in counts:
            points = [run for run in fitted if run.n == count]
            axis.plot([getattr(run, name) for run in points], [run.loss for run in points], marker[count],
                      color=color[count], markersize=5, label=f'N = {short(count)}' if axis is by_d else None)
        for run, (_, low, high) in zip(unseen, predictions):
            at = getattr(run, name)
            axis.plot([at, at], [low, high], '_-', color='#D55E00', linewidth=1.5, markersize=10, markeredgewidth=1.5,
                      label='90% interval of a run held out' if run is unseen[0] and axis is by_d else None)
            axis.plot(at, run.loss, marker[run.n], markerfacecolor='white', markeredgecolor=color[run.n], markersize=5)
        axis.set(xscale='log', yscale='log')
        values = [getattr(run, name) for run in shown]
        wide = max(values) > 30 * min(values)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        if axis is not by_flops:
            axis.xaxis.set_major_formatter(lambda value, _: short(value))
        axis.set_xlabel(label, fontsize=9)
        axis.tick_params(which='both', labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    losses = [run.loss for run in shown] + [x for numbers in predictions for x in numbers]
    by_flops.set_ylim(min(losses) / 1.08, max(losses) * 1.15)
    by_flops.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)))
    by_flops.yaxis.set_major_formatter('{x:.3g}')
    by_flops.yaxis.set_minor_formatter(ticker.NullFormatter())
    by_flops.set_ylabel('validation loss (nats per token)', fontsize=9)
    figure.legend(loc='outside upper center', ncols=4, frameon=False, fontsize=8)
    save(path, lambda f: figure.savefig(f, dpi=200, format=Path(path).suffix[1:]))


def save(path, write):
    """Have write(binary file) make the file at path, whole or not at all."""
    try:
        with files.atomic_write(path) as f:
            write(f)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib has no format for
        raise UserError(f'{path} cannot be written: {error}') from None


def main():
    given = configure(globals(), 'train.py')
    try:
        targets = [(float(n), float(d)) for n, d in (pair.split(':') for pair in predict.split(',') if pair.strip())]
    except ValueError:
        raise UserError(f'predict={predict} is not parameters:tokens, such as 124e6:10e9') from None
    if hold_out < 0 or resamples < 20:
        raise UserError('hold_out must be at least 0 and resamples at least 20')
    if picture:
        try:
            import matplotlib  # noqa: F401  before hours of training
        except ImportError:
            raise UserError('the picture needs matplotlib: pip install matplotlib, or --picture= for none') from None
    files.lock(out_dir).release()  # raises unless it can be written
    if runs:
        patterns = [os.path.expanduser(pattern.strip()) for pattern in runs.split(',')]
        folders = sorted({folder for pattern in patterns for folder in glob.glob(pattern) if os.path.isdir(folder)})
        if not folders:
            raise UserError(f'runs={runs} names no folder')
        found, problems = [], []
        for folder in folders:  # a pattern also finds what is no finished run
            try:
                found.append(read_run(folder))
            except UserError as error:
                problems.append(error)
        if not found:
            raise problems[0]
        for error in problems:
            print(f'left out: {error}')
    else:
        found = train_grid({name: given[name] for name in settings_of(TRAIN)})
    by_batches = any(config['eval_iters'] for _, config in found)
    for name in 'dataset', 'block_size', *(('eval_iters', 'batch_size') if by_batches else ('eval_tokens',)):
        if len({config.get(name) for _, config in found}) > 1:
            print(f'{name} differs between these runs: their validation losses are not of the same tokens')
    found = sorted((run for run, _ in found), key=lambda run: run.flops)
    fitted, unseen = found[:len(found) - hold_out], found[len(found) - hold_out:]
    n_sizes, n_counts = len({run.n for run in fitted}), len({run.d for run in fitted})
    if len(fitted) < 8 or n_sizes < 3 or n_counts < 3:
        raise UserError(f'a law of five numbers needs at least 8 runs of 3 sizes and 3 token counts, and there are '
                        f'{len(fitted)} of {n_sizes} and {n_counts} beside the {len(unseen)} that hold_out={hold_out} '
                        'leaves for the prediction')

    data = [torch.tensor([getattr(run, name) for run in fitted], dtype=torch.float64) for name in ('n', 'd', 'loss')]
    law = laws.fit(*data)
    resampled, noise = laws.resample(*data, law, resamples)
    intervals = {name: laws.interval(values).tolist() for name, values in asdict(resampled).items()}
    exponent = laws.interval(resampled.beta / (resampled.alpha + resampled.beta)).tolist()
    numbers = {name: float(value) for name, value in asdict(law).items()}
    E, A, alpha, B, beta = numbers.values()
    print(f'\n{len(fitted)} runs, {short(min(data[0]))} to {short(max(data[0]))} parameters, '
          f'{short(min(data[1]))} to {short(max(data[1]))} tokens')
    print(f'L = {E:.3f} + {A:.4g}/N^{alpha:.3f} + {B:.4g}/D^{beta:.3f}')
    for name, (low, high) in intervals.items():
        print(f'  {name:5} {numbers[name]:8.4g}   90% interval {low:.3g} to {high:.3g}')
    if E < 0.01 * min(data[2]):
        print('  these runs cannot tell E from 0: that takes longer runs of larger models')
    print(f'  compute-optimal N ~ C^{beta / (alpha + beta):.2f} ({exponent[0]:.2f} to {exponent[1]:.2f}), '
          "Chinchilla's 0.46 to 0.50")

    predictions = [[float(x) for x in laws.predict(law, resampled, noise, run.n, run.d)] for run in unseen]
    for run, (expected, low, high) in zip(unseen, predictions):
        verdict = 'inside' if low <= run.loss <= high else 'OUTSIDE'
        print(f'held out: {describe(run)}: {expected:.4f} expected, 90% interval {low:.4f} to {high:.4f}; '
              f'measured {run.loss:.4f}, {verdict}')
    for n, d in targets:
        expected, low, high = map(float, laws.predict(law, resampled, noise, n, d))
        print(f'{short(n)} parameters, {short(d)} tokens: {expected:.4f} expected, '
              f'90% interval {low:.4f} to {high:.4f}')

    result = {'law': numbers, 'intervals': intervals, 'flops': [fitted[0].flops, fitted[-1].flops],
              'runs': [asdict(run) for run in found], 'hold_out': hold_out}
    path = os.path.join(out_dir, 'scaling.json')
    save(path, lambda f: f.write(json.dumps(result, indent=1).encode() + b'\n'))
    written = [path]
    if picture:
        written.append(os.path.join(out_dir, picture))
        draw(written[-1], fitted, unseen, law, predictions)
    print(' and '.join(written) + ' written')


if __name__ == '__main__':
    main()
