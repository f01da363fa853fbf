# A small GPT on Shakespeare, byte by byte: good for a laptop's GPU, and with the sizes below for its CPU.
# python data/shakespeare_char/prepare.py
#
# On a CPU, 2,000 steps of a smaller one in about a minute:
# python train.py config/shakespeare_char.py --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 \
#     --total_batch_size=768 --max_iters=2000 --dropout=0.0

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 250
log_interval = 10
sample_interval = 1000
hellaswag_interval = 0

batch_size = 64
total_batch_size = 16_384
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False

learning_rate = 1e-3  # higher than a large model's
min_lr = 1e-4
max_iters = 5000
beta2 = 0.99  # higher, as a step has few tokens
warmup_iters = 100
