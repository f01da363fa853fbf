"""
A tokenizer of your own text: a folder that prepare_fineweb.py takes as --tokenizer.

    python train_tokenizer.py --data_files='corpus/*.jsonl' --vocab_size=32000 --out_dir=data/tok
    python prepare_fineweb.py --data_files='corpus/*.jsonl' --tokenizer=data/tok --out_dir=data/corpus

The same files and settings give the same tokenizer. It prints how many bytes a token stands for in text held out,
beside GPT-2's: more bytes make shorter sequences.
"""
import json
import os
from pathlib import Path

from configurator import UserError, configure
from data.atomic import write
from data.files import corpus_of_files, find_files
from data.tokenizer import END_OF_TEXT, TokenizerJSON, get_tokenizer

# -----------------------------------------------------------------------------
data_files = ''  # patterns as 'a/*.jsonl.gz,b/**/*.txt'; json, jsonl, parquet, csv or text
text_key = 'text'  # the column that holds the text
txt_split = 'file'  # a document in a text file: the 'file', a 'line', or, for large files, between 'blank' lines
skip_bad = False  # skip documents that cannot be read, rather than stop and name the first
kind = 'bpe'  # or 'unigram', both of bytes: any text comes back exactly; or BERT's 'wordpiece', which loses white space
vocab_size = 32000  # ids, the end-of-text id among them
max_bytes = 300_000_000  # of text to train on, kept in memory: a sample of all files, of compressed ones the beginning
out_dir = ''  # the folder to write
# -----------------------------------------------------------------------------
PIECE = 4000  # characters taken or left out together
HELD_OUT = 20  # one piece in HELD_OUT is held out, to measure


def pieces(corpus):
    """The documents of a corpus (see data/prepare.py) in pieces of text."""
    for texts, _ in corpus(None):
        for text in texts:
            for i in range(0, len(text or ''), PIECE):
                yield text[i:i + PIECE]


def sample(corpus, share, limit):
    """(texts to train on, texts held out): an even share of a corpus, at most `limit` bytes."""
    chosen, held_out, n_bytes = [], [], 0
    for n, text in enumerate(pieces(corpus)):
        if int((n + 1) * share) > int(n * share):
            n_bytes += count_bytes([text])
            if n_bytes > limit and chosen:
                break
            (held_out if (len(chosen) + len(held_out)) % HELD_OUT == 1 else chosen).append(text)
    if not held_out:
        raise UserError(f'data_files={data_files} holds too little text')
    return chosen, held_out


def train(kind, vocab_size, texts):
    """The content of tokenizer.json of a new tokenizer: bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special, options = [END_OF_TEXT], {}
    if kind == 'wordpiece':
        new = Tokenizer(models.WordPiece(unk_token='[UNK]'))
        new.pre_tokenizer, new.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer, special = trainers.WordPieceTrainer, ['[UNK]', END_OF_TEXT]
        new.train_from_iterator(texts, trainer(vocab_size=1, special_tokens=special, show_progress=False))
        order = sorted(new.get_vocab().keys() - special)  # of single characters: random, unless they are given
    else:
        new = Tokenizer(models.BPE() if kind == 'bpe' else models.Unigram())
        new.pre_tokenizer, new.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer if kind == 'bpe' else trainers.UnigramTrainer
        options, order = dict(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())), []
    options |= dict(vocab_size=vocab_size, special_tokens=special + order, show_progress=False)
    new.train_from_iterator(texts, trainer(**options))
    content = json.loads(new.to_str())
    if kind == 'unigram':
        content['model']['vocab'] = sorted_pieces(content['model']['vocab'])
    content['added_tokens'] = [token for token in content['added_tokens'] if token['content'] in special]
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def sorted_pieces(vocab):
    """Unigram's vocabulary, [[piece, score], …], the same in each training. The library adds up scores in the order of
    a hash table, which differs from run to run, so they are rounded; in such an order it also gives the characters that
    training dropped their scores, in steps of 0.0001 from the lowest, which here follow the characters."""
    special, vocab = vocab[:1], [[piece, round(score, 6)] for piece, score in vocab[1:]]
    lowest = min(score for _, score in vocab)
    dropped = [entry for entry in vocab if len(entry[0]) == 1 and round((entry[1] - lowest) * 1e4, 2) % 1 == 0]
    scores = sorted(score for _, score in dropped)
    for entry, score in zip(sorted(dropped), scores):
        entry[1] = score
    return special + sorted(vocab, key=lambda entry: (-entry[1], entry[0]))


def count_bytes(texts):
    return sum(len(text.encode(errors='replace')) for text in texts)


def bytes_per_token(tokenizer, texts):
    return count_bytes(texts) / sum(len(tokenizer.encode(text)) for text in texts)


if __name__ == '__main__':
    configure(globals())
    if not data_files or not out_dir:
        raise UserError("--data_files='corpus/*.jsonl' names the text, and --out_dir=FOLDER where the tokenizer goes")
    for name, value, least in ('vocab_size', vocab_size, 258), ('max_bytes', max_bytes, 1):
        if value < least:
            raise UserError(f'{name}={value} must be at least {least}')
    path = Path(out_dir, 'tokenizer.json')
    if path.exists():
        raise UserError(f'{path} is there already: give another out_dir')
    files = find_files(data_files)
    share = min(1, max_bytes / max(1, sum(map(os.path.getsize, files))))
    chosen, held_out = sample(corpus_of_files(files, text_key, txt_split, skip_bad), share, max_bytes)
    print(f'training a {kind} tokenizer on {count_bytes(chosen):,} bytes of {len(files):,} files', flush=True)
    content = train(kind, vocab_size, chosen)
    tokenizer = TokenizerJSON(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from None
    fewer = ' (the text has no more)' * (tokenizer.vocab_size < vocab_size)
    print(f'{path.parent}: {tokenizer.vocab_size:,} ids{fewer}')
    print(f'{bytes_per_token(tokenizer, held_out):.2f} bytes a token in text held out, ', end='')
    try:
        print(f'gpt2 {bytes_per_token(get_tokenizer("gpt2"), held_out):.2f}')
    except UserError:
        print("not compared with gpt2's, whose vocabulary is not on this machine")
