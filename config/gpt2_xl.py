# GPT-2 xl (1558M) on FineWeb-Edu.
# torchrun --nproc_per_node=8 train.py config/gpt2_xl.py

out_dir = 'out-gpt2-xl'
wandb_run_name = 'gpt2-1558M'

n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 8  # for 80 GB
learning_rate = 2e-4  # as GPT-3's model of this size
min_lr = 2e-5

hellaswag_interval = 1000
sample_interval = 1000
