# GPT-2 (124M) on 10 billion tokens of FineWeb-Edu: train.py's defaults, spelled out.
# python prepare_fineweb.py
# torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py     eight GPUs
# python train.py config/gpt2.py                                       one GPU, the same run in eight times the time

out_dir = 'out-gpt2'
wandb_run_name = 'gpt2-124M'

batch_size = 64  # sequences of 1,024 for each GPU at a time: 80 GB hold 64, 24 GB hold 16
total_batch_size = 524288
max_iters = 19073
warmup_iters = 715
learning_rate = 6e-4
min_lr = 6e-5

eval_interval = 250  # on 10.5 million tokens
hellaswag_interval = 250
sample_interval = 250
