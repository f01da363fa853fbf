"""rehearse.py finds planted faults before a run meets them, and leaves the run's own folder alone."""

import runpy
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import hellaswag
import rehearse
from conftest import ROOT, TINY
from configurator import override, settings_of
from data import tokenizer as tokenizers
from data.errors import UserError
from data.tokenizer import GPT2, get_tokenizer
from model import GPT, GPTConfig
from test_dataset import write_dataset

ITEM = '{"ctx": "A man sits", "label": 1, "endings": ["up.", "down.", "in.", "out."]}\n'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A dataset of a few thousand bytes: its folder, as a string."""
    folder = tmp_path_factory.mktemp('data') / 'lines'
    tokenizer = get_tokenizer('bytes')
    ids = tokenizer.encode_documents([f'This is line {i} of a small text.\n' * 4 for i in range(200)])
    write_dataset(folder, 10_000, tokenizer.vocab_size, tokenizer='bytes', train=ids, val=ids[:3000])
    return str(folder)


@pytest.fixture
def rows(data, tmp_path, capsys, monkeypatch):
    """A function of settings: {check: (mark, text)} of the table, without what takes a training."""
    for name in 'WANDB_MODE', 'WANDB_SILENT', 'TRACKIO_DIR':  # which check_trackers sets
        monkeypatch.setenv(name, 'online')
        monkeypatch.delenv(name)

    def rows(*settings, processes=1):
        arguments = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', *settings]
        config = override(settings_of(ROOT / 'train.py'), arguments)
        capsys.readouterr()
        table = rehearse.Table()
        gpt, _ = rehearse.before_training(table, config, processes, tmp_path / 'rehearsal')
        if gpt:
            table.check('export', rehearse.check_export, gpt, True, tmp_path / 'rehearsal')
        lines = [line for line in capsys.readouterr().out.splitlines()
                 if line[:5].strip() in ('ok', '-', 'warn', 'FAIL')]
        found = {line[5:17].strip(): (line[:5].strip(), line[17:]) for line in lines}
        assert table.failed == [name for name, (mark, _) in found.items() if mark == 'FAIL']
        assert not (tmp_path / 'out').is_dir()
        return found
    return rows


def marks(found, mark):
    return [name for name, row in found.items() if row[0] == mark]


def test_a_sound_run_passes(rows):
    found = rows()
    assert not marks(found, 'FAIL') and not marks(found, '-')
    assert found['settings'][1].startswith('1 x 2 micro-batches of 4 x 32 tokens, cpu')
    assert '26,960 tokens, and the run reads 5,120; 3,000 to validate on' in found['data'][1], found['data']


def test_a_missing_dataset_and_what_depends_on_it(rows):
    found = rows('--dataset=nowhere')
    assert found['data'] == ('FAIL', found['data'][1]) and 'nowhere' in found['data'][1]
    assert marks(found, '-') == ['tokenizer', 'model', 'memory', 'disk', 'hellaswag'] and found['log_to'][0] == 'ok'


def test_a_damaged_shard(rows, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / 'copy')
    shard = copy / 'train_000001.npy'
    shard.write_bytes(shard.read_bytes()[:-100])
    found = rows(f'--dataset={copy}')
    assert marks(found, 'FAIL') == ['data'] and 'train_000001.npy' in found['data'][1]


def test_data_shorter_than_a_block(rows):
    found = rows('--block_size=4096', '--total_batch_size=16384')
    assert marks(found, 'FAIL') == ['data'] and 'too few for one block of block_size=4096' in found['data'][1]


def test_settings_that_make_no_run(rows):
    assert 'the nearest are 384 or 768' in rows('--total_batch_size=500', processes=3)['settings'][1]
    assert marks(found := rows('--position=sideways'), 'FAIL') == ['model'] and 'not one of learned' in found['model'][1]
    assert marks(rows('--n_embd=33'), 'FAIL') == ['model']
    with pytest.raises(UserError, match='lr_schedule=cosin is not one of'):
        rows('--lr_schedule=cosin')


def test_a_tokenizer_that_cannot_be_had(rows, data, tmp_path, monkeypatch):
    copy = shutil.copytree(data, tmp_path / 'copy')
    (copy / 'meta.json').write_text((copy / 'meta.json').read_text().replace('"bytes"', '"gpt2"').replace('257', '50257'))

    def offline(self):
        raise UserError('the GPT-2 vocabulary could not be fetched')
    monkeypatch.setattr(GPT2, '__init__', offline)
    tokenizers.named.cache_clear()
    found = rows(f'--dataset={copy}')
    assert marks(found, 'FAIL') == ['tokenizer'] and 'could not be fetched' in found['tokenizer'][1]


def test_hellaswag(rows, tmp_path, monkeypatch):
    (tmp_path / 'items.jsonl').write_text(ITEM * 3)
    assert rows('--hellaswag_interval=10', f'--hellaswag_data={tmp_path}/items.jsonl')['hellaswag'] == ('ok', '3 items')
    found = rows('--hellaswag_interval=10', '--hellaswag_data=missing.jsonl')
    assert marks(found, 'FAIL') == ['hellaswag'] and 'cannot read missing.jsonl' in found['hellaswag'][1]

    def offline(*args):
        raise UserError('it could not be fetched')
    monkeypatch.setattr(hellaswag, 'load_items', offline)
    config = override(settings_of(ROOT / 'train.py'), [])  # nothing given: the run prints a line, and trains
    with pytest.raises(rehearse.Minor, match='not scored: it could not be fetched; --hellaswag_interval=0'):
        rehearse.check_hellaswag(config, get_tokenizer('bytes'), GPTConfig())


def test_trackers(rows, tmp_path, monkeypatch):
    assert 'log_to=mlflow is not one of' in rows('--log_to=mlflow')['log_to'][1]
    monkeypatch.setitem(sys.modules, 'wandb', None)
    found = rows('--wandb_log')
    assert marks(found, 'FAIL') == ['log_to'] and 'pip install wandb' in found['log_to'][1]


def test_weights_and_biases_without_a_login(rows, tmp_path, monkeypatch):
    class Started(rehearse.log.Wandb):
        def __init__(self, *args):
            assert rehearse.os.environ['WANDB_MODE'] == 'offline'  # else the service would show the rehearsal

        def finish(self):
            pass

    monkeypatch.setitem(rehearse.log.TRACKERS, 'wandb', Started)
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    (tmp_path / 'netrc').write_text('')
    assert rows('--log_to=wandb')['log_to'] == ('FAIL', 'Weights & Biases has no login here: `wandb login`, WANDB_API_KEY, '
                                                'or WANDB_MODE=offline')
    monkeypatch.delenv('WANDB_MODE')
    (tmp_path / 'netrc').write_text('machine api.wandb.ai\n  login user\n  password 0123456789\n')
    assert rows('--log_to=wandb')['log_to'] == ('ok', 'wandb can start')


def test_a_disk_too_small(rows, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    size = int(float(rows()['disk'][1].split(' of ')[1].split()[0]) * 1e9)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(0, 0, int(4.5 * size)))
    assert rows()['disk'][0] == 'ok'  # ckpt.pt, ckpt_best.pt, and one that is being written
    found = rows('--keep_checkpoints=2')
    assert marks(found, 'FAIL') == ['disk'] and found['disk'][1].startswith('6 checkpoints of')
    assert 'lower keep_checkpoints=2' in found['disk'][1]


def test_the_checkpoint_is_of_the_size_that_disk_counts(data):
    config = override(settings_of(ROOT / 'train.py'), [*TINY, f'--dataset={data}'])
    model = GPT(gpt := GPTConfig(32, 257, n_layer=2, n_head=2, n_embd=32))
    sizes = sum(4 * p.numel() for p in model.parameters())
    text = rehearse.check_disk(config, gpt)[1]
    assert float(text.split(' of ')[1].split()[0]) * 1e9 == pytest.approx(3 * sizes, rel=0.01)  # and Adam's two moments


def test_an_out_dir_that_is_a_file(rows, tmp_path):
    (tmp_path / 'file').write_text('')
    found = rows(f'--out_dir={tmp_path}/file/out')
    assert marks(found, 'FAIL') == ['disk'] and f'{tmp_path}/file is a file; choose another' in found['disk'][1]


def test_weights(rows, data, tmp_path):
    found = rows('--init_from=nowhere.pt')
    assert marks(found, 'FAIL') == ['model'] and 'no checkpoint nowhere.pt' in found['model'][1]
    torch.save({'model': GPT(c := GPTConfig(32, 50257, 1, 1, 8)).state_dict(), 'model_args': vars(c), 'tokenizer': 'gpt2'},
               tmp_path / 'gpt2.pt')
    found = rows(f'--init_from={tmp_path}/gpt2.pt')
    assert marks(found, 'FAIL') == ['model'] and 'were trained on gpt2 tokens' in found['model'][1]
    assert 'no checkpoint' in rows('--init_from=resume')['model'][1] and rows('--init_from=auto')['model'][0] == 'ok'


def test_a_model_that_is_not_exported_is_no_failure(rows):
    found = rows('--softcap=30')
    assert not marks(found, 'FAIL') and found['export'][0] == 'warn' and 'softcap=30.0' in found['export'][1]


@pytest.mark.parametrize('settings', [
    [], ['--n_head=12', '--n_embd=768', '--n_kv_head=4', '--position=rope', '--mlp=swiglu', '--n_mlp=2048'],
    ['--n_head=1', '--n_embd=24', '--head_size=16', '--n_layer=1'], ['--n_head=5', '--n_kv_head=1', '--n_embd=320']])
def test_a_narrow_model_keeps_the_kind(settings, data):
    defaults = settings_of(ROOT / 'train.py')
    arguments = [f'--dataset={data}', *settings]
    config = override(defaults, arguments)
    known = {name for name in vars(GPTConfig()) if name in config}
    gpt = GPTConfig(**{name: config[name] for name in known}, vocab_size=257)
    small = override(defaults, arguments + rehearse.narrow(config, gpt, 2, 10, Path('folder')))
    new = GPTConfig(**{name: small[name] for name in known}, vocab_size=257)
    assert new.head_size == gpt.head_size and (new.n_kv_head < new.n_head) == (gpt.n_kv_head < gpt.n_head > 1)
    assert new.n_head <= 2 and new.n_layer <= 2 and new.block_size == 256 and GPT(new)
    assert new.n_mlp / new.n_embd == pytest.approx(gpt.n_mlp / gpt.n_embd, rel=0.01)
    rehearse.divide_step(small, rehearse.given, 2)
    assert {name for name in small if small[name] != config[name]} <= known | {
        'init_from', 'out_dir', 'batch_size', 'total_batch_size', 'eval_interval', 'eval_tokens', 'sample_interval',
        'hellaswag_interval', 'hellaswag_limit', 'device'}


def test_weights_that_read_a_tokenizer_json(tmp_path, monkeypatch):
    from tokenizers import ByteLevelBPETokenizer
    path = tmp_path / 'tokenizer.json'
    own = ByteLevelBPETokenizer()
    own.train_from_iterator(['some text'] * 9, vocab_size=260, special_tokens=['<|endoftext|>'], show_progress=False)
    own.save(str(path))
    model = GPT(GPTConfig(block_size=8, vocab_size=261, n_layer=1, n_head=1, n_embd=8))
    monkeypatch.setattr(rehearse, 'given', {})
    monkeypatch.setattr(rehearse.checkpoint, 'pretrained', lambda source, dropout: (model, str(path)))
    config = settings_of(ROOT / 'train.py') | {'init_from': 'gpt', 'dataset': 'own', 'block_size': 8}
    assert rehearse.check_model(config, get_tokenizer(str(path)))[0] == model.config
    with pytest.raises(UserError, match='own is tokenized with bytes, but the weights were trained on tokenizer.json'):
        rehearse.check_model(config, get_tokenizer('bytes'))
    monkeypatch.setitem(rehearse.given, 'n_layer', '--n_layer=3')  # which train.py refuses
    with pytest.raises(UserError, match='--n_layer=3: the weights have n_layer=1, not 3'):
        rehearse.check_model(config | {'n_layer': 3}, get_tokenizer(str(path)))


def test_the_line_that_train_py_printed(tmp_path):
    (tmp_path / 'stderr').write_text("""W1121 17:00:00.1 123 torch/distributed/run.py:852] Setting OMP_NUM_THREADS

min_lr=1 must be at most learning_rate=0.001
W1121 17:00:02.1 123 torch/distributed/elastic/multiprocessing/api.py:1] Sending process 12 closing signal SIGTERM
E1121 17:00:03.1 123 torch/distributed/elastic/multiprocessing/api.py:2] failed (exitcode: 1)
Traceback (most recent call last):
  File "torchrun", line 8, in <module>
""")
    assert rehearse.tail(tmp_path / 'stderr') == 'min_lr=1 must be at most learning_rate=0.001'


def test_a_rehearsal_from_end_to_end(data, tmp_path, capsys, forked):
    (tmp_path / 'items.jsonl').write_text(ITEM * 3)
    arguments = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}/out', '--n_layer=12', '--sample_interval=5',
                 '--hellaswag_interval=5', f'--hellaswag_data={tmp_path}/items.jsonl', '--parallel=fsdp']
    config = override(settings_of(ROOT / 'train.py'), arguments)
    assert rehearse.rehearse(config, arguments, processes=1) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [['ok', name] for name in (
        'settings', 'data', 'tokenizer', 'model', 'memory', 'disk', 'hellaswag', 'log_to', 'train', 'evaluation',
        'sample', 'resume', 'export')]
    assert 'hellaswag' in lines[9] and 'resumed from the checkpoint of step' in lines[11]
    assert [path.name for path in tmp_path.iterdir()] == ['items.jsonl']


def test_the_command_quotes_train_py_s_own_line(data, capsys, monkeypatch, forked):
    monkeypatch.setattr(sys, 'argv', ['rehearse.py', *TINY, f'--dataset={data}', '--compile=maybe', '--processes=1'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(UserError, match='^this run would fail: train$'):  # exit status 1
        runpy.run_path(str(ROOT / 'rehearse.py'), run_name='__main__')
    assert 'FAIL train       compile=maybe is not one of auto, True, False\n' in capsys.readouterr().out
