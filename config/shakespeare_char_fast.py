# Shakespeare byte by byte on a CPU, with what has been learned since GPT-2: see config/gpt2_fast.py.
# python data/shakespeare_char/prepare.py
# python train.py config/shakespeare_char_fast.py

from config.gpt2_fast import bias, min_lr, mlp, norm, optimizer, position, qk_norm, zero_init  # its recipe

out_dir = 'out-shakespeare-char-fast'
dataset = 'shakespeare_char'
eval_interval = 300
hellaswag_interval = 0
sample_interval = 0
log_interval = 10

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
