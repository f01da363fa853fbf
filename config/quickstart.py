# A first GPT in three to four minutes on two cores: 0.8M parameters that learn to write like Python's standard library.
# python data/stdlib/prepare.py
# python train.py config/quickstart.py
# python sample.py --out_dir=out-quickstart

from config.gpt2_fast import bias, min_lr, mlp, norm, optimizer, position, qk_norm, zero_init  # its recipe

out_dir = 'out-quickstart'
dataset = 'stdlib'
eval_interval = 100
eval_tokens = 40_960
log_interval = 10
sample_interval = 200
hellaswag_interval = 0

batch_size = 16
total_batch_size = 2048
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 5e-3
lr_schedule = 'linear'
warmup_iters = 20
max_iters = 600
compile = False  # it is done before compiling pays
