"""The GPT: its blocks, its loss, its generation, and the files it is kept in.

GPT-2's architecture (Radford et al., 2019) from PyTorch's own layers, with GPT-2's names in
Hugging Face (`transformer.h.0.attn.c_attn`, ...), so that weights go over one to one. Shapes
in comments: B sequences, T tokens each, C features (n_embd), V token ids (vocab_size).
"""

import dataclasses
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Config, UserError, nearest, notice, one_line, whole_file

# ------------------------------------------------------------------------------------------
# The network


class Cache:
    """The keys and values of the tokens a model has read, so that each is computed once."""

    def __init__(self, config: Config, batch: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held, the same for every sequence of the batch

    def extend(self, layer: int, kv: torch.Tensor) -> torch.Tensor:
        """Writes the new keys and values (2, B, n_head, T, head width) behind the old; returns all there are."""
        end = self.length + kv.size(3)
        self.buffer[layer, :, :, :, self.length : end] = kv
        return self.buffer[layer, :, :, :, :end]


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with 16 random bits an element (p in steps of 2**-16): PyTorch's masks take a tenth of the training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.is_cuda:
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        draw(bits)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0.0)


@torch.library.custom_op("tinystories::draw", mutates_args={"bits"})  # as one call, also in a compiled block
def draw(bits: torch.Tensor) -> None:
    """Fills int64 `bits` with random bits of the default generator."""
    bits.random_(-(2**63), None)


SHORT = 256  # tokens: up to here attention is written out on a CPU; beyond, its T x T scores would take too much memory


class Attention(nn.Module):
    """Causal self-attention: each token reads from itself and the tokens before it."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer = config.n_head, layer
        self.drop = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, (k, v) = qkv[0], qkv[1:] if cache is None else cache.extend(self.layer, qkv[1:])
        if cache is None and T <= SHORT and not x.is_cuda:
            # Softmax(q k / sqrt(width)) v, compiled with what stands around it: on a CPU faster than PyTorch's function.
            scores = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
            y = self.drop(scores.softmax(-1, dtype=torch.float32)).to(v.dtype) @ v
        else:
            # Several new tokens are always the first of a sequence, so the plain causal mask fits them;
            # a single one may look at everything.
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
    """Attention, then the MLP, each added to the residual stream after a LayerNorm of its own."""

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

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.head_gradient: HeadGradient = head_gradient
        self.apply(self._initialise)

    @torch.no_grad()
    def _initialise(self, module: nn.Module) -> None:
        """The first weights; biases are zero.

        gpt2: normal, std 0.02, and for the two projections into the residual stream 0.02 /
        sqrt(2 x blocks), so that its variance does not grow with the depth (Radford et al.,
        2019, section 2.3). fan_in: std 1 / sqrt(inputs), which keeps the size of what flows
        through (LeCun et al., 1998, section 4.6), half of that for queries and keys, so that
        attention begins nearly even, and zero for those two projections: every block begins
        as the identity. Positions begin as waves (`position_waves`). What embedding_init
        says is done by train.py's `spell`: it takes the tokenizer.
        """
        config = self.config
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.embedding_std)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02 if config.init == "gpt2" else module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):
            std = 0.02 / math.sqrt(2 * config.n_layer) if config.init == "gpt2" else 0.0
            nn.init.normal_(module.c_proj.weight, std=std)
        if isinstance(module, Attention) and config.init == "fan_in":
            module.c_attn.weight[: 2 * config.n_embd] /= 2
        if isinstance(module, GPT) and config.init == "fan_in":
            module.transformer.wpe.weight.copy_(position_waves(config.block_size, config.n_embd, config.embedding_std))

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
        """Token ids (B, T) to logits (B, T, V); with targets (B, T), to their mean loss in nats.

        T may not exceed block_size. The loss never holds all logits at once (`head_loss`).
        """
        x = self.features(idx)
        if targets is None:
            return F.linear(x, self.transformer.wte.weight)
        return head_loss(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten(), self.head_gradient)

    def compile_parts(self) -> None:
        """torch.compile what repeats: the block (once for all of them) and the head's softmax."""
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self.head_gradient = torch.compile(head_gradient, dynamic=False)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def position_waves(count: int, width: int, std: float) -> torch.Tensor:
    """Sines and cosines of the position, (count, width), of wavelengths from 6 to 6 x count tokens (Vaswani et al., 2017, section 3.5).

    Near positions begin alike, and a step along the text is the same rotation everywhere, so
    that "the token before" has not to be learnt for each position alone.
    """
    half = (width + 1) // 2
    angles = torch.arange(count).unsqueeze(1) * float(count) ** -(torch.arange(half) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width] * (std * math.sqrt(2))


# ------------------------------------------------------------------------------------------
# The loss
#
# Two thirds of the model's arithmetic is the head (C x 50,257), and the logits of 4,096 tokens
# are 0.8 GB in float32, their gradient as much again. So the head runs over a few hundred
# tokens at a time, and takes the gradient while it has the logits: softmax minus one-hot
# needs nothing from later in the graph but a factor. The logits are then thrown away.

# Tokens at a time: in the matrix products, enough to fill the matrix units; in the softmax on
# a CPU, few enough to stay in its cache (a tenth of the time that passes over memory take).
CHUNK = {"cpu": 512, "cuda": 8192}
ROWS = {"cpu": 64, "cuda": 8192}
# Rows of the weight's gradient at a time: what is added to it would otherwise be as large as it is.
SLICE = {"cpu": 16384, "cuda": 65536}

# Float16 has no room below 6e-8, where the softmax of an unlikely token lies: its gradient is
# kept 8 times as large (exactly: a power of two) and divided again in float32.
FLOAT16_SCALE = 8.0

HeadGradient = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def head_gradient(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """Turns logits (N, V) into `scale` x the gradient of their summed cross-entropy, in place; returns that sum.

    d loss / d logits = softmax(logits) - one_hot(targets), in float32 before it is rounded.
    """
    targets = targets.unsqueeze(1)
    log_softmax = F.log_softmax(logits, dim=1, dtype=torch.float32)
    log_likelihood = log_softmax.gather(1, targets)
    logits.copy_(log_softmax.exp() * scale)
    logits.scatter_(1, targets, (torch.expm1(log_likelihood) * scale).to(logits.dtype))
    return -log_likelihood.sum()


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head; see the comment above for how."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
        dtype: torch.dtype, gradient_of: HeadGradient, training: bool,
    ):  # fmt: skip
        kind, vocab = x.device.type, weight.size(0)
        # A width that is a multiple of 64 suits the matrix units: zero rows, masked out of the softmax.
        w = weight.new_zeros((vocab + -vocab % 64, weight.size(1)), dtype=dtype)
        w[:vocab] = weight
        scale = FLOAT16_SCALE if dtype == torch.float16 else 1.0
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dw = (torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)) if training else (None, None)
        for i in range(0, len(x), CHUNK[kind]):
            rows = slice(i, i + CHUNK[kind])
            chunk = x[rows].to(dtype)
            logits = chunk @ w.t()
            logits[:, vocab:] = -torch.inf
            for some, target in zip(logits.split(ROWS[kind]), targets[rows].split(ROWS[kind]), strict=True):
                loss += gradient_of(some, target, scale)  # where only the loss is wanted too: it is the fastest way to that
            if training:
                dx[rows] = logits @ w  # now the gradient of the logits
                for part, columns in zip(dw.split(SLICE[kind]), logits.split(SLICE[kind], dim=1), strict=True):
                    part += columns.t() @ chunk
        ctx.factor = 1 / (scale * len(x))
        if training:
            ctx.save_for_backward(dx, dw[:vocab])
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor):
        dx, dw = ctx.saved_tensors
        factor = grad_loss * ctx.factor
        return dx * factor, dw * factor, None, None, None, None


def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient_of: HeadGradient = head_gradient) -> torch.Tensor:
    """The mean cross-entropy, in nats, of the logits x @ weight.t(), which are never all held.

    x (N, C), weight (V, C), targets (N,) of ids below V; a float32 scalar comes back. The
    products run in autocast's dtype where it is on, else in that of x. The gradient goes to
    x and weight, once (no double backward).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return HeadLoss.apply(x, weight, targets, dtype, gradient_of, torch.is_grad_enabled())


# ------------------------------------------------------------------------------------------
# Generation


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yields the next token of each row of `prompt` (B, T), T >= 1: ids (B,), step by step.

    temperature 0 takes the likeliest token; top_k > 0 draws among the k likeliest. A row that
    has drawn `stop_token` yields it from then on; when all have, generation ends. The model
    should be in eval mode.

    Positions are learned, one vector each, so a full window cannot slide along the cache. When
    it is full, the oldest quarter is dropped and the rest is read again from position 0: then
    the next block_size / 4 tokens are cheap once more. A prompt longer than the context is cut
    from the left.
    """
    size = model.config.block_size
    window = prompt[:, -size:]
    cache = Cache(model.config, len(prompt), prompt.device, model.transformer.wte.weight.dtype)
    head = model.transformer.wte.weight.t()
    if head.dtype == torch.float32 and head.device.type == "cpu":
        head = head.contiguous()  # one row of features times it takes less than half the time then
    finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    unread = window
    for _ in range(max_new_tokens):
        token = pick(next_logits(model, unread, cache, head), temperature, top_k, generator)
        if stop_token is not None:
            token = torch.where(finished, stop_token, token)
            finished |= token == stop_token
        yield token
        if stop_token is not None and finished.all():
            return
        unread = token.unsqueeze(1)
        window = torch.cat([window, unread], dim=1)
        if window.size(1) > size:
            unread = window = window[:, -(size - size // 4) :]
            cache.length = 0


def next_logits(model: GPT, unread: torch.Tensor, cache: Cache, head: torch.Tensor) -> torch.Tensor:
    """The logits (B, V) of what follows the `unread` ids (B, T), which are then in the cache; head is (C, V)."""
    onednn = torch.backends.mkldnn
    before = onednn.enabled
    if head.dtype == torch.bfloat16 and unread.numel() == 1:
        # On a CPU oneDNN rearranges such a matrix for every product; for a single row PyTorch's own product takes half the time.
        onednn.enabled = False
    try:
        return model.features(unread, cache)[:, -1] @ head
    finally:
        onednn.enabled = before


def pick(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> torch.Tensor:
    """One id for each row of logits (B, V), drawn as `generate` says."""
    if temperature < 1e-30:  # 0, or so small that float32 would divide by zero
        return logits.argmax(dim=1)
    if 0 < top_k < logits.size(1):
        logits, ids = logits.topk(top_k, dim=1)
    else:
        ids = torch.arange(logits.size(1), device=logits.device).expand_as(logits)
    logits = logits.float()
    # Shifted before it is divided: a tiny temperature must not overflow to infinity.
    logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature
    choice = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)
    return ids.gather(1, choice).squeeze(1)


# ------------------------------------------------------------------------------------------
# Model files, ours and Hugging Face's

FORMAT = "tinystories-gpt/1"  # in every file we write: what tells it from others


def save_file(path: Path, config: Config, model: GPT, **extra: Any) -> None:
    """Writes model.pt or ckpt.pt: config, weights and `extra`, tensors and plain values only."""
    content = {"format": FORMAT, "config": dataclasses.asdict(config), "model": model.state_dict(), **extra}
    buffer = io.BytesIO()  # torch.save to a full disk fails in its own words, a plain write in the system's
    torch.save(content, buffer)
    with whole_file(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def load_file(path: Path) -> dict[str, Any]:
    """Reads what `save_file` wrote, on the CPU. Nothing in the file is executed.

    Raises UserError for a file that is missing, unreadable, damaged or not ours.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums torch.save wrote
            if file.testzip() or any(entry.external_attr for entry in file.infolist()):  # "a directory": read as nothing
                raise zipfile.BadZipFile("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # what zipfile, zlib and the unpickler raise for a damaged file has no common base
        raise UserError(f"{path} is not a checkpoint of ours, or it is damaged ({one_line(problem)[:80]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of ours: write one with train.py")
    return content


def config_of(content: dict[str, Any], path: Path) -> Config:
    """The Config kept in a checkpoint. Raises UserError if it is not one this version knows."""
    known = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of ours: it lacks a config or the weights")
    if unknown := set(content["config"]) - known:
        name = min(unknown)
        raise UserError(f"{path} was written by another version: its setting {name} is unknown{nearest(name, known)}")
    return Config(**content["config"])


def load_model(path: str) -> GPT:
    """The model in a model.pt, a ckpt.pt, or a Hugging Face GPT-2 folder or Hub name; eval mode, CPU, float32.

    Raises UserError if there is none, or none that can be read.
    """
    if (Path(path) / "model.pt").is_file():
        raise UserError(f"{path} is a folder: name the model in it, {Path(path) / 'model.pt'}")
    if Path(path).is_dir() or (not Path(path).exists() and not path.endswith(".pt")):
        return load_hugging_face(path)
    content = load_file(Path(path))
    model = empty_model(config_of(content, Path(path)))
    load_weights(model, content["model"], path)
    return model.eval()


def load_weights(model: GPT, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as problem:
        raise UserError(f"the weights in {path} do not fit the model they describe ({one_line(problem)[:120]})") from None


def empty_model(config: Config) -> GPT:
    """A GPT whose weights are about to be loaded, so none are drawn for it."""
    with torch.device("meta"):
        model = GPT(config)
    return model.to_empty(device="cpu")


# Hugging Face keeps these as (in, out), PyTorch's Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GELU_NAMES = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


def load_hugging_face(path: str) -> GPT:
    """A Hugging Face GPT-2 of any size as our GPT. Raises UserError if it is not one."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, GPT2LMHeadModel, logging

    logging.set_verbosity(logging.CRITICAL)  # its table of what does not fit: it is said here, in one line
    logging.disable_progress_bar()
    if not Path(path).exists():
        notice(f"there is no {path} here: asking the Hugging Face Hub")
        hub_logging.set_verbosity_error()  # a line for every time it tries again
    try:
        theirs = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if theirs.model_type != "gpt2":
            raise UserError(f"{path} holds a {theirs.model_type} model; only gpt2 can be read")
        config = config_from_hugging_face(theirs, path)
        model, report = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        unexpected = [name for name in report["unexpected_keys"] if not name.endswith("masked_bias")]  # in old files
        if wrong := [*report["missing_keys"], *unexpected]:
            raise ValueError(f"its weights do not fit its config.json, {wrong[0]} for one")
        weights = model.state_dict()
    except UserError:
        raise
    except Exception as problem:  # what safetensors, pickle and the Hub raise has no common base
        missing = "no such file or folder, and not on the Hub, or the Hub cannot be reached"
        reason = one_line(problem)[:120] if Path(path).exists() else missing
        raise UserError(f"no checkpoint could be read from {path}: {reason}") from None
    model = empty_model(config)
    ours = {name: weights[name].t() if name.endswith(TRANSPOSED) else weights[name] for name in model.state_dict()}
    load_weights(model, ours, path)
    return model.eval()


def config_from_hugging_face(theirs: Any, path: str) -> Config:
    """Their GPT2Config as our Config. Raises UserError for what our GPT does not do."""
    supported = {
        "activation_function": tuple(GELU_NAMES), "tie_word_embeddings": (True,), "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * theirs.n_embd), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    }  # fmt: skip
    for name, values in supported.items():
        if getattr(theirs, name) not in values:
            raise UserError(f"{path} has {name} {getattr(theirs, name)}, which our GPT does not do")
    return Config(
        n_layer=theirs.n_layer, n_head=theirs.n_head, n_embd=theirs.n_embd, block_size=theirs.n_positions,
        vocab_size=theirs.vocab_size, dropout=theirs.resid_pdrop, gelu=GELU_NAMES[theirs.activation_function],
    )  # fmt: skip


def to_hugging_face(model: GPT) -> Any:
    """Our model (on the CPU, float32) as Hugging Face's GPT2LMHeadModel, biases it lacks as zeros."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head,
        activation_function={"exact": "gelu", "tanh": "gelu_new"}[config.gelu], layer_norm_epsilon=1e-5, tie_word_embeddings=True,
        embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout,
    ))  # fmt: skip
    ours = model.state_dict()
    weights = {name: torch.zeros_like(weight) for name, weight in theirs.state_dict().items()}
    weights |= {name: weight.t() if name.endswith(TRANSPOSED) else weight for name, weight in ours.items()}
    theirs.load_state_dict(weights | {"lm_head.weight": ours["transformer.wte.weight"]})
    return theirs


def save_hugging_face(model: GPT, folder: Path, **generation: Any) -> None:
    """Writes the model (on the CPU, float32) into `folder` as `load_hugging_face` reads it.

    config.json, model.safetensors, and generation_config.json with `generation`'s settings.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = to_hugging_face(model)
    theirs.generation_config = GenerationConfig(max_length=model.config.block_size, **generation)
    theirs.save_pretrained(folder)
