"""model.py against oracles of their own: Hugging Face's GPT-2, F.cross_entropy, a loop without a
cache.
"""

import copy
import dataclasses
import json
import math
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from config import Config, UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import refusal, same, snapshot
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

import model as gpt
from model import GPT, fused_linear_cross_entropy, generate, load_model, save_file, to_hugging_face
from prepare_data import END_OF_TEXT, token_bytes, tokenizer

TINY = Config(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=101, dropout=0.0)
VOCAB = 50257

pytestmark = pytest.mark.usefixtures("one_thread")


def shaken(config: Config, seed: int = 0, std: float = 0.2) -> GPT:
    """A model in eval mode with every parameter far from its start, biases and LayerNorms too."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model.eval()


def is_conv1d(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and "wte" not in name and "wpe" not in name


def in_hugging_face(model: GPT) -> GPT2LMHeadModel:
    c = model.config
    settings = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, activation_function={"exact": "gelu", "tanh": "gelu_new"}[c.gelu],
        attn_pdrop=c.dropout, embd_pdrop=c.dropout, resid_pdrop=c.dropout)
    theirs = GPT2LMHeadModel(settings)
    # A bias we lack is zero.
    weights = {name: torch.zeros_like(weight) for name, weight in theirs.state_dict().items()}
    for name, w in model.state_dict().items():
        weights[name] = w.t().contiguous() if is_conv1d(name, w) else w
    theirs.load_state_dict(weights | {"lm_head.weight": model.transformer.wte.weight})
    return theirs.eval()


def random_ids(config: Config, batch: int = 3, length: int | None = None) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length or config.block_size))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of their difference, as a share of theirs."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


# -------------------------------------------------------------------------------------- The network


@pytest.mark.parametrize("changes", [{}, {"gelu": "tanh"}, {"bias": False}], ids=str)
def test_logits_loss_and_gradients_equal_hugging_face(changes):
    ours = shaken(dataclasses.replace(TINY, **changes))
    theirs = in_hugging_face(ours)
    idx, targets = random_ids(TINY), random_ids(TINY)
    logits = theirs(idx).logits
    close(ours(idx), logits)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    our_loss = ours(idx, targets)
    our_loss.backward()
    close(our_loss, loss)
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        gradient = gradients[name].grad
        close(p.grad, gradient.t() if is_conv1d(name, p) else gradient)
    assert ("bias" in changes) != any("bias" in name for name in ours.state_dict())
    exact = shaken(TINY)(idx)  # the two GELUs differ by more than the tolerance
    assert ("gelu" in changes) <= ((ours(idx) - exact).abs().max().item() > 1e-3)


@torch.no_grad()
def test_logits_of_the_reference_size_equal_hugging_face():
    ours = shaken(Config(dropout=0.0), std=0.02)
    theirs, idx = in_hugging_face(ours), random_ids(ours.config, batch=2)
    close(ours(idx), theirs(idx).logits)
    assert 29e6 < ours.parameter_count() == theirs.num_parameters() < 31e6


def test_dropout_falls_where_gpt2_drops_and_nowhere_in_an_evaluation():
    """Both draw from the same generator in the same order, so that any misplaced or missing dropout
    changes the logits.
    """
    ours = shaken(dataclasses.replace(TINY, dropout=0.3))
    theirs = in_hugging_face(ours)
    idx = random_ids(TINY)
    torch.manual_seed(1)
    expected = theirs.train()(idx).logits
    torch.manual_seed(1)
    close(ours.train()(idx), expected)
    assert distance(ours.eval()(idx), expected) > 0.1
    close(ours(idx), theirs.eval()(idx).logits)


@torch.no_grad()
def test_attention_written_out_is_pytorchs(monkeypatch):
    model, idx = shaken(TINY), random_ids(TINY)
    written_out = model(idx)
    monkeypatch.setattr(gpt, "SHORT", 0)
    close(written_out, model(idx), 1e-5)


@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit():
    model = shaken(TINY)
    idx = random_ids(TINY)
    before = model(idx)
    for cut in range(TINY.block_size):
        changed = idx.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % TINY.vocab_size
        after = model(changed)
        close(after[:, :cut], before[:, :cut], 1e-6)
        assert (after[:, cut] - before[:, cut]).abs().max() > 1e-3


def test_initialisation_is_the_reference_one():
    torch.manual_seed(0)
    config = Config()
    model = GPT(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.count_nonzero() == 0, name
        elif ".ln_" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            residual = name.endswith("c_proj.weight")
            expected = 0.02 / (2 * config.n_layer) ** 0.5 if residual else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(p.mean().item()) < 0.05 * expected, name


def test_fitted_initialisation_keeps_the_size_of_what_flows_through():
    torch.manual_seed(0)
    config = Config.from_preset("tuned")
    model = GPT(config)
    for block in model.transformer.h:
        for weight in (block.attn.c_attn.weight, block.mlp.c_fc.weight):
            assert weight.std().item() == pytest.approx(config.n_embd**-0.5, rel=0.02)
        assert not block.attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
    tokens, positions = model.transformer.wte, model.transformer.wpe.weight
    assert tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert positions.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
    idx = random_ids(config, batch=2)  # the blocks are the identity
    close(model.features(idx), model.transformer.ln_f(tokens(idx) + positions))


def test_sinusoidal_positions_are_those_of_hugging_face():
    # 10,000 is what their wavelengths grow to.
    theirs = MarianSinusoidalPositionalEmbedding(10_000, 8).create_weight()
    ours = gpt.sinusoidal_positions(10_000, 8, std=0.5**0.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # float32 of angles up to 10,000
    odd, even = (gpt.sinusoidal_positions(16, width, 0.03) for width in (9, 10))
    assert torch.equal(odd, even[:, :9])  # the last one is left out


# ----------------------------------------------------------------------------------------- The loss


def head_inputs(rows: int = 40, width: int = 32, vocab: int = VOCAB, device: str = "cpu"):
    """Features like a LayerNorm's, a head that prefers some tokens, targets with repeats."""
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    weight = 0.3 * torch.randn(vocab, width)
    targets = torch.randint(vocab, (rows,))
    targets[: rows // 4] = targets[0]
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def full_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The oracle: all logits at once, in float32 from the softmax on."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def loss_and_gradients(function, x, weight, targets, scale: float = 1.0):
    loss = function(x, weight, targets)
    dx, dw = torch.autograd.grad(loss * scale, (x, weight))
    return loss.detach(), dx / scale, dw / scale


@pytest.mark.parametrize("vocab, group, rows", [
    (1, 512, 64), (63, 512, 64), (64, 512, 64), (65, 512, 64), (VOCAB, 512, 64), (101, 7, 3),
    (101, 3, 7), (101, 1, 1), (101, 40, 40), (101, 39, 13),
])
def test_fused_linear_cross_entropy_is_cross_entropy(monkeypatch, vocab, group, rows):
    """Over exactly the vocabulary, whatever the size of its groups; without gradients too."""
    monkeypatch.setitem(gpt.HEAD_TOKENS, "cpu", group)
    monkeypatch.setitem(gpt.SOFTMAX_TOKENS, "cpu", rows)
    inputs = head_inputs(vocab=vocab)
    ours = loss_and_gradients(fused_linear_cross_entropy, *inputs)
    for mine, other in zip(ours, loss_and_gradients(full_loss, *inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        close(fused_linear_cross_entropy(*inputs), ours[0], 1e-6)


def test_padding_counts_for_nothing_where_it_would_be_the_likeliest():
    x = torch.ones(5, 32, requires_grad=True)
    # Every real logit is -32, that of a zero row would be 0.
    weight = torch.full((VOCAB, 32), -1.0, requires_grad=True)
    loss, dx, _ = loss_and_gradients(fused_linear_cross_entropy, x, weight, torch.arange(5))
    assert loss.item() == pytest.approx(torch.tensor(VOCAB).log().item(), abs=1e-3)
    close(dx, torch.zeros_like(x))


def test_bfloat16_autocast_stays_close_to_float32():
    inputs = head_inputs()
    loss, dx, dw = loss_and_gradients(full_loss, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(fused_linear_cross_entropy, *inputs)
    assert ours[0].dtype == torch.float32
    assert ours[0].item() == pytest.approx(loss.item(), rel=5e-3)
    assert distance(ours[1], dx) < 0.02 and distance(ours[2], dw) < 0.02


def test_the_gradients_of_many_chunks_add_up_in_float32(monkeypatch):
    """In bfloat16 a sum of equal terms stands still at 256 of them."""
    x, weight, targets = head_inputs(rows=1000, vocab=101)
    with torch.no_grad():
        x.abs_()
    inputs = x, weight, torch.zeros_like(targets)
    exact = loss_and_gradients(full_loss, *inputs)[2]
    monkeypatch.setitem(gpt.HEAD_TOKENS, "cpu", 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(loss_and_gradients(fused_linear_cross_entropy, *inputs)[2], exact) < 0.02


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
CUDA = pytest.param("cuda", marks=NO_GPU)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_scaled_float16_gradients_equal_those_of_full_logits(device):
    inputs = head_inputs(device=device)
    scaler = torch.amp.GradScaler(device, init_scale=65536.0)
    scale = scaler.scale(torch.ones((), device=device)).item()
    with torch.autocast(device, torch.float16):
        ours = loss_and_gradients(fused_linear_cross_entropy, *inputs, scale)
        full = loss_and_gradients(full_loss, *inputs, scale)
    for mine, other in zip(ours, full, strict=True):
        assert mine.isfinite().all()
        assert distance(mine, other) < 2e-3  # float16 keeps 11 bits: 5e-4 a rounding
        assert (mine - other).abs().max() < 4e-3 * other.abs().max()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_float16_keeps_the_gradient_of_very_unlikely_tokens(device):
    """Each of 50,256 tokens has a probability of about 2e-8, which plain float16 rounds to zero."""
    x, weight, _ = head_inputs(rows=32, device=device)
    with torch.no_grad():
        x[:, 0], weight[:, 0], weight[0, 0] = 4.0, 0.0, 4.6
        weight[:, 1:] *= 0.1
    targets = torch.zeros(32, dtype=torch.long, device=device)
    assert 1e-8 < F.linear(x, weight).softmax(dim=1).median() < 3e-8
    exact = loss_and_gradients(full_loss, x, weight, targets)[2][1:]
    with torch.autocast(device, torch.float16):
        ours = loss_and_gradients(fused_linear_cross_entropy, x, weight, targets, 65536.0)[2][1:]
    assert (ours[:, 0] > 0).all()
    assert distance(ours.sum(0), exact.sum(0)) < 0.1 and distance(ours, exact) < 0.3


@pytest.mark.parametrize("alike", [7500, 8192])
def test_float16_holds_the_gradient_of_thousands_of_like_tokens(monkeypatch, alike):
    """Padding, tables, white space: eight times their sum is beyond float16's 65,504."""
    monkeypatch.setitem(gpt.HEAD_TOKENS, "cpu", 8192)  # as on a GPU
    x, weight, targets = head_inputs(rows=8192, vocab=512)  # a small head, for time
    with torch.no_grad():
        x[:alike] = 3 * torch.sign(x[0])
    targets[:alike] = 0
    exact = loss_and_gradients(full_loss, x, weight, targets)
    with torch.autocast("cpu", torch.float16):
        ours = loss_and_gradients(fused_linear_cross_entropy, x, weight, targets, 65536.0)
    for mine, other in zip(ours, exact, strict=True):
        assert mine.isfinite().all() and distance(mine, other) < 5e-3


# -------------------------------------------------------------------------------------- Compilation


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_parts_give_the_same_loss_and_gradients():
    eager = shaken(dataclasses.replace(TINY, n_layer=1)).train()
    compiled = copy.deepcopy(eager)
    compiled.compile_parts()
    idx, targets = random_ids(TINY), random_ids(TINY)
    losses = [model(idx, targets) for model in (eager, compiled)]
    for loss in losses:
        loss.backward()
    close(losses[1], losses[0])
    gradients = {name: p.grad for name, p in compiled.named_parameters()}
    assert gradients.keys() == dict(eager.named_parameters()).keys()
    for name, p in eager.named_parameters():
        close(gradients[name], p.grad)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@torch.no_grad()
def test_on_cuda_the_compiled_softmax_holds_the_logits_once_and_gives_the_same_gradient():
    """Inductor's code for a CPU shows it: no buffer but for one number per token."""
    from torch._inductor.utils import run_and_get_code

    logits, targets = torch.randn(8, 1024), torch.randint(1024, (8,))
    softmax = torch.compile(gpt.scaled_softmax, dynamic=False)
    _, code = run_and_get_code(softmax, logits.clone(), targets.unsqueeze(1), 8.0)
    sizes = re.findall(r"= empty_strided\w*\(\((.*?)\)", "".join(code))
    assert sizes and all("1024" not in size for size in sizes)
    ours, whole = logits.clone(), logits.clone()
    loss = gpt.softmax_gradient(ours, targets, 8.0, softmax=softmax)
    close(loss, gpt.softmax_gradient(whole, targets, 8.0))
    close(ours, whole)


# --------------------------------------------------------------------------------------- Generation


@torch.no_grad()
def plain_greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """No cache: the whole window through the model for every token; a full window loses its oldest
    quarter.
    """
    size = model.config.block_size
    window, out = list(prompt)[-size:], []
    for _ in range(count):
        out.append(model(torch.tensor([window]))[0, -1].argmax().item())
        window.append(out[-1])
        if len(window) > size:
            window = window[-(size - size // 4) :]
    return out


def generated(model: GPT, prompt: torch.Tensor, count: int, **settings) -> list[list[int]]:
    """All that `generate` yields, a list for each row."""
    steps = [*generate(model, prompt, count, **settings)]
    return torch.stack(steps, dim=1).tolist()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block_size, prompt_length", [
    (16, 1), (16, 5), (16, 15), (16, 16), (16, 40), (1, 1), (1, 3), (2, 1), (5, 2), (5, 9),
])
def test_cached_greedy_generation_equals_uncached(block_size, prompt_length, batch):
    model = shaken(dataclasses.replace(TINY, block_size=block_size), std=0.4)
    prompts = random_ids(model.config, batch, prompt_length)
    rows = generated(model, prompts, 50, temperature=0)
    assert rows == [plain_greedy(model, prompt, 50) for prompt in prompts.tolist()]
    different = max(len(set(row)) for row in rows)
    assert block_size <= 2 or different > 3, "a story of a few tokens proves little"


@pytest.mark.parametrize("enabled", [True, False])
@torch.inference_mode()
def test_logits_of_a_single_bfloat16_row_are_those_of_float32_and_onednn_stays_as_it_was(
    monkeypatch, enabled
):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    model, ids = shaken(Config(n_layer=2)), random_ids(Config(), 1, 20)
    expected = model(ids)[:, -1]
    model = model.to(torch.bfloat16)
    cache = gpt.Cache(model.config, 1, ids.device, torch.bfloat16)
    for token in ids.split(1, dim=1):
        logits = gpt.next_logits(model, token, cache, model.transformer.wte.weight.t())
        assert torch.backends.mkldnn.enabled == enabled
    assert distance(logits, expected) < 1.5 * distance(model(ids)[:, -1], expected)


def test_several_tokens_behind_a_filled_cache_are_refused():
    """The causal mask would hide the cache from them."""
    model, ids = shaken(TINY), random_ids(TINY, 1, 6)
    cache = gpt.Cache(TINY, 1, ids.device, torch.float32)
    model.features(ids[:, :3], cache)
    with pytest.raises(AssertionError, match="one new token"):
        model.features(ids[:, 3:], cache)


def draws(model: GPT, count: int, **settings) -> torch.Tensor:
    """How often each token follows one fixed prompt, as shares of `count` draws."""
    prompt = torch.zeros(count, 3, dtype=torch.long)
    (tokens,) = generate(model, prompt, 1, generator=torch.Generator().manual_seed(5), **settings)
    return torch.bincount(tokens, minlength=model.config.vocab_size) / count


def assert_shares(shares: torch.Tensor, expected: torch.Tensor) -> None:
    """Of 20,000 draws, within five standard errors: fails by chance once in a million."""
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert (shares - expected).abs().le(5 * error + 1e-9).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature):
    model = shaken(dataclasses.replace(TINY, vocab_size=8))
    logits = model(torch.zeros(1, 3, dtype=torch.long))[0, -1].detach()
    shares = draws(model, 20_000, temperature=temperature)
    assert_shares(shares, (logits / temperature).softmax(0))


def test_a_top_k_beyond_the_vocabulary_is_all_of_it():
    model, count = shaken(TINY), TINY.vocab_size
    for more in (count, count + 1, 10**12):
        assert torch.equal(draws(model, 2000, top_k=more), draws(model, 2000, top_k=0))


@pytest.mark.parametrize("top_k, top_p", [(0, 0.5), (0, 0.9), (5, 0.7), (0, 1e-9), (3, 1.0)])
def test_top_k_and_top_p_draw_as_hugging_face_does(top_k, top_p):
    model = shaken(TINY)
    logits = model(torch.zeros(1, 3, dtype=torch.long))[:, -1].detach() / 3
    warp = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    warp.append(TopPLogitsWarper(top_p))
    expected = warp(None, logits).softmax(1)[0]
    assert top_k != 3 or expected[expected > 0].min() > 0.05
    found = draws(model, 20_000, temperature=3.0, top_k=top_k, top_p=top_p)
    assert_shares(found, expected)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-45, 1e-46, 5e-324])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_very_small_temperature_takes_the_likeliest_and_a_huge_one_draws_evenly(
    temperature, top_k
):
    logits = torch.randn(6, 50)
    assert torch.equal(gpt.draw_token(logits, temperature, top_k), logits.argmax(dim=1))
    assert torch.equal(gpt.draw_token(logits, 1.0, 1), logits.argmax(dim=1))
    generator = torch.Generator().manual_seed(0)
    token = gpt.draw_token(torch.randn(20_000, 4), 1e308, generator=generator)
    assert_shares(torch.bincount(token) / 20_000, torch.full((4,), 0.25))


def test_the_same_seed_gives_the_same_tokens_and_the_global_generator_is_untouched():
    model, prompt = shaken(TINY), random_ids(TINY, 2, 4)
    state = torch.get_rng_state()
    seeded = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    first, again, other = (generated(model, prompt, 30, generator=draw) for draw in seeded)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_that_ended_keeps_yielding_end_of_text_and_all_ended_is_the_end():
    model = shaken(dataclasses.replace(TINY, vocab_size=8), std=0.05)
    prompt, last = torch.ones(4, 2, dtype=torch.long), 3
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    free = generated(model, prompt, 100, generator=seeded[0])
    ends = [row.index(last) for row in free]
    assert len(set(ends)) == len(ends), "the rows should end at different tokens"
    expected = []
    for row, end in zip(free, ends, strict=True):
        expected.append(row[:end] + [last] * (max(ends) + 1 - end))
    assert generated(model, prompt, 100, generator=seeded[1], end_of_text=last) == expected


# --------------------------------------------------------------------------------------------- Text

FOX = "🦊"  # three tokens of GPT-2, none of them a whole character


def text_of(tokens: Iterable[int]) -> Iterator[str]:
    return gpt.stream_text(iter(tokens), token_bytes(), END_OF_TEXT)


def test_text_streams_as_whole_characters_as_soon_as_they_are_whole():
    text = f"A fox {FOX}, a naïve café, 你好."
    tokens = tokenizer().encode(text)
    read = []
    streamed = text_of(read.append(token) or token for token in tokens)
    arrived = [(piece, len(read)) for piece in streamed]
    assert arrived[0] == ("A", 1)  # before the next token is drawn
    assert "".join(piece for piece, _ in arrived) == text and len(tokenizer().encode(FOX)) > 1
    for i, (_, count) in enumerate(arrived):
        # What the tokens so far spell, an unfinished character left off.
        whole = tokenizer().decode_bytes(tokens[:count]).decode("utf-8", errors="ignore")
        assert "".join(piece for piece, _ in arrived[: i + 1]) == whole


def test_text_ends_at_end_of_text_and_bytes_that_are_no_character_are_replaced():
    A, fox = 32, tokenizer().encode(FOX)
    assert "".join(text_of([A, END_OF_TEXT, A])) == "A"
    assert "".join(text_of([A, *fox[:-1]])) == "A\ufffd"
    assert "".join(text_of([fox[1], A])) == "\ufffdA"


# -------------------------------------------------------------------------------------------- Files


def refused(path: Path) -> str:
    """The one line that load_model refuses `path` with."""
    with warnings.catch_warnings(record=True) as told, pytest.raises(UserError) as error:
        warnings.simplefilter("always", UserWarning)
        load_model(str(path))
    line = str(error.value)
    second = [warning for warning in told if warning.category is UserWarning]
    assert not second, "a second line on stderr"
    assert line and len(line.splitlines()) == 1 and len(line) < 400
    return line


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = shaken(TINY)
    save_file(tmp_path / "model.pt", TINY, model, iteration=7)
    back = load_model(str(tmp_path / "model.pt"))
    assert back.config == TINY and not back.training
    assert same(back.state_dict(), model.state_dict())
    assert {weight.dtype for weight in back.state_dict().values()} == {torch.float32}
    assert gpt.load_file(tmp_path / "model.pt")["iteration"] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


@pytest.fixture
def saved(tmp_path) -> Path:
    save_file(tmp_path / "model.pt", TINY, GPT(TINY))
    return tmp_path / "model.pt"


BAD_BYTES = {
    "empty": b"", "text": b"Once upon a time there was a cat.\n", "zip": b"PK\x05\x06" + bytes(18),
    "json": b'{"format": "tinystories-gpt/1"}', "dots": b".\nwE{Q6sS}l1 Ka)}",
    "binary": bytes(range(256)) * 20,
}
NOT_OURS = {
    "no format": {"model": {}}, "another format": {"format": "other/1"}, "list": [1, 2],
    "tensor": torch.zeros(3), "weights": {"transformer.wte.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("name", ["missing", *BAD_BYTES, *NOT_OURS])
def test_a_file_that_is_missing_or_no_checkpoint_of_ours_is_refused(tmp_path, name):
    if name in BAD_BYTES:
        (tmp_path / "x.pt").write_bytes(BAD_BYTES[name])
    if name in NOT_OURS:
        torch.save(NOT_OURS[name], tmp_path / "x.pt")
    assert "x.pt" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_and_one_with_a_flipped_bit_are_refused(saved, share):
    whole = saved.read_bytes()
    place = int(share * len(whole))
    saved.write_bytes(whole[:place])
    assert "model.pt" in refused(saved)
    if share == 0.5:  # in its weights
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "damaged" in refused(saved)


class Bomb:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, write):
    write({"format": gpt.FORMAT, "bomb": Bomb(tmp_path / "ran")}, tmp_path / "x.pt")
    assert "x.pt" in refused(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


WRONG_CONTENTS = {
    "it lacks a config or the weights": [lambda c: c.pop("config"), lambda c: c.pop("model")],
    "not all finite": [lambda c: c["model"]["transformer.ln_f.weight"][:1].fill_(math.nan)],
    "n_layers is unknown here, did you mean n_layer": [lambda c: c["config"].update(n_layers=2)],
    "do not fit their model": [
        lambda c: c["config"].update(n_embd=64), lambda c: c["config"].update(n_layer=3),
        lambda c: c["config"].update(n_layer=1), lambda c: c["config"].update(bias=False),
        lambda c: c["config"].update(block_size=8)],
}


@pytest.mark.parametrize("reason", WRONG_CONTENTS)
def test_a_checkpoint_with_wrong_contents_is_refused(saved, reason):
    for spoil in WRONG_CONTENTS[reason]:
        save_file(saved, TINY, GPT(TINY))
        content = torch.load(saved)
        spoil(content)
        torch.save(content, saved)
        line = refused(saved)
        assert "model.pt" in line and reason in line


# ----------------------------------------------------------------------------- Hugging Face's files


@pytest.fixture
def folder(tmp_path) -> Path:
    in_hugging_face(shaken(TINY)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("gelu", ["gelu", "gelu_new"])
@torch.no_grad()
def test_a_hugging_face_folder_gives_the_same_logits(tmp_path, gelu):
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    settings = GPT2Config(activation_function=gelu, initializer_range=0.2, **sizes)
    theirs = GPT2LMHeadModel(settings).eval()
    theirs.save_pretrained(tmp_path)
    ours, idx = load_model(str(tmp_path)), random_ids(TINY)
    assert not ours.training
    close(ours(idx), theirs(idx).logits)


@pytest.mark.parametrize("changes", [{}, {"gelu": "tanh", "dropout": 0.2}, {"bias": False}],
                         ids=str)
@torch.no_grad()
def test_an_export_gives_the_same_logits_and_comes_back_bit_for_bit(tmp_path, changes):
    model = shaken(dataclasses.replace(TINY, **changes))
    to_hugging_face(model).save_pretrained(tmp_path / "first")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    idx = random_ids(TINY)
    close(theirs(idx).logits, model(idx), 1e-5)
    assert theirs.config.model_type == "gpt2" and theirs.config.tie_word_embeddings
    assert theirs.config.attn_pdrop == model.config.dropout and theirs.dtype == torch.float32
    back = load_model(str(tmp_path / "first"))
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    for name in back.state_dict().keys() - model.state_dict().keys():
        assert not back.state_dict()[name].any()  # biases it lacked
    to_hugging_face(back).save_pretrained(tmp_path / "second")
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")


def test_a_model_of_another_kind_or_an_empty_folder_is_refused(tmp_path):
    assert tmp_path.name in refused(tmp_path)
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=30, hidden_size=16, **sizes)).save_pretrained(tmp_path)
    assert "bert" in refused(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_hugging_face_folder_is_refused(folder, name):
    content = (folder / name).read_bytes()
    for kept in (content[:-1000], b""):
        (folder / name).write_bytes(kept)
        assert "gpt2" in refused(folder)
    (folder / name).unlink()
    assert "gpt2" in refused(folder)


UNFIT = {
    "n_embd": 64, "n_layer": 3, "n_head": 3, "n_positions": 8, "activation_function": "relu",
    "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "n_inner": 100,
}


@pytest.mark.parametrize("field", UNFIT)
def test_a_hugging_face_config_that_does_not_fit_is_refused(folder, field):
    """A layer missing from the file too: transformers would make it up and say so in a table."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: UNFIT[field]}))
    refused(folder)


RMS, LINEAR = torch.nn.RMSNorm(32), torch.nn.Linear(32, 256)
UNLIKE_GPT2 = {  # what its code might have become, and what the line names
    "Missing.*transformer.wpe": lambda model: model.transformer.pop("wpe"),
    "Unexpected.*q_norm": lambda model: model.transformer.h[0].attn.add_module("q_norm", RMS),
    "size mismatch.*mlp.c_fc": lambda model: setattr(model.transformer.h[0].mlp, "c_fc", LINEAR),
    "logits differ": lambda model: setattr(model.transformer.h[1], "ln_1", RMS),  # the same name
    "logits differ by": lambda model: turn(model.transformer.h[0].attn),
}


def turn(attention: gpt.Attention) -> None:
    plain = attention.queries_keys_values
    attention.queries_keys_values = lambda x: plain(x).roll(1, dims=3)


@pytest.mark.parametrize("reason", UNLIKE_GPT2)
def test_a_model_that_is_no_gpt2_is_not_exported(reason):
    model = shaken(TINY)
    UNLIKE_GPT2[reason](model)
    assert re.search(f"cannot be a GPT-2.*{reason}", refusal(to_hugging_face, model))


# ------------------------------------------------------------------------------------------ Devices


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cpu:1", "meta", "cuda:x", "cuda:-1", "cuda:",
                                  "cuda:007", "cuda:300", "cuda:99999999999", "mps:1", "tpu"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, name, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    line = refusal(gpt.pick_device, name)
    assert f"device {name} is not there" in line
    assert ("cpu, cuda, cuda:0, cuda:1" if gpus else "--device cpu or auto") in line


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    for gpus, kind in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert gpt.pick_device("auto") == torch.device(kind)
    assert gpt.pick_device("cuda:1") == torch.device("cuda", 1)
