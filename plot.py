"""
One picture of any number of runs, from their log.jsonl. Needs matplotlib.

    python plot.py out-gpt2 out-gpt2-fast                   # curves.png and curves.svg
    python plot.py out-* --x=time --out=docs/speed

Training loss, gradient norm and tokens/s are running means over the shadow of every logged step; a cross marks a
skipped step. OpenAI's GPT-2 (124M) is a dashed line where the runs' data make it comparable.
"""
import os
from pathlib import Path

from configurator import UserError, configure

import numpy as np

from common import files, log

# -----------------------------------------------------------------------------
x = 'tokens'  # the horizontal axis: 'tokens', 'steps', or 'time' spent in training steps
out = 'curves'  # the picture's path without its ending: .png and .svg are added
# -----------------------------------------------------------------------------

PANELS = {'loss': 'training loss (nats per token)', 'val_loss': 'validation loss (nats per token)',
          'lr': 'learning rate', 'grad_norm': 'gradient norm', 'tokens_per_s': 'tokens per second',
          'hellaswag': 'HellaSwag (accuracy)'}
NOISY = 'loss', 'grad_norm', 'tokens_per_s'
UNITS = {'tokens': {'billions': 1e9, 'millions': 1e6, 'thousands': 1e3}, 'steps': {'thousands': 1e4},
         'time': {'days': 86400, 'hours': 3600, 'minutes': 60, 'seconds': 0}}
GPT2 = {'val_loss': 3.2924, 'hellaswag': 0.2945}  # OpenAI's 124M, by build-nanogpt's log; the loss on FineWeb-Edu
COLORS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'  # Okabe and Ito's, without yellow
STYLES, MARKERS = ('-', '-.', ':', (0, (8, 2))), 'os^Dv*P'
POINTS = 1000  # of a curve; more are joined into their mean, lowest and highest


def series(entries, x):
    """{name: (positions, values)} of the PANELS that a log has, and 'skipped': the positions of skipped steps."""
    train = {entry['step']: entry for entry in entries if 'loss' in entry}  # the last, of a step that is there twice
    steps = sorted(train)
    size = {'steps': lambda entry: 1, 'time': lambda entry: entry['ms'] / 1e3,
            'tokens': lambda entry: round(entry['tokens_per_s'] * entry['ms'] / 1e3)}[x]
    position = np.cumsum(np.diff([0, *steps]) * [size(train[step]) for step in steps])  # unlogged steps: as the next
    curves = {}
    for name in PANELS:
        at = {entry['step']: entry[name] for entry in entries if name in entry}
        if at:
            where = np.interp(sorted(at), [0, *steps], [0, *position])
            curves[name] = where, np.array([at[step] for step in sorted(at)], float)
    skipped = np.diff([0, *(train[step].get('skipped', 0) for step in steps)]) > 0
    return curves, position[skipped]


def thin(position, values):
    """A curve in at most POINTS groups: (position, mean, lowest, highest), each without what is not finite."""
    size = -(-len(values) // POINTS)
    padding = 0, -len(values) % size
    position = np.pad(position, padding, 'edge').reshape(-1, size).max(1)
    groups = np.ma.masked_invalid(np.pad(values, padding, constant_values=np.nan).reshape(-1, size))
    return position, *(part.filled(np.nan) for part in (groups.mean(1), groups.min(1), groups.max(1)))


def smooth(values):
    """The running mean over a thirtieth of a curve, without what is not finite."""
    good, window = np.isfinite(values), np.ones(max(1, len(values) // 30))
    mean = np.convolve(np.where(good, values, 0), window, 'same') / np.maximum(np.convolve(good, window, 'same'), 1)
    return np.where(good, mean, np.nan)


def late_bounds(where, values):
    """What a loss reaches after its first twentieth, in which it comes down from ln(vocab_size); [] if all is NaN."""
    late = values[(where >= where[-1] / 20) & np.isfinite(values)]
    return np.percentile(late, [1, 99]) if len(late) else []


def short_names(folders):
    """The folders' last names, if they differ, without their middle where they are long."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [name if len(name) <= 44 else f'{name[:21]}…{name[-22:]}' for name in names]


def comparable(logs):
    """The part of GPT2 that these runs may be held against: all say that they were scored on the same data."""
    configs = [next((entry['config'] for entry in reversed(entries) if 'config' in entry), {}) for entries in logs]
    same = {'val_loss': all(Path(c.get('dataset', '')).name.startswith('fineweb_edu') for c in configs),
            'hellaswag': all((c.get('hellaswag_limit'), c.get('hellaswag_data')) == (0, '') for c in configs)}
    return {name: value for name, value in GPT2.items() if same[name]}


def curves(folders, *paths, x='tokens', labels=None):
    """Draw the runs in `folders` into each of `paths` (.png, .svg), which are replaced whole.

    Runs with the same label share a color and an entry of the legend. Raises UserError for a folder without a log,
    for an x that is not in UNITS, and where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # and not pyplot, which keeps state and may want a screen
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
    except ImportError:
        raise UserError('pictures need matplotlib: pip install matplotlib') from None
    if x not in UNITS:
        raise UserError(f'x={x} is not one of {", ".join(UNITS)}')
    logs = [log.read(Path(folder, 'log.jsonl')) for folder in folders]
    runs = [series(entries, x) for entries in logs]
    for folder, (run, _) in zip(folders, runs):
        if not run:
            raise UserError(f'{Path(folder, "log.jsonl")} has nothing to draw yet')
    extent = max(where[-1] for run, _ in runs for where, _ in run.values())
    unit, scale = next(((f'{x} ({unit})', scale or 1) for unit, scale in UNITS[x].items() if extent >= 2 * scale),
                       (x, 1))

    labels = labels or short_names(folders)
    kinds = list(dict.fromkeys(labels))
    references = {name: value for name, value in comparable(logs).items() if any(name in run for run, _ in runs)}
    columns = 105 // (max(map(len, kinds)) + 7) or 1  # of the legend
    height = 7.5 + 0.2 * -(-(len(kinds) + bool(references)) // columns)  # inches
    figure = Figure(figsize=(8, height))
    axes = dict(zip(PANELS, figure.subplots(3, 2, gridspec_kw=dict(
        left=0.08, right=0.99, bottom=0.55 / height, top=7.2 / height, wspace=0.17, hspace=0.24)).flat))
    handles = {}
    for (run, skipped), label in zip(runs, labels):
        k = kinds.index(label)
        handles[label] = draw(axes, run, scale, color=COLORS[k % len(COLORS)], marker=MARKERS[k % len(MARKERS)],
                              linestyle=STYLES[k // len(COLORS) % len(STYLES)])
        axes['loss'].plot(skipped / scale, np.full(len(skipped), 0.97), 'x', color=COLORS[k % len(COLORS)],
                          markersize=5, transform=axes['loss'].get_xaxis_transform())
    for name, value in references.items():
        handles["OpenAI's GPT-2 124M"] = axes[name].axhline(value, color='dimgray', linestyle='--', linewidth=1)
    for name, axis in axes.items():
        axis.set_title(PANELS[name], loc='left', fontsize=10)
        axis.set_xlim(0, extent / scale * 1.02 or 1)
        axis.tick_params(which='both', labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_visible(any(name in run for run, _ in runs))
    for name in 'loss', 'val_loss':
        bounds = [bound for run, _ in runs if name in run for bound in late_bounds(*run[name])]
        if bounds:
            bounds += [references[name]] if name in references else []
            margin = (max(bounds) - min(bounds)) / 10 or 0.1
            axes[name].set_ylim(min(bounds) - margin, max(bounds) + margin)
    axes['grad_norm'].set_yscale('log')
    axes['grad_norm'].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes['grad_norm'].yaxis.set_major_formatter('{x:g}')
    axes['grad_norm'].yaxis.set_minor_formatter(NullFormatter())
    axes['tokens_per_s'].set_ylim(0)
    axes['tokens_per_s'].yaxis.set_major_formatter(EngFormatter(sep=''))
    axes['lr'].ticklabel_format(axis='y', style='plain')
    figure.text(0.535, 0.1 / height, unit, ha='center', fontsize=10)
    figure.legend(handles.values(), handles, loc='upper left', bbox_to_anchor=(0.04, 1), ncols=columns, frameon=False,
                  fontsize=9)
    for path in map(Path, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_write(path) as f:
                figure.savefig(f, dpi=150, format=path.suffix[1:])
        except OSError as error:
            raise UserError(f'{path} could not be written: {error.strerror}') from None


def redraw(out_dir):
    """Replace a run's curves.png. Whatever goes wrong costs a line, never the run."""
    path = Path(out_dir, 'curves.png')
    try:
        curves([out_dir], path)
    except Exception as error:
        if not path.exists() and 'matplotlib' not in str(error):
            print(f'no curves.png: {error}', flush=True)


def draw(axes, run, scale, **style):
    """Draw a run into the panels; returns one of its lines for the legend."""
    for name, (where, values) in run.items():
        if name in NOISY:
            where, values, low, high = thin(where, values)
            axes[name].plot(np.repeat(where, 2) / scale, np.stack([low, high], 1).ravel(), color=style['color'],
                            alpha=0.25, linewidth=0.6)
            values = smooth(values)
        line, = axes[name].plot(where / scale, values, linewidth=1.4, markersize=4,
                                **style | {'marker': style['marker'] if len(values) <= 12 else ''})
    return line


if __name__ == '__main__':
    folders = []
    configure(globals(), positional=folders)
    if not folders:
        raise UserError('plot.py draws the runs in folders that you name, as in: python plot.py out-gpt2 out-gpt2-fast')
    curves(folders, f'{out}.png', f'{out}.svg', x=x)
    print(f'{out}.png and {out}.svg show {len(folders)} run{"s" * (len(folders) > 1)}')
