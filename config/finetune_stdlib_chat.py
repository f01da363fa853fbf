# Teach config/quickstart.py's model to answer questions about the standard library: 600 steps of the same size.
# python data/stdlib_chat/prepare.py
# python train.py config/finetune_stdlib_chat.py
# python sample.py --out_dir=out-stdlib-chat --chat

from config.quickstart import *

out_dir = 'out-stdlib-chat'
init_from = 'out-quickstart/ckpt.pt'
dataset = 'stdlib_chat'
document_mask = True
eval_tokens = 102_400  # all of the held-out part
eval_interval = 200
sample_interval = 0

learning_rate = 2e-3
