# GPT-2 medium (350M) on FineWeb-Edu.
# torchrun --nproc_per_node=8 train.py config/gpt2_medium.py

out_dir = 'out-gpt2-medium'
wandb_run_name = 'gpt2-350M'

n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 32  # for 80 GB
learning_rate = 3e-4  # as GPT-3's model of this size
min_lr = 3e-5

hellaswag_interval = 1000
sample_interval = 1000
