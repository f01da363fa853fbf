"""sample.py as its user runs it: at a terminal, in a pipe, for many prompts, and with what a user gets wrong."""
import json
import os
import pty
import select
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from conftest import command, environment, finish, run, start
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from common.optimizers import configure_optimizers, step
from processes import Script

TEXT = 'Übermut, 9 €: ☃ and 😀!'  # characters of one, two, three and four bytes
GREEDY = ['--temperature=0', '--num_samples=1', '--device=cpu', '--dtype=float32']


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    """The checkpoint of a model that knows one document, TEXT, by heart."""
    tokenizer = get_tokenizer('bytes')
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4, n_embd=64,
                          position='rope'))
    document = [tokenizer.eot, *tokenizer.encode(TEXT).tolist()]
    ids = torch.tensor([(document * 5)[n:n + 65] for n in range(len(document))])  # from each token on
    optimizers = configure_optimizers(model, 'muon', 1e-2, 0.1, (0.9, 0.95))
    for _ in range(40):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        step(optimizers)
    assert loss < 0.05
    folder = tmp_path_factory.mktemp('out')
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'bytes'}, folder / 'ckpt.pt')
    return folder


HANGS = 1800  # seconds without a byte, on a machine however busy


class Terminal:
    """sample.py at a terminal of its own."""

    def __init__(self, *args):
        self.fd, other = pty.openpty()
        self.process = Script(command('sample.py', *args)[1:], environment(TERM='dumb'), terminal=other)
        os.close(other)
        self.seen = ''

    def type(self, text):
        os.write(self.fd, text.encode())

    def until(self, text):
        """All that came until `text`, which must come before the process ends."""
        data = b''
        while text.encode() not in data:
            assert select.select([self.fd], [], [], HANGS)[0], f'no {text!r} in {data!r}'
            try:
                data += os.read(self.fd, 1)
            except OSError:  # the process has closed the terminal
                raise AssertionError(f'no {text!r} in {data!r}') from None
        return data.decode().replace('\r\n', '\n')

    def reads(self):
        """Wait until the process sleeps, in what reads a line: Ctrl-C between a prompt and the reading is lost."""
        while Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()[0] in 'RD':
            time.sleep(0.01)

    def end(self):
        rest = b''
        try:
            while piece := os.read(self.fd, 1000):
                rest += piece
        except OSError:
            pass
        os.close(self.fd)
        return self.process.wait(HANGS), rest.decode().replace('\r\n', '\n')


# what it writes ------------------------------------------------------------------------------------------------------

def test_whole_samples_and_no_cut_character(out_dir):
    beginning = 'Übermut, 9 '
    out = run('sample.py', f'--out_dir={out_dir}', *GREEDY, f'--start={beginning}', '--max_new_tokens=4').out
    assert out == 'Übermut, 9 €:\n---------------\n'
    out = run('sample.py', f'--out_dir={out_dir}', *GREEDY, f'--start={beginning}', '--max_new_tokens=2').out
    assert out == 'Übermut, 9 \n---------------\n'  # two of the three bytes of €


def test_stop_and_a_new_document(out_dir, tmp_path):
    args = [f'--out_dir={out_dir}', *GREEDY, '--max_new_tokens=50']
    assert run('sample.py', *args, '--stop').out == f'{TEXT}\n---------------\n'
    assert run('sample.py', *args).out.startswith(f'{TEXT}<|endoftext|>{TEXT[:5]}')
    (tmp_path / 'lines.txt').write_text(f'{TEXT[:5]}\n{TEXT[:15]}\n', encoding='utf-8')  # one ends before the other
    assert run('sample.py', *args, '--stop', f'--prompts={tmp_path}/lines.txt').out == 2 * f'{TEXT}\n---------------\n'


def test_many_prompts_each_as_if_alone(out_dir, tmp_path):
    lines = ['Über', '☃', '', 'Übermut, 9 €: ☃ and', 'something else, longer than the others and than the context of '
             'the model, so that its window slides']
    (tmp_path / 'lines.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    args = [f'--out_dir={out_dir}', '--json', '--temperature=1.5', '--max_new_tokens=20', '--device=cpu',
            '--dtype=float32']
    done = run('sample.py', *args, f'--prompts={tmp_path}/lines.txt', '--num_samples=2', '--batch_size=4')
    assert done.err == 'a prompt has 99 tokens: the model sees the last 64\n'
    together = [json.loads(line) for line in done.out.splitlines()]
    assert [(row['prompt'], row['seed']) for row in together] == [(line, 1337 + n) for line in lines for n in (0, 1)]
    assert all(len(row['tokens']) == 20 for row in together)
    assert len({row['text'] for row in together}) > 5
    for i, line in ((0, lines[0]), (8, lines[4])):
        alone = run('sample.py', *args, f'--start={line}', '--num_samples=1').out
        assert json.loads(alone) == together[i]


def test_the_seed_and_the_file_of_a_prompt(out_dir, tmp_path):
    (tmp_path / 'prompt.txt').write_text('Über\nmut', encoding='utf-8')
    args = [f'--out_dir={out_dir}', '--max_new_tokens=40', '--temperature=3.0', '--dtype=float32',
            f'--start=FILE:{tmp_path}/prompt.txt']
    first = run('sample.py', *args, '--num_samples=2').out.split('---------------\n')
    assert len(first) == 3 and first[0] != first[1] and first[0].startswith('Über\nmut')
    assert run('sample.py', *args, '--num_samples=1', '--seed=1338').out.split('---------------\n')[0] == first[1]


def test_bfloat16_writes_the_same(out_dir):
    args = [f'--out_dir={out_dir}', '--temperature=0', '--max_new_tokens=50', '--stop', '--dtype=bfloat16', '--device=cpu']
    one = run('sample.py', *args, '--num_samples=1', '--compile=True')
    assert one.out == f'{TEXT}\n---------------\n' and one.err == 'compile=True does nothing on cpu: CUDA graphs need a GPU\n'
    assert run('sample.py', *args, '--num_samples=3').out == 3 * f'{TEXT}\n---------------\n'


# at a terminal -------------------------------------------------------------------------------------------------------

def test_a_terminal_sees_tokens_as_they_come(out_dir):
    terminal = Terminal(f'--out_dir={out_dir}', *GREEDY, '--max_new_tokens=100000')
    assert terminal.until('😀').startswith(TEXT[:5])  # long before the end
    terminal.type('\x03')
    status, rest = terminal.end()
    assert status == 130 and 'Traceback' not in rest


def test_interactive(out_dir):
    terminal = Terminal(f'--out_dir={out_dir}', *GREEDY, '--max_new_tokens=100000', '--interactive')
    terminal.until('> ')
    terminal.reads()
    terminal.type('\x03')  # at the prompt: another prompt
    terminal.until('> ')
    terminal.type('Über\n')
    assert terminal.until('☃').endswith('Übermut, 9 €: ☃')
    terminal.type('\x03')  # stops the sample, not the program
    terminal.until('---------------')
    terminal.until('> ')
    terminal.reads()
    terminal.type('\x1b[A\n')  # the line before, from the history
    assert '[A' not in terminal.until('Übermut, 9 €: ☃')
    terminal.type('\x03')
    terminal.until('> ')
    terminal.reads()
    terminal.type('\x04')
    status, rest = terminal.end()
    assert status == 0 and 'Traceback' not in rest


def test_interactive_in_a_pipe(out_dir, forked):
    process = subprocess.run(command('sample.py', f'--out_dir={out_dir}', *GREEDY, '--interactive', '--json', '--stop'),
                             input='Über\n☃\n', env=environment(), capture_output=True, text=True)
    lines = process.stdout.splitlines()  # of JSON alone
    assert json.loads(lines[0])['text'] == TEXT[4:] and len(lines) == 2, process.stderr


def test_a_closed_pipe_is_no_error(out_dir, forked):
    shell = ' '.join(command('sample.py', f'--out_dir={out_dir}', '--max_new_tokens=20', '--num_samples=40',
                             '--batch_size=1')) + ' | head -1'
    process = subprocess.run(shell, shell=True, env=environment(), capture_output=True, text=True)
    assert process.stdout.count('\n') == 1 and process.stderr == ''


# what a user gets wrong ----------------------------------------------------------------------------------------------

def test_plain_errors(out_dir, tmp_path):
    checkpoint = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    checkpoint['model']['transformer.wte.weight'][3, 5] = torch.nan
    torch.save(checkpoint, tmp_path / 'nan.pt')
    wrong = [
        (['--top_p=1.5'], 'top_p=1.5 must be above 0 and at most 1'),
        (['--temperature=-1'], 'temperature=-1.0 must be at least 0'),
        (['--num_samples=0'], 'num_samples=0 must be at least 1'),
        (['--compile=maybe'], 'compile=maybe is not one of auto, True, False'),
        (['--init_from=scratch'], 'init_from=scratch is for train.py'),
        (['--device=meta'], 'device=meta cannot be used here'),
        ([f'--init_from={tmp_path}/nan.pt'], 'nan.pt: lm_head.weight, transformer.wte.weight has values that are not finite'),
        (['--start=FILE:~/nowhere.txt'], f'cannot read the prompt {Path.home()}/nowhere.txt: No such file or directory\n'),
        ([f'--start=FILE:{tmp_path}/nan.pt'], 'nan.pt: it is not UTF-8 text'),
        (['--start=FILE:nowhere.txt'], 'cannot read the prompt nowhere.txt'),
        (['--prompts=nowhere.txt'], 'cannot read the prompt nowhere.txt'),
        (['--prompts=x.txt', '--interactive'], 'give only one of them'),
        (['--prompts=/dev/null'], '/dev/null holds no prompt'),
        (['--interactive', '--num_samples=2'], 'interactive draws one sample a prompt'),
        (['--out_dir=nowhere'], 'nowhere/ckpt.pt'),
    ]
    for process, (args, words) in zip([start('sample.py', *args) for args, _ in wrong], wrong):  # side by side
        finish(process)
        assert process.returncode == 1 and process.out == '', args
        assert words in process.err and process.err.count('\n') == 1
