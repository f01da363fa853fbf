"""lm-evaluation-harness takes an exported folder as it is, and finds the HellaSwag score that hellaswag.py gives."""
import json
import os

import pytest
import torch

import hellaswag
from conftest import SHARED, needs_gpt2
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig

os.environ['HF_HUB_OFFLINE'] = '1'
lm_eval = pytest.importorskip('lm_eval', reason='pip install lm_eval transformers')

TASK = '''
task: our_hellaswag
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
metric_list:
  - metric: acc
'''
VARIANTS = {'gpt2': dict(vocab_size=50257), 'bytes': dict(vocab_size=257, position='rope', norm='rmsnorm', mlp='swiglu',
                                                        bias=False, tie_embeddings=False, n_kv_head=2, qk_norm=True)}


@pytest.mark.parametrize('tokenizer', ['bytes', pytest.param('gpt2', marks=needs_gpt2)])
def test_lm_eval_finds_our_score(tokenizer, tmp_path, monkeypatch):
    path = SHARED / 'data' / 'hellaswag_val_1000.jsonl'
    path = path if path.exists() else hellaswag.FILE
    if not path.exists():
        pytest.skip('no HellaSwag items here: python hellaswag.py fetches them')
    items = hellaswag.load_items(path, limit=25)
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=1024, n_layer=2, n_head=4, n_embd=32, **VARIANTS[tokenizer])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # so large that it has opinions
    ours = hellaswag.evaluate(model, hellaswag.prepare(items, get_tokenizer(tokenizer), 1024))
    model.save_pretrained(tmp_path / 'gpt', tokenizer)
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'items.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))
    (tmp_path / 'our_hellaswag.yaml').write_text(TASK.format(path=tmp_path / 'items.jsonl'))

    from lm_eval.tasks import TaskManager
    theirs = lm_eval.simple_evaluate(model='hf', model_args=dict(pretrained=str(tmp_path / 'gpt'), dtype='float32'),
                                     tasks=['our_hellaswag'], device='cpu', batch_size=8, bootstrap_iters=0,
                                     task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    assert theirs['results']['our_hellaswag']['acc,none'] == ours['acc']
    samples = sorted(theirs['samples']['our_hellaswag'], key=lambda sample: sample['doc_id'])
    losses = [[-loss for loss, _ in sample['filtered_resps']] for sample in samples]
    torch.testing.assert_close(torch.tensor(losses), ours['losses'].float(), atol=1e-3, rtol=1e-4)
