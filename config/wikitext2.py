# WikiText-2 from nothing to text: a GPT of 16M parameters, three times through 2.4 million tokens.
# python data/wikitext2/prepare.py
# python train.py config/wikitext2.py
# python sample.py --out_dir=out-wikitext2 --start='Machine learning is' --temperature=0.9 --top_k=50 --top_p=0.95

out_dir = 'out-wikitext2'
dataset = 'wikitext2'
eval_interval = 300
eval_tokens = 131_072
log_interval = 10
sample_interval = 1200
hellaswag_interval = 0

batch_size = 16
total_batch_size = 2048
block_size = 128

n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.1

learning_rate = 5e-5  # a finetuning rate; --learning_rate=1e-3 is more usual for a model this small, from scratch
lr_schedule = 'linear'
warmup_iters = 100
max_iters = 3600
min_lr = 0.0
