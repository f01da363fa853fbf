"""
What a run logs: log.jsonl, one JSON object a line, and the trackers that show it (Weights & Biases, TensorBoard,
Trackio). A log that can't be written costs a line, never the run.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

from common import files
from data.errors import UserError

# -----------------------------------------------------------------------------
# log.jsonl

class Log:
    """log.jsonl, kept open: write(entry) appends a line and passes it to the trackers; the entry has a 'step'.

    hold: keep the entries until release(), so that a start that fails leaves the file as it was.
    """

    def __init__(self, path, trackers=(), hold=False):
        self.path, self.file, self.missing, self.trackers = Path(path), None, 0, trackers
        self.held = [] if hold else None

    def release(self):
        held, self.held = self.held, None
        for entry in held:
            self.write(entry)

    def write(self, entry):
        if self.held is not None:
            self.held.append(entry)
            return
        entry = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # JSON has no NaN and no infinity
        data = json.dumps(entry).encode() + b'\n'
        try:
            if not self.file or not self.is_in_place():
                self.close_file()
                self.open()
            while data:
                data = data[self.file.write(data):]
            if self.missing:
                print(f'{self.path} is written again; {self.missing} entries are missing', file=sys.stderr, flush=True)
            self.missing = 0
        except OSError as error:
            self.close_file()
            if not self.missing:
                print(f'{self.path} could not be written: {files.reason(error)}', file=sys.stderr, flush=True)
            self.missing += 1
        for tracker in self.trackers:
            tracker.write(entry)

    def open(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, 'ab', buffering=0)
        with contextlib.suppress(OSError), open(self.path, 'rb') as f:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b'\n':  # half a line, by a kill or a full disk
                self.file.write(b'\n')

    def is_in_place(self):
        """False once the file was removed or replaced."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except OSError:
            return False

    def close_file(self):
        if self.file:
            self.file.close()
        self.file = None

    def close(self):
        self.close_file()
        for tracker in self.trackers:
            tracker.close()


def step_line(entry, max_iters, left, note=''):
    """What the terminal shows of a step: all of it, or the most important of what fits into its width."""
    parts = {'step': f'step {entry["step"]}/{max_iters}', 'loss': f'loss {entry["loss"]:.4f}',
             'lr': f'lr {entry["lr"]:.2e}', 'norm': f'norm {entry["grad_norm"]:.2f}', 'ms': f'{entry["ms"]:.0f} ms',
             'rate': f'{entry["tokens_per_s"]:,.0f} tokens/s', 'mfu': f'mfu {entry["mfu"]:.1%}', 'left': f'{left} left'}
    parts |= {'note': note} if note else {}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    for name in 'mfu', 'ms', 'lr', 'norm', 'rate', '':
        if len(line := ' | '.join(parts.values())) < width:
            break
        parts.pop(name, None)
    return line


def read(path):
    """The entries of a log, a list of dicts. Raises UserError if there is no such file."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such log; train.py writes one into its out_dir')
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f'{path} cannot be read: {files.reason(error)}') from None
    return [entry for entry in map(parse, lines) if isinstance(entry, dict) and isinstance(entry.get('step'), int)]


def parse(line):
    """The value of a line of JSON; None for half a line, which a kill or a full disk may leave."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def rewind(path, step):
    """Drop the entries that a run which resumes at this step will write again, and half lines."""
    def stays(line):
        entry = parse(line)
        at = entry.get('step') if isinstance(entry, dict) else None
        return entry is not None and (not isinstance(at, int) or at < step or at == step and 'loss' in entry)

    try:
        if os.path.exists(path):
            lines = Path(path).read_bytes().splitlines()
            with files.atomic_write(path) as f:
                f.writelines(line + b'\n' for line in lines if stays(line))
    except OSError as error:
        print(f'{path} could not be rewound to step {step} ({files.reason(error)}), and is continued as it is',
              file=sys.stderr, flush=True)


def archive_previous_run(out_dir, after=None):
    """Rename what an earlier run left in out_dir to 1.*, 2.* and so on, so that a new one overwrites nothing.

    after: the new run continues from that step's numbered checkpoint in out_dir: those up to there stay in their
    place, and so does the log, which is copied.
    """
    out_dir = Path(out_dir)
    stay = set(files.numbered(out_dir, after)) if after is not None else set()
    earlier = sorted({*out_dir.glob('ckpt*.pt'), *out_dir.glob('log.jsonl')} - stay)
    if after is None and any('ckpt' in path.name for path in earlier):
        earlier += out_dir.glob('tokenizer*.json')  # the checkpoints'
    if not earlier:
        return
    n = next(n for n in itertools.count(1) if not any(out_dir.glob(f'{n}.*')))
    try:
        for path in earlier:
            archived = path.with_name(f'{n}.{path.name}')
            if path.name == 'log.jsonl' and after is not None:
                files.copy(path, archived)
            else:
                path.rename(archived)
    except OSError as error:
        raise UserError(f'{path}, of an earlier run, could not be renamed to {archived.name} ({files.reason(error)}): '
                        'choose another out_dir') from None
    print(f'{out_dir} held an earlier run: its files are now called {n}.*', flush=True)


def archive_or_rewind(out_dir, resumed_path, step):
    """Make out_dir ready for a new run, or for one that continues at this step from the checkpoint at resumed_path."""
    ckpt_path = os.path.join(out_dir, 'ckpt.pt')
    continues = os.path.dirname(resumed_path or '') == os.path.dirname(ckpt_path)
    if resumed_path != ckpt_path:
        archive_previous_run(out_dir, after=step if continues else None)
    if continues:
        rewind(os.path.join(out_dir, 'log.jsonl'), step)

# -----------------------------------------------------------------------------
# trackers

def start_trackers(names, project, run_name, config, out_dir, step=0):
    """The trackers that a comma-separated list names, started: a list for Log.

    config: {name: value} of the run's settings. step: the run continues from it. Raises UserError for a tracker that is
    unknown, not installed or refuses.
    """
    trackers = []
    for name in dict.fromkeys(filter(None, (name.strip() for name in names.split(',')))):
        if name not in TRACKERS:
            raise UserError(f'log_to={name} is not one of {", ".join(TRACKERS)}')
        try:
            trackers.append(TRACKERS[name](project, run_name, config, out_dir, step))
        except ImportError as error:
            if error.name and error.name.split('.')[0] not in (name, 'torch'):
                raise
            raise UserError(f'log_to={name} needs the package {name}: pip install {name}') from None
        except UserError:
            raise
        except Exception as error:  # each service has its own
            raise UserError(f'log_to={name}: {files.reason(error)}') from None
    return trackers


class Tracker:
    """One service. A subclass starts its run in __init__; one without a run has its own send and finish."""
    failed = False

    def send(self, values, step):
        self.run.log(values, step=step)

    def finish(self):
        self.run.finish()

    def write(self, entry):
        self.attempt(self.send, {k: v for k, v in entry.items() if v is not None and k != 'step'}, entry['step'])

    def close(self):
        self.attempt(self.finish)

    def attempt(self, function, *args):
        """A service that fails ends nothing: the first failure is one line."""
        try:
            function(*args)
        except Exception as error:
            if not self.failed:
                print(f'{type(self).__name__} could not be reached ({files.reason(error)}); training continues',
                      file=sys.stderr, flush=True)
            self.failed = True


class Wandb(Tracker):

    def __init__(self, project, run_name, config, out_dir, step):
        if bad := set(project) & set('/\\#?%:'):
            raise UserError(f"wandb_project={project}: Weights & Biases allows no '{min(bad)}' in a project's name")
        import wandb
        how, hook = dict(project=project, name=run_name, config=config, dir=out_dir), sys.excepthook
        try:
            self.run = wandb.init(**how, settings=wandb.Settings(init_timeout=60))
        except wandb.errors.CommError as error:
            if isinstance(error, wandb.errors.AuthenticationError):
                raise
            self.run = wandb.init(**how, mode='offline')
            print(f'Weights & Biases does not answer: logged to {self.run.dir}, to be sent by `wandb sync`',
                  file=sys.stderr)

        def report(*error):  # instead of wandb's hook, which prints a traceback of every error
            try:
                hook(*error)
            finally:
                self.attempt(self.run.finish, 1)

        sys.excepthook = report


class TensorBoard(Tracker):

    def __init__(self, project, run_name, config, out_dir, step):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=step + 1)
        self.writer.add_text('config', json.dumps(config, indent=1), step)

    def send(self, values, step):
        for name, value in values.items():
            if isinstance(value, dict):
                self.send({f'{name}/{key}': v for key, v in value.items()}, step)
            elif isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self):
        self.writer.close()


class Trackio(Tracker):

    def __init__(self, project, run_name, config, out_dir, step):
        import trackio
        self.run = trackio.init(project=project, name=run_name, config=config)


TRACKERS = {'wandb': Wandb, 'tensorboard': TensorBoard, 'trackio': Trackio}
