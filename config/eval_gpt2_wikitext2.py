# OpenAI's GPT-2 (124M) on WikiText-2's test split, in windows of 1,024 tokens every 512. (GPT-2's paper undid
# WikiText's spaces round words and signs before it measured; others do not.)
# python data/wikitext2/prepare.py --held_out=test
# python evaluate.py config/eval_gpt2_wikitext2.py --init_from=gpt2-xl

init_from = 'gpt2'
dataset = 'wikitext2'
block_size = 1024
stride = 512
