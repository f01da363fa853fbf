# OpenAI's GPT-2 (124M) on the validation data: its loss and its HellaSwag score.
# python train.py config/eval_gpt2.py --init_from=gpt2-xl

init_from = 'gpt2'
eval_only = True
batch_size = 8
compile = False  # a single evaluation is over before compiling pays
