# OpenAI's GPT-2 (124M) on WikiText-2's validation split, as others measure it: windows of 1,024 tokens every 512.
# python data/wikitext2/prepare.py
# python evaluate.py config/eval_gpt2_wikitext2.py --init_from=gpt2-xl

init_from = 'gpt2'
dataset = 'wikitext2'
block_size = 1024
stride = 512
