"""What plan.py promises, beside what a run then takes, and beside sums done by hand."""

import json
import re

import pytest
import torch

from common import device
from conftest import TINY, at_step, run, run_ranks
from plan import predicted_loss

SIZES = ['--n_layer=3', '--n_embd=64', '--n_head=4', '--block_size=32', '--batch_size=4']
LAYOUTS = {'ddp': [], 'zero1': ['--parallel=zero1'], 'fsdp': ['--parallel=fsdp'],
           'muon': ['--parallel=zero1', '--optimizer=muon']}


def plan(*args):
    return run('plan.py', *args).out


def parts(out):
    """{part: bytes} of the memory that a plan tells of."""
    return {part: float(size) * 1e9 for part, size in re.findall(r'^  (\w+) +([\d.]+)(?:  \(about\))?$', out, re.MULTILINE)}


def test_the_plan_of_gpt2_is_what_one_computes_by_hand():
    out = plan('config/gpt2.py')
    assert 'parameters            124,439,808,' in out and '9,999,745,024 = 19,073 steps of 524,288' in out
    assert 'tokens per parameter  80.4' in out and re.search("loss to expect +3.06 by Chinchilla's fit", out)
    assert 'loss to expect        unknown' in plan('config/quickstart.py')  # 13.75, where a guess among 257 costs 5.55
    flops = float(re.search(r'compute +(\S+) FLOPs', out)[1])
    assert flops == pytest.approx((6 * 124e6 + 12 * 12 * 768 * 1024) * 10e9, rel=0.02)
    memory = parts(out)
    n = 124_439_808 + 47 * 768  # and the vocabulary's padding
    assert (memory['weights'], memory['gradients'], memory['optimizer']) == pytest.approx((4 * n, 4 * n, 8 * n), rel=1e-3)
    gpu, gb, hours, gpu_hours, cost, fit = re.search(r'^ +(A100) +(\d+) +(\S+) +(\S+) +(\S+) +(.+)$', out, re.MULTILINE).groups()
    assert float(gpu_hours) == pytest.approx(flops / (0.4 * 312e12) / 3600, abs=0.06)
    assert float(hours) == pytest.approx(float(gpu_hours) / 8, abs=0.06) and float(cost) == pytest.approx(2 * float(gpu_hours), abs=1)
    assert fit == 'yes'


@pytest.mark.parametrize('name, gpu', [
    ('NVIDIA H100 80GB HBM3', 'H100'), ('NVIDIA H100 PCIe', 'H100 PCIe'), ('NVIDIA A100-SXM4-80GB', 'A100'),
    ('NVIDIA A10', 'A10'), ('NVIDIA L40S', 'L40S'), ('NVIDIA L40', 'L40'), ('NVIDIA L4', 'L4'), ('Tesla T4', 'T4'),
    ('Tesla V100-SXM2-16GB', 'V100'), ('NVIDIA GeForce RTX 4090', 'RTX 4090'), ('AMD Instinct MI300X', 'MI300X'),
    ('AMD Instinct MI250X/MI250', 'MI250X'), ('Apple M2', 'Apple M2'), ('Apple M2 Max', 'M2 Max')])
def test_a_device_has_the_peak_of_its_row(monkeypatch, name, gpu):
    monkeypatch.setattr(device, 'device_name', lambda _: name)
    assert device.peak_flops('bfloat16', 'cuda') == device.GPUS[gpu][0]


@pytest.mark.parametrize('name', ['NVIDIA A10G', 'NVIDIA T400', 'NVIDIA H100X', ''])
def test_the_peak_of_a_device_without_a_row_is_measured(monkeypatch, name):
    monkeypatch.setattr(device, 'device_name', lambda _: name)
    assert device.peak_flops('bfloat16', 'cpu') not in {flops for flops, _ in device.GPUS.values()}


def test_numbers_that_no_event_announces_are_waited_for():
    """An mps device has no event to wait for, as a GPU has."""
    class OnMps:
        is_cuda = False

        def to(self, target, non_blocking):
            assert not non_blocking
            return torch.ones(2)
    assert device.fetch(OnMps())() == [1, 1]


def test_a_step_that_cannot_be_divided_is_another_one_and_the_plan_says_so():
    out = plan('--batch_size=48', '--gpus=7')
    assert 'steps of 688,128' in out and '(total_batch_size=688128 instead of 524288, which is not a multiple of' in out


def test_the_laws_say_what_their_papers_say():
    chinchilla, _ = predicted_loss(70e9, 70e9, 1.4e12)  # Chinchilla itself: Hoffmann et al., figure 4 and table A9
    assert chinchilla == pytest.approx(1.94, abs=0.01)
    _, kaplan = predicted_loss(1e9, 1e9, 1e15)  # endless data: equation 1.1
    assert kaplan == pytest.approx((8.8e13 / 1e9)**0.076, rel=0.03)


def test_a_plan_that_does_not_fit_names_settings_that_do():
    args = 'config/gpt2_xl.py', '--batch_size=64', '--dtype=bfloat16'
    fit = re.search(r'^ +RTX 4090 .*  with (--.*)$', plan(*args), re.MULTILINE)[1]
    out = plan(*args, *fit.split())
    assert re.search(r'^ +RTX 4090 .*  yes$', out, re.MULTILINE) and sum(parts(out).values()) / 2 < 24e9
    assert 'no: more GPUs' in plan('config/gpt2_xl.py', '--gpus=1', '--n_layer=200')


def test_large_numbers_keep_their_columns_and_what_train_py_refuses_is_refused():
    row = re.search(r'^  M1 Max .*$', plan('config/llama_7b.py', '--lora_rank=8', '--gpus=1'), re.MULTILINE)[0].split()
    assert row[3] == row[4] and float(row[5].replace(',', '')) == pytest.approx(2 * float(row[4].replace(',', '')), rel=1e-3)
    err = run('plan.py', 'config/llama_7b.py', '--lora_rank=8', '--optimizer=muon', expect=1).err
    assert err == 'optimizer=muon is for whole matrices: lora_rank needs --optimizer=adamw\n'


@pytest.mark.parametrize('layout', LAYOUTS)
def test_memory_is_what_the_plan_says(dataset, tmp_path, layout):
    """Bytes of weights, gradients and optimizer on the fullest process, within 15%."""
    args = [*TINY, *SIZES, *LAYOUTS[layout], f'--dataset={dataset}', f'--out_dir={tmp_path}', '--total_batch_size=512']
    measure = at_step(tmp_path, 3, f"""import sys; sys.path.append({str(tmp_path)!r}); import measured; measured.tell({str(tmp_path)!r})""")
    (tmp_path / 'measured.py').write_text('''
import json, os
from __main__ import model, opts
from common.distributed import to_local as local

def size(tensors):
    return sum(local(x).untyped_storage().nbytes() if local(x).dim() else 0 for x in tensors)

def tell(folder):
    state = [x for opt in opts for s in opt.state.values() for x in s.values()]
    found = {'weights': size(model.parameters()), 'gradients': sum(local(p.grad).nbytes for p in model.parameters()),
             'optimizer': size(state)}
    with open(f"{folder}/{os.environ['RANK']}.json", 'w') as f:
        json.dump(found, f)
''')
    run_ranks('train.py', *args, '--max_iters=3', measure, processes=2)
    found = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2)]
    planned = parts(plan(*args, '--gpus=2'))
    for part in ('weights', 'gradients', 'optimizer'):
        assert planned[part] == pytest.approx(max(each[part] for each in found), rel=0.15), part
