# Llama's architecture at GPT-2's size (124M, of GPT-2's tokens): RoPE, RMSNorm, SwiGLU, no biases. Exported, it is a
# LlamaForCausalLM: python export.py --out_dir=out-llama-124m --folder=llama
# torchrun --nproc_per_node=8 train.py config/llama_124m.py

out_dir = 'out-llama-124m'
wandb_run_name = 'llama-124M'

position = 'rope'
norm = 'rmsnorm'
norm_eps = 1e-6
mlp = 'swiglu'
n_mlp = 2048  # 8/3 n_embd: three matrices with as many weights as GPT-2's two
bias = False

batch_size = 64  # for 80 GB
total_batch_size = 524288
max_iters = 19073
warmup_iters = 715
learning_rate = 6e-4
min_lr = 6e-5

eval_interval = 500
hellaswag_interval = 500
sample_interval = 500
