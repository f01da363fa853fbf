# The 124M GPT with what has been learned since GPT-2, each part a field of GPTConfig or a setting of train.py:
# rotary positions, normalised queries and keys, RMSNorm, ReLU², projections that start at zero, no biases, Muon
# for the matrices, and a learning rate that stays high until the end nears.
# transformers opens it too, as ApertusForCausalLM: python export.py --out_dir=out-gpt2-fast --folder=gpt
# torchrun --nproc_per_node=8 train.py config/gpt2_fast.py

out_dir = 'out-gpt2-fast'
wandb_run_name = 'gpt2-fast'

bias = False
position = 'rope'
norm = 'rmsnorm'
qk_norm = True
mlp = 'relu2'
zero_init = True

optimizer = 'muon'
learning_rate = 2e-3
min_lr = 0.0
lr_schedule = 'wsd'
wsd_decay = 0.5
warmup_iters = 100

batch_size = 64
max_iters = 9536  # 5 billion tokens, half of config/gpt2.py's
eval_interval = 500
hellaswag_interval = 500
sample_interval = 500
