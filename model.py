"""The GPT: blocks, first weights, loss, generation; device and precision; model files.

The architecture is GPT-2's (Radford et al., 2019), made of PyTorch's own layers. Parameters have
Hugging Face's names (`transformer.h.0.attn.c_attn`, ...), so that weights can be exchanged. Shapes
have B sequences of T tokens each, C features (n_embd), V token ids (vocab_size).
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from config import Config, UserError, atomic_write, nearest, one_line

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# -------------------------------------------------------------------------------------- The network


class Cache:
    """The keys and values of the tokens that a model has read: each is computed only once."""

    def __init__(self, config: Config, batch: int, device: torch.device, dtype: torch.dtype):
        width = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, width)
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # the tokens it holds of every sequence, once all blocks have read them

    def extend(self, layer: int, kv: Tensor) -> Tensor:
        """Appends keys and values (2, B, heads, T, width) of new tokens; returns those of all."""
        end = self.length + kv.size(3)
        self.buffer[layer, :, :, :, self.length : end] = kv
        return self.buffer[layer, :, :, :, :end]


SHORT = 256  # tokens: in longer sequences the T x T weights would take too much memory


class Attention(nn.Module):
    """Causal self-attention: each token reads from itself and the tokens before it."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer = config.n_head, layer
        self.drop = nn.Dropout(config.dropout)

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x (B, T, C) as they are used: (3, B, heads, T, width).

        What turns or scales queries and keys, as rotary positions do, belongs here. Generation and
        plots/attention.py then follow it.
        """
        B, T, C = x.shape
        return self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)

    @staticmethod
    def scores(q: Tensor, k: Tensor) -> Tensor:
        """How well each token's query (row) fits each token's key (column): (B, heads, T, T)."""
        return (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Tensor:
        """Each token's (row's) attention to itself and those before it: (B, heads, T, T)."""
        scores = Attention.scores(q, k)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        qkv = self.queries_keys_values(x)
        q, kv = qkv[0], qkv[1:]
        k, v = kv if cache is None else cache.extend(self.layer, kv)
        if cache is None and x.size(1) <= SHORT and x.device.type == "cpu":
            # Compiled with what stands around it, this is faster on a CPU than PyTorch's function.
            y = self.drop(self.weights(q, k)).to(v.dtype) @ v
        else:
            # With a cache, several new tokens are always the first of their sequence (`features`
            # asserts it), so the plain causal mask fits them. A single one may look at all others.
            p = self.drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=x.size(1) > 1)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Two layers with a GELU between them, four times as wide in the middle."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


def make_norm(config: Config) -> nn.Module:
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    """Attention, then the MLP: each reads the residual stream, normalized, and adds to it."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A decoder-only Transformer. Its output head is its token embedding: the weights are tied."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=make_norm(config),
        ))
        self.softmax_gradient = softmax_gradient  # `compile_parts` replaces it
        self.apply(self._initialise)

    @torch.no_grad()
    def _initialise(self, module: nn.Module) -> None:
        """Draws a module's first weights. Biases are zero.

        gpt2: the standard deviation is 0.02, but 0.02 / sqrt(2 x blocks) for the two projections
        into the residual stream, whose variance then does not grow with the depth (Radford et al.,
        2019, section 2.3). fan_in: it is 1 / sqrt(inputs), which keeps activations at one size
        (LeCun et al., 1998, section 4.6), and those two projections are zero, so that every block
        begins as the identity. Positions begin as sinusoids.
        """
        config = self.config
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            std = 0.02 if config.init == "gpt2" else module.in_features**-0.5
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):  # after its layers: c_proj is drawn again
            std = 0.02 / math.sqrt(2 * config.n_layer) if config.init == "gpt2" else 0.0
            nn.init.normal_(module.c_proj.weight, std=std)
        if isinstance(module, GPT) and config.init == "fan_in":
            sinusoids = sinusoidal_positions(config.block_size, config.n_embd, std=0.02)
            module.transformer.wpe.weight.copy_(sinusoids)

    def features(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids (B, T) to the features (B, T, C) that the output head reads."""
        start = 0 if cache is None else cache.length
        assert start == 0 or idx.size(1) == 1, "a filled cache takes one new token at a time"
        position = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Token ids (B, T), T up to block_size, to logits (B, T, V); with targets (B, T), to their
        mean cross-entropy in nats, which never holds the logits of more than HEAD_TOKENS tokens.

        Another loss takes one line in train.py's `Run.step`. With label smoothing, for example:
        `loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=0.1)`.
        """
        x, head = self.features(idx), self.transformer.wte.weight
        if targets is None:
            return F.linear(x, head)
        x, targets = x.flatten(0, 1), targets.flatten()
        return fused_linear_cross_entropy(x, head, targets, self.softmax_gradient)

    def compile_parts(self) -> None:
        """Compiles what a step repeats: the block (all share one code) and the head's softmax."""
        for block in self.transformer.h:
            block.compile(dynamic=False)
        if self.transformer.wte.weight.device.type == "cuda":
            # Compiled too, `scatter_` would make inductor copy the logits: 0.8 GB at a time.
            softmax = torch.compile(scaled_softmax, dynamic=False)
            self.softmax_gradient = functools.partial(softmax_gradient, softmax=softmax)
        else:  # a CPU has few logits at once, and is faster so
            self.softmax_gradient = torch.compile(softmax_gradient, dynamic=False)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def sinusoidal_positions(count: int, width: int, std: float) -> Tensor:
    """Sines and cosines of the positions, (count, width), with wavelengths of 2 pi to 2 pi x count
    tokens (Vaswani et al., 2017, section 3.5), whose root mean square is `std`.

    A step along the text is the same rotation everywhere, so "the token before" need not be learnt
    for each position separately.
    """
    half = (width + 1) // 2
    angles = torch.arange(count).unsqueeze(1) * float(count) ** -(torch.arange(half) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width] * (std * math.sqrt(2))


# ----------------------------------------------------------------------------------------- The loss
# Two thirds of the model's arithmetic is the output head (C x 50,257). The logits of 4,096 tokens
# take 0.8 GB in float32, and their gradient takes as much again. So the head goes through the
# tokens in groups, and computes the gradient while it has the logits of a group: softmax minus
# one-hot needs nothing from later in the graph but a factor. No logits are kept for `backward`.

# Tokens in a group: enough to fill the matrix units.
HEAD_TOKENS = {"cpu": 512, "cuda": 8192, "mps": 2048}
# Tokens in a softmax: few enough, on a CPU, for its cache, which is ten times as fast as memory.
SOFTMAX_TOKENS = {"cpu": 64, "cuda": 8192, "mps": 2048}
# Token ids whose head gradient is updated at once: what is added takes as much memory again.
GRADIENT_IDS = {"cpu": 16384, "cuda": 65536, "mps": 16384}
# Float16 reaches from 6e-8 to 65,504. The softmax of an unlikely token is smaller, so the gradient
# by the logits is held 8 times as large. A sum over many similar tokens may overflow, so beyond
# 512 tokens the features are divided by tokens / 512, rounded up to a power of two. Both factors
# are undone in float32. A sum then stays below 8 x 512 times the largest feature.
FLOAT16_SCALE, FLOAT16_TOKENS = 8.0, 512


def scaled_softmax(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Replaces logits (N, V) by `scale` times their softmax, computed in float32. Returns the log
    of its values at the targets (N, 1).
    """
    log_softmax = F.log_softmax(logits, dim=1, dtype=torch.float32)
    log_likelihood = log_softmax.gather(1, targets)
    logits.copy_(log_softmax.exp_().mul_(scale))
    return log_likelihood


def softmax_gradient(logits: Tensor, targets: Tensor, scale: float,
                     softmax: Callable = scaled_softmax) -> Tensor:
    """Replaces logits (N, V) by `scale` times the gradient of their summed cross-entropy, which is
    softmax(logits) - one_hot(targets). Returns that sum.
    """
    targets = targets.unsqueeze(1)
    log_likelihood = softmax(logits, targets, scale)
    logits.scatter_(1, targets, (torch.expm1(log_likelihood) * scale).to(logits.dtype))
    return -log_likelihood.sum()


class FusedLinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of a linear head; the comment above says how."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor,
                dtype: torch.dtype, softmax_gradient: Callable, training: bool):
        kind, vocab = x.device.type, weight.size(0)
        # Matrix units want a multiple of 64: ids are added whose logits become -inf.
        padded = math.ceil(vocab / 64) * 64
        w = weight.new_zeros((padded, weight.size(1)), dtype=dtype)
        w[:vocab] = weight
        scale = FLOAT16_SCALE if dtype == torch.float16 else 1.0
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if training else None
        dw = torch.zeros_like(w, dtype=torch.float32) if training else None
        for i in range(0, len(x), HEAD_TOKENS[kind]):
            group = slice(i, i + HEAD_TOKENS[kind])
            features = x[group].to(dtype)
            logits = features @ w.t()
            logits[:, vocab:] = -torch.inf
            # The gradient takes their place, in an evaluation too: no other way is faster.
            answers = targets[group].split(SOFTMAX_TOKENS[kind])
            for part, answer in zip(logits.split(SOFTMAX_TOKENS[kind]), answers, strict=True):
                loss += softmax_gradient(part, answer, scale)
            if training:
                dx[group] = logits @ w
                shrink = 1.0
                if dtype == torch.float16 and len(features) > FLOAT16_TOKENS:
                    shrink = 2.0 ** math.ceil(math.log2(len(features) / FLOAT16_TOKENS))
                    features = features / shrink
                columns = logits.split(GRADIENT_IDS[kind], dim=1)
                for part, column in zip(dw.split(GRADIENT_IDS[kind]), columns, strict=True):
                    part.add_(column.t() @ features, alpha=shrink)
        ctx.factor = 1 / (scale * len(x))
        if training:
            ctx.save_for_backward(dx, dw[:vocab])
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor):
        dx, dw = ctx.saved_tensors
        factor = grad_loss * ctx.factor
        return dx * factor, dw * factor, None, None, None, None


def fused_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor,
                               softmax_gradient: Callable = softmax_gradient) -> Tensor:
    """The mean cross-entropy of the logits x @ weight.t(), in nats, a float32 scalar.

    Shapes: x (N, C), weight (V, C), targets (N,) of ids below V. The products run in autocast's
    dtype where that is on, else in x's. Gradients go to x and weight; there are no second ones.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    training = torch.is_grad_enabled()
    with torch.autocast(kind, enabled=False):
        return FusedLinearCrossEntropy.apply(x, weight, targets, dtype, softmax_gradient, training)


# --------------------------------------------------------------------------------------- Generation


@torch.inference_mode()
def generate(
    model: GPT, prompt: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, generator: torch.Generator | None = None, end_of_text: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each row of `prompt` (B, T), T >= 1: ids (B,), one after the other.

    temperature 0 takes the likeliest token. top_k > 0 draws from the k likeliest only; of these,
    top_p < 1 leaves the fewest that have this share of the probability (Holtzman et al., 2020). A
    row that has drawn `end_of_text` yields it from then on, and generation ends when all rows have.
    The model should be in eval mode. Of a prompt longer than the context, the last tokens are read.

    Each position has a learned vector, so a full window cannot slide along the cache. Instead, the
    oldest quarter is dropped, and the rest is read again from position 0 on.
    """
    size, head = model.config.block_size, model.transformer.wte.weight.t()
    cache = Cache(model.config, len(prompt), prompt.device, head.dtype)
    if head.dtype == torch.float32 and head.device.type == "cpu":
        head = head.contiguous()  # one row times it then takes less than half the time
    finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    unread = window = prompt[:, -size:]
    for _ in range(max_new_tokens):
        logits = next_logits(model, unread, cache, head)
        token = draw_token(logits, temperature, top_k, top_p, generator)
        if end_of_text is not None:
            token = torch.where(finished, end_of_text, token)
            finished |= token == end_of_text
        yield token
        if end_of_text is not None and finished.all():
            return
        unread = token.unsqueeze(1)
        window = torch.cat([window, unread], dim=1)
        if window.size(1) > size:
            unread = window = window[:, -(size - size // 4) :]
            cache.length = 0


def next_logits(model: GPT, unread: Tensor, cache: Cache, head: Tensor) -> Tensor:
    """Logits (B, V) of the token behind the `unread` ids (B, T), which go into the cache.

    `head` is (C, V). For a single bfloat16 row oneDNN is switched off: on a CPU it rearranges each
    matrix before every product, and PyTorch's own product takes half the time.
    """
    before = torch.backends.mkldnn.enabled
    if head.dtype == torch.bfloat16 and unread.numel() == 1:
        torch.backends.mkldnn.enabled = False
    try:
        return model.features(unread, cache)[:, -1] @ head
    finally:
        torch.backends.mkldnn.enabled = before


def draw_token(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
               generator: torch.Generator | None = None) -> Tensor:
    """One id (B,) for each row of logits (B, V), drawn as `generate` says."""
    if temperature < 1e-30:  # 0, or so small that float32 would divide by zero
        return logits.argmax(dim=1)
    likeliest, count = None, min(top_k or logits.size(1), logits.size(1))
    if count < logits.size(1) or top_p < 1:
        logits, likeliest = logits.topk(count, dim=1)
    logits = logits.float()
    # Shifted before they are divided: a tiny temperature must not make infinity of them.
    logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature
    shares = logits.softmax(dim=1)
    if top_p < 1:
        before = shares.cumsum(dim=1) - shares  # of the tokens that are likelier
        shares = shares.masked_fill(before >= top_p, 0)
    choice = torch.multinomial(shares, 1, generator=generator)
    if likeliest is not None:
        choice = likeliest.gather(1, choice)
    return choice.squeeze(1)


def stream_text(tokens: Iterator[int], token_bytes: list[bytes], end_of_text: int) -> Iterator[str]:
    """Token ids to text, up to `end_of_text`, in whole characters: a token may end inside one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == end_of_text:
            break
        yield decoder.decode(token_bytes[token])
    yield decoder.decode(b"", final=True)


# ----------------------------------------------------------------------------- Device and precision


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is a GPU if there is one. UserError if it is not there."""
    # Names are compared as texts, since torch.device takes cuda:300 for cuda:44.
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in there:
        raise UserError(f"device {name} is not there{nearest(name, there)}: use --device "
                        f"{', '.join(there)} or auto (under torchrun: or fewer processes)")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision called `name`; auto is the device's fastest. UserError if it has none such.

    A GPU below compute capability 8.0 (a T4 has 7.5) only emulates bfloat16, slowly, which
    `torch.cuda.is_bf16_supported()` counts as support: so it is not asked.
    """
    able, fastest = ["float32"], "float32"
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        able += ["float16", "bfloat16"] if native else ["float16"]
        fastest = able[-1]
    if device.type == "cpu":
        # AVX-512 BF16 or AMX, else it is emulated. A PyTorch without these private names: no.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
        able += ["bfloat16"]
        fastest = "bfloat16" if native else "float32"
    if name not in ("auto", *able):
        raise UserError(f"dtype {name} is not for this {device.type}: use --dtype "
                        f"{', '.join(able)} or auto")
    return getattr(torch, fastest if name == "auto" else name)


# ------------------------------------------------------------- Model files, ours and Hugging Face's

FORMAT = "tinystories-gpt/1"  # stands in every file we write, and tells it from others
REMOVED = ("embedding_init",)  # settings of older files, which are read without them


def save_file(path: Path, config: Config, model: GPT, **extra: Any) -> None:
    """Writes model.pt or ckpt.pt: config, weights and `extra`, tensors and plain values only."""
    weights = model.state_dict()
    content = {"format": FORMAT, "config": dataclasses.asdict(config), "model": weights, **extra}
    buffer = io.BytesIO()  # on a full disk, torch.save itself would not raise an OSError
    torch.save(content, buffer)
    with atomic_write(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def load_file(path: Path) -> dict[str, Any]:
    """Reads what `save_file` wrote, to the CPU. Code in the file is not executed.

    UserError if it is missing, damaged or not ours.
    """
    if not path.is_file():
        other = path.with_name("ckpt.pt")  # of a run stopped before its first evaluation
        hint = f", but {other}" if other.is_file() else ""
        raise UserError(f"there is no checkpoint {path}{hint}")
    try:
        with zipfile.ZipFile(path) as file:
            # torch.load does not compare the checksums, and takes the memory as it is for the
            # contents of an entry that says it is a folder. We write no folders.
            folders = any(entry.external_attr for entry in file.infolist())
            if folders or file.testzip():
                raise zipfile.BadZipFile("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as problem:  # zipfile, zlib and the unpickler have no error in common
        reason = one_line(problem)[:80]
        raise UserError(f"{path} is damaged, or not a checkpoint of ours: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of ours: write one with train.py")
    return content


def config_of(content: dict[str, Any], path: str | Path) -> Config:
    """The Config in a checkpoint. UserError if this version cannot read it."""
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of ours: it lacks a config or the weights")
    settings = {name: value for name, value in content["config"].items() if name not in REMOVED}
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise UserError(f"{path} is of another version: its setting {unknown[0]} is unknown here"
                        f"{nearest(unknown[0], known)}")
    return Config(**settings)


def load_model(path: str) -> GPT:
    """The model in a model.pt, a ckpt.pt, or a Hugging Face GPT-2 folder or Hub name.

    It is in eval mode, on the CPU, in float32. UserError if there is none that can be read.
    """
    for file in (Path(path, "model.pt"), Path(path, "ckpt.pt")):
        if file.is_file():
            raise UserError(f"{path} is a folder: name the model in it, {file}")
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise UserError(f"no checkpoint in {path}: no model.pt, and no Hugging Face config.json")
    if Path(path).is_dir() or is_hub_name(path):
        return load_hugging_face(path)
    content = load_file(Path(path))
    return with_weights(config_of(content, path), content["model"], path)


def is_hub_name(path: str) -> bool:
    return not Path(path).exists() and not path.endswith(".pt")


def with_weights(config: Config, weights: dict[str, Tensor], path: str) -> GPT:
    """A GPT with these weights, in eval mode. UserError if they do not fit."""
    with torch.device("meta"):  # so that no first weights are drawn, which would take seconds
        model = GPT(config)
    model.to_empty(device="cpu")
    load_weights(model, weights, path)
    return model.eval()


def load_weights(model: GPT, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as problem:
        reason = one_line(problem)[:120]
        raise UserError(f"the weights in {path} do not fit their model ({reason})") from None
    if not all(weight.sum().isfinite() for weight in model.parameters()):
        raise UserError(f"the weights in {path} are not all finite numbers: name another model")


# Our settings by Hugging Face's names, and what our GPT always does. The matrices in Hugging Face's
# blocks are (inputs, outputs), those of PyTorch's Linear (outputs, inputs).
SETTINGS = dict(
    n_layer="n_layer", n_head="n_head", n_embd="n_embd", n_positions="block_size",
    vocab_size="vocab_size", embd_pdrop="dropout", attn_pdrop="dropout", resid_pdrop="dropout",
)
ALWAYS = dict(
    tie_word_embeddings=True, layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
)
GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_hugging_face(path: str) -> GPT:
    """A Hugging Face GPT-2 of any size as our GPT. UserError if it is not one."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, GPT2LMHeadModel, logging

    # They would print tables of weights that do not fit, and each retry: one line of ours says it.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        if is_hub_name(path) and not try_to_load_from_cache(path, "config.json"):
            HfApi().model_info(path, timeout=10)  # transformers would try for a minute
        theirs = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = config_from_hugging_face(theirs, path)
        model, report = GPT2LMHeadModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True)
        unexpected = [key for key in report["unexpected_keys"] if not key.endswith("masked_bias")]
        wrong = [*report["missing_keys"], *unexpected]
        if wrong:
            raise ValueError(f"its weights do not fit its config.json, {wrong[0]} for one")
        if vocabulary_hash(path) != GPT2_VOCABULARY:
            raise UserError(f"{path} has a tokenizer of its own; only GPT-2's can be used")
    except UserError:
        raise
    except Exception as problem:  # safetensors, pickle and the Hub have no error in common
        asked = "no such file or folder; the Hub answers: " if is_hub_name(path) else ""
        reason = one_line(problem)[:160]
        raise UserError(f"no checkpoint could be read from {path}: {asked}{reason}") from None
    weights = model.state_dict()
    del weights["lm_head.weight"]  # the token embedding again
    return with_weights(config, transposed(weights), path)


GPT2_VOCABULARY = "855ec41a9d90094ebb1189ee8082e915505cf2dfe0691a4f39da9c020f9476b2"


def vocabulary_hash(path: str) -> str:
    """SHA-256 of a Hugging Face model's tokens and their ids; GPT-2's where it has no such file."""
    from huggingface_hub import hf_hub_download

    for name in ("vocab.json", "tokenizer.json"):
        file = Path(path, name)
        if is_hub_name(path):
            with contextlib.suppress(Exception):  # it has none
                file = Path(hf_hub_download(path, name))
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            ids = content["model"]["vocab"] if name == "tokenizer.json" else content
            return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()
    return GPT2_VOCABULARY


def transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: w.t() if key.endswith(MATRICES) else w for key, w in weights.items()}


def config_from_hugging_face(theirs: Any, path: str) -> Config:
    """Their GPT2Config as our Config. UserError if it asks for what our GPT does not do."""
    if theirs.model_type != "gpt2":
        raise UserError(f"{path} holds a {theirs.model_type} model; only gpt2 can be read")
    supported = {name: [value] for name, value in ALWAYS.items()}
    supported |= {"activation_function": GELUS, "n_inner": [None, 4 * theirs.n_embd]}
    for name, values in supported.items():
        if getattr(theirs, name) not in values:
            raise UserError(f"{path} has {name} {getattr(theirs, name)}, which our GPT does not do")
    settings = {ours: getattr(theirs, name) for name, ours in SETTINGS.items()}
    return Config(**settings, gelu=GELUS[theirs.activation_function])


def to_hugging_face(model: GPT) -> Any:
    """Our model, on the CPU in float32, as a GPT2LMHeadModel; both are in eval mode afterwards.

    A bias that ours lacks is zero there. UserError if GPT-2's class cannot hold the model or gives
    other logits, since the code of ours has been changed.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config, head = model.config, model.transformer.wte.weight
    settings = {name: getattr(config, ours) for name, ours in SETTINGS.items()}
    gelu = "gelu" if config.gelu == "exact" else "gelu_new"
    settings |= dict(n_ctx=config.block_size, activation_function=gelu)  # llama.cpp reads n_ctx
    theirs = GPT2LMHeadModel(GPT2Config(**settings, **ALWAYS)).eval()
    biases = {name: w for name, w in theirs.state_dict().items() if name.endswith("bias")}  # zeros
    weights = biases | transposed(model.eval().state_dict()) | {"lm_head.weight": head}
    ids = torch.arange(config.block_size).unsqueeze(0) % config.vocab_size
    try:
        theirs.load_state_dict(weights)
        with torch.inference_mode():
            ours, others = model(ids), theirs(ids).logits
        if not torch.allclose(ours, others, rtol=0, atol=1e-3 * ours.abs().max().item()):
            raise RuntimeError(f"logits differ by up to {(ours - others).abs().max().item():.2g}")
    except RuntimeError as problem:
        reason = one_line(problem)[:200]
        raise UserError(f"this model cannot be a GPT-2 of Hugging Face: {reason}") from None
    return theirs
