"""Tests of training: learning rate, batches, steps, evaluations, resuming, fine-tuning, scoring.

The oracles are independent: PyTorch's schedulers and Muon, plain steps on one large batch, plain
loops over windows, Hugging Face.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import config as config_module
from config import Config

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY,
    check_equal,
    copy_of,
    files_in,
    main,
    new_config,
    new_run,
    prepare_tales,
    refusal,
    rows_of,
    same,
    save,
    snapshot,
    tiny,
    write_tales,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import model as gpt
import train
from model import GPT, load_file, load_model, save_file
from plots import loss_curve
from prepare_data import load_meta, prepare

pytestmark = pytest.mark.usefixtures("one_thread", "signals", "no_pictures")

COLUMNS = ("iteration,tokens,train_loss,val_loss,val_bits_per_byte,learning_rate,grad_norm,"
           "skipped_updates,tokens_per_second,seconds")


def tokens_of(data: Path, split: str) -> np.ndarray:
    return np.fromfile(data / f"{split}.bin", dtype="<u2").astype(np.int64)


def windows(tokens: np.ndarray, starts, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(np.stack([tokens[s : s + size] for s in starts]))
    y = torch.tensor(np.stack([tokens[s + 1 : s + 1 + size] for s in starts]))
    return x, y


def shake(run: train.Run) -> None:
    """Takes every weight far from its start, where all predictions are alike."""
    torch.manual_seed(0)
    for p in run.model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))


def weights_of(run: train.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


# -------------------------------------------------------------------------------- The learning rate


def pytorch_rates(config: Config, count: int) -> list[float]:
    """The rates of the first `count` iterations, by PyTorch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    length = max(config.decay_iters - config.warmup, 1)
    last = config.min_lr / config.learning_rate
    if config.lr_schedule == "linear":
        scheduler = LinearLR(optimizer, 1.0, last, total_iters=length)
    else:
        scheduler = CosineAnnealingLR(optimizer, length, eta_min=config.min_lr)
    if config.warmup:
        warmup = LinearLR(optimizer, config.warmup_start_factor, total_iters=config.warmup)
        scheduler = SequentialLR(optimizer, [warmup, scheduler], [config.warmup])
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SHORT = dict(max_iters=1000, lr_decay_iters=1000, warmup_iters=100)  # a tenth of the reference


@pytest.mark.parametrize("changes", [
    {}, {"max_iters": 100}, SHORT | {"min_lr": 0.0}, SHORT | {"warmup_iters": 0},
    SHORT | {"warmup_iters": 1}, SHORT | {"lr_decay_iters": 2000},
    SHORT | {"warmup_start_factor": 1.0},
    SHORT | {"lr_decay_iters": 500}, SHORT | {"lr_decay_iters": 100},  # of no length
    SHORT | {"lr_schedule": "linear", "learning_rate": 1e-3},
    SHORT | {"lr_schedule": "linear", "min_lr": 5e-5, "warmup_iters": None},
], ids=str)
def test_the_learning_rate_is_pytorchs_at_every_iteration_of_the_decay_and_then_min_lr(changes):
    config = Config(**changes)
    ours = [train.learning_rate_at(config, i) for i in range(config.max_iters)]
    end = min(config.decay_iters, config.max_iters)
    theirs = pytorch_rates(config, end)
    np.testing.assert_allclose(ours[:end], theirs, rtol=1e-9, atol=1e-18)
    assert ours[end:] == [config.min_lr] * (config.max_iters - end)


def test_the_reference_rate_rises_from_a_third_of_1e_4_over_1e_4_to_5e_4():
    # 5500 is halfway through the decay.
    rates = [train.learning_rate_at(Config(), i) for i in (0, 1000, 5500, 9999)]
    assert rates == pytest.approx([1e-4 / 3, 1e-4, 3e-4, 5e-4])


# ------------------------------------------------------------- Where steps end and evaluations fall


@pytest.mark.parametrize("begin, end", [(0, 4), (3, 4), (4, 8), (5, 8), (16, 18), (17, 18)])
def test_a_step_ends_at_the_same_iteration_wherever_it_was_begun(data, tmp_path, begin, end):
    run = new_run(tiny(data, tmp_path))
    run.state.iteration = begin  # in the middle of a step after a resume with another max_iters
    run.step()
    assert run.state.iteration == end


@pytest.mark.parametrize("size, interval", itertools.product([1, 3, 4, 32], [1, 3, 4, 10, 500]))
def test_evaluations_fall_on_their_boundaries(size, interval):
    """An iteration's falls on the last end of a step that is not after it; the first one counts."""
    for length in (1, 7, 32, 100, 1100):
        points = train.evaluation_points(
            Config(gradient_accumulation_steps=size, eval_interval=interval, max_iters=length))
        due: dict[int, int] = {}
        for name in range(interval, length, interval):
            before = [end for end in range(size, length, size) if end <= name]
            if before:
                due.setdefault(before[-1], name)
        assert points == due | {length: length}
    assert train.evaluation_points(Config())[480] == 500  # a step of the reference is 32 iterations


# ------------------------------------------------------------------------------------------ Batches


def test_crops_are_a_function_of_seed_and_iteration_alone_and_do_not_overlap():
    config = Config(seed=3)
    starts = train.crop_starts(config, 7, 10_000)
    np.random.seed(99)
    torch.manual_seed(99)
    other = Config(seed=3, device_batch_size=5, gradient_accumulation_steps=2, max_iters=50,
                   dropout=0.0, n_layer=1, learning_rate=1.0)
    assert np.array_equal(starts, train.crop_starts(other, 7, 10_000))
    assert starts.shape == (config.batch_size,)
    crops = {(s, i): tuple(train.crop_starts(Config(seed=s), i, 10**6))
             for s in (0, 1, 2, 2**32, 2**63 - 1) for i in (0, 1, 2, 3)}
    assert len(set(crops.values())) == len(crops)


def test_crops_are_spread_evenly_from_one_end_of_a_split_to_the_other():
    config = Config(block_size=16, batch_size=1000)
    starts = np.concatenate([train.crop_starts(config, i, 26) for i in range(10)])
    counts = np.bincount(starts)
    assert len(counts) == 10  # a crop and its targets are 17 tokens
    assert (abs(counts - 1000) < 5 * math.sqrt(1000)).all()
    assert set(train.crop_starts(config, 0, 17)) == {0}


def test_shuffled_crops_take_every_window_once_before_any_twice():
    config, length = Config(crops="shuffled", block_size=16, batch_size=8, seed=2), 16 * 40 + 7
    # An epoch has 39 windows: the fifth batch is of two epochs.
    starts = np.concatenate([train.crop_starts(config, i, length) for i in range(10)])
    first, second = starts[:39], starts[39:78]
    for epoch in (first, second):
        assert (np.diff(np.sort(epoch)) == 16).all()  # side by side
        assert epoch.min() >= 0 and epoch.max() + 16 < length  # and their targets are there
        assert (np.diff(epoch) != 16).mean() > 0.5  # in no order
    assert first.min() != second.min() and not np.array_equal(np.argsort(first), np.argsort(second))


@pytest.mark.parametrize("changes", [{}, {"seed": 8}, {"batch_size": 5}, {"batch_size": 300},
                                     {"device_batch_size": 3}], ids=str)
def test_evaluation_windows_are_even_and_the_same_for_every_seed_and_batch(changes):
    """So that the logs of two runs compare."""
    config = Config(block_size=16, eval_windows=20, **changes)
    starts = train.even_starts(config, 10_000)
    assert (len(starts), starts[0], starts[-1]) == (20, 0, 10_000 - 17)
    assert np.ptp(np.diff(starts)) <= 1
    plain = Config(block_size=16, eval_windows=20)
    assert np.array_equal(starts, train.even_starts(plain, 10_000))
    assert train.even_starts(config, 20).tolist() == [0, 1, 2, 3]  # a split with few windows
    assert train.even_starts(config, 17).tolist() == [0]


# ----------------------------------------------------------------------------------------- One step

# A large eps keeps AdamW's step in proportion to the gradient, so that its size counts (a mean, not
# a sum; clipped or not) and rounding does not; the clipping is at work.
PLAIN = dict(dropout=0.0, eps=1e-3, learning_rate=0.1, grad_clip=0.3, max_iters=6, warmup_iters=3,
             lr_decay_iters=10, weight_decay=0.5)


def plain_steps(run: train.Run, data: Path, steps: list[range]) -> tuple[dict, float, float]:
    """The oracle, one large batch a step: the weights, the last step's loss and gradient norm."""
    config, model = run.config, GPT(run.config)
    model.load_state_dict(run.model.state_dict())
    groups = [{"params": [], "weight_decay": 0.0},
              {"params": [], "weight_decay": config.weight_decay}]
    for name, p in model.named_parameters():
        groups[0 if is_spared(name) else 1]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2),
                                  eps=config.eps, fused=False, foreach=False)
    tokens, rates = tokens_of(data, "train"), pytorch_rates(config, config.max_iters)
    for iterations in steps:
        starts = [start for i in iterations for start in train.crop_starts(config, i, len(tokens))]
        x, y = windows(tokens, starts, config.block_size)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rates[iterations[-1]]
        optimizer.step()
    return dict(model.named_parameters()), loss.item(), norm.item()


@pytest.mark.parametrize("changes", [{}, {"device_batch_size": 1}, {"device_batch_size": 3},
                                     {"device_batch_size": 1000}, {"grad_clip": 0.0}], ids=str)
def test_steps_equal_plain_ones_on_one_large_batch(data, tmp_path, changes):
    """Of four iterations, then of the last two, however they are cut into micro-batches."""
    run = new_run(tiny(data, tmp_path, **PLAIN | changes))
    expected, loss, norm = plain_steps(run, data, [range(0, 4), range(4, 6)])
    before = weights_of(run)
    run.step()
    run.step()
    assert run.state.iteration == 6
    assert run.loss.item() == pytest.approx(loss, rel=1e-5)
    assert run.state.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    assert norm > PLAIN["grad_clip"]
    for name, p in run.model.named_parameters():
        moved = (expected[name] - before[name]).abs().max()
        assert (p - expected[name]).abs().max() < 1e-3 * moved, name


def is_spared(name: str) -> bool:
    """Whether a parameter is a bias or belongs to a LayerNorm: these do not decay."""
    return name.endswith(".bias") or ".ln_" in name


@pytest.mark.parametrize("embedding_lr_mult", [1.0, 3.0])
def test_each_kind_of_parameter_moves_and_decays_at_its_rate(data, tmp_path, embedding_lr_mult):
    """Biases and LayerNorms do not decay; they and the embeddings have embedding_lr_mult."""
    for gradient, decay in ((1.0, 0.0), (0.0, 0.5)):
        run = new_run(tiny(data, tmp_path, weight_decay=decay, grad_clip=0.0,
                           embedding_lr_mult=embedding_lr_mult))
        for p in run.model.parameters():
            p.data.add_(1.0)
            p.grad = torch.full_like(p, gradient)
        before = weights_of(run)
        run.update_weights(learning_rate=0.1)
        for name, p in run.model.named_parameters():
            own = is_spared(name) or name.endswith(("wte.weight", "wpe.weight"))
            rate = 0.1 * (embedding_lr_mult if own else 1.0)
            # AdamW's first step is the rate, whatever the gradient's size, or else only decay.
            kept = 1.0 if is_spared(name) else 1 - rate * decay
            torch.testing.assert_close(p.detach(), before[name] * kept - rate * gradient, msg=name)


OPTIMIZERS = pytest.mark.parametrize("matrix_optimizer", ["adamw", "muon"])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 or later has a Muon")
@pytest.mark.parametrize("shape, parts", [((24, 8), 1), ((8, 24), 1), ((8, 8), 1), ((24, 8), 3)])
def test_muon_steps_as_pytorchs_own(shape, parts):
    """Five steps; queries, keys and values (parts 3) as three matrices. Both in bfloat16."""
    torch.manual_seed(0)
    ours, other = (torch.nn.Parameter(torch.randn(shape)) for _ in range(2))
    start = [ours.detach().clone(), other.detach().clone()]
    theirs = [torch.nn.Parameter(part.clone()) for p in start for part in p.chunk(parts)]
    group = dict(params=[ours, other], rule="muon", momentum=0.9, parts=parts, weight_decay=0.1)
    optimizer = train.Optimizer([group], torch.bfloat16, lr=0.02)
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=4,
                              adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradients = [torch.randn(shape) for _ in range(2)]
        ours.grad, other.grad = gradients
        for p, gradient in zip(theirs, [g for grad in gradients for g in grad.chunk(parts)],
                               strict=True):
            p.grad = gradient.clone()
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        oracle.step()
    for p, before, some in zip((ours, other), start, (theirs[:parts], theirs[parts:]), strict=True):
        expected = torch.cat([part.detach() for part in some])
        assert (p - expected).norm() < 0.03 * (expected - before).norm()


@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6), (4, 8, 8)])
def test_orthogonal_matrices_keep_the_singular_vectors_and_have_singular_values_near_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * 1e-6  # of any size
    found = train.orthogonalize(matrices, torch.float32)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ found @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.3
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_the_rest(data, tmp_path):
    after = []
    for name in ("adamw", "muon"):
        run = new_run(tiny(data, tmp_path, matrix_optimizer=name, momentum=0.9))
        run.step()
        after.append(weights_of(run))
    differing = {name for name in after[0] if not torch.equal(after[0][name], after[1][name])}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert differing == {f"transformer.h.0.{name}.weight" for name in matrices}


def test_dropout_is_a_function_of_seed_and_place(data, tmp_path):
    def weights_after(seed: int, noise: int) -> dict[str, torch.Tensor]:
        run = new_run(tiny(data, tmp_path, dropout=0.3, seed=seed))
        torch.manual_seed(noise)  # what the process did before must not matter
        run.step()
        return weights_of(run)

    assert same(weights_after(5, 0), weights_after(5, 1))
    assert not same(weights_after(5, 0), weights_after(6, 0))


def test_dropout_differs_between_the_micro_batches_of_a_step(data, tmp_path):
    """With one mask for both, the same sequences would have the same loss."""
    run = new_run(tiny(data, tmp_path, dropout=0.5, gradient_accumulation_steps=2))
    losses, batch = [], windows(tokens_of(data, "train"), [0, 1, 2, 3], 16)
    run.model.register_forward_hook(lambda module, arguments, loss: losses.append(loss.item()))
    run.model.register_forward_pre_hook(lambda module, arguments: batch)
    run.step()
    assert len(losses) == 2 and losses[0] != losses[1]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def matrices(run: train.Run) -> torch.Tensor:
    """All that Muon steps, as one vector."""
    found = [p.detach().cpu() for p in run.model.transformer.h.parameters() if p.dim() > 1]
    return torch.cat([p.flatten() for p in found])


@pytest.mark.parametrize("device, dtype", [
    ("cpu", "bfloat16"), pytest.param("cuda", "bfloat16", marks=NO_GPU),
    pytest.param("cuda", "float16", marks=NO_GPU), pytest.param("cuda", "float32", marks=NO_GPU)])
def test_steps_in_every_precision_stay_close_to_float32_on_a_cpu(data, tmp_path, device, dtype):
    """Of AdamW and of Muon; on a GPU in compiled code."""
    if (device, dtype) == ("cuda", "bfloat16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    config = tiny(data, tmp_path, n_layer=2, dropout=0.0, learning_rate=1e-2, warmup_iters=0,
                  gradient_accumulation_steps=1, matrix_optimizer="muon")
    compile = "true" if device == "cuda" else "false"
    exact = new_run(config)
    run = new_run(dataclasses.replace(config, device=device, dtype=dtype, compile=compile))
    train.compile_model(run)  # with compile true it is an error if that fails
    assert run.scaler.is_enabled() == (dtype == "float16")
    starts, before = train.even_starts(config, 500), matrices(exact)
    start = exact.mean_loss(exact.tokens["val"], starts)
    for _ in range(4):
        exact.step()
        run.step()
        assert run.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
        # Unscaled before it is measured.
        assert run.state.grad_norm.item() == pytest.approx(exact.state.grad_norm.item(), rel=5e-2)
    assert run.state.skipped_updates == 0
    losses = [r.mean_loss(r.tokens["val"], starts) for r in (exact, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[0] < 0.95 * start
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    ours, theirs = (matrices(each) - before for each in (run, exact))
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


# -------------------------------------------------------------------- Gradients that are not finite


def poison(run: train.Run, value: float, iterations: range) -> None:
    """One entry of one gradient becomes `value` in the steps that begin at these iterations."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if run.state.iteration not in iterations:
            return gradient
        return gradient.index_fill(0, torch.tensor([3]), value)

    run.model.transformer.ln_f.weight.register_hook(spoil)


@OPTIMIZERS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_changes_nothing_and_is_counted(data, tmp_path, value, matrix_optimizer):
    run = new_run(tiny(data, tmp_path, matrix_optimizer=matrix_optimizer))
    before = weights_of(run)
    poison(run, value, range(1))
    run.step()
    assert same(weights_of(run), before)
    assert run.state.skipped_updates == 1 and run.state.iteration == 4
    # The optimizer has not noticed either: the next step is that of a run without the bad one.
    clean = new_run(tiny(data, tmp_path, matrix_optimizer=matrix_optimizer))
    clean.state.iteration = 4
    for r in (run, clean):
        r.step()
    assert same(weights_of(run), weights_of(clean)) and not same(weights_of(run), before)


@pytest.mark.parametrize("broken, end", [(range(40), 10), (range(3, 22), 20), (range(3, 12), None)])
def test_a_run_ends_at_the_tenth_step_that_finds_ten_skipped_in_a_row(data, tmp_path, broken, end):
    """On all ranks alike. Nine skipped steps in a row are only counted."""
    run = new_run(tiny(data, tmp_path, gradient_accumulation_steps=1, max_iters=24,
                       eval_interval=100))
    before = weights_of(run)
    poison(run, math.nan, broken)
    if end is None:
        train.train(run)
        assert rows_of(run.folder.path / "log.csv")[-1]["skipped_updates"] == 9
        return
    line = refusal(train.train, run)
    assert "was not finite in 10 steps in a row" in line and "learning_rate" in line
    assert run.state.iteration == end
    assert same(weights_of(run), before) == (broken.start == 0)


def test_a_streak_of_bad_gradients_that_has_ended_still_ends_the_run(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    for value in [math.nan] * 10 + [1.0]:
        for p in run.model.parameters():
            p.grad = torch.full_like(p, value)
        run.update_weights(1e-3)
    assert run.state.skipped_in_a_row == 0
    assert "10 steps in a row" in refusal(train.save_checkpoint, run)
    assert not run.folder.ckpt.exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    run.step()
    save(run, 6)
    files = snapshot(run.folder.path)
    run.model.transformer.ln_f.weight.data.fill_(math.nan)
    assert "model.pt" in refusal(save, run, 12)
    assert snapshot(run.folder.path) == files


def test_float16_trains_on_repetitive_text(data, tmp_path, monkeypatch):
    """11 of 12 tokens alike: a gradient that overflows before it is scaled would skip all steps."""
    monkeypatch.setitem(gpt.HEAD_TOKENS, "cpu", 8192)  # as a GPU takes them
    monkeypatch.setattr(gpt, "pick_dtype", lambda name, device: torch.float16)
    config = tiny(data, tmp_path, batch_size=512, dropout=0, gradient_accumulation_steps=1,
                  vocab_size=512)  # a small head, for time
    run = train.Run(config, load_meta(data), train.Ranks(torch.device("cpu")))
    run.tokens["train"] = np.where(np.arange(20_000) % 12 == 0, 464, 220).astype(np.uint16)
    losses = []
    for _ in range(4):
        run.step()
        losses.append(run.loss.item())
    assert run.state.skipped_updates <= 2 and losses[-1] < losses[0]


# --------------------------------------------------------------------------------------- Evaluation


@torch.no_grad()
def plain_loss(logits_of: Callable, tokens: np.ndarray, starts: Iterable) -> tuple[float, int]:
    """The mean cross-entropy, one window of 16 at a time, and how many tokens that is."""
    total, count = 0.0, 0
    for start in starts:
        window = torch.tensor(tokens[start : start + 17])
        logits = logits_of(window[None, :-1])[0].double()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return total / count, count


@pytest.mark.parametrize("device_batch_size", [None, 3, 1000])
def test_an_evaluation_is_a_mean_without_dropout(data, tmp_path, device_batch_size):
    run = new_run(tiny(data, tmp_path, dropout=0.5, device_batch_size=device_batch_size))
    shake(run)
    tokens = tokens_of(data, "val")
    starts = train.even_starts(run.config, len(tokens))
    loss = run.mean_loss(run.tokens["val"], starts)
    assert run.model.training  # and training goes on with it
    # Two evaluations differ only by the weights.
    assert run.mean_loss(run.tokens["val"], starts) == loss
    assert loss == pytest.approx(plain_loss(run.model.eval(), tokens, starts)[0], rel=1e-5)


def pieces_of(tokens: np.ndarray, sizes: list[int]) -> list[tuple[np.ndarray, dict[str, int]]]:
    """A text in batches, as `train.score` takes it; a byte is a token."""
    pieces = np.split(tokens, np.cumsum(sizes)[:-1])
    return [(piece, dict(tokens=len(piece), bytes=len(piece))) for piece in pieces]


@pytest.mark.parametrize("sizes", [[17], [18], [32], [33], [100], [None], [1, 5, 16, 17, 40],
                                   [3] * 20, [33, 1, 1]], ids=str)
def test_a_text_in_any_pieces_is_scored_on_every_token_but_the_first_once(data, tmp_path, sizes):
    run = new_run(tiny(data, tmp_path, device_batch_size=3))
    shake(run)
    tokens = tokens_of(data, "val")
    sizes = [size or len(tokens) for size in sizes]  # None: the whole split
    tokens = tokens[: sum(sizes)]
    loss, count = plain_loss(run.model.eval(), tokens, range(0, len(tokens) - 1, 16))
    final = train.score(run, pieces_of(tokens, sizes))
    assert final["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert final["tokens_scored"] == count == len(tokens) - 1
    assert final["tokens"] == len(tokens)


def test_a_part_of_a_split_is_even_windows_of_it(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    shake(run)
    tokens = tokens_of(data, "val")
    text = pieces_of(tokens, [len(tokens)])
    part = train.score(run, text, 5 * 16 + 7)
    last = (len(tokens) - 17) // 16
    starts = [round(i * last / 4) * 16 for i in range(5)]
    loss, scored = plain_loss(run.model.eval(), tokens, starts)
    assert part["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert part["tokens_scored"] == scored == 80
    assert train.score(run, text, len(tokens)) == train.score(run, text)
    assert train.score(run, text, 0)["tokens_scored"] == 16


# -------------------------------------------------------------------------------------- A whole run


def test_a_run_leaves_its_files_and_nothing_else(finished):
    names = ["out/first/ckpt.pt", "out/first/log.csv", "out/first/model.pt",
             "out/first/run.json", "plots/first.png"]
    assert files_in(finished.folder) == names
    assert (finished.folder / "plots" / "first.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("model.pt", "ckpt.pt"):  # which hold tensors and plain values only
        content = torch.load(finished.out / name, weights_only=True)
        assert content["config"]["n_embd"] == 32
        assert set(content["model"]) == set(GPT(Config(**TINY)).state_dict())
    assert finished.stdout.startswith("Once upon a time") and finished.stdout.endswith("\n")
    assert "loss" not in finished.stdout and "wrote" not in finished.stdout


def test_the_log_has_the_columns_and_a_row_an_evaluation(finished, data):
    assert (finished.out / "log.csv").read_text().splitlines()[0] == COLUMNS
    rows = rows_of(finished.out / "log.csv")
    assert [row["iteration"] for row in rows] == [6, 12, 18]
    # What the weights have seen: whole steps of 4 iterations.
    assert [row["tokens"] for row in rows] == [4 * 64, 12 * 64, 18 * 64]
    rates = pytorch_rates(Config(**TINY), 18)
    used = [row["learning_rate"] for row in rows]
    assert used == pytest.approx([rates[3], rates[11], rates[17]], rel=1e-6)
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"] < 600
    for name in ("train_loss", "val_loss"):  # it learns
        assert rows[-1][name] < rows[0][name] < math.log(50257)
    text = (data.parent / "val.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    size = sum(len(story.encode()) for story in text)
    for row in rows:
        bits = row["val_loss"] / math.log(2) * len(tokens_of(data, "val")) / size
        assert row["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("eval_interval, speeds", [
    # Steps end at 4, 8, 12, 16 and 18, an iteration is 64 tokens. Evaluations follow the third and
    # the last step here; the first step, which compiles, is left out.
    (12, [8 * 64 / 4, 6 * 64 / 4]),
    # Here the first follows the first step: nothing else could be measured.
    (6, [4 * 64 / 50, 8 * 64 / 4, 6 * 64 / 4]),
])
def test_the_speed_leaves_evaluations_out(data, tmp_path, monkeypatch, eval_interval, speeds):
    """By a clock that the first step moves by 50 seconds, others by 2, and each loss by 50."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock.now))
    run = new_run(tiny(data, tmp_path, eval_interval=eval_interval))
    step = run.step

    def slow_step() -> None:
        clock.now += 2 if run.state.iteration else 50
        step()

    def slow_loss(*args: Any) -> float:
        clock.now += 50
        return 1.0

    monkeypatch.setattr(run, "step", slow_step)
    monkeypatch.setattr(run, "mean_loss", slow_loss)
    train.train(run)
    told = [row["tokens_per_second"] for row in rows_of(run.folder.path / "log.csv")]
    assert told == pytest.approx(speeds)


def test_stderr_says_what_runs_and_how_it_went(finished, data):
    said = " ".join(finished.stderr.split())
    parameters = sum(p.numel() for p in GPT(Config(**TINY)).parameters())
    for words in (f"{parameters / 1e6:.1f} M parameters", "CPU", "float32", str(data), "256 tokens",
                  "tokens: 1,152", "learning rate 0.003", "0.0001", "batch_size 4", "seed 1337",
                  "iteration 6:", "iteration 18:", "validation loss", "perplexity",
                  "bits per byte", "first.png"):
        assert words in said, words
    told = said.partition("changed: ")[2].partition(" iteration 6:")[0]
    differing = {name for name in TINY if TINY[name] != getattr(Config(), name)}
    assert all(f"{name} {TINY[name]}" in told for name in differing) and len(differing) > 10


def test_the_plot_shows_rates_and_the_published_curve(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_run", loss_curve.draw_run)
    pictures = set()
    for rate, changes in ((1e-4, {}), (2e-4, {}), (1e-4, {"warmup_iters": 16}),
                          (1e-4, {"preset": "demo"})):
        run = new_run(tiny(data, tmp_path, **changes))
        run.plot.draw([dict(iteration=i, train_loss=9.0, val_loss=9.1, learning_rate=rate)
                       for i in (9, 18)])
        pictures.add((tmp_path / "plots" / "out.png").read_bytes())
    assert len(pictures) == 4


def test_model_pt_is_the_best_by_validation_loss_and_ckpt_pt_the_last(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    better, best = save(run, 6), weights_of(run)
    for p in run.model.parameters():
        p.data.mul_(3)
    worse = save(run, 12)
    kept, last = load_file(run.folder.path / "model.pt"), load_file(run.folder.path / "ckpt.pt")
    assert same(kept["model"], best) and kept["iteration"] == 6
    assert kept["val_loss"] == better["val_loss"] < worse["val_loss"]
    assert same(last["model"], weights_of(run))


# ------------------------------------------------------------ Resuming, and folders that hold a run


def test_a_run_resumed_twice_equals_one_that_was_never_interrupted(data, tmp_path):
    flags = TINY | dict(lr_decay_iters=24, eval_interval=8, embedding_lr_mult=3.0, data_dir=data,
                        plot_dir=tmp_path)
    main(**flags | dict(max_iters=24, out_dir=tmp_path / "whole"))
    main(**flags | dict(max_iters=8, out_dir=tmp_path / "0"))
    for number, length in ((1, 16), (2, 24)):
        out = shutil.copytree(tmp_path / str(number - 1), tmp_path / str(number))
        main("--resume", max_iters=length, lr_decay_iters=24, out_dir=out, plot_dir=tmp_path)
    check_equal(tmp_path / "2", tmp_path / "whole")


def test_a_folder_that_holds_a_run_is_refused_and_left_untouched(finished, tmp_path):
    before = snapshot(finished.folder)
    line = refusal(main, **finished.flags)
    assert "--resume" in line and "--overwrite" in line and "--out_dir" in line
    assert snapshot(finished.folder) == before
    out = tmp_path / "out"  # here the large files have been removed, and the log was kept
    out.mkdir()
    shutil.copy(finished.out / "log.csv", out)
    flags = finished.flags | dict(out_dir=out, plot_dir=tmp_path, max_iters=4, eval_interval=2)
    line = refusal(main, **flags)
    assert "log.csv" in line and "--overwrite" in line and "--resume" not in line
    main("--overwrite", **flags)
    assert [row["iteration"] for row in rows_of(out / "log.csv")] == [4]
    assert load_file(out / "model.pt")["iteration"] == 4


@pytest.mark.parametrize("changes", [{}, {"max_iters": 10}], ids=str)
def test_a_finished_run_says_so_and_is_left_untouched(finished, changes):
    """A run that is past a smaller max_iters is finished too."""
    before = snapshot(finished.folder)
    stdout, stderr = main("--resume", out_dir=finished.out, **changes)
    assert "finished" in stderr and "18" in stderr and "--eval_only" in stderr and stdout == ""
    assert snapshot(finished.folder) == before


def test_resume_lists_all_that_it_refuses_and_touches_nothing(finished):
    before = snapshot(finished.folder)
    # A width of 64 fits this run's two heads, though not the six of the preset.
    changes = dict(
        n_layer=2, n_head=4, n_embd=64, block_size=8, bias=False, gelu="tanh", batch_size=8,
        gradient_accumulation_steps=2, learning_rate=1.0, min_lr=0.0, warmup_iters=0,
        warmup_start_factor=0.0, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=1.0, grad_clip=0.0,
        dropout=0.0, seed=1, preset="demo", init="fan_in", eval_windows=3,
        embedding_lr_mult=2.0, matrix_optimizer="muon", momentum=0.5)
    old = load_model(str(finished.out / "model.pt")).config
    for some in (changes | dict(max_iters=30), dict(n_embd=64), dict(learning_rate=1.0)):
        line = refusal(main, "--resume", out_dir=finished.out, **some)
        for name in some.keys() & changes.keys():
            assert f" {name} {getattr(old, name)} -> {changes[name]}" in line
        assert "max_iters" not in line
    assert "toy" in refusal(main, "--resume", out_dir=finished.out, dataset="toy")
    assert snapshot(finished.folder) == before


def test_files_with_a_setting_that_is_gone_load_export_and_resume(finished, tmp_path):
    """Older versions wrote `embedding_init`. Nothing else differs from a file without it."""
    ends = []
    for name, written in (("new", {}), ("old", {"embedding_init": "subword"})):
        out = shutil.copytree(finished.out, tmp_path / name)
        for file in (out / "model.pt", out / "ckpt.pt"):
            content = load_file(file)
            content["config"] |= written
            torch.save(content, file)
        model = load_model(str(out / "model.pt"))
        assert model.config == load_model(str(finished.out / "model.pt")).config
        gpt.to_hugging_face(model).save_pretrained(tmp_path / f"hf_{name}")
        main("--resume", **finished.flags | dict(out_dir=out, plot_dir=tmp_path, max_iters=24))
        ends.append(load_file(out / "ckpt.pt"))
    assert same(ends[0]["model"], ends[1]["model"]) and ends[0]["state"]["iteration"] == 24
    assert snapshot(tmp_path / "hf_new") == snapshot(tmp_path / "hf_old")


def test_resume_takes_what_does_not_matter_and_what_is_said_again(finished, data, tmp_path):
    """Even a decay over fewer iterations than the preset's warmup has: this run's is shorter."""
    moved = shutil.copytree(data, tmp_path / "moved")
    out = copy_of(finished, tmp_path)
    changes = dict(data_dir=moved, out_dir=out, plot_dir=tmp_path / "p", max_iters=20,
                   lr_decay_iters=19, device_batch_size=3)
    main("--resume", **finished.flags | changes)
    rows = rows_of(out / "log.csv")
    assert [row["iteration"] for row in rows] == [6, 12, 18, 20]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert (tmp_path / "p" / "copy.png").exists()


# ----------------------------------------------------------------- Fine-tuning, and scoring a model

# What fine-tuning types: no architecture.
TUNING = {name: value for name, value in TINY.items()
          if name not in ("n_layer", "n_head", "n_embd", "block_size")}
EVAL = dict(device="cpu", dtype="float32", compile="false")
# A run that learns nothing.
FROZEN = TUNING | dict(learning_rate=1e-30, min_lr=0.0, max_iters=4, lr_decay_iters=4,
                       weight_decay=0.0)


@pytest.fixture(scope="session")
def export(finished, tmp_path_factory) -> Path:
    """The finished run's model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("export")
    gpt.to_hugging_face(load_model(str(finished.out / "model.pt"))).save_pretrained(folder)
    return folder


def score_in(text: str) -> str:
    """The two lines of a final score."""
    [found] = re.findall(r"validation loss .*\nperplexity .*", text)
    return found.strip()


def test_eval_only_says_what_the_run_said_of_itself_and_changes_nothing(finished, data):
    """The run of the fixture still holds its folder, as one that is going on does."""
    before = snapshot(finished.folder)
    stdout, stderr = main("--eval_only", out_dir=finished.out, max_iters=3, learning_rate=7, **EVAL)
    model = load_model(str(finished.out / "model.pt"))
    run = new_run(model.config, source=model)
    tokens = len(run.tokens["val"])
    text = [(run.tokens["val"], run.meta["splits"]["val"])]
    whole = train.score(run, text)["perplexity"]
    assert f"\nperplexity {whole:.2f}, " in stdout and "tokens" not in stdout
    # A run scores itself on a fifth of the tokens that it was trained on, 18 iterations of 64.
    part = train.score(run, text, 18 * 64 // 5)["perplexity"]
    own = score_in(finished.stderr)
    assert f"\nperplexity {part:.2f}, " in own and f" on 224 of {tokens:,} tokens\n" in own
    assert str(finished.out / "model.pt") in stderr and str(data) in stderr
    assert snapshot(finished.folder) == before


def test_eval_only_agrees_with_hugging_face_on_the_same_windows(export, data):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(export).eval()
    tokens = tokens_of(data, "val")
    starts = range(0, len(tokens) - 1, 16)
    assert 2 < len(tokens) - starts[-1] < 17  # the last window is an odd one
    expected, _ = plain_loss(lambda ids: theirs(ids).logits, tokens, starts)
    stdout, _ = main("--eval_only", init_from=export, data_dir=data, device_batch_size=7, **EVAL)
    words = stdout.replace(",", "").split()
    loss, perplexity, bits = (float(word) for word in words if word[0].isdigit())
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-5)  # the loss to 1e-5
    assert loss == pytest.approx(expected, abs=1e-4)
    size = sum(len(tale.encode()) for tale in write_tales(data.parent / "again.txt", 1, 25))
    assert bits == pytest.approx(expected / math.log(2) * len(tokens) / size, abs=1e-4)


def test_eval_only_scores_a_shorter_context_and_other_data(finished, tmp_path):
    other = prepare_tales(tmp_path, 3, 60)
    changes = ({}, {"block_size": 8}, {"data_dir": other})
    lines = {main("--eval_only", out_dir=finished.out, **flags)[0] for flags in changes}
    assert len(lines) == 3


def test_a_text_never_prepared_is_scored_whole(finished, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tales(tmp_path / "held.txt", 1, 25)  # the text that val.bin was made from
    expected = main("--eval_only", out_dir=finished.out, **EVAL)[0]
    stdout, stderr = main("--eval_only", out_dir=finished.out, dataset="held.txt", **EVAL)
    assert f"validation {stdout}" == expected  # which split a text is, it does not say
    assert f"held.txt ({len(tokens_of(data, 'val')):,} tokens)" in stderr
    assert files_in(tmp_path) == ["held.txt"]
    assert "gone.txt" in refusal(main, "--eval_only", out_dir=finished.out, dataset="gone.txt")
    (tmp_path / "empty.txt").touch()
    assert "no text" in refusal(main, "--eval_only", out_dir=finished.out, dataset="empty.txt")


def test_eval_only_refuses_what_it_cannot_score(finished, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "out/demo/model.pt" in refusal(main, "--eval_only", preset="demo")
    line = refusal(main, "--eval_only", "--resume", out_dir=finished.out)
    assert "--eval_only" in line and "--resume" in line
    assert "n_layer 1, not 2" in refusal(main, "--eval_only", out_dir=finished.out, n_layer=2)
    assert "prepare_data.py" in refusal(main, "--eval_only", init_from=export)
    for typed in (dict(dataset="toy"), dict(preset="demo")):  # a typed preset gives the data
        line = refusal(main, "--eval_only", init_from=export, **typed)
        assert "data/toy" in line and "TinyStories" not in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["model.pt", "ckpt.pt", "folder"])
def test_a_run_starts_from_weights(finished, export, data, tmp_path, monkeypatch, form):
    real = train.score
    monkeypatch.setattr(train, "score", lambda run, text, most=0: real(run, text))  # all of it
    source = export if form == "folder" else finished.out / form
    flags = FROZEN | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    stderr = main(init_from=source, **flags)[1]
    scored = main("--eval_only", init_from=source, data_dir=data, device_batch_size=4, **EVAL)[0]
    assert score_in(stderr) == score_in(scored)
    assert f"init_from {source}" in " ".join(stderr.split())
    ours, theirs = load_model(str(tmp_path / "out" / "model.pt")), load_model(str(source))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=1e-12)
    assert ours.config.init_from == str(source)
    assert (ours.config.n_embd, ours.config.block_size) == (32, 16)


def test_a_shorter_context_has_the_first_positions(finished, data, tmp_path):
    source = finished.out / "model.pt"
    folders = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path / "plots")
    flags = FROZEN | folders
    for changes, words in (
        (dict(block_size=17), "positions for 16 tokens only"),
        (dict(n_layer=2, n_embd=64), "n_layer 1, not 2, n_embd 32, not 64"),
        (dict(gelu="tanh"), "gelu exact, not tanh"), (dict(bias="false"), "bias True, not False"),
    ):
        assert words in refusal(main, init_from=source, **flags | changes)
    assert not any(tmp_path.iterdir())
    main(init_from=source, block_size=8, n_layer=1, **flags)
    ours, theirs = load_model(str(tmp_path / "out" / "model.pt")), load_model(str(source))
    learnt = theirs.transformer.wpe.weight[:8]
    torch.testing.assert_close(ours.transformer.wpe.weight, learnt, rtol=0, atol=1e-12)


def test_only_a_typed_architecture_counts_not_the_presets(finished, tmp_path, monkeypatch):
    out, model = str(tmp_path / "out"), str(finished.out / "model.pt")
    # A preset may name the model to start from. The demo has 3 layers, 96 wide, of 128 tokens.
    monkeypatch.setitem(config_module.PRESETS, "mine", dict(init_from=model, dropout=0.0))
    for typed in (dict(preset="demo", init_from=model), dict(preset="mine")):
        config, source = new_config(typed | dict(out_dir=out))
        assert (config.n_layer, config.n_embd, config.block_size, config.dropout) == (1, 32, 16, 0)
        assert isinstance(source, GPT)


def test_another_vocabulary_than_gpt2s_is_refused_before_anything_is_prepared(data, tmp_path):
    """A model from elsewhere may have one. To prepare TinyStories takes minutes."""
    small = Config(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=1000)
    save_file(tmp_path / "small.pt", small, GPT(small))
    before, text = snapshot(tmp_path), data.parent / "train.txt"
    start = TUNING | dict(out_dir=tmp_path / "out", plot_dir=tmp_path / "plots", dataset=text)
    for argv, flags in (((), start | dict(data_dir=data)), (("--eval_only",), dict(dataset=text)),
                        ((), start | dict(data_dir=tmp_path / "data"))):
        line = refusal(main, *argv, init_from=tmp_path / "small.pt", **flags)
        assert "vocab_size 1000" in line and "50257" in line
    assert snapshot(tmp_path) == before


def test_overwrite_loses_nothing_until_the_new_run_has_something_to_keep(finished, tmp_path):
    """The new run may start from the very model that it replaces."""
    out = copy_of(finished, tmp_path)
    flags = FROZEN | dict(data_dir=finished.flags["data_dir"], out_dir=out, plot_dir=tmp_path)
    before = snapshot(out)
    for source, words in {
        tmp_path / "none.pt": "none.pt", tmp_path: "no checkpoint", out / "log.csv": "log.csv",
    }.items():
        assert words in refusal(main, "--overwrite", init_from=source, **flags)
    flags["init_from"] = out / "model.pt"
    assert "not finite" in refusal(main, "--overwrite", **flags | dict(learning_rate=1e30))
    assert snapshot(out) == before
    out = shutil.copytree(out, tmp_path / "again")  # the first is held by this process
    main("--overwrite", **flags | dict(out_dir=out, init_from=out / "model.pt"))
    lines = {main("--eval_only", out_dir=folder, **EVAL)[0] for folder in (out, finished.out)}
    assert len(lines) == 1 and len(rows_of(out / "log.csv")) == 1


def test_a_resumed_run_needs_the_model_it_started_from_no_more(finished, data, tmp_path):
    source = shutil.copy(finished.out / "model.pt", tmp_path / "source.pt")
    flags = TUNING | dict(init_from=source, data_dir=data, plot_dir=tmp_path, eval_interval=8)
    main(**flags | dict(max_iters=16, out_dir=tmp_path / "whole"))
    main("--resume", **flags | dict(max_iters=8, out_dir=tmp_path / "part"))
    Path(source).unlink()
    shutil.copytree(tmp_path / "part", tmp_path / "rest")
    main("--resume", **flags | dict(max_iters=16, out_dir=tmp_path / "rest"))
    check_equal(tmp_path / "rest", tmp_path / "whole")
    assert "init_from" in refusal(main, "--resume", out_dir=tmp_path / "rest", init_from="other.pt")


# ------------------------------------------------- Data that is not there or not what was asked for


def refused_early(tmp_path: Path, **flags) -> str:
    """The line of a run that is refused before a model is built: one this wide fits no memory."""
    before = snapshot(tmp_path)
    folders = dict(out_dir=tmp_path / "out", plot_dir=tmp_path / "plots")
    line = refusal(main, **TINY | dict(n_embd=2**30, n_head=1) | folders | flags)
    assert snapshot(tmp_path) == before
    return line


def test_another_dataset_than_the_prepared_one_is_refused(finished, data, tmp_path):
    line = refused_early(tmp_path, data_dir=data, dataset="toy")
    assert "toy" in line and "train.txt" in line and "--data_dir" in line
    again = dict(dataset=data.parent / "train.txt", out_dir=copy_of(finished, tmp_path))
    assert "is finished" in main("--resume", **again)[1]


def test_a_split_shorter_than_a_crop_and_its_target_is_refused(data, tmp_path):
    length = len(tokens_of(data, "val"))  # the shorter of the two splits
    line = refused_early(tmp_path, data_dir=data, block_size=length)
    assert "val" in line and "block_size" in line and str(length + 1) in line
    new_run(tiny(data, tmp_path, block_size=length - 1))  # just short enough


@pytest.mark.parametrize("name, content", [("train.bin", b""), ("val.bin", None),
                                           ("meta.json", None)], ids=str)
def test_damaged_or_missing_data_is_refused_and_not_prepared_over(data, tmp_path, name, content):
    """All kinds of damage are in test_prepare_data.py."""
    path = shutil.copytree(data, tmp_path / "data") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert name in refused_early(tmp_path, data_dir=path.parent)


def test_a_typed_data_dir_is_never_filled_with_something_else(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "raw.txt").write_text("Once.")
    for preset in ("demo", "tuned"):
        line = refusal(main, data_dir=folder, preset=preset, out_dir=tmp_path / "out")
        assert "python prepare_data.py" in line and "meta.json" in line
    assert files_in(tmp_path) == ["mine/raw.txt"]


def test_a_typed_text_that_has_changed_is_refused_for_a_new_run_only(tmp_path):
    data, text = prepare_tales(tmp_path, 3, 60), tmp_path / "train.txt"
    flags = TINY | dict(data_dir=data, plot_dir=tmp_path, dataset=text, max_iters=2, eval_windows=1)
    main(out_dir=tmp_path / "one", **flags)
    with open(text, "a") as file:
        file.write("<|endoftext|>One more story.")
    line = refusal(main, out_dir=tmp_path / "two", **flags)
    assert "changed since" in line and "--overwrite" in line and not (tmp_path / "two").exists()
    copy = shutil.copytree(tmp_path / "one", tmp_path / "copy")
    main("--resume", out_dir=copy, dataset=text, max_iters=4)  # the .bin files decide
    text.unlink()
    main(out_dir=tmp_path / "three", **flags)  # what is gone is no obstacle


def test_several_ranks_do_not_prepare_data(data, tmp_path, monkeypatch):
    config = tiny(tmp_path / "data", tmp_path, dataset=str(data.parent / "train.txt"))
    monkeypatch.setattr(train, "Ranks", lambda device: SimpleNamespace(
        size=2, named_in_errors=contextlib.nullcontext))
    assert "prepare_data.py" in refusal(new_run, config)
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- Records: run.json and TensorBoard


def record_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def test_run_json_says_what_the_run_was_and_how_it_went(finished, data):
    record, rows = record_of(finished.out), rows_of(finished.out / "log.csv")
    kept = load_model(str(finished.out / "model.pt")).config
    assert record["settings"] == dataclasses.asdict(kept)
    assert record["differs"]["n_embd"] == 32 and "weight_decay" not in record["differs"]
    meta = load_meta(data)
    assert record["data"]["name"] == meta["dataset"]
    for split in ("train", "val"):
        assert record["data"]["hashes"][split] == meta["splits"][split]["sha256"]
        assert record["data"]["tokens"][split] == meta["splits"][split]["tokens"]
    assert record["versions"]["pytorch"] == torch.__version__
    assert "CPU" in record["versions"]["device"]
    assert record["tokens"] == 18 * 64 and record["seconds"] >= rows[-1]["seconds"]
    best, final = min(rows, key=lambda row: row["val_loss"]), record["final"]
    assert record["best"]["iteration"] == best["iteration"]
    assert record["best"]["val_loss"] == pytest.approx(best["val_loss"], abs=1e-5)
    assert final["perplexity"] == pytest.approx(math.exp(final["val_loss"]))
    assert f"{final['val_loss']:.4f}" in score_in(finished.stderr)
    assert (final["tokens_scored"], final["tokens"]) == (224, meta["splits"]["val"]["tokens"])


def test_run_json_is_there_from_the_start_and_a_resume_adds_to_it(finished, tmp_path, monkeypatch):
    seen, real = [], train.train

    def watched(run: train.Run) -> None:
        seen.append(record_of(run.folder.path))
        real(run)

    monkeypatch.setattr(train, "train", watched)
    out = copy_of(finished, tmp_path)
    main("--resume", max_iters=20, out_dir=out, plot_dir=tmp_path)
    assert seen[0]["tokens"] == 18 * 64 and seen[0]["final"] is None
    after = record_of(out)
    assert after["tokens"] == 20 * 64 and after["settings"]["max_iters"] == 20
    assert after["seconds"] > seen[0]["seconds"] > 0 and after["final"]
    again = shutil.copytree(out, tmp_path / "again")
    main("--overwrite", **finished.flags | dict(out_dir=again, plot_dir=tmp_path, max_iters=4))
    assert seen[1] == after  # until there is something to put in its place
    assert record_of(again)["tokens"] == 4 * 64


def test_a_loss_too_large_for_its_perplexity_is_json_all_the_same(data, tmp_path, monkeypatch):
    run = new_run(tiny(data, tmp_path))
    monkeypatch.setattr(run, "mean_loss", lambda *_: 1000.0)
    final = train.score(run, [(run.tokens["val"], run.meta["splits"]["val"])])
    run.folder.write_record(run, final)
    record = json.loads((run.folder.path / "run.json").read_text(), parse_constant=pytest.fail)
    assert record["final"]["perplexity"] is None


def test_tensorboard_gets_the_logs_figures_and_is_not_needed_to_score(data, tmp_path, monkeypatch):
    told = []
    writer = SimpleNamespace(add_scalar=lambda *args: told.append(args),
                             close=lambda: told.append("closed"))
    package = SimpleNamespace(SummaryWriter=lambda folder, **options: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    flags = TINY | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    main(**flags | dict(tensorboard="true"))
    expected = [(name, pytest.approx(value, abs=1e-5), row["iteration"])
                for row in rows_of(tmp_path / "out" / "log.csv") for name, value in row.items()]
    assert told == [*expected, "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "validation loss" in main("--eval_only", out_dir=tmp_path / "out", **EVAL)[0]


class DoesNotFit:
    """TensorBoard beside a protobuf that it does not fit."""

    def __getattr__(self, name: str) -> Any:
        raise TypeError("Descriptors cannot be created directly")


@pytest.mark.parametrize("package", [None, DoesNotFit()], ids=["missing", "broken"])
def test_tensorboard_that_does_not_work_is_refused(data, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    folders = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    assert "pip install -U tensorboard" in refusal(main, tensorboard="true", **TINY | folders)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- Epochs


@pytest.mark.parametrize("epochs", [0.01, 0.5, 2.0])
def test_max_epochs_is_another_way_to_say_max_iters(data, tmp_path, epochs):
    run = new_run(tiny(data, tmp_path, max_epochs=epochs, lr_decay_iters=None))
    assert run.config.max_iters == math.ceil(epochs * len(tokens_of(data, "train")) / 64)
    # The schedule follows, and is checked once the data is open.
    assert run.config.decay_iters == run.config.max_iters
    wrong = tiny(data, tmp_path, max_epochs=epochs, lr_decay_iters=1, warmup_iters=5)
    assert "lr_decay_iters 1" in refusal(new_run, wrong)


def test_the_length_typed_last_wins_and_two_on_one_command_line_are_refused(monkeypatch):
    assert "--max_epochs" in refusal(main, "--max_iters=3", "--max_epochs=1")
    monkeypatch.setitem(config_module.PRESETS, "long", dict(max_epochs=3.0))
    typed = Config.from_preset("long", max_iters=5)
    assert (typed.max_iters, typed.max_epochs) == (5, None)
    assert Config.from_preset("demo", max_epochs=0.5).max_epochs == 0.5
    # A default of config.py that somebody has edited gives way to a preset's max_iters too.
    monkeypatch.setattr(Config.__dataclass_fields__["max_epochs"], "default", 2.0)
    assert Config.from_preset("tuned").max_epochs is None
    assert Config.from_preset("reference", max_iters=5).max_epochs is None


def epoch_flags(data: Path, folder: Path) -> dict:
    """The flags of a small run that does not say how long it is."""
    flags = TINY | dict(data_dir=data, out_dir=folder / "out", plot_dir=folder)
    del flags["max_iters"], flags["lr_decay_iters"]
    return flags


def test_a_run_of_epochs_is_lengthened_by_more_of_them(data, tmp_path):
    size = len(tokens_of(data, "train"))
    said = main(**epoch_flags(data, tmp_path) | dict(max_epochs=0.05))[1]
    first = math.ceil(0.05 * size / 64)
    assert f"{first} iterations" in said and f"{first * 64 / size:.2f} epochs" in said
    assert "is finished" in main("--resume", out_dir=tmp_path / "out")[1]
    longer = shutil.copytree(tmp_path / "out", tmp_path / "longer")
    said = main("--resume", out_dir=longer, max_epochs=0.1, plot_dir=tmp_path)[1]
    assert "schedule changes" in said
    assert rows_of(longer / "log.csv")[-1]["iteration"] == math.ceil(0.1 * size / 64)


def test_full_is_one_epoch_and_says_so(tmp_path):
    data = prepare_tales(tmp_path, 3, 60)
    changes = dict(preset="full", eval_interval=1000)
    flags, size = epoch_flags(data, tmp_path) | changes, len(tokens_of(data, "train"))
    said, count = main(**flags)[1], math.ceil(size / 64)
    assert f"\n{count} iterations in" in said and f"{count * 64 / size:.2f} epochs" in said
    differs = record_of(tmp_path / "out")["differs"]
    assert "n_embd" in differs and not differs.keys() & {"max_iters", "max_epochs"}
    short = tmp_path / "short"
    assert "\n3 iterations in" in main(**flags | dict(max_iters=3, out_dir=short))[1]
    assert "is finished" in main("--resume", out_dir=short)[1]
    longer = dict(out_dir=shutil.copytree(short, tmp_path / "longer"), plot_dir=tmp_path)
    assert "\n4 iterations in" in main("--resume", max_iters=4, **longer)[1]
    differs = record_of(tmp_path / "longer")["differs"]
    assert differs["max_iters"] == 4 and "max_epochs" not in differs


@pytest.mark.parametrize("preset", ["reference", "tuned", "full", "demo"])
def test_paths_are_no_differences_from_a_preset(preset):
    config = Config.from_preset(preset, data_dir="some/where", out_dir="elsewhere")
    assert train.differences(config) == {}
    assert train.differences(dataclasses.replace(config, seed=7)) == {"seed": 7}
    typed = Config.from_preset(preset, max_iters=config.max_iters)  # `full` is as long as its data
    assert train.differences(typed) == ({"max_iters": 40_000} if preset == "full" else {})


# ------------------------------------------------ Schedules that cannot happen, advice that works


@pytest.mark.parametrize("changes, words", [
    (dict(warmup_iters=40, lr_decay_iters=60), "warmup of 40 iterations is not shorter"),
    (dict(warmup_iters=18), "warmup of 18 iterations is not shorter"),
    (dict(lr_decay_iters=60), "decay would end at iteration 60"),
    (dict(max_iters=30, lr_decay_iters=30, max_epochs=None), ""),
])
def test_a_schedule_that_cannot_happen_is_told_at_the_start(data, tmp_path, changes, words):
    lines = train.description(new_run(tiny(data, tmp_path, **changes)))
    assert any(words in line for line in lines)
    assert any("rate only reaches" in " ".join(line.split()) for line in lines) == bool(words)


def test_steps_and_tokens_of_a_short_run_agree_and_many_epochs_are_told(data, tmp_path):
    short = "\n".join(train.description(new_run(tiny(data, tmp_path, max_iters=2))))
    assert "2 iterations in one step of 128 tokens: 128" in short and "overfitting" not in short
    shortest = "\n".join(train.description(new_run(tiny(data, tmp_path, max_iters=1))))
    assert "\n1 iteration in one step of 64 tokens: 64" in shortest
    assert f"training tokens of {data.parent.name}/train.txt" in short
    size = len(tokens_of(data, "train"))
    long = "\n".join(train.description(new_run(tiny(data, tmp_path, max_iters=size))))
    assert "is read 64 times" in long and "overfitting" in " ".join(long.split())


def test_a_diverged_run_is_told_a_command_that_works_and_keeps_its_settings(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    run = train.resumed_run(train.RunFolder(out), {"out_dir": str(out)})
    line = refusal(run.fail, "it diverged")
    [command] = re.findall(r"python train.py (.*)", line)
    typed = shlex.split(command)
    config, source = new_config(train.parse_command_line(typed)[0])
    assert config.init_from == str(out / "model.pt") and source is not None
    for name, usual in (("learning_rate", 1e-4), ("min_lr", 5e-4)):  # those of the preset
        lower = min(getattr(run.config, name) / 3, usual)
        assert getattr(config, name) == pytest.approx(lower, rel=0.02)
    for name in TINY.keys() - {"learning_rate", "min_lr"}:
        assert getattr(config, name) == getattr(run.config, name), name
    main(*typed, max_iters=2, plot_dir=tmp_path, eval_windows=2)
    run.folder.replaces = True  # as with --overwrite: the files are another run's
    assert ".pt" not in refusal(run.fail, "it diverged")
    run.folder.replaces = False
    run.folder.model.unlink()  # no evaluation yet: ckpt.pt may hold weights that diverge
    assert ".pt" not in refusal(run.fail, "it diverged")


def test_a_diverged_run_whose_preset_is_gone_is_told_a_command_that_works(
    data, tmp_path, monkeypatch
):
    recipe = TINY | dict(warmup_iters=None, learning_rate=1.0, weight_decay=0.0, max_iters=8)
    flags = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    with monkeypatch.context() as edited:
        edited.setitem(config_module.PRESETS, "mine", recipe)
        main(preset="mine", **flags)
    out = shutil.copytree(tmp_path / "out", tmp_path / "copy")
    run = train.resumed_run(train.RunFolder(out), {"out_dir": str(out)})
    run.config = dataclasses.replace(run.config, learning_rate=1e9)
    [command] = re.findall(r"python train.py (.*)", refusal(run.fail, "it diverged"))
    config, _ = new_config(train.parse_command_line(shlex.split(command))[0])
    assert (config.preset, config.learning_rate, config.warmup) == ("reference", 1e-4, 0)
    for name in ("weight_decay", "max_iters", "lr_decay_iters", "batch_size"):
        assert getattr(config, name) == recipe[name], name


def test_a_better_model_pt_than_the_checkpoint_knows_of_is_kept(finished, tmp_path):
    """As where a backup of ckpt.pt is put back."""
    out = copy_of(finished, tmp_path)
    content = load_file(out / "ckpt.pt")
    content["state"]["log"] = content["state"]["log"][:1]
    content["config"]["dataset"] = "/the/same/text/elsewhere"
    torch.save(content, out / "ckpt.pt")
    run = train.resumed_run(train.RunFolder(out), {"out_dir": str(out)})
    assert run.folder.best_loss == load_file(out / "model.pt")["val_loss"]


def test_data_that_moved_or_was_prepared_anew_is_told_what_to_do(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    line = refusal(main, "--resume", out_dir=out, data_dir=tmp_path / "none")
    assert "--data_dir" in line and "not in" in line
    other = prepare_tales(tmp_path, 8)
    line = refusal(main, "--resume", out_dir=out, data_dir=other)
    assert "--init_from" in line and "has changed" in line


def test_the_commit_of_an_edited_tree_is_dirty(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str | None:
        return train.versions_of(torch.device("cpu"))["commit"]

    file = tmp_path / "train.py"
    monkeypatch.setattr(train, "__file__", str(file))
    git("init")
    assert commit() is None
    file.touch()
    git("add", "train.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is no commit")
    (tmp_path / "untracked").touch()
    assert commit() == git("rev-parse", "HEAD")
    file.write_text("edited")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


# ------------------------------------------------------------------------ No trained model is lost


def stop_at(iteration: int, monkeypatch) -> None:
    """Ctrl-C before the step that begins at this iteration."""
    step = train.Run.step

    def interrupted(run: train.Run) -> None:
        if run.state.iteration == iteration:
            signal.raise_signal(signal.SIGINT)
        step(run)

    monkeypatch.setattr(train.Run, "step", interrupted)


@pytest.mark.parametrize("iteration", [0, 4])
def test_overwrite_typed_by_mistake_and_ctrl_c_leave_the_old_run(
    finished, tmp_path, monkeypatch, signals, iteration
):
    out = copy_of(finished, tmp_path)
    files = snapshot(out)
    stop_at(iteration, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main("--overwrite", **finished.flags | dict(out_dir=out, eval_interval=12))
    assert stopped.value.code == 130 and snapshot(out) == files


def test_overwrite_of_nothing_leaves_a_checkpoint_at_ctrl_c(
    finished, tmp_path, monkeypatch, signals
):
    stop_at(4, monkeypatch)
    with pytest.raises(SystemExit):
        main("--overwrite", **finished.flags | dict(out_dir=tmp_path / "new"))
    assert load_file(tmp_path / "new" / "ckpt.pt")["state"]["iteration"] == 4


@pytest.mark.parametrize("mode", [[], ["--resume"]])
def test_a_run_that_another_process_has_ended_meanwhile_is_not_replaced(
    finished, tmp_path, monkeypatch, mode
):
    out, compile_model = tmp_path / "new", train.compile_model

    def slow(run: train.Run) -> None:
        shutil.copytree(finished.out, out)
        compile_model(run)

    monkeypatch.setattr(train, "compile_model", slow)
    refusal(main, *mode, **finished.flags | dict(out_dir=out))
    assert snapshot(out) == snapshot(finished.out)


def test_ctrl_c_in_the_last_picture_leaves_out_the_story(finished, tmp_path, monkeypatch, signals):
    def write(folder: train.RunFolder, run: train.Run, final: dict | None = None) -> None:
        if final:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.RunFolder, "write_record", write)
    monkeypatch.setattr(train, "tell_story", pytest.fail)
    with pytest.raises(SystemExit) as stopped:
        main(**finished.flags | dict(out_dir=tmp_path / "new", max_iters=4))
    assert stopped.value.code == 130


def test_ctrl_c_in_the_story_is_python_s_own(finished, tmp_path, monkeypatch, signals):
    def generate(*_: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(gpt, "generate", generate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    with pytest.raises(KeyboardInterrupt):
        main(**finished.flags | dict(out_dir=tmp_path / "new", max_iters=4))
    assert (tmp_path / "new" / "model.pt").exists()


def test_eval_only_on_a_text_takes_the_separator_of_the_model_s_data(tmp_path):
    tales = write_tales(tmp_path / "a.txt", 1, 60)
    for name, mark in (("a", "<|endoftext|>"), ("b", "</s>")):
        text = tmp_path / f"{name}.txt"
        text.write_text(mark.join(tales), encoding="utf-8")
        prepare(str(text), tmp_path / name, val_fraction=0.2, separator=mark, num_threads=1)
    flags = TINY | dict(data_dir=tmp_path / "b", out_dir=tmp_path / "out", plot_dir=tmp_path)
    main(**flags | dict(max_iters=4))
    scores = [main("--eval_only", out_dir=tmp_path / "out", dataset=tmp_path / name, device="cpu",
                   dtype="float32")[0] for name in ("a.txt", "b.txt")]
    assert scores[0] == scores[1]
