# Teach GPT-2 to write Shakespeare.
# python data/shakespeare/prepare.py
# On a GPU of 24 GB gpt2-xl fits with --batch_size=1; a CPU manages --init_from=gpt2.

out_dir = 'out-shakespeare'
init_from = 'gpt2'  # or gpt2-medium, gpt2-large, gpt2-xl
dataset = 'shakespeare'  # 301,966 tokens for training
eval_interval = 5
eval_tokens = 40_960
sample_interval = 10
hellaswag_interval = 0
always_save_checkpoint = False  # it overfits soon: keep the best

# 32 sequences of 1,024 tokens a step: nine steps see all of Shakespeare
batch_size = 1
total_batch_size = 32_768
max_iters = 20

learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
dropout = 0.1
