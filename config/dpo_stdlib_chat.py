# For dpo.py: prefer a function's own description, and its own name, to another one's.
# python data/stdlib_chat/prepare.py
# python train.py config/finetune_stdlib_chat.py
# python dpo.py config/dpo_stdlib_chat.py

out_dir = 'out-stdlib-dpo'
init_from = 'out-stdlib-chat/ckpt.pt'
pairs = 'data/stdlib_chat/pairs_train.jsonl'
val_pairs = 'data/stdlib_chat/pairs_val.jsonl'
eval_interval = 25
log_interval = 10

batch_size = 16
gradient_accumulation_steps = 2
learning_rate = 1e-4
warmup_iters = 10
max_iters = 100
compile = False  # it is done before compiling pays
