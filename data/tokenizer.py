"""
Tokenizers: text to token ids and back. get_tokenizer takes

    gpt2           GPT-2's byte pair encoding, 50,257 ids (tiktoken fetches its vocabulary once)
    bytes          a text's UTF-8 bytes and one end-of-text id, 257 ids, nothing to fetch
    cl100k_base …  any encoding of tiktoken's
    data/tok       a tokenizer.json (BPE, WordPiece, Unigram …): its path, its folder, or a model on the hub
    meta.pkl       nanoGPT's characters: its path or its folder
    gpt2+chatml …  any of these with ChatML's two tokens, for conversations (data/chatml.py)

    tokenizer = get_tokenizer('gpt2')
    tokenizer.encode('Hello world')  # array([15496, 995], dtype=uint16)

Another tokenizer is a class with Tokenizer's members and a row in TOKENIZERS.
"""
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np

from data.atomic import write
from data.errors import UserError, some

END_OF_TEXT = '<|endoftext|>'  # how the end-of-text id is written; the same characters in a text are only text
IM_START, IM_END = '<|im_start|>', '<|im_end|>'  # begin and end a message
CHATML = '+chatml'  # ends a tokenizer's name


class Tokenizer:
    """
    name: tells it from every other one; vocab_size: the largest id plus 1; eot: the end-of-text id; dtype: of its ids
    eot_is_text: eot also occurs within texts
    im_start, im_end: the ids that begin and end a message of a conversation; None without ChatML
    chat_template: a Jinja template for transformers, ChatML's or another one; None for none
    files: {name: bytes} that a dataset or a run keeps of it; none where the name is enough
    encode(text): (n,) ids of self.dtype, never eot: no characters of a text are a special token
    encode_documents(texts): (n,) ids of many texts, each preceded by eot
    decode_bytes(ids): what each id stands for in the middle of a text, joined
    """
    eot_is_text, files, im_start, im_end, chat_template = False, {}, None, None, None

    def decode(self, ids):
        """Text of the ids (a list, array or tensor); bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


class Tiktoken(Tokenizer):
    """An encoding of tiktoken's, or of a plugin's."""

    def __init__(self, name='gpt2'):
        import tiktoken  # here, because nobody needs it for bytes
        try:
            self.bpe = tiktoken.get_encoding(name)
        except Exception as error:  # requests' errors, or tiktoken's ValueError for a damaged download
            called = 'GPT-2' if name == 'gpt2' else name
            raise UserError(f'the {called} vocabulary could not be fetched ({type(error).__name__}): go online once, '
                            'set TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer bytes') from None
        if END_OF_TEXT not in self.bpe.special_tokens_set:
            known = some(sorted(self.bpe.special_tokens_set), 8) or 'none'
            raise UserError(f'the tokenizer {name} has no {END_OF_TEXT}, only {known}')
        self.name, self.vocab_size, self.eot = name, self.bpe.n_vocab, self.bpe.eot_token
        self.dtype = smallest_dtype(self.vocab_size)

    def encode(self, text):
        return self.bpe.encode_to_numpy(valid(text), disallowed_special=()).astype(self.dtype)

    def encode_documents(self, texts):
        """One call into tiktoken for all of them, which runs without Python's lock, so that threads use all cores."""
        joined = valid(END_OF_TEXT + END_OF_TEXT.join(texts))
        if joined.count(END_OF_TEXT) != len(texts):  # a text holds these characters itself: one by one
            eot = np.array([self.eot], self.dtype)
            return np.concatenate([eot[:0], *(part for text in texts for part in (eot, self.encode(text)))])
        return self.bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=()).astype(self.dtype)

    def decode_bytes(self, ids):
        ids = plain(ids)
        try:
            return self.bpe.decode_bytes(ids)
        except KeyError:  # cl100k_base and others have ids without a token
            return b''.join(self.decode_bytes([i]) for i in ids) if len(ids) > 1 else b''


class GPT2(Tiktoken):
    name, vocab_size, eot, dtype = 'gpt2', 50257, 50256, np.uint16  # known without its vocabulary


class Bytes(Tokenizer):
    name, vocab_size, eot, dtype = 'bytes', 257, 256, np.uint16

    def encode(self, text):
        return np.frombuffer(valid(text).encode(), np.uint8).astype(self.dtype)

    def encode_documents(self, texts):
        joined = b''.join(b'\xff' + valid(text).encode() for text in texts)  # no UTF-8 has the byte 255
        ids = np.frombuffer(joined, np.uint8).astype(self.dtype)
        ids[ids == 255] = self.eot
        return ids

    def decode_bytes(self, ids):
        return b''.join(END_OF_TEXT.encode() if i == self.eot else bytes([i]) for i in plain(ids))


class TokenizerJSON(Tokenizer):
    """
    A tokenizer.json of the `tokenizers` library, given its content and tokenizer_config.json's (bytes, b'' for none).

    The end-of-text token is tokenizer_config.json's eos_token, else the first of ENDS among the special tokens. What
    the file says about truncation, padding and tokens around a text is not used. Raises ValueError if it is damaged.
    """
    ENDS = (END_OF_TEXT, '<|end_of_text|>', '</s>', '<eos>', '<|eos|>', '[EOS]', '[SEP]')

    def __init__(self, content, config=b''):
        import tokenizers
        try:
            self.hf = tokenizers.Tokenizer.from_str(content.decode())
        except BaseException as error:  # a damaged file can make the library's Rust code panic, which is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
        self.hf.no_truncation()
        self.hf.no_padding()
        self.hf.encode_special_tokens = True  # as text
        settings = json.loads(config or b'{}')
        end = self.find_end(settings.get('eos_token'))
        vocabulary, self.eot = self.hf.get_vocab(), self.hf.token_to_id(end)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > 2**24:
            raise ValueError(f'it has the id {self.vocab_size - 1:,}')
        self.dtype = smallest_dtype(self.vocab_size)
        self.byte_level = 'ByteLevel' in str(self.hf.decoder)
        self.eot_is_text = len(end) == 1  # of Characters
        self.end, self.sha256 = end, hashlib.sha256(content).hexdigest()
        self.chat_template = settings.get('chat_template')
        if self.chat_template == chatml_template(end):  # exported from here
            self.im_start, self.im_end = vocabulary.get(IM_START), vocabulary.get(IM_END)
        self.name = f'tokenizer.json {self.sha256[:12]} (end: {end!r})'
        self.files = {'tokenizer.json': content, 'tokenizer_config.json': config or json.dumps(
            {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': end}).encode()}

    def find_end(self, end):
        """The end-of-text token, a string. end: tokenizer_config.json's eos_token, a string, an object or None."""
        end = end.get('content') if isinstance(end, dict) else end
        special = [token.content for token in self.hf.get_added_tokens_decoder().values() if token.special]
        for token in [end] if isinstance(end, str) else [token for token in self.ENDS if token in special]:
            if self.hf.token_to_id(token) is not None:
                return token
        raise ValueError(f'it has no end-of-text token: eos_token in tokenizer_config.json is {end!r}, '
                         f'and its special tokens are {some(sorted(special), 8) or "none"}')

    def encode(self, text):
        return self.encode_texts([text], [])

    def encode_documents(self, texts):
        """One call into the library for all of them, which runs without Python's lock."""
        return self.encode_texts(texts, [self.eot])

    def encode_texts(self, texts, before):
        texts = [valid(text) for text in texts]
        try:
            encodings = self.hf.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # what is not in the vocabulary, and has no token that stands for it
            missing = sorted(set().union(*texts) - self.hf.get_vocab().keys()) if self.eot_is_text else ''
            what = f'the character {missing[0]!r}' if missing else f'this text ({error})'
            raise UserError(f'{self.name} has no token for {what}') from None
        ids = []
        for encoding in encodings:
            new = encoding.ids
            ids += before
            ids += new if self.eot_is_text or self.eot not in new else self.without_end(new)
        return np.array(ids, self.dtype)

    def without_end(self, ids):
        """The ids, where the end-of-text token in a text becomes its characters, one by one."""
        spelled = [token.id for char in self.end for token in self.hf.model.tokenize(char)]
        return [new for i in ids for new in (spelled if i == self.eot else [i])]

    @functools.cached_property
    def pieces(self):
        """{id: the bytes that it stands for in the middle of a text}"""
        vocabulary = self.hf.get_vocab()
        if self.byte_level:
            byte_of = {char: byte for byte, char in enumerate(VISIBLE)}
            pieces = {i: bytes(byte_of[char] for char in token) for token, i in vocabulary.items()
                      if set(token) <= byte_of.keys()}
        else:  # what the token adds after another one
            anchor, before = next(((i, text) for i in vocabulary.values() if (text := self.hf.decode([i]))
                                   and self.hf.decode([i, i]).startswith(text)), (self.eot, ''))
            after = self.hf.decode_batch([[anchor, i] for i in vocabulary.values()], skip_special_tokens=False)
            pieces = {i: text[len(before):].encode() for i, text in zip(vocabulary.values(), after)}
            if 'ByteFallback' in str(self.hf.decoder):
                pieces |= {vocabulary[token]: bytes([byte]) for byte in range(256)
                           if (token := f'<0x{byte:02X}>') in vocabulary}
        whole = {token.content for token in self.hf.get_added_tokens_decoder().values()} | {self.end}
        return pieces | {vocabulary[token]: token.encode() for token in whole}

    def decode_bytes(self, ids):
        return b''.join(self.pieces.get(i, b'') for i in plain(ids))

    def decode(self, ids):
        if self.byte_level:
            return super().decode(ids)
        return self.hf.decode(plain(ids), skip_special_tokens=False)  # knows how a text begins


class Characters(TokenizerJSON):
    """nanoGPT's meta.pkl, given its content: an id for each character. A text begins after a line break, as there.
    Raises ValueError if it is damaged."""

    def __init__(self, content):
        try:
            meta = PlainUnpickler(io.BytesIO(content)).load()
        except UserError as error:  # of find_class
            raise ValueError(error) from None
        except Exception as error:  # of damaged bytes: many kinds
            raise ValueError(f'it is damaged ({type(error).__name__}: {error})') from None
        itos = meta.get('itos') if isinstance(meta, dict) else None
        if not (isinstance(itos, dict) and itos and set(itos) == set(range(len(itos)))
                and all(isinstance(char, str) and len(char) == 1 for char in itos.values())):
            raise ValueError("it has no 'itos' with a character for each id")
        vocabulary = {itos[i]: i for i in range(len(itos))}
        split = dict(type='Split', pattern=dict(Regex=r'[\s\S]'), behavior='Isolated', invert=False)
        content = dict(version='1.0', truncation=None, padding=None, added_tokens=[], normalizer=None,
                       pre_tokenizer=split, post_processor=None, decoder=dict(type='Fuse'),
                       model=dict(type='WordLevel', vocab=vocabulary, unk_token='<unk>'))
        end = {'eos_token': '\n' if '\n' in vocabulary else itos[0], 'tokenizer_class': 'PreTrainedTokenizerFast'}
        super().__init__(json.dumps(content).encode(), json.dumps(end).encode())


class ChatML(Tokenizer):
    """Another tokenizer with ChatML's two tokens: the ids after its last, unless its vocabulary has them."""

    def __init__(self, base):
        vocabulary = base.hf.get_vocab() if base.files else {}
        if base.chat_template:
            raise UserError(f'{base.name} has a chat template of its own, which cannot be read here: conversations are '
                            'ChatML')
        if base.files and len(vocabulary) < base.vocab_size:
            raise UserError(f'{base.name} has {len(vocabulary)} tokens with ids up to {base.vocab_size - 1}: '
                            'a tokenizer.json with gaps takes no more tokens')
        new = [token for token in (IM_START, IM_END) if token not in vocabulary]
        ids = vocabulary | {token: base.vocab_size + i for i, token in enumerate(new)}
        self.base, self.name, self.vocab_size = base, base.name + CHATML, base.vocab_size + len(new)
        self.im_start, self.im_end, self.eot, self.eot_is_text = ids[IM_START], ids[IM_END], base.eot, base.eot_is_text
        self.dtype, self.files, self.sha256 = smallest_dtype(self.vocab_size), base.files, getattr(base, 'sha256', '')
        self.chat_template = chatml_template(getattr(base, 'end', END_OF_TEXT))

    def encode(self, text):
        return self.base.encode(text).astype(self.dtype, copy=False)

    def encode_documents(self, texts):
        return self.base.encode_documents(texts).astype(self.dtype, copy=False)

    def decode_bytes(self, ids):
        special = {self.im_start: IM_START.encode(), self.im_end: IM_END.encode()}
        return b''.join(self.base.decode_bytes(list(run)) if token is None else token * len(list(run))
                        for token, run in itertools.groupby(plain(ids), special.get))


TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (GPT2, Bytes)}


def get_tokenizer(spec):
    """The Tokenizer that `spec` names (see above). Raises UserError."""
    if spec.endswith(CHATML):
        return ChatML(get_tokenizer(spec.removesuffix(CHATML)))
    if spec in TOKENIZERS or os.path.basename(spec) == spec and spec in tiktoken_names():
        return named(spec)
    path = locate(spec)
    config = path.name.removesuffix('tokenizer.json') + 'tokenizer_config.json'
    beside = path.with_name(config), path.with_name('chat_template.jinja')
    return from_file(path, *beside, *(os.stat(file).st_mtime_ns for file in (path, *beside) if file.is_file()))


def tokenizer_name(spec):
    """The name of the Tokenizer that `spec` names: two with the same name are the same. gpt2's needs no vocabulary."""
    return spec if spec.removesuffix(CHATML) in TOKENIZERS else get_tokenizer(spec).name


@functools.cache
def named(name):
    return TOKENIZERS[name]() if name in TOKENIZERS else Tiktoken(name)


def tiktoken_names():
    import tiktoken
    return tiktoken.list_encoding_names()


def locate(spec):
    """The path of the tokenizer.json or meta.pkl that `spec` names."""
    path = Path(os.path.expanduser(spec))
    for file in [path / 'tokenizer.json', path / 'meta.pkl'] if os.path.isdir(path) else [path]:
        if os.path.isfile(file):  # False, where Path.is_file raises, for a name that is too long
            return file
    if os.path.isdir(path):
        raise UserError(f'{spec} holds no tokenizer.json, and no meta.pkl of nanoGPT')
    if spec.count('/') != 1 or path.suffix in ('.json', '.pkl'):
        raise UserError(f"no tokenizer is called '{spec}': there are {' and '.join(TOKENIZERS)}, tiktoken's "
                        f"{', '.join(name for name in tiktoken_names() if name not in TOKENIZERS)}, and any "
                        'tokenizer.json, as its path, its folder or a model on the Hugging Face hub')
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    try:
        path = Path(hf_hub_download(spec, 'tokenizer.json'))
        for file in ('tokenizer_config.json', 'chat_template.jinja'):
            try:
                hf_hub_download(spec, file)
            except EntryNotFoundError as error:
                no_network = isinstance(error, LocalEntryNotFoundError)  # rather than no such file
                if no_network and file != 'chat_template.jinja':  # few models have one
                    raise
        return path
    except Exception as error:  # many kinds: no such model or file, no network, no access
        raise UserError(f'there is no file {spec}, and no tokenizer.json of that name could be downloaded from the '
                        f'Hugging Face hub ({type(error).__name__})') from None


@functools.lru_cache(16)
def from_file(path, config, template, *_modified):
    try:
        if path.suffix == '.pkl':
            return Characters(path.read_bytes())
        settings = config.read_bytes() if config.is_file() else b''
        if template.is_file():  # where transformers writes it since version 5
            more = {'chat_template': template.read_text('utf-8')}
            settings = json.dumps(json.loads(settings or b'{}') | more).encode()
        return TokenizerJSON(path.read_bytes(), settings)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f'{path} is no tokenizer: {error}') from None


# -----------------------------------------------------------------------------
# what datasets and checkpoints keep

def to_record(tokenizer):
    """What meta.json and checkpoints say of a tokenizer, from which from_record finds it again."""
    if tokenizer.files:
        chatml = CHATML * tokenizer.name.endswith(CHATML)
        return {'tokenizer': 'tokenizer.json' + chatml, 'tokenizer_sha256': tokenizer.sha256}
    return {'tokenizer': tokenizer.name}


def from_record(record, folder):
    """What get_tokenizer takes for the tokenizer of a dataset or a checkpoint in that folder. Raises UserError if its
    file is missing there, or has another sha256."""
    if 'tokenizer_sha256' not in record:
        return record['tokenizer']
    found = sorted(filter(Path.is_file, Path(folder).glob('*tokenizer.json')), key=lambda path: (len(path.name), path))
    for path in found:
        if hashlib.sha256(path.read_bytes()).hexdigest() == record['tokenizer_sha256']:
            return str(path) + CHATML * record['tokenizer'].endswith(CHATML)
    why = ('is another tokenizer: its sha256 is not' if found else
           'is missing: copy it from where this folder is from; its sha256 is')
    raise UserError(f'{Path(folder) / "tokenizer.json"} {why} {record["tokenizer_sha256"]}')


def keep_files(tokenizer, folder):
    """Write a tokenizer's files into a folder, and return what get_tokenizer takes for them there. Raises UserError if
    it holds another tokenizer.json."""
    for name, content in tokenizer.files.items():
        path = Path(folder, name)
        if not path.exists():
            write(path, content)
        elif name == 'tokenizer.json' and path.read_bytes() != content:
            raise UserError(f'{path} is another tokenizer than {tokenizer.name}: give another folder')
    return str(Path(folder, to_record(tokenizer)['tokenizer'])) if tokenizer.files else tokenizer.name

# -----------------------------------------------------------------------------
# helpers

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


def smallest_dtype(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class PlainUnpickler(pickle._Unpickler):  # the one in C would allocate as many memo entries as a damaged file names
    """Loads dictionaries, lists, strings and numbers alone, so that nothing in a file is run."""

    def find_class(self, module, name):
        raise UserError('it holds more than dictionaries, lists, strings and numbers, which is not loaded, since that '
                        f'could run code ({module}.{name})')

# -----------------------------------------------------------------------------
# transformers' files

def tokenizer_files(tokenizer, block_size):
    """The content of tokenizer.json and tokenizer_config.json, from which transformers' AutoTokenizer makes a
    tokenizer with our ids: dictionaries, or the bytes of its own. As usual there, and unlike here, '<|endoftext|>' in a
    text is the end-of-text id. Raises UserError for an encoding of tiktoken's other than gpt2."""
    if tokenizer.name.endswith(CHATML):
        return with_chatml(tokenizer, tokenizer_files(tokenizer.base, block_size))
    if tokenizer.files:
        config = json.loads(tokenizer.files['tokenizer_config.json'])
        return {'tokenizer.json': tokenizer.files['tokenizer.json'],
                'tokenizer_config.json': dict(model_max_length=block_size, clean_up_tokenization_spaces=False) | config}
    if tokenizer.name not in TOKENIZERS:
        raise UserError(f'the tokenizer {tokenizer.name} has no tokenizer.json here')
    from tokenizers import Tokenizer as Library, decoders, models, pre_tokenizers
    ranks, merges = byte_pairs(tokenizer)
    vocab = {printable(token): i for token, i in ranks.items()} | {END_OF_TEXT: tokenizer.eot}
    new = Library(models.BPE(vocab, [(printable(a), printable(b)) for a, b in merges]))
    new.pre_tokenizer, new.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    new.add_special_tokens([END_OF_TEXT])
    return {'tokenizer.json': json.loads(new.to_str()),
            'tokenizer_config.json': dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=block_size,
                                          bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT,
                                          clean_up_tokenization_spaces=False)}


def with_chatml(tokenizer, files):
    """The files of a ChatML's base, with its tokens and its template."""
    content = files['tokenizer.json']
    content = json.loads(content) if isinstance(content, bytes) else content
    known = {token['content'] for token in content['added_tokens']}
    content['added_tokens'] += [
        dict(id=i, content=token, special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)
        for token, i in ((IM_START, tokenizer.im_start), (IM_END, tokenizer.im_end)) if token not in known]
    return {'tokenizer.json': content,
            'tokenizer_config.json': files['tokenizer_config.json'] | {'chat_template': tokenizer.chat_template}}


def chatml_template(eot):
    """What data.chatml.encode does, as a Jinja template for transformers; eot: how the end-of-text id is written."""
    message = f"{{{{ '{IM_START}' + message['role'] + '\\n' + message['content'] | trim + '{IM_END}\\n' }}}}"
    answer = f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
    return f'{eot}{{% for message in messages %}}{message}{{% endfor %}}{answer}'


def printable(token):
    """A token's bytes as GPT-2's files write them: a visible character for each byte."""
    return ''.join(VISIBLE[byte] for byte in token)


VISIBLE = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else None for b in range(256)]
unseen = iter(range(256, 512))
VISIBLE = [c or chr(next(unseen)) for c in VISIBLE]  # the others, in order, are the characters from 256 on


@functools.cache
def byte_pairs(tokenizer):
    """({token: id}, [(left, right)]) of gpt2 or bytes: each token's bytes, and the two parts that each longer one was
    merged from: what byte pair encoding makes of its bytes when the token itself is the only one left to merge."""
    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.eot)}  # the last id is the end of a text
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(parts)
    return ranks, merges
