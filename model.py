"""The GPT: blocks, first weights, loss, generation; device and precision; model files.

GPT-2's architecture (Radford et al., 2019) from PyTorch's own layers, with GPT-2's names in
Hugging Face (`transformer.h.0.attn.c_attn`, ...), so that weights go over one to one. Shapes
in comments: B sequences, T tokens each, C features (n_embd), V token ids (vocab_size).
"""

import codecs
import dataclasses
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from config import Config, UserError, atomic_write, nearest, one_line

import torch
import torch.nn as nn
import torch.nn.functional as F

# -------------------------------------------------------------------------------------- The network


class Cache:
    """The keys and values of the tokens a model has read, so that each is computed once."""

    def __init__(self, config: Config, batch: int, device: torch.device, dtype: torch.dtype):
        width = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, width)
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held, the same for every sequence of the batch

    def extend(self, layer: int, kv: torch.Tensor) -> torch.Tensor:
        """Writes new keys and values (2, B, heads, T, width) behind the old; returns them all."""
        end = self.length + kv.size(3)
        self.buffer[layer, :, :, :, self.length : end] = kv
        return self.buffer[layer, :, :, :, :end]


class Dropout(nn.Dropout):
    """nn.Dropout, but on a CPU with 16 random bits an element (p in steps of 2**-16): there
    PyTorch's own masks take a tenth of the training time.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        draw_bits(bits)
        # As signed numbers the 16 bits are uniform from -2**15 on: `dropped` of them lie below.
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0.0)


@torch.library.custom_op("tinystories::draw_bits", mutates_args={"bits"})
def draw_bits(bits: torch.Tensor) -> None:
    """Fills int64 `bits` from the default generator: in one call, in a compiled block too."""
    bits.random_(-(2**63), None)  # None: up to the largest


SHORT = 256  # tokens: beyond, the T x T scores of attention written out take too much memory


class Attention(nn.Module):
    """Causal self-attention: each token reads from itself and the tokens before it."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer = config.n_head, layer
        self.drop = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        # (B, T, 3C) to queries, keys and values of (B, heads, T, width) each.
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, kv = qkv[0], qkv[1:]
        k, v = kv if cache is None else cache.extend(self.layer, kv)
        if cache is None and T <= SHORT and x.device.type == "cpu":
            # softmax(q k / sqrt(width)) v, compiled with what stands around it: on a CPU faster
            # than PyTorch's function.
            scores = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32)
            y = self.drop(weights).to(v.dtype) @ v
        else:
            # Several new tokens are always the first of a sequence (`generate` sees to that), so
            # the plain causal mask fits them; a single one may look at everything.
            p = self.drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with a GELU between them, four times as wide in the middle."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention, then the MLP: each reads a LayerNorm of the residual stream and adds to it."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A decoder-only Transformer whose output head is its token embedding (tied weights)."""

    def __init__(self, config: Config, token_bytes: list[bytes] | None = None):
        """First weights as config says; embedding_init "subword" takes the bytes of every id."""
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.softmax_gradient = softmax_gradient  # `compile_parts` replaces it
        self.apply(self._initialise)
        if config.embedding_init == "subword" and token_bytes:
            subword_initialisation(self.transformer.wte.weight, token_bytes)

    @torch.no_grad()
    def _initialise(self, module: nn.Module) -> None:
        """The first weights; biases are zero.

        gpt2: normal, std 0.02, and for the two projections into the residual stream 0.02 /
        sqrt(2 x blocks), so that its variance does not grow with the depth (Radford et al.,
        2019, section 2.3). fan_in: std 1 / sqrt(inputs), which keeps the size of what flows
        through (LeCun et al., 1998, section 4.6), and zero for those two projections: every
        block begins as the identity. Positions begin as sinusoids.
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

    def features(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Token ids (B, T) to the features the head reads (B, T, C)."""
        start = 0 if cache is None else cache.length
        position = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, T), T up to block_size, to logits (B, T, V); with targets (B, T), to their
        mean loss in nats, for which the logits of CHUNK tokens at most are held.
        """
        x, head = self.features(idx), self.transformer.wte.weight
        if targets is None:
            return F.linear(x, head)
        x, targets = x.flatten(0, 1), targets.flatten()
        return fused_linear_cross_entropy(x, head, targets, self.softmax_gradient)

    def compile_parts(self) -> None:
        """torch.compile what repeats: the block (once for all of them) and the head's softmax."""
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self.softmax_gradient = torch.compile(softmax_gradient, dynamic=False)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def sinusoidal_positions(count: int, width: int, std: float) -> torch.Tensor:
    """Sines and cosines of the position, (count, width), of wavelengths from 6 to 6 x count tokens
    (Vaswani et al., 2017, section 3.5).

    Near positions begin alike, and a step along the text is the same rotation everywhere, so
    that "the token before" has not to be learnt for each position alone.
    """
    half = (width + 1) // 2
    angles = torch.arange(count).unsqueeze(1) * float(count) ** -(torch.arange(half) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width] * (std * math.sqrt(2))


@torch.no_grad()
def subword_initialisation(vectors: torch.Tensor, token_bytes: list[bytes]) -> None:
    """Lets the vectors (V, C) of tokens that share letters begin alike, so that what is learnt of
    frequent ones holds for rare ones.

    The direction of each becomes a sum of random ones: its own, its word's (the same for " Dog"
    and "dog"), and those of its word's letter groups ("dogs" has three of "dog"'s six); the
    length stays. "dog" and "Dog" begin with a cosine of 0.9, "dog" and "dogs" of 0.16. The groups
    are nearly fastText's (Bojanowski et al., 2017, section 3.2), where they stay part of the
    vector; here they are where it begins.
    """
    own = vectors.cpu()
    groups = [subword_groups(token) for token in token_bytes[: len(own)]]
    total = F.normalize(own) * math.sqrt(0.1)  # the shares of the squared length add up to 1
    for kind, share in (("word", 0.5), ("letters", 0.4)):
        numbers: dict[str, int] = {}  # of the groups, in the order they appear
        members, begins = [], []  # of all tokens, one after the other; where each token's begin
        for of_token in groups:
            begins.append(len(members))
            for name in of_token[kind]:
                members.append(numbers.setdefault(name, len(numbers)))
        random = torch.randn(len(numbers), own.size(1))
        means = F.embedding_bag(torch.tensor(members), random, torch.tensor(begins))
        total += F.normalize(means) * math.sqrt(share)
    vectors.copy_(F.normalize(total) * own.norm(dim=1, keepdim=True))


def subword_groups(token: bytes) -> dict[str, list[str]]:
    """The word of a token, without case and space, and its groups of 3 to 5 letters, ends marked.

    " Dogs": the word dogs; the groups <do, dog, ogs, gs>, <dog, dogs, ogs>, <dogs, dogs>.
    """
    word = (token.strip().lower() or token).decode("latin-1")  # it may be a part of a letter only
    marked = f"<{word}>"
    letters = []
    for n in (3, 4, 5):
        letters += [marked[i : i + n] for i in range(len(marked) - n + 1)]
    return {"word": [word], "letters": letters}


# ----------------------------------------------------------------------------------------- The loss
# Two thirds of the model's arithmetic is the head (C x 50,257), and the logits of 4,096 tokens
# are 0.8 GB in float32, their gradient as much again. So the head runs over CHUNK tokens at a
# time, and takes the gradient while it has the logits: softmax minus one-hot needs nothing
# from later in the graph but a factor. The logits are then thrown away.

# Tokens at a time. In the matrix products: enough to fill the matrix units. In the softmax on
# a CPU: few enough to stay in its cache, which is ten times as fast as memory.
CHUNK = {"cpu": 512, "cuda": 8192, "mps": 2048}
ROWS = {"cpu": 64, "cuda": 8192, "mps": 2048}
# Rows of the head's gradient at a time: what is added to them is held once more.
SLICE = {"cpu": 16384, "cuda": 65536, "mps": 16384}
# Float16 has no room below 6e-8, where the softmax of an unlikely token lies: its gradient is
# kept 8 times as large (exactly: a power of two) and divided again in float32.
FLOAT16_SCALE = 8.0


def softmax_gradient(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """Turns logits (N, V) into `scale` x the gradient of their summed cross-entropy, in place:
    softmax(logits) - one_hot(targets), in float32 until it is rounded. Returns that sum.
    """
    targets = targets.unsqueeze(1)
    log_softmax = F.log_softmax(logits, dim=1, dtype=torch.float32)
    log_likelihood = log_softmax.gather(1, targets)
    logits.copy_(log_softmax.exp_().mul_(scale))
    logits.scatter_(1, targets, (torch.expm1(log_likelihood) * scale).to(logits.dtype))
    return -log_likelihood.sum()


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head; the comment above says how."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                dtype: torch.dtype, softmax_gradient: Callable, training: bool):
        kind, vocab = x.device.type, weight.size(0)
        # A width that is a multiple of 64 suits the matrix units: zero rows, never likely.
        padded = math.ceil(vocab / 64) * 64
        w = weight.new_zeros((padded, weight.size(1)), dtype=dtype)
        w[:vocab] = weight
        scale = FLOAT16_SCALE if dtype == torch.float16 else 1.0
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if training else None
        dw = torch.zeros_like(w, dtype=torch.float32) if training else None
        for i in range(0, len(x), CHUNK[kind]):
            rows = slice(i, i + CHUNK[kind])
            chunk = x[rows].to(dtype)
            logits = chunk @ w.t()
            logits[:, vocab:] = -torch.inf
            # The gradient takes the logits' place; in an evaluation too, since this is the
            # fastest way to the loss.
            answers = targets[rows].split(ROWS[kind])
            for part, answer in zip(logits.split(ROWS[kind]), answers, strict=True):
                loss += softmax_gradient(part, answer, scale)
            if training:
                dx[rows] = logits @ w
                columns = logits.split(SLICE[kind], dim=1)
                for part, column in zip(dw.split(SLICE[kind]), columns, strict=True):
                    part += column.t() @ chunk
        ctx.factor = 1 / (scale * len(x))
        if training:
            ctx.save_for_backward(dx, dw[:vocab])
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor):
        dx, dw = ctx.saved_tensors
        factor = grad_loss * ctx.factor
        return dx * factor, dw * factor, None, None, None, None


def fused_linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
    softmax_gradient: Callable = softmax_gradient,
) -> torch.Tensor:
    """The mean cross-entropy, in nats, of the logits x @ weight.t(), of which those of CHUNK
    tokens at most are held.

    x (N, C), weight (V, C), targets (N,) of ids below V; a float32 scalar comes back. The
    products run in autocast's dtype where it is on, else in that of x. The gradient goes to
    x and weight, once (no double backward).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    training = torch.is_grad_enabled()
    with torch.autocast(kind, enabled=False):
        return FusedLinearCrossEntropy.apply(x, weight, targets, dtype, softmax_gradient, training)


# --------------------------------------------------------------------------------------- Generation


@torch.inference_mode()
def generate(
    model: GPT, prompt: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
    generator: torch.Generator | None = None, end_of_text: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yields the next token of each row of `prompt` (B, T), T >= 1: ids (B,), one after the other.

    temperature 0 takes the likeliest token; top_k > 0 draws among the k likeliest. A row that
    has drawn `end_of_text` yields it from then on; when all have, generation ends. The model
    should be in eval mode. A prompt longer than the context is cut from the left.

    Positions are learned, one vector each, so a full window cannot slide along the cache. The
    oldest quarter is dropped then, and the rest is read again from position 0: the next
    block_size / 4 tokens are cheap once more.
    """
    size, head = model.config.block_size, model.transformer.wte.weight.t()
    cache = Cache(model.config, len(prompt), prompt.device, head.dtype)
    if head.dtype == torch.float32 and head.device.type == "cpu":
        head = head.contiguous()  # a product with one row takes less than half the time then
    finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    unread = window = prompt[:, -size:]
    for _ in range(max_new_tokens):
        token = draw_token(next_logits(model, unread, cache, head), temperature, top_k, generator)
        if end_of_text is not None:
            token = torch.where(finished, end_of_text, token)
            finished |= token == end_of_text
        yield token
        if end_of_text is not None and finished.all():
            return
        unread = token.unsqueeze(1)
        window = torch.cat([window, unread], dim=1)
        if window.size(1) > size:  # drop the oldest quarter, and read the rest again
            unread = window = window[:, -(size - size // 4) :]
            cache.length = 0


def next_logits(model: GPT, unread: torch.Tensor, cache: Cache, head: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) of what follows the `unread` ids (B, T), which the cache then holds too.

    `head` is (C, V). A single row in bfloat16 does without oneDNN, which on a CPU rearranges the
    matrix for every product: PyTorch's own takes half the time.
    """
    before = torch.backends.mkldnn.enabled
    if head.dtype == torch.bfloat16 and unread.numel() == 1:
        torch.backends.mkldnn.enabled = False
    try:
        return model.features(unread, cache)[:, -1] @ head
    finally:
        torch.backends.mkldnn.enabled = before


def draw_token(
    logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator | None
) -> torch.Tensor:
    """One id (B,) for each row of logits (B, V), drawn as `generate` says."""
    if temperature < 1e-30:  # 0, or so small that float32 would divide by zero
        return logits.argmax(dim=1)
    likeliest = None
    if 0 < top_k < logits.size(1):
        logits, likeliest = logits.topk(top_k, dim=1)
    logits = logits.float()
    # Shifted before it is divided: a tiny temperature must not overflow to infinity.
    logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature
    choice = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)
    if likeliest is not None:
        choice = likeliest.gather(1, choice)
    return choice.squeeze(1)


def stream_text(tokens: Iterator[int], token_bytes: list[bytes], end_of_text: int) -> Iterator[str]:
    """Token ids to text, in whole characters: a token may end inside one. Ends at `end_of_text`."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == end_of_text:
            break
        yield decoder.decode(token_bytes[token])
    yield decoder.decode(b"", final=True)


# ----------------------------------------------------------------------------- Device and precision


def pick_device(name: str) -> torch.device:
    """The device `name` asks for; auto is a GPU if there is one. UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        there = f"PyTorch sees {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"device {name} is not there: {there}; use --device cpu or auto (under "
                        "torchrun: fewer processes)")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there: use --device cpu or auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision `name` asks for; auto is the device's fastest. UserError if it has none.

    A GPU below compute capability 8.0 (a T4 is 7.5) only emulates bfloat16, slowly; and
    `torch.cuda.is_bf16_supported()` counts emulation, so it is not asked.
    """
    able, fastest = ["float32"], "float32"
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        able += ["float16", "bfloat16"] if native else ["float16"]
        fastest = able[-1]
    if device.type == "cpu":
        # AVX-512 BF16 or AMX; the names are private, and absent means no. Else it is emulated.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
        able += ["bfloat16"]
        fastest = "bfloat16" if native else "float32"
    if name not in ("auto", *able):
        raise UserError(f"dtype {name} is not for this {device.type}: use --dtype "
                        f"{', '.join(able)} or auto")
    return getattr(torch, fastest if name == "auto" else name)


# ------------------------------------------------------------- Model files, ours and Hugging Face's

FORMAT = "tinystories-gpt/1"  # in every file we write: what tells it from others


def save_file(path: Path, config: Config, model: GPT, **extra: Any) -> None:
    """Writes model.pt or ckpt.pt: config, weights and `extra`, tensors and plain values only."""
    weights = model.state_dict()
    content = {"format": FORMAT, "config": dataclasses.asdict(config), "model": weights, **extra}
    buffer = io.BytesIO()  # a full disk: torch.save fails in its own words, a write in the system's
    torch.save(content, buffer)
    with atomic_write(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def load_file(path: Path) -> dict[str, Any]:
    """Reads what `save_file` wrote, on the CPU, executing nothing that is in it.

    UserError for a file that is missing, unreadable, damaged or not ours.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at torch.save's checksums
            directories = any(entry.external_attr for entry in file.infolist())  # read as nothing
            if file.testzip() or directories:
                raise zipfile.BadZipFile("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as problem:  # what zipfile, zlib and the unpickler raise has no common base
        reason = one_line(problem)[:80]
        raise UserError(f"{path} is damaged, or not a checkpoint of ours: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of ours: write one with train.py")
    return content


def config_of(content: dict[str, Any], path: str | Path) -> Config:
    """The Config kept in a checkpoint. UserError if it is not one that this version knows."""
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of ours: it lacks a config or the weights")
    known = {field.name for field in dataclasses.fields(Config)}
    for name in sorted(content["config"].keys() - known):
        raise UserError(f"{path} is of another version: its setting {name} is unknown here"
                        f"{nearest(name, known)}")
    return Config(**content["config"])


def load_model(path: str) -> GPT:
    """The model in a model.pt, a ckpt.pt, or a Hugging Face GPT-2 folder or Hub name.

    In eval mode, on the CPU, float32. UserError if there is none, or none that can be read.
    """
    if (Path(path) / "model.pt").is_file():
        raise UserError(f"{path} is a folder: name the model in it, {Path(path) / 'model.pt'}")
    if Path(path).is_dir() or is_hub_name(path):
        return load_hugging_face(path)
    content = load_file(Path(path))
    return with_weights(config_of(content, path), content["model"], path)


def is_hub_name(path: str) -> bool:
    return not Path(path).exists() and not path.endswith(".pt")


def with_weights(config: Config, weights: dict[str, torch.Tensor], path: str) -> GPT:
    """A GPT in eval mode with these weights, none drawn for it. UserError if they do not fit."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    load_weights(model, weights, path)
    return model.eval()


def load_weights(model: GPT, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as problem:
        reason = one_line(problem)[:120]
        raise UserError(f"the weights in {path} do not fit their model ({reason})") from None
    if not all(weight.sum().isfinite() for weight in model.parameters()):
        raise UserError(f"the weights in {path} are not all finite numbers: name another model")


# Our settings under Hugging Face's names, and what our GPT always does. Hugging Face keeps the
# matrices of blocks as (in, out), PyTorch's Linear as (out, in).
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
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, GPT2LMHeadModel, logging

    # Their tables of what does not fit, and a line for every retry: one line of ours says it.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        theirs = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = config_from_hugging_face(theirs, path)
        model, report = GPT2LMHeadModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True)
        unexpected = [key for key in report["unexpected_keys"] if not key.endswith("masked_bias")]
        for key in [*report["missing_keys"], *unexpected]:
            raise ValueError(f"its weights do not fit its config.json, {key} for one")
    except UserError:
        raise
    except Exception as problem:  # what safetensors, pickle and the Hub raise has no common base
        reason = one_line(problem)[:120]
        if is_hub_name(path):
            reason = "no such file or folder, and not on the Hub, or the Hub cannot be reached"
        raise UserError(f"no checkpoint could be read from {path}: {reason}") from None
    weights = model.state_dict()
    del weights["lm_head.weight"]  # the token embedding again
    return with_weights(config, transposed(weights), path)


def transposed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: w.t() if key.endswith(MATRICES) else w for key, w in weights.items()}


def config_from_hugging_face(theirs: Any, path: str) -> Config:
    """Their GPT2Config as our Config. UserError for what our GPT does not do."""
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
    """Our model (on the CPU, float32) as a GPT2LMHeadModel; biases that it lacks are zeros."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {name: getattr(model.config, ours) for name, ours in SETTINGS.items()}
    gelu = "gelu" if model.config.gelu == "exact" else "gelu_new"
    theirs = GPT2LMHeadModel(GPT2Config(**settings, **ALWAYS, activation_function=gelu))
    weights = theirs.state_dict() | transposed(model.state_dict())  # its own biases are zero
    theirs.load_state_dict(weights | {"lm_head.weight": model.transformer.wte.weight})
    return theirs
