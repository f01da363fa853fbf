"""
The GPT: its configuration, its layers, its loss, and its weights in and out.

With the defaults it is GPT-2 exactly ("Language Models are Unsupervised Multitask Learners", Radford et
al. 2019), with the parameter names that GPT-2 has in Hugging Face's transformers. The other fields of
GPTConfig turn it, one line at a time, into what has been learned since.

Shapes: B batch, T time (sequence length), C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 1024  # context length, in tokens
    vocab_size: int = 50257  # of the tokenizer; the weights are padded to padded_vocab_size rows
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the Linears and LayerNorms, as in GPT-2; False is a bit better and faster
    # what GPT-2 did not have
    n_kv_head: int = 0  # heads for keys and values; fewer than n_head is grouped-query attention; 0 is n_head
    head_size: int = 0  # width of a head; 0 is n_embd / n_head
    position: str = 'learned'  # or 'rope': rotary positions (Su et al. 2021, arXiv:2104.09864)
    rope_theta: float = 10000.0  # the base of RoPE's wavelengths
    rope_type: str = 'default'  # or 'linear', 'llama3', 'yarn': frequencies scaled to a longer context
    rope_factor: float = 1.0  # how many times longer
    rope_original_context: int = 0  # the context before scaling, in tokens; 0 is block_size
    rope_low_freq_factor: float = 1.0  # frequencies with fewer turns in the original context are divided by rope_factor
    rope_high_freq_factor: float = 0.0  # those with more are kept; 0 is 4 for llama3, 32 for yarn
    rope_attention_factor: float = 0.0  # yarn's scale of queries and keys; 0 is 0.1 ln(rope_factor) + 1
    norm: str = 'layernorm'  # or 'rmsnorm'
    norm_gain: bool = True  # normalisations have weights
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm on queries and keys, head by head (Dehghani et al. 2023, arXiv:2302.05442)
    mlp: str = 'gelu'  # or 'relu2' (So et al. 2021, arXiv:2109.08668) or 'swiglu' (Shazeer 2020, arXiv:2002.05202)
    n_mlp: int = 0  # width of the MLP; 0 is 4 * n_embd
    embedding_norm: bool = False  # normalise the embeddings, before the first block
    tie_embeddings: bool = True  # the head uses the token embedding's weights
    zero_init: bool = False  # the projections back into the residual stream and an untied head start at zero
    softcap: float = 0.0  # logits are squeezed into ±softcap by a tanh (Gemma 2, arXiv:2408.00118); 0 is off
    causal: bool = True  # a token attends to those before it; False: to all, for masked language models
    lora_rank: int = 0  # of the adapters that are trained instead of the weights (common/lora.py); 0 is none
    lora_alpha: float = 0.0  # the adapters' scale, times lora_rank; 0 is 2 * lora_rank

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_mlp = self.n_mlp or 4 * self.n_embd
        self.lora_alpha = float(self.lora_rank and (self.lora_alpha or 2 * self.lora_rank))
        for field, known in dict(position=('learned', 'rope'), rope_type=('default', 'linear', 'llama3', 'yarn'),
                                 norm=('layernorm', 'rmsnorm'), mlp=('gelu', 'relu2', 'swiglu')).items():
            if getattr(self, field) not in known:
                raise ValueError(f'{field}={getattr(self, field)!r} is not one of {", ".join(known)}')
        for field in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, field) < 1:
                raise ValueError(f'{field}={getattr(self, field)} must be at least 1')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and less than 1')
        if self.head_size == 0 and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        self.head_size = self.head_size or self.n_embd // self.n_head
        for field, least in dict(n_kv_head=1, head_size=1, n_mlp=1, rope_theta=1.001).items():
            if not least <= getattr(self, field) < math.inf:
                raise ValueError(f'{field}={getattr(self, field)} must be at least {least}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}')
        if self.position == 'rope' and self.head_size % 2:
            raise ValueError(f'RoPE needs an even head size, and head_size is {self.head_size}')
        if self.rope_type != 'default':
            self.rope_original_context = self.rope_original_context or self.block_size
            self.rope_high_freq_factor = self.rope_high_freq_factor or (32.0 if self.rope_type == 'yarn' else 4.0)
            if self.rope_type == 'yarn':
                self.rope_attention_factor = self.rope_attention_factor or 0.1 * math.log(max(1, self.rope_factor)) + 1
            if self.position != 'rope':
                raise ValueError(f"rope_type={self.rope_type!r} needs position='rope'")
            if not 1 <= self.rope_factor < math.inf:
                raise ValueError(f'rope_factor={self.rope_factor} must be at least 1')
            if not 0 < self.rope_low_freq_factor < self.rope_high_freq_factor < math.inf:
                raise ValueError(f'rope_low_freq_factor={self.rope_low_freq_factor} must be greater than 0 and less '
                                 f'than rope_high_freq_factor={self.rope_high_freq_factor}')
            if self.rope_original_context < 1 or not 0 <= self.rope_attention_factor < math.inf:
                raise ValueError(f'rope_original_context={self.rope_original_context} and rope_attention_factor='
                                 f'{self.rope_attention_factor} must not be negative')

    @property
    def padded_vocab_size(self):
        """vocab_size rounded up to a multiple of 64, for matrix units: 50,304 for GPT-2. Padding is never scored or
        sampled."""
        return -(-self.vocab_size // 64) * 64


class RMSNorm(nn.RMSNorm):
    """In float32 whatever the precision of its input and its gain (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x):
        gain = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, gain, self.eps).type_as(x)


class LayerNorm(nn.LayerNorm):
    """In float32 whatever the precision of its input, its gain and its bias (Ba et al. 2016, arXiv:1607.06450)."""

    def forward(self, x):
        gain, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, gain, bias, self.eps).type_as(x)


def norm(config):
    """The normalisation that config asks for, over the channels."""
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_gain)
    return LayerNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_gain, bias=config.bias)


def rope_frequencies(config, device=None):
    """(frequencies (D/2,) float32, in radians a token; the factor of cosines and sines) of RoPE, scaled to a longer
    context by rope_type:

    default  none of it
    linear   all of them divided by rope_factor (Chen et al. 2023, arXiv:2306.15595)
    llama3   the low ones divided, the high ones kept, those between interpolated by their turns in the original
             context (Llama 3.1; Grattafiori et al. 2024, arXiv:2407.21783)
    yarn     the same, interpolated by their index, and queries and keys scaled (Peng et al. 2023, arXiv:2309.00071)
    """
    D, theta, context = config.head_size, config.rope_theta, config.rope_original_context
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if config.rope_type == 'default':
        return frequencies, 1.0
    if config.rope_type == 'linear':
        return frequencies / config.rope_factor, 1.0
    if config.rope_type == 'llama3':
        kept = (context * frequencies / (2 * math.pi) - low) / (high - low)  # in turns
    else:
        def index(turns):  # of the frequency that turns that often in the original context
            return D * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        first, last = max(math.floor(index(high)), 0), min(math.ceil(index(low)), D - 1)
        kept = 1 - (torch.arange(D // 2, device=device) - first) / ((last - first) or 0.001)
    kept = kept.clamp(0, 1)
    factor = config.rope_attention_factor if config.rope_type == 'yarn' else 1.0
    return frequencies * (kept + (1 - kept) / config.rope_factor), factor


def rotate(x, rope):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x: (B, T, H, D); rope: cos and sin, (…, T, 1, D/2)."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)  # float32: bfloat16 angles blur far positions
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        q_size, kv_size = config.n_head * config.head_size, config.n_kv_head * config.head_size
        self.c_attn = nn.Linear(config.n_embd, q_size + 2 * kv_size, bias=config.bias)  # q, k, v in one
        self.c_proj = nn.Linear(q_size, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps, elementwise_affine=config.norm_gain)
            self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps, elementwise_affine=config.norm_gain)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, mask=None, cache=None):
        config, (B, T, _) = self.config, x.shape
        q, k, v = self.c_attn(x).view(B, T, -1, config.head_size).split(
            (config.n_head, config.n_kv_head, config.n_kv_head), dim=2)  # (B, T, H, D) each
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D), S = everything so far
        grouped = config.n_kv_head != config.n_head
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)  # (B, H, T, D)
        else:
            # a bool even where torch.compile traces T as a symbol
            causal = True if config.causal and mask is None and T > 1 else False
            dropout = config.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout,
                                               enable_gqa=grouped)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.c_fc = nn.Linear(config.n_embd, config.n_mlp * (2 if config.mlp == 'swiglu' else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.n_mlp, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, n_mlp), or the gate and the value side by side for SwiGLU
        if self.kind == 'gelu':
            x = F.gelu(x, approximate='tanh')  # the approximation that GPT-2 was trained with
        elif self.kind == 'relu2':
            x = F.relu(x).square()
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.dropout(self.c_proj(x))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class LayerCache:
    """One layer's keys and values of the tokens so far: both (B, H, max_len, D), filled up to `length`."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (batch_size, config.n_kv_head, max_len, config.head_size)
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def append(self, k, v):
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=norm(config),
        ))
        if config.position == 'learned':
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        if config.embedding_norm:
            self.transformer['ln_e'] = norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.activation_checkpointing = False  # True: recompute each block in the backward pass, to save memory
        self.init_weights()
        self.init_rope()
        if config.lora_rank:
            from common import lora
            lora.add(self, config.lora_rank, config.lora_alpha)

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: normal with standard deviation 0.02, 0.01 for positions, and the projections
        back into the residual stream smaller by the root of their number, 2L (section 2.3 of the paper)."""
        config = self.config
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                p.normal_(0, 0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))
            elif name == 'lm_head.weight':  # only listed when untied
                p.normal_(0, 0 if config.zero_init else 0.02)
            elif p.dim() >= 2:
                p.normal_(0, 0.01 if 'wpe' in name else 0.02)
            elif name.endswith('bias'):
                p.zero_()
            else:  # the gain of a normalisation
                p.fill_(1)

    def init_rope(self):
        """Tables of RoPE's cosines and sines, (block_size, D/2) float32 each, computed on the CPU for every device."""
        if self.config.position == 'rope':
            with torch.device('cpu'):
                frequencies, factor = rope_frequencies(self.config)  # (D/2,)
                angles = torch.arange(self.config.block_size)[:, None] * frequencies  # (T, D/2)
            device = self.lm_head.weight.device
            self.register_buffer('rope_cos', (factor * angles.cos()).to(device), persistent=False)
            self.register_buffer('rope_sin', (factor * angles.sin()).to(device), persistent=False)

    def _apply(self, fn, recurse=True):
        """What .to() and its like call. The tables stay float32, and to_empty() would leave them undefined."""
        super()._apply(fn, recurse)
        self.init_rope()
        return self

    def get_num_params(self, non_embedding=True):
        """Number of parameters, the vocabulary's padding not counted; nanoGPT's convention leaves out the
        position embeddings (the token embeddings do the head's work, so they count)."""
        n = sum(p.numel() for p in self.parameters())
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        n -= padding if self.config.tie_embeddings else 2 * padding
        if non_embedding and self.config.position == 'learned':
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self):
        """Training FLOPs a token: 6 for each weight that multiplies it, and attention's 12·L·C·T (PaLM,
        arXiv:2204.02311, appendix B)."""
        config = self.config
        def flops(p):  # a frozen weight has no gradient to compute
            return 6 if p.requires_grad else 4
        matrices = sum(flops(p) * p.numel() for p in self.transformer.h.parameters() if p.dim() == 2)
        head = flops(self.lm_head.weight) * config.n_embd * config.vocab_size
        return matrices + head + 12 * config.n_layer * config.n_head * config.head_size * config.block_size

    def hidden(self, idx, positions=None, mask=None, cache=None):
        """Hidden states (B, T, C), after the last normalisation, of token ids idx (B, T) int64.

        positions: (T,) or (B, T) int64, each token's place in its text; by default 0 … T-1, after what cache holds.
        mask: bool, broadcastable to (B, H, T, S), True where a token attends; or FlexAttention's BlockMask, without
            dropout; by default GPTConfig's causal.
        cache: from new_cache(); these T tokens are appended to it.
        """
        T = idx.size(1)
        if positions is None:
            start = cache[0].length if cache else 0
            if start + T > self.config.block_size:
                raise ValueError(f'{start + T} tokens do not fit into block_size={self.config.block_size}')
            positions = torch.arange(start, start + T, device=idx.device)
            if start and T > 1 and mask is None:  # several tokens after what the cache holds
                mask = positions[:, None] >= torch.arange(start + T, device=idx.device)
        x, rope = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(positions)
        else:
            rope = [table[positions].unsqueeze(-2) for table in (self.rope_cos, self.rope_sin)]  # ([B,] T, 1, D/2)
        if self.config.embedding_norm:
            x = self.transformer.ln_e(x)
        kind = idx.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream: half the memory traffic, and no loss (tests/BENCHMARKS.md)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    def padded_logits(self, x):
        """Logits of hidden states x (…, C), the vocabulary's padding included."""
        logits = self.lm_head(x)
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits.float() / self.config.softcap)
        return logits

    def head(self, x):
        """Logits (…, V) of hidden states x (…, C)."""
        return self.padded_logits(x)[..., :self.config.vocab_size]

    def loss(self, x, targets, return_logits=True, reduction='mean'):
        """As forward, of hidden states x (…, C) and targets (…). A method of its own, which torch.compile fuses even
        where hooks between blocks keep it from compiling all of forward as one: float32 logits are never stored."""
        logits, V = self.padded_logits(x), self.config.vocab_size
        if V < logits.size(-1):  # masked, not cut off: rows of no multiple of 16 bytes load element by element
            padding = torch.arange(logits.size(-1), device=x.device) >= V
            logits = logits.masked_fill_(padding, torch.finfo(logits.dtype).min)
        loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=-1, reduction=reduction)
        return logits[..., :V] if return_logits else None, loss

    def forward(self, idx, targets=None, return_logits=True, positions=None, mask=None):
        """(logits, loss) of token ids idx (B, T) int64; positions and mask as in hidden.

        targets: (B, T) int64, the token that follows each one, or -1 where none is scored.

        With targets: logits (B, T, V), or None unless return_logits, and the mean loss in nats, a float32 scalar.
        Without: the last position's logits (B, 1, V), and None.
        """
        x = self.hidden(idx, positions, mask)  # (B, T, C)
        if targets is None:
            return self.head(x[:, [-1]]), None
        return self.loss(x, targets, return_logits)

    def token_losses(self, idx, targets, positions=None, mask=None):
        """Each token's loss in nats, (B, T) float32, 0 where targets is -1. Arguments as in forward. The head, the most
        expensive layer of a small model, runs on scored tokens alone."""
        x, scored = self.hidden(idx, positions, mask), targets != -1
        losses = torch.zeros(targets.shape, device=x.device)
        losses[scored] = self.loss(x[scored], targets[scored], False, reduction='none')[1]
        return losses

    def new_cache(self, batch_size, max_len=None, device=None):
        """An empty cache of batch_size rows and max_len tokens (by default block_size) for hidden(cache=…). Keys and
        values have the autocast dtype inside autocast, else the weights' dtype."""
        weight = self.lm_head.weight
        device = device or weight.device  # offloaded weights are not where the model computes
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return [LayerCache(self.config, batch_size, max_len or self.config.block_size, device, dtype)
                for _ in self.transformer.h]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) int64 continued by max_new_tokens tokens: (B, T + max_new_tokens). options: those of
        common.generate.stream, which yields the tokens one at a time."""
        from common.generate import stream
        return torch.cat((idx, *stream(self, idx, max_new_tokens, temperature, top_k, **options)), dim=1)

    def crop_block_size(self, block_size):
        """Shorten the context, for instance to finetune GPT-2 on sequences shorter than its 1,024."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is longer than the weights\' {self.config.block_size}')
        self.config.block_size = block_size
        if self.config.position == 'learned':
            wpe = self.transformer.wpe.weight
            self.transformer.wpe.weight = nn.Parameter(wpe[:block_size], wpe.requires_grad)
        self.init_rope()

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """A GPT with the weights of a folder that transformers can read, or of a model on the Hugging Face hub:
        'gpt2' (124M), 'gpt2-medium' (350M), 'gpt2-large' (774M), 'gpt2-xl' (1558M), or another GPT-2, Llama or
        Qwen3. overrides: GPTConfig fields that change no weight, such as dropout. Raises UserError for
        what GPTConfig has no field for."""
        from common import convert
        fields, state_dict = convert.load(name)
        model = cls(GPTConfig(**fields | overrides))
        model.load_state_dict(convert.pad_vocab(state_dict, model.config.padded_vocab_size))
        return model

    def save_pretrained(self, folder, tokenizer='gpt2', dtype='float32'):
        """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer open. tokenizer: its name; dtype:
        'float32', 'bfloat16' or 'float16'. Raises UserError if it holds a model already, or if transformers has no
        class for this one."""
        from common import convert
        state_dict = convert.pad_vocab(self.state_dict(), self.config.vocab_size)
        convert.save(folder, self.config, state_dict, tokenizer, dtype)
