# GPT-2 large (774M) on FineWeb-Edu.
# torchrun --nproc_per_node=8 train.py config/gpt2_large.py

out_dir = 'out-gpt2-large'
wandb_run_name = 'gpt2-774M'

n_layer = 36
n_head = 20
n_embd = 1280

batch_size = 16  # for 80 GB
learning_rate = 2.5e-4  # as GPT-3's model of this size
min_lr = 2.5e-5

hellaswag_interval = 1000
sample_interval = 1000
