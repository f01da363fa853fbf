# Llama 7B (Touvron et al. 2023, arXiv:2302.13971): 6,738,415,616 parameters with a tokenizer of 32,000 ids.
# What it needs: python plan.py config/llama_7b.py --gpus=64
# torchrun --nnodes=8 --nproc_per_node=8 … train.py config/llama_7b.py

out_dir = 'out-llama-7b'
wandb_run_name = 'llama-7B'

n_layer = 32
n_head = 32
n_embd = 4096
n_mlp = 11008
position = 'rope'
norm = 'rmsnorm'
norm_eps = 1e-6
mlp = 'swiglu'
bias = False
tie_embeddings = False

batch_size = 2  # sequences of 2,048 tokens, for 80 GB
block_size = 2048
total_batch_size = 4194304
max_iters = 238419  # a trillion tokens
warmup_iters = 2000
learning_rate = 3e-4
min_lr = 3e-5

parallel = 'fsdp'
sharded_checkpoints = True  # to resume, each process reads all 81 GB into CPU memory
activation_checkpointing = True

eval_interval = 1000
hellaswag_interval = 5000
sample_interval = 1000
