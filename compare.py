"""
Is one configuration better than another? Trains both with the same seeds and data, and says.

    python compare.py config/gpt2.py config/gpt2_fast.py --seeds=5
    python compare.py config/quickstart.py 'config/quickstart.py --qk_norm=False' --max_iters=300 --jobs=2

Each side is a settings file, with settings of its own in the same quotes; further settings of train.py are for both.
The runs are OUT_DIR/NAME-seed1 and so on. The same command again continues where it stopped, and with more --seeds
adds to what is there: finished runs are read.

The final validation losses are compared pair by pair, by Student's t, after 3, 5, 10 and 20 seeds. These looks share
5% of error (1, 2.5, 1 and 0.5%): whether a comparison stops at the first that shows a difference, or adds seeds when
none does, it claims one that isn't there in at most 5 of 100 cases. They are repeated confidence intervals (Jennison
and Turnbull 1989, J. R. Statist. Soc. B 51:305) with Bonferroni's inequality.
"""
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configurator import UserError, configure, given, override, settings_of

import numpy as np

import plot
from common import files, log
from data.errors import some

# -----------------------------------------------------------------------------
seeds = 5  # pairs of runs at most: 3, 5, 10 or 20
jobs = 1  # runs at a time
out_dir = 'out-compare'  # for the runs' folders and the picture
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
LOOKS = {3: 9.925, 5: 3.495, 10: 3.250, 20: 3.174}  # seeds: Student's t for this look's error, both sides together
running = []  # the processes of runs


def side(text, common):
    """(name, train.py's arguments, the settings that they make) of one side of a comparison."""
    file, *own = shlex.split(text) or ['']
    name = ','.join([Path(file).stem, *(word.removeprefix('--').replace('/', '_') for word in own)])
    arguments = [file, *own, *common]
    if any(argument.startswith(('--seed=', '--out_dir=')) for argument in arguments):
        raise UserError('each run gets a seed and an out_dir of its own: --seeds says how many')
    return name, arguments, override(settings_of(ROOT / 'train.py'), arguments)


def differing(a, b):
    """The names of the settings in which two runs differ, sorted, but for what each run has of its own."""
    own = {'seed', 'out_dir', 'init_from', 'wandb_run_name'}  # init_from is 'resume' after a stop
    return sorted(name for name in a.keys() & b.keys() - own if a[name] != b[name])


def finished(folder, config):
    """The log of the run in `folder`, a list of dicts, if it has finished, else None. Raises UserError if the run has
    other settings than `config`."""
    if not (folder / 'log.jsonl').exists():
        return None
    entries = log.read(folder / 'log.jsonl')
    then = next((entry['config'] for entry in reversed(entries) if 'config' in entry), {})
    if other := differing(then, config):
        raise UserError(f'{folder} has a run with ' + some([f'{name}={then[name]}, not {config[name]}' for name in other])
                        + ': choose another --out_dir, or delete it')
    end = [entry['val_loss'] for entry in entries if 'val_loss' in entry and entry['step'] == config['max_iters']]
    if end and end[-1] is None:  # as a log has what is not finite
        raise UserError(f'{folder} has diverged: its final validation loss is not finite')
    return entries if end else None


def train(folder, arguments, config, seed, jobs=1):
    """The log of the run in `folder`, which is started, or resumed, unless it has finished. Raises UserError if it
    fails."""
    if entries := finished(folder, config):
        return entries
    folder.mkdir(parents=True, exist_ok=True)
    resume = ['--init_from=resume'] * (folder / 'ckpt.pt').exists()
    threads = {} if jobs == 1 else {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // jobs))}
    with open(folder / 'output.txt', 'a') as output:
        process = subprocess.Popen([sys.executable, ROOT / 'train.py', *arguments, f'--seed={seed}',
                                    f'--out_dir={folder}', *resume], env=threads | os.environ, stdout=output,
                                   stderr=subprocess.PIPE, text=True)
        running.append(process)
        error = process.communicate()[1].strip()
        output.write(error)
    entries = finished(folder, config)
    if process.returncode or not entries:
        raise UserError(f'{folder}: {error.splitlines()[-1] if error else "stopped; the same command continues"}')
    return entries


def final_loss(entries):
    """The validation loss at the end of a run."""
    return next(entry['val_loss'] for entry in reversed(entries) if 'val_loss' in entry)


def loss_curve(entries):
    """(tokens, validation loss) of a run, float arrays, without what is not finite."""
    tokens, loss = plot.series(entries, 'tokens')[0]['val_loss']
    return tokens[np.isfinite(loss)], loss[np.isfinite(loss)]


def tokens_to(loss, entries):
    """The tokens at which a run's validation loss first is at most this, by a line between evaluations; inf: never."""
    tokens, losses = loss_curve(entries)
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return math.inf
    k = max(1, below[0])
    return float(np.interp(loss, losses[[k, k - 1]], tokens[[k, k - 1]]))


def seconds(entries):
    """The training time of a run, without evaluation, at the median rate of its steps."""
    return loss_curve(entries)[0][-1] / statistics.median(entry['tokens_per_s'] for entry in entries if 'loss' in entry)


def tokens_ratio(a, b):
    """Tokens that the runs b take to the final loss of a, as a fraction of a's, the median over pairs of logs."""
    return statistics.median(tokens_to(final_loss(x), y) / loss_curve(x)[0][-1] for x, y in zip(a, b))


def ratios(a, b, logs):
    """Two lines that hold the tokens and the time of b against a's; `logs` is {name: logs of runs}."""
    there, back = tokens_ratio(logs[a], logs[b]), tokens_ratio(logs[b], logs[a])
    time = statistics.median(seconds(y) / seconds(x) for x, y in zip(logs[a], logs[b]))
    tokens = f'{b} reaches the final loss of {a} with {there:.2f} of its tokens' if there < math.inf else (
        f'{b} does not reach the final loss of {a}; {a} reaches that of {b} with {back:.2f} of its own tokens')
    return f'tokens: {tokens}\ntime: {b} trains for {time:.2f} times as long as {a}'


def interval(differences):
    """(mean, half-width) of the interval for the mean of paired differences, whose number is one of LOOKS."""
    n = len(differences)
    return np.mean(differences), LOOKS[n] * np.std(differences, ddof=1) / math.sqrt(n)


def verdict(differences, a, b):
    """The sentence on b - a after a look at paired differences of the validation loss."""
    n, (mean, half) = len(differences), interval(differences)
    if abs(mean) > half:
        return f'{b} is {"better" if mean < 0 else "worse"} than {a}'
    if not any(differences):
        return f'{a} and {b} are the same'
    enough = [look for look, t in LOOKS.items() if t * np.std(differences, ddof=1) <= abs(mean) * math.sqrt(look)]
    more = f'about {enough[0] - n}' if enough else f'more than {max(LOOKS) - n}'
    return f'no difference shown; {more} more seeds would show one of this size'


def compare(texts, common, seeds, jobs, out_dir):
    """Train and compare two configurations, and print the result. texts: the two sides as on the command line; common:
    a list of --name=value for both. Raises UserError for a mistake in a setting, and for a run that fails, diverges, or
    was made with other settings."""
    sides = [side(text, common) for text in texts]
    (a, _, first), (b, _, second) = sides
    if a == b:
        raise UserError(f'both configurations are called {a}: change one of them, or name its file otherwise')
    files.lock(out_dir).release()  # raises unless it can be written
    names = [f'{name} {first[name]} and {second[name]}' for name in differing(first, second)]
    print(f'{a} and {b} differ in {some(names) or "no setting"}; {out_dir}/*/output.txt shows the runs', flush=True)
    folders, logs, differences = [], {a: [], b: []}, []
    pool = ThreadPoolExecutor(jobs)
    try:
        for look in (look for look in LOOKS if look <= seeds):
            new = range(len(differences) + 1, look + 1)
            runs = [(Path(out_dir, f'{name}-seed{seed}'), arguments, config, seed)
                    for seed in new for name, arguments, config in sides]
            for folder, _, config, _ in runs:
                finished(folder, config)  # raises before anything is run
            results = pool.map(lambda run: train(*run, jobs), runs)
            for seed, x, y in zip(new, results, results):  # two at a time
                logs[a].append(x)
                logs[b].append(y)
                differences.append(final_loss(y) - final_loss(x))
                print(f'seed {seed}: {a} {final_loss(x):.4f}, {b} {final_loss(y):.4f}, '
                      f'difference {differences[-1]:+.4f}', flush=True)
            folders += [folder for folder, *_ in runs]
            mean, half = interval(differences)
            print(f'after {look} seeds: difference {mean:+.4f}, 95% interval {mean - half:+.4f} to {mean + half:+.4f}',
                  flush=True)
            if abs(mean) > half:
                break
    except BaseException:  # a failed run, or Ctrl-C: the others save and stop
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        raise
    finally:
        pool.shutdown()
    print(ratios(a, b, logs), verdict(differences, a, b), sep='\n', flush=True)
    try:
        picture = Path(out_dir, f'{a}_vs_{b}.png')
        plot.curves(folders, picture, labels=[a, b] * len(differences))
        print(picture)
    except UserError as error:
        print(error)


if __name__ == '__main__':
    texts = []
    configure(globals(), base='train.py', positional=texts)
    common = [arg for name, arg in given.items() if name not in ('seeds', 'jobs', 'out_dir')]
    if len(texts) != 2:
        raise UserError('compare.py takes two configurations, as in: python compare.py config/a.py config/b.py')
    if seeds not in LOOKS:
        raise UserError(f'seeds={seeds} is not one of {", ".join(map(str, LOOKS))}, after which it may look')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    compare(texts, common, seeds, jobs, out_dir)
