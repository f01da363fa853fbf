# Teach GPT-2 to answer, from conversations of your own: only the answers are scored.
# python data/chat/prepare.py --input='talks/*.jsonl'
# python sample.py --out_dir=out-chat --chat
# On a GPU of 24 GB gpt2-xl fits with --batch_size=1; a CPU manages --init_from=gpt2.

out_dir = 'out-chat'
init_from = 'gpt2'  # or gpt2-medium, gpt2-large, gpt2-xl, a folder, a .pt file of the same tokenizer
dataset = 'chat'
document_mask = True  # a block holds several conversations
eval_interval = 50
eval_tokens = 102_400
sample_interval = 0  # it would not know that it is asked: sample.py --chat
hellaswag_interval = 0

# 32 blocks of 1,024 tokens a step; 20,000 conversations of 200 tokens are 122 steps
batch_size = 4
total_batch_size = 32_768
max_iters = 250

learning_rate = 3e-5
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = 10
weight_decay = 0.0
