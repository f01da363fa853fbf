"""
Tokenizers by name: text to token ids and back. There are two:

    gpt2   GPT-2's byte pair encoding, 50,257 ids (tiktoken fetches its vocabulary once)
    bytes  a text's UTF-8 bytes and one end-of-text id, 257 ids, nothing to fetch

    tokenizer = get_tokenizer('gpt2')
    tokenizer.encode('Hello world')  # array([15496, 995], dtype=uint16)

A further tokenizer is a class with the same members and a row in TOKENIZERS.
"""
import functools
import math

import numpy as np

from data.errors import UserError

END_OF_TEXT = '<|endoftext|>'  # how the end-of-text id is written; the same characters in a text are only text


class GPT2:
    name, vocab_size, eot, dtype = 'gpt2', 50257, 50256, np.uint16

    def __init__(self):
        import tiktoken  # here, because nobody needs it for bytes
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as error:  # requests' errors, or tiktoken's ValueError for a damaged download
            raise UserError(f"the GPT-2 vocabulary could not be fetched ({type(error).__name__}): go online once, "
                            'set TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer bytes')

    def encode(self, text):
        """The ids of `text`, (n,) uint16. It holds no special tokens: '<|endoftext|>' in it is ordinary text."""
        return self.bpe.encode_to_numpy(valid(text), disallowed_special=()).astype(self.dtype)

    def encode_documents(self, texts):
        """The ids of many texts, each preceded by the end-of-text id, (n,) uint16.

        One call into tiktoken for all of them, which runs without Python's lock, so that threads use all cores.
        """
        joined = valid(END_OF_TEXT + END_OF_TEXT.join(texts))
        if joined.count(END_OF_TEXT) != len(texts):  # a text holds these characters itself: one by one
            eot = np.array([self.eot], self.dtype)
            return np.concatenate([eot[:0], *(part for text in texts for part in (eot, self.encode(text)))])
        return self.bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT}).astype(self.dtype)

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes(plain(ids))

    def decode(self, ids):
        """Text of the ids (a list, array or tensor); bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


class Bytes:
    name, vocab_size, eot, dtype = 'bytes', 257, 256, np.uint16

    def encode(self, text):
        """The UTF-8 bytes of `text`, (n,) uint16."""
        return np.frombuffer(valid(text).encode(), np.uint8).astype(self.dtype)

    def encode_documents(self, texts):
        """The bytes of many texts, each preceded by the end-of-text id, (n,) uint16."""
        joined = b''.join(b'\xff' + valid(text).encode() for text in texts)  # no UTF-8 has the byte 255
        ids = np.frombuffer(joined, np.uint8).astype(self.dtype)
        ids[ids == 255] = self.eot
        return ids

    def decode_bytes(self, ids):
        return b''.join(END_OF_TEXT.encode() if i == self.eot else bytes([i]) for i in plain(ids))

    def decode(self, ids):
        """Text of the ids (a list, array or tensor); bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (GPT2, Bytes)}


@functools.cache
def get_tokenizer(name):
    """The tokenizer of that name: .name, .vocab_size, .eot, .dtype, .encode, .encode_documents, .decode."""
    if name not in TOKENIZERS:
        raise UserError(f"no tokenizer is called '{name}': there are {' and '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


def plain(ids):
    """A list of Python ints, of a list, array or tensor of ids."""
    return ids.tolist() if hasattr(ids, 'tolist') else [int(i) for i in ids]


def valid(text):
    """`text` itself, or with U+FFFD for lone surrogates, which JSON can spell and UTF-8 can't."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')

# -----------------------------------------------------------------------------
# tokenizers

def tokenizer_files(tokenizer, block_size):
    """The content of tokenizer.json and tokenizer_config.json, from which transformers' AutoTokenizer makes a
    tokenizer with our ids. As usual there, and unlike here, '<|endoftext|>' in a text is the end-of-text id."""
    ranks = {bytes([i]): i for i in range(256)}
    if tokenizer.name == 'gpt2':
        ranks = {token: tokenizer.bpe.encode_single_token(token) for token in tokenizer.bpe.token_byte_values()}
    special = dict(content=END_OF_TEXT, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    vocab = {printable(token): i for token, i in ranks.items()} | {END_OF_TEXT: tokenizer.eot}
    pieces = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=False, use_regex=True)  # GPT-2's splits
    bpe = dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix='', end_of_word_suffix='',
               fuse_unk=False, byte_fallback=False, vocab=vocab, merges=[[printable(p) for p in m] for m in merges(ranks)])
    return {'tokenizer.json': dict(version='1.0', truncation=None, padding=None, normalizer=None, pre_tokenizer=pieces,
                                   added_tokens=[dict(id=tokenizer.eot) | special], post_processor=None,
                                   decoder=pieces, model=bpe),
            'tokenizer_config.json': dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=block_size,
                                          bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT,
                                          clean_up_tokenization_spaces=False)}


def printable(token):
    """A token's bytes as GPT-2's files write them: a visible character for each byte."""
    return ''.join(VISIBLE[byte] for byte in token)


VISIBLE = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else None for b in range(256)]
unseen = iter(range(256, 512))
VISIBLE = [c or chr(next(unseen)) for c in VISIBLE]  # the others, in order, are the characters from 256 on


def merges(ranks):
    """The two parts that each longer token was merged from: what byte pair encoding makes of its bytes when the
    token itself is the only one left to merge."""
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        yield parts
