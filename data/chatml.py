"""
Conversations as token ids: ChatML, which many models use. Training scores only the answers.

    <|endoftext|><|im_start|>user
    What is 1 + 1?<|im_end|>
    <|im_start|>assistant
    2<|im_end|>

<|im_start|> and <|im_end|> are one id each, white space around a content is dropped, and the end-of-text id comes
first, as before any document. The tokenizer is one with these two tokens: 'gpt2+chatml', or any other one's name and
+chatml. Its first ids are those of gpt2, so that GPT-2's weights fit. tokenizer.chat_template in an exported folder is
the same in transformers.
"""
import numpy as np

from data.errors import UserError
from data.tokenizer import CHATML, get_tokenizer


def chat_tokenizer(spec):
    """The Tokenizer for conversations: that of get_tokenizer(spec), with ChatML's tokens if it lacks them. Raises
    UserError for a tokenizer.json with another chat template."""
    tokenizer = get_tokenizer(spec)
    return tokenizer if tokenizer.im_start is not None else get_tokenizer(spec + CHATML)


def encode(messages, tokenizer, answer=False):
    """
    (ids, scored) of a conversation: (n,) of tokenizer.dtype and (n,) bool, True for what the assistant writes, the
    im_end of its messages included. answer: end with the beginning of the assistant's next message.

    tokenizer: from chat_tokenizer. Raises UserError for one without ChatML's tokens.
    """
    if tokenizer.im_start is None:
        raise UserError(f'the tokenizer {tokenizer.name} has ' + (
            'a chat template of its own, which cannot be read here: conversations are ChatML'
            if tokenizer.chat_template else
            'no chat template: the model has not been finetuned on conversations, as config/finetune_chat.py does'))
    eot, start, end = np.array([[tokenizer.eot], [tokenizer.im_start], [tokenizer.im_end]], tokenizer.dtype)
    pieces, newline = [(eot, False)], tokenizer.encode('\n')
    for message in messages:
        answers = message['role'] == 'assistant'
        pieces += [(start, False), (tokenizer.encode(message['role'] + '\n'), False),
                   (tokenizer.encode(message['content'].strip()), answers), (end, answers), (newline, False)]
    if answer:
        pieces += [(start, False), (tokenizer.encode('assistant\n'), False)]
    return (np.concatenate([ids for ids, _ in pieces]),
            np.repeat([scored for _, scored in pieces], [len(ids) for ids, _ in pieces]))
