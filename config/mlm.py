# A small masked language model (BERT's objective) of the Python library's source code, on any computer.
# python data/stdlib/prepare.py
# python train.py config/mlm.py
# python sample.py --out_dir=out-mlm --start='import [MASK]s'
out_dir = 'out-mlm'
dataset = 'stdlib'
objective = 'mlm'
hellaswag_interval = 0  # it continues no text
sample_interval = 0

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
total_batch_size = 4096  # tokens in a step; 15% are predicted

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000
eval_interval = 500
eval_tokens = 65536
