"""train.py against independent oracles: PyTorch's schedulers, plain steps, plain loops."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import config
from config import Config, UserError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY,
    check_equal,
    files_in,
    main,
    new_run,
    refusal,
    rows_of,
    same,
    snapshot,
    tiny,
    write_tales,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import model as gpt
import train
from model import GPT, load_file, load_model, pick_device, pick_dtype, save_file
from plots import loss_curve
from prepare_data import prepare, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "signals")

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


# ------------------------------------------------------------------------------------------
# The learning rate


def pytorch_rates(config: Config, count: int) -> list[float]:
    """The rates of the first `count` iterations, by PyTorch's schedulers. The reference run used
    those of the cosine.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)

    def decay() -> LRScheduler:
        length = config.decay_iters - config.warmup
        if config.lr_schedule == "linear":
            return LinearLR(optimizer, 1.0, config.min_lr / config.learning_rate,
                            total_iters=length)
        return CosineAnnealingLR(optimizer, length, eta_min=config.min_lr)

    if config.warmup:
        linear = LinearLR(optimizer, config.warmup_start_factor, total_iters=config.warmup)
        scheduler = SequentialLR(optimizer, [linear, decay()], [config.warmup])
    else:
        scheduler = decay()
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"min_lr": 0.0}, {"warmup_iters": 0}, {"warmup_iters": 1}, {"lr_decay_iters": 20_000},
        {"warmup_start_factor": 1.0},
        {"lr_schedule": "linear", "learning_rate": 1e-3},
        {"lr_schedule": "linear", "learning_rate": 7e-4, "min_lr": 5e-5, "warmup_iters": None},
    ],
    ids=str,
)
def test_the_learning_rate_is_pytorchs_at_every_one_of_10_000_iterations(changes):
    config = Config(**changes)
    ours = [train.learning_rate_at(config, i) for i in range(10_000)]
    np.testing.assert_allclose(ours, pytorch_rates(config, 10_000), rtol=1e-9, atol=1e-18)


def test_the_reference_rate_rises_from_a_third_of_1e_4_over_1e_4_to_5e_4():
    config = Config()
    assert train.learning_rate_at(config, 0) == pytest.approx(1e-4 / 3)
    assert train.learning_rate_at(config, 1000) == pytest.approx(1e-4)
    assert train.learning_rate_at(config, 5500) == pytest.approx(3e-4)  # halfway between the two
    assert train.learning_rate_at(config, 10_000) == pytest.approx(5e-4)
    rates = [train.learning_rate_at(config, i) for i in range(10_001)]
    assert all(a < b for a, b in itertools.pairwise(rates))


def test_a_run_shorter_than_its_warmup_is_the_beginning_of_a_longer_one():
    short, long = Config(max_iters=100), Config()
    rates = [[train.learning_rate_at(config, i) for i in range(100)] for config in (short, long)]
    assert rates[0] == rates[1]


def test_the_rate_stays_at_its_minimum_behind_the_decay():
    config = Config(max_iters=3000, lr_decay_iters=2000)
    ours = [train.learning_rate_at(config, i) for i in range(2000)]
    np.testing.assert_allclose(ours, pytorch_rates(config, 2000), rtol=1e-9)
    assert {train.learning_rate_at(config, i) for i in range(2000, 3000)} == {config.min_lr}


def test_a_decay_of_no_length_jumps_to_the_minimum_after_the_warmup():
    config = Config(lr_decay_iters=1000, warmup_iters=1000)
    ours = [train.learning_rate_at(config, i) for i in range(1000)]
    np.testing.assert_allclose(ours, pytorch_rates(Config(), 1000), rtol=1e-9)
    assert {train.learning_rate_at(config, i) for i in (1000, 1001, 9999)} == {config.min_lr}


# ------------------------------------------------------------------------------------------
# Steps and evaluations: when


def boundaries(config: Config) -> list[int]:
    ends = [0]
    while ends[-1] < config.max_iters:
        ends.append(train.step_end(config, ends[-1]))
    return ends[1:]


def test_a_step_is_over_consecutive_iterations_and_the_last_may_hold_fewer():
    assert boundaries(Config(max_iters=18, gradient_accumulation_steps=4)) == [4, 8, 12, 16, 18]
    assert boundaries(Config(max_iters=3, gradient_accumulation_steps=4)) == [3]
    ends = boundaries(Config())
    assert len(ends) == 313 and ends[-2:] == [9984, 10_000]


def test_a_step_that_was_begun_in_the_middle_ends_where_it_always_does():
    config = Config(max_iters=18, gradient_accumulation_steps=4)
    ends = [train.step_end(config, i) for i in range(18)]
    assert ends == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4 + [18] * 2


def test_the_evaluation_at_500_happens_at_the_last_step_before_it():
    points = train.evaluation_points(Config())
    assert points[480] == 500 and points[992] == 1000 and points[9472] == 9500
    assert list(points.values()) == list(range(500, 10_001, 500))


@pytest.mark.parametrize(
    "steps, interval, length",
    itertools.product([1, 3, 4, 32], [1, 3, 4, 10, 500], [1, 7, 32, 100]),
)
def test_evaluations_fall_on_their_boundaries(steps, interval, length):
    config = Config(gradient_accumulation_steps=steps, eval_interval=interval, max_iters=length)
    points, ends = train.evaluation_points(config), boundaries(config)
    assert 0 not in points  # never before training
    assert points[length] == length  # always at the end
    # The oracle: an iteration's evaluation belongs to the last boundary that is not after it,
    # and a boundary has the first of those that fall on it.
    due = {}
    for name in range(interval, length, interval):
        before = [end for end in ends if end <= name]
        if before:
            due.setdefault(before[-1], name)
    assert points == due | {length: length}


def test_an_evaluation_is_due_once_and_never_between_its_boundaries():
    config = Config(max_iters=18, gradient_accumulation_steps=4, eval_interval=6)
    points = train.evaluation_points(config)
    assert points == {4: 6, 12: 12, 18: 18}
    log = []
    for iteration, name in ((0, None), (4, 6), (8, None), (12, 12), (16, None), (18, 18)):
        state = train.State(iteration=iteration, log=log)
        assert train.due_evaluation(points, state) == name
        assert not train.is_finished(config, state)
        if name:
            log.append(dict(iteration=name))
            assert train.due_evaluation(points, state) is None
    assert train.is_finished(config, train.State(iteration=18, log=log))


def test_a_run_that_is_past_a_smaller_max_iters_is_finished():
    config = Config(max_iters=10, gradient_accumulation_steps=4, eval_interval=6)
    assert train.is_finished(config, train.State(iteration=12, log=[dict(iteration=12)]))


# ------------------------------------------------------------------------------------------
# Batches


def test_crops_are_a_function_of_seed_and_iteration_alone():
    config = Config(seed=3)
    starts = train.crop_starts(config, 7, 10_000)
    np.random.seed(99)
    torch.manual_seed(99)
    other = Config(seed=3, device_batch_size=5, gradient_accumulation_steps=2, max_iters=50,
                   dropout=0.0, n_layer=1, learning_rate=1.0)
    assert np.array_equal(starts, train.crop_starts(other, 7, 10_000))
    assert starts.shape == (config.batch_size,)


def test_seeds_and_iterations_do_not_overlap():
    crops = {(s, i): tuple(train.crop_starts(Config(seed=s), i, 10**6))
             for s in (0, 1, 2, 2**32, 2**63 - 1) for i in (0, 1, 2, 3)}
    assert len(set(crops.values())) == len(crops)


def test_crops_reach_both_ends_of_a_split_and_never_over_them():
    config = Config(block_size=16, batch_size=64)
    length = 16 + 5
    seen = np.concatenate([train.crop_starts(config, i, length) for i in range(20)])
    assert set(seen) == {0, 1, 2, 3, 4}  # a crop and its targets are 17 tokens
    assert set(train.crop_starts(config, 0, 17)) == {0}


def test_crops_are_spread_evenly():
    config = Config(block_size=16, batch_size=1000)
    starts = np.concatenate([train.crop_starts(config, i, 26) for i in range(10)])
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10 and (abs(counts - 1000) < 5 * math.sqrt(1000)).all()


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


def test_y_is_x_shifted_by_one(data):
    split = np.memmap(data / "train.bin", dtype="<u2", mode="r")
    starts = np.array([0, 5, 5, len(split) - 17])
    x, y = train.read_batch(split, starts, 16, torch.device("cpu"))
    expected_x, expected_y = windows(tokens_of(data, "train"), starts, 16)
    assert torch.equal(x, expected_x) and torch.equal(y, expected_y) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_evaluation_windows_are_fixed_and_evenly_spaced_from_end_to_end():
    config = Config(block_size=16, eval_windows=20)
    starts = train.even_starts(config, 10_000)
    assert (len(starts), starts[0], starts[-1]) == (20, 0, 10_000 - 17)
    assert np.ptp(np.diff(starts)) <= 1


@pytest.mark.parametrize(
    "changes", [{"seed": 8}, {"batch_size": 5}, {"batch_size": 300}, {"device_batch_size": 3}],
    ids=str,
)
def test_evaluation_windows_change_with_neither_seed_nor_batch(changes):
    """So that the logs of two runs compare."""
    config = Config(block_size=16, eval_windows=20)
    other = dataclasses.replace(config, **changes)
    starts = train.even_starts(config, 10_000)
    assert len(starts) == 20 and np.array_equal(starts, train.even_starts(other, 10_000))


def test_a_split_with_few_windows_is_evaluated_on_each_of_them_once():
    config = Config(block_size=16, eval_windows=128)
    assert train.even_starts(config, 20).tolist() == [0, 1, 2, 3]
    assert train.even_starts(config, 17).tolist() == [0]


# ------------------------------------------------------------------------------------------
# The first weights


def test_a_run_begins_with_the_first_vectors_it_is_told(data, tmp_path):
    plain, run = (new_run(tiny(data, tmp_path, embedding_init=name))
                  for name in ("random", "subword"))
    dog, capital, cat = (tokenizer().encode_ordinary(text)[0] for text in (" dog", " Dog", " cat"))
    for of, low, high in ((plain, -1, 0.7), (run, 0.7, 1)):
        rows = of.model.transformer.wte.weight.detach()
        assert low < torch.cosine_similarity(rows[dog], rows[capital], dim=0) < high
        assert torch.cosine_similarity(rows[dog], rows[cat], dim=0) < 0.7
    ours, theirs = weights_of(plain), weights_of(run)
    del ours["transformer.wte.weight"], theirs["transformer.wte.weight"]
    assert same(ours, theirs)
    source = GPT(run.config)
    begun = train.start(run.config, {}, None, source)
    assert same(weights_of(begun), dict(source.named_parameters()))
    shake(run)
    train.save_checkpoint(run)
    resumed = train.start(run.config, {}, load_file(run.out_dir / "ckpt.pt"))
    assert same(weights_of(resumed), weights_of(run))


# ------------------------------------------------------------------------------------------
# One step

# A large eps keeps AdamW's step in proportion to the gradient, so that its size counts (a
# mean, not a sum; clipped or not) and rounding does not; the clipping is at work.
PLAIN = dict(dropout=0.0, eps=1e-3, learning_rate=0.1, grad_clip=0.3, max_iters=6, warmup_iters=3,
             lr_decay_iters=10, weight_decay=0.5)


def plain_steps(
    run: train.Run, data: Path, steps: list[range]
) -> tuple[dict[str, torch.Tensor], float, float]:
    """The oracle: each step one large batch, full logits, plain AdamW. Returns the weights, and the
    last step's loss and gradient norm.
    """
    config = run.config
    model = GPT(config)
    model.load_state_dict(run.model.state_dict())
    named = list(model.named_parameters())
    spared = [p for name, p in named if name.endswith(".bias") or ".ln_" in name]
    decayed = [p for name, p in named if not (name.endswith(".bias") or ".ln_" in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2),
                                  eps=config.eps, fused=False, foreach=False)
    tokens = tokens_of(data, "train")
    rates = pytorch_rates(config, config.max_iters)
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
    return dict(named), loss.item(), norm.item()


@pytest.mark.parametrize("device_batch_size", [None, 1, 3, 1000])
def test_steps_equal_plain_ones_on_one_large_batch(data, tmp_path, device_batch_size):
    """Four iterations, then the last two: the gradient is the mean over the iterations a step
    holds, however they are cut into micro-batches.
    """
    run = new_run(tiny(data, tmp_path, device_batch_size=device_batch_size, **PLAIN))
    expected, loss, norm = plain_steps(run, data, [range(0, 4), range(4, 6)])
    before = weights_of(run)
    run.step()
    run.step()
    assert run.state.iteration == 6
    assert run.loss.item() == pytest.approx(loss, rel=1e-5)
    assert run.state.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    assert norm > run.config.grad_clip
    for name, p in run.model.named_parameters():
        moved = (expected[name] - before[name]).abs().max()
        assert (p - expected[name]).abs().max() < 1e-3 * moved, name


def test_without_clipping_the_gradient_is_left_as_it_is(data, tmp_path):
    run = new_run(tiny(data, tmp_path, **PLAIN | {"grad_clip": 0.0}))
    expected, _, _ = plain_steps(run, data, [range(0, 4)])
    before = weights_of(run)
    run.step()
    name = "transformer.wpe.weight"
    moved = (expected[name] - before[name]).abs().max()
    assert (run.model.get_parameter(name) - expected[name]).abs().max() < 1e-3 * moved


VECTORS = (".bias", "ln_1.weight", "ln_2.weight", "ln_f.weight")
KINDS = {
    "embedding_lr_mult": ("wte.weight", "wpe.weight", *VECTORS),
}
RATES = [{}, {"embedding_lr_mult": 3.0}]


def rate_of(name: str, config: Config) -> float:
    """A parameter's rate, as a multiple of the learning rate, by its name."""
    for setting, ends in KINDS.items():
        if name.endswith(ends):
            return getattr(config, setting)
    return 1.0


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_each_kind_of_parameter_moves_at_its_rate(data, tmp_path, rates):
    run = new_run(tiny(data, tmp_path, weight_decay=0.0, grad_clip=0.0, **rates))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.update_weights(learning_rate=0.1)
    # AdamW's first step is the rate, whatever the gradient's size.
    for name, p in run.model.named_parameters():
        moved = torch.full_like(p, 0.1 * rate_of(name, run.config))
        torch.testing.assert_close(before[name] - p.detach(), moved, msg=name)


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_decay_pulls_matrices_and_embeddings_at_their_rate_but_no_bias_or_layernorm(
    data, tmp_path, rates
):
    run = new_run(tiny(data, tmp_path, weight_decay=0.5, **rates))
    for p in run.model.parameters():
        p.data.add_(1.0)
        p.grad = torch.zeros_like(p)  # then AdamW does nothing but decay
    before = weights_of(run)
    run.update_weights(learning_rate=0.1)
    for name, p in run.model.named_parameters():
        spared = name.endswith(".bias") or ".ln_" in name
        rate = 0.1 * rate_of(name, run.config)
        kept = 1.0 if spared else 1 - rate * 0.5
        torch.testing.assert_close(p.detach(), before[name] * kept, msg=name)


OPTIMIZERS = pytest.mark.parametrize("matrix_optimizer", ["adamw", "muon"])


@pytest.mark.parametrize("shape, parts", [((24, 8), 1), ((8, 24), 1), ((8, 8), 1), ((24, 8), 3)])
def test_muon_steps_as_pytorchs_own(shape, parts):
    """Five steps; queries, keys and values (parts 3) as three matrices. Both in bfloat16."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch 2.9 or later has a Muon to compare with")
    torch.manual_seed(0)
    ours, other = (torch.nn.Parameter(torch.randn(shape)) for _ in range(2))
    start = [ours.detach().clone(), other.detach().clone()]
    theirs = [torch.nn.Parameter(part.clone()) for p in start for part in p.chunk(parts)]
    group = dict(params=[ours, other], momentum=0.9, parts=parts, weight_decay=0.1)
    optimizer = train.Muon([group], torch.bfloat16, lr=0.02)
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


@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6), (2, 2, 8, 8)])
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
    plain, run = (new_run(tiny(data, tmp_path, matrix_optimizer=name, momentum=0.9))
                  for name in ("adamw", "muon"))
    names = {p: name for name, p in run.model.named_parameters()}
    groups = run.optimizer.param_groups
    taken = {names[p] for group in groups if "momentum" in group for p in group["params"]}
    assert taken == {f"transformer.h.0.{name}.weight" for name in
                     ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    for of in (plain, run):
        of.step()
    ours, theirs = weights_of(run), weights_of(plain)
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == taken


def test_dropout_is_a_function_of_seed_and_place(data, tmp_path):
    def weights_after(seed, noise):
        run = new_run(tiny(data, tmp_path, dropout=0.3, seed=seed))
        torch.manual_seed(noise)  # what the process did before must not matter
        run.step()
        return weights_of(run)

    assert same(weights_after(5, 0), weights_after(5, 1))
    assert not same(weights_after(5, 0), weights_after(6, 0))


def test_dropout_differs_between_the_micro_batches_of_a_step(data, tmp_path):
    """The same sequences in two micro-batches: with one mask for both, the second would repeat the
    first's loss.
    """
    run = new_run(tiny(data, tmp_path, dropout=0.5, gradient_accumulation_steps=2))
    losses = []
    run.model.register_forward_hook(lambda module, arguments, loss: losses.append(loss.item()))
    x, y = windows(tokens_of(data, "train"), [0, 1, 2, 3], 16)
    run.model.register_forward_pre_hook(lambda module, arguments: (x, y))
    run.step()
    assert len(losses) == 2 and losses[0] != losses[1]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
HARDWARE = [
    pytest.param("cpu", "bfloat16"), pytest.param("cuda", "float16", marks=NO_GPU),
    pytest.param("cuda", "bfloat16", marks=NO_GPU), pytest.param("cuda", "float32", marks=NO_GPU),
]


@pytest.mark.parametrize("device, dtype", HARDWARE)
def test_steps_in_every_precision_stay_close_to_float32(data, tmp_path, device, dtype):
    if (device, dtype) == ("cuda", "bfloat16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    changes = dict(dropout=0.0, learning_rate=1e-2, warmup_iters=0)
    exact = new_run(tiny(data, tmp_path, **changes))
    run = new_run(tiny(data, tmp_path, device=device, dtype=dtype, **changes))
    assert run.scaler.is_enabled() == (dtype == "float16")
    start = exact.mean_loss(exact.tokens["val"], train.even_starts(exact.config, 500))
    for _ in range(3):
        exact.step()
        run.step()
        assert run.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    # Unscaled before it is measured.
    assert run.state.grad_norm.item() == pytest.approx(exact.state.grad_norm.item(), rel=5e-2)
    assert run.state.skipped_updates == 0
    starts = train.even_starts(exact.config, 500)
    losses = [r.mean_loss(r.tokens["val"], starts) for r in (exact, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[0] < 0.95 * start
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


# ------------------------------------------------------------------------------------------
# Gradients that are not finite


def poison(run: train.Run, value: float, times: float = math.inf):
    """One entry of one gradient becomes `value`, in the first `times` backward passes."""
    calls = itertools.count()

    def spoil(gradient):
        return gradient.index_fill(0, torch.tensor([3]), value) if next(calls) < times else gradient

    return run.model.transformer.ln_f.weight.register_hook(spoil)


@OPTIMIZERS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    data, tmp_path, value, matrix_optimizer
):
    run = new_run(tiny(data, tmp_path, matrix_optimizer=matrix_optimizer))
    before = weights_of(run)
    handle = poison(run, value)
    run.step()
    handle.remove()
    assert same(weights_of(run), before)
    assert run.state.skipped_updates == 1 and run.state.iteration == 4
    # The optimizer has not noticed either: the next step is that of a run without the bad one.
    clean = new_run(tiny(data, tmp_path, matrix_optimizer=matrix_optimizer))
    clean.state.iteration = 4
    for r in (run, clean):
        r.step()
    assert same(weights_of(run), weights_of(clean)) and not same(weights_of(run), before)


def test_ten_skipped_steps_in_a_row_end_the_run_in_one_line(data, tmp_path):
    run = new_run(tiny(data, tmp_path, gradient_accumulation_steps=1, max_iters=12,
                       eval_interval=100))
    before = weights_of(run)
    poison(run, math.nan)
    line = refusal(train.train, run)
    assert "the gradient has not been finite for 10 steps" in line and "learning_rate" in line
    assert same(weights_of(run), before)


def test_nine_skipped_steps_in_a_row_are_only_counted(data, tmp_path):
    run = new_run(tiny(data, tmp_path, gradient_accumulation_steps=1, max_iters=12,
                       eval_interval=100))
    poison(run, math.nan, times=train.MAX_SKIPPED - 1)
    train.train(run)
    assert rows_of(run.out_dir / "log.csv")[-1]["skipped_updates"] == train.MAX_SKIPPED - 1 == 9


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    run.step()
    train.save_checkpoint(run, train.evaluate(run, 6, 1.0))
    files = snapshot(run.out_dir)
    run.model.transformer.ln_f.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="ckpt.pt") as mistake:
        train.evaluate(run, 12, 1.0)
    assert "\n" not in str(mistake.value) and snapshot(run.out_dir) == files


# ------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def plain_loss(
    run: train.Run, tokens: np.ndarray, starts: list[int], size: int
) -> tuple[float, int]:
    """Summed cross-entropy, one window at a time, and how many tokens that is."""
    total, count = 0.0, 0
    run.model.eval()
    for start in starts:
        window = torch.tensor(tokens[start : start + size + 1])
        logits = run.model(window[None, :-1])[0].double()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    run.model.train()
    return total, count


@pytest.mark.parametrize("device_batch_size", [None, 3, 1000])
def test_an_evaluation_is_the_mean_over_its_windows_with_dropout_off(
    data, tmp_path, device_batch_size
):
    run = new_run(tiny(data, tmp_path, dropout=0.5, device_batch_size=device_batch_size))
    shake(run)
    tokens = tokens_of(data, "val")
    starts = train.even_starts(run.config, len(tokens))
    total, count = plain_loss(run, tokens, starts, 16)
    assert run.mean_loss(run.tokens["val"], starts) == pytest.approx(total / count, rel=1e-5)
    assert run.model.training  # and training goes on with it


def test_two_evaluations_differ_only_by_the_weights(data, tmp_path):
    run = new_run(tiny(data, tmp_path, dropout=0.5))
    shake(run)
    first, second = (train.evaluate(run, label, 1.0) for label in (6, 12))
    assert (first["train_loss"], first["val_loss"]) == (second["train_loss"], second["val_loss"])


def pieces_of(tokens: np.ndarray, sizes: list[int]) -> list[tuple[np.ndarray, dict[str, int]]]:
    """A text in batches, as `train.score` takes it; a byte is a token."""
    pieces = np.split(tokens, np.cumsum(sizes)[:-1])
    return [(piece, dict(tokens=len(piece), bytes=len(piece))) for piece in pieces]


@pytest.mark.parametrize("length", [17, 18, 32, 33, 100, None])
def test_the_whole_split_scores_every_token_but_the_first_exactly_once(data, tmp_path, length):
    run = new_run(tiny(data, tmp_path, device_batch_size=3))
    shake(run)
    tokens = tokens_of(data, "val")[:length]
    total, count = plain_loss(run, tokens, list(range(0, len(tokens) - 1, 16)), 16)
    assert count == len(tokens) - 1
    final = train.score(run, pieces_of(tokens, [len(tokens)]))
    assert final["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert final["tokens_scored"] == count


@pytest.mark.parametrize("sizes", [[1, 5, 16, 17, 40], [100], [3] * 20, [33, 1, 1]])
def test_a_text_in_pieces_is_scored_as_it_is_in_one(data, tmp_path, sizes):
    run = new_run(tiny(data, tmp_path, device_batch_size=3))
    shake(run)
    tokens = tokens_of(data, "val")[: sum(sizes)]
    whole = train.score(run, pieces_of(tokens, [len(tokens)]))
    assert train.score(run, pieces_of(tokens, sizes)) == pytest.approx(whole, rel=1e-6)
    assert (whole["tokens_scored"], whole["tokens"]) == (len(tokens) - 1, len(tokens))


def test_a_part_of_a_split_is_even_windows_of_it(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    shake(run)
    tokens = tokens_of(data, "val")
    text = pieces_of(tokens, [len(tokens)])
    part = train.score(run, text, 5 * 16 + 7)
    last = (len(tokens) - 17) // 16
    starts = [round(i * last / 4) * 16 for i in range(5)]
    total, scored = plain_loss(run, tokens, starts, 16)
    assert part["val_loss"] == pytest.approx(total / scored, rel=1e-5)
    assert part["tokens_scored"] == scored == 80
    assert train.score(run, text, len(tokens)) == train.score(run, text)
    assert train.score(run, text, 0)["tokens_scored"] == 16


def test_bits_per_byte():
    a_byte_a_token = {"tokens": 1000, "bytes": 1000}
    assert train.bits_per_byte(math.log(256), a_byte_a_token) == pytest.approx(8)  # a uniform guess
    four_bytes_a_token = {"tokens": 250, "bytes": 1000}
    bits = train.bits_per_byte(math.log(50257), four_bytes_a_token)
    assert bits == pytest.approx(math.log2(50257) / 4)


# ------------------------------------------------------------------------------------------
# A whole run


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> SimpleNamespace:
    """A run of 18 iterations that came to its end; treat as read-only."""
    folder = tmp_path_factory.mktemp("finished")
    flags = TINY | dict(data_dir=data, out_dir=folder / "out" / "first", plot_dir=folder / "plots")
    stdout, stderr = main(**flags)
    return SimpleNamespace(folder=folder, flags=flags, out=folder / "out" / "first", stdout=stdout,
                           stderr=stderr)


def copy_of(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """Its out_dir elsewhere, to work on (a run holds its own folder until its process ends)."""
    return shutil.copytree(finished.out, tmp_path / "copy")


def test_a_run_leaves_its_files_and_nothing_else(finished):
    names = ["out/first/ckpt.pt", "out/first/log.csv", "out/first/model.pt",
             "out/first/run.json", "plots/first.png"]
    assert files_in(finished.folder) == names


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
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"] < 600
    text = (data.parent / "val.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    size = sum(len(story.encode()) for story in text)
    for row in rows:
        bits = row["val_loss"] / math.log(2) * len(tokens_of(data, "val")) / size
        assert row["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_every_row_of_the_log_has_a_speed(finished):
    """The first one too, though its evaluation follows the first step, which compiles."""
    assert all(row["tokens_per_second"] > 0 for row in rows_of(finished.out / "log.csv"))


@pytest.mark.parametrize(
    "eval_interval, speeds",
    [
        # Steps end at 4, 8, 12, 16 and 18, an iteration is 64 tokens. Evaluations follow the third
        # and the last step here; the first step, which compiles, is left out.
        (12, [8 * 64 / 4, 6 * 64 / 4]),
        # Here the first follows the first step: nothing else could be measured.
        (6, [4 * 64 / 50, 8 * 64 / 4, 6 * 64 / 4]),
    ],
)
def test_the_speed_in_the_log_leaves_evaluations_out(
    data, tmp_path, monkeypatch, eval_interval, speeds
):
    """By a clock that the steps move by 2 seconds (the first by 50), and evaluations by 100."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock.now))
    run = new_run(tiny(data, tmp_path, eval_interval=eval_interval))

    def taking(seconds, work):
        def slow(*args):
            clock.now += seconds(run.state.iteration)
            return work(*args)

        return slow

    monkeypatch.setattr(run, "step", taking(lambda at: 2 if at else 50, run.step))
    for name in ("evaluate", "save_checkpoint"):
        monkeypatch.setattr(train, name, taking(lambda at: 100, getattr(train, name)))
    train.train(run)
    told = [row["tokens_per_second"] for row in rows_of(run.out_dir / "log.csv")]
    assert told == pytest.approx(speeds)


def test_it_learns(finished):
    rows = rows_of(finished.out / "log.csv")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < math.log(50257)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < math.log(50257)


def test_stdout_holds_a_story_and_nothing_else(finished):
    assert finished.stdout.startswith("Once upon a time") and finished.stdout.endswith("\n")
    assert "loss" not in finished.stdout and "wrote" not in finished.stdout


def test_stderr_says_what_runs_and_how_it_went(finished, data):
    said = " ".join(finished.stderr.split())
    config = Config(**TINY)
    parameters = sum(p.numel() for p in GPT(config).parameters())
    for words in (f"{parameters / 1e6:.1f} M parameters", "CPU", "float32", str(data), "256 tokens",
                  "1,152 tokens"):
        assert words in said, words
    for words in ("iteration 6:", "iteration 18:", "validation loss", "perplexity", "bits per byte",
                  "first.png"):
        assert words in said, words


def described(run: train.Run, capsys) -> str:
    capsys.readouterr()
    train.describe(run)
    return capsys.readouterr().err


def differences(stderr: str) -> set[str]:
    """The settings that a start says differ from its preset."""
    _, _, rest = stderr.partition("differs from the preset: ")
    return set(rest.splitlines()[0].split(", "))


def test_a_start_says_the_rate_the_batch_and_the_seed(finished):
    [line] = [line for line in finished.stderr.splitlines() if "differs from the preset" in line]
    for words in ("learning rate 0.003", "0.0001", "4 sequences", "seed 1337"):
        assert words in line, words


def test_a_start_says_what_differs_from_its_preset_and_nothing_else(finished):
    reference = Config()
    expected = {f"{name} {value}" for name, value in TINY.items()
                if value != getattr(reference, name)}
    assert differences(finished.stderr) == expected and len(expected) > 10


def test_a_run_of_a_preset_as_it_is_differs_in_nothing(data, tmp_path, capsys):
    run = new_run(tiny(data, tmp_path))
    for preset in ("reference", "demo"):
        run.config = Config.from_preset(preset, data_dir=str(data), out_dir="elsewhere")
        assert differences(described(run, capsys)) == {"nothing"}
        run.config = dataclasses.replace(run.config, seed=7)
        assert differences(described(run, capsys)) == {"seed 7"}


def test_a_run_whose_preset_has_been_removed_is_described_all_the_same(data, tmp_path, capsys):
    run = new_run(tiny(data, tmp_path, preset="mine"))
    said = described(run, capsys)
    assert said.startswith("mine: ") and "learning rate 0.003" in said and "seed 1337" in said


def test_checkpoints_hold_tensors_and_plain_values_only(finished):
    for name in ("model.pt", "ckpt.pt"):
        content = torch.load(finished.out / name, weights_only=True)
        assert content["config"]["n_embd"] == 32
        assert set(content["model"]) == set(GPT(Config(**TINY)).state_dict())


def is_a_picture(path: Path) -> bool:
    """A PNG, and with more than ten colours."""
    from matplotlib.image import imread

    image = imread(path)
    colours = np.unique(image[..., :3].reshape(-1, 3), axis=0)
    is_png = path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return is_png and min(image.shape[:2]) > 300 and len(colours) > 10


def test_the_plot_is_a_png_with_something_in_it(finished):
    assert is_a_picture(finished.folder / "plots" / "first.png")


def run_with_a_log(folder: Path, rate: float = 1e-4, **settings) -> SimpleNamespace:
    """What `train.draw` reads of a run."""
    log = [
        dict(iteration=i, train_loss=9.0, val_loss=9.1, learning_rate=rate) for i in (500, 1000)
    ]
    config = Config(out_dir=str(folder / "run"), plot_dir=str(folder), max_iters=1000, **settings)
    return SimpleNamespace(config=config, state=train.State(log=log))


def test_only_the_reference_preset_has_the_published_curve_behind_it(tmp_path):
    pictures = []
    for preset in ("reference", "demo"):
        train.draw(run_with_a_log(tmp_path, preset=preset))
        pictures.append((tmp_path / "run.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_the_plot_shows_the_rates_that_were_used(tmp_path):
    """After a resume with another max_iters they are not those of the schedule."""
    pictures = set()
    for rate in (1e-4, 2e-4):
        train.draw(run_with_a_log(tmp_path, rate))
        pictures.add((tmp_path / "run.png").read_bytes())
    assert len(pictures) == 2


def test_the_plot_shows_the_rates_that_are_planned(tmp_path):
    pictures = set()
    for warmup in (0, 900):
        train.draw(run_with_a_log(tmp_path, warmup_iters=warmup))
        pictures.add((tmp_path / "run.png").read_bytes())
    assert len(pictures) == 2


def test_the_published_curve_is_the_reference_runs():
    rows = rows_of(loss_curve.PUBLISHED)
    at = {row["iteration"]: row["val_loss"] for row in rows}
    assert at[500] == pytest.approx(9.448, abs=1e-3) and at[1000] == pytest.approx(8.471, abs=1e-3)
    assert at[9500] == pytest.approx(2.963, abs=1e-3)


def test_a_log_is_drawn_from_the_command_line(finished, tmp_path, capsys):
    png = tmp_path / "curve.png"
    loss_curve.main([str(finished.out / "log.csv"), "--out", str(png)])
    assert is_a_picture(png) and files_in(tmp_path) == ["curve.png"]
    assert str(png) in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x89PNG\r\n\x1a\n", b"iteration,val_loss\n", b"One day, a cat\nsat on a mat.\n",
        b"iteration,val_loss\n5,\n", b"iteration,val_loss\n5,1,2\n", b"loss,step\n5,1\n",
        b"iteration,val_loss\n5,1\n", b"iteration,train_loss,val_loss\n5,1\n", b"a" * 200_000,
    ],
    ids=["empty", "png", "header", "text", "short row", "long row", "other columns",
         "too few columns", "a row too short", "a long line"],
)
def test_a_file_that_is_no_log_is_refused_and_nothing_is_drawn(tmp_path, content):
    log = tmp_path / "log.csv"
    log.write_bytes(content)
    line = refusal(loss_curve.main, [str(log), "--out", str(tmp_path / "curve.png")])
    assert str(log) in line and files_in(tmp_path) == ["log.csv"]


def test_model_pt_is_the_best_by_validation_loss_and_ckpt_pt_the_last(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    train.save_checkpoint(run, train.evaluate(run, 6, 1.0))
    best = weights_of(run)
    for p in run.model.parameters():
        p.data.mul_(3)
    worse = train.evaluate(run, 12, 1.0)
    train.save_checkpoint(run, worse)
    kept = torch.load(run.out_dir / "model.pt", weights_only=True)
    assert same(kept["model"], best) and kept["iteration"] == 6
    assert kept["val_loss"] < worse["val_loss"]
    assert same(torch.load(run.out_dir / "ckpt.pt", weights_only=True)["model"], weights_of(run))


# ------------------------------------------------------------------------------------------
# Going on


LONG = TINY | dict(max_iters=24, lr_decay_iters=24, eval_interval=8, embedding_lr_mult=3.0)


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    main(**LONG, data_dir=data, out_dir=folder / "out", plot_dir=folder)
    return folder / "out"


def test_a_run_resumed_twice_equals_one_that_was_never_interrupted(uninterrupted, data, tmp_path):
    main(**LONG | dict(max_iters=8), data_dir=data, out_dir=tmp_path / "0", plot_dir=tmp_path)
    for i, length in enumerate((16, 24)):
        shutil.copytree(tmp_path / str(i), tmp_path / str(i + 1))
        out = tmp_path / str(i + 1)
        main("--resume", max_iters=length, lr_decay_iters=24, out_dir=out, plot_dir=tmp_path)
    check_equal(tmp_path / "2", uninterrupted)


def test_a_run_resumed_between_evaluations_equals_one_that_was_never_interrupted(
    uninterrupted, data, tmp_path
):
    run = new_run(Config(**LONG, data_dir=str(data), out_dir=str(tmp_path / "out")))
    for end in (4, 8, 12):
        run.step()
        if end == 8:
            train.save_checkpoint(run, train.evaluate(run, 8, 1.0))
    train.save_checkpoint(run)
    main("--resume", out_dir=tmp_path / "out", plot_dir=tmp_path)
    check_equal(tmp_path / "out", uninterrupted)


def test_the_seconds_of_a_resumed_run_go_on(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    main("--resume", max_iters=20, out_dir=out, plot_dir=tmp_path)
    seconds = [row["seconds"] for row in rows_of(out / "log.csv")]
    assert len(seconds) == 4 and seconds == sorted(seconds)


def test_a_folder_that_holds_a_run_is_refused_and_left_untouched(finished):
    before = snapshot(finished.folder)
    line = refusal(main, **finished.flags)
    assert "--resume" in line and "--overwrite" in line and "--out_dir" in line
    assert snapshot(finished.folder) == before


def test_overwrite_starts_again(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    changes = dict(out_dir=out, plot_dir=tmp_path, max_iters=4, eval_interval=2)
    main("--overwrite", **finished.flags | changes)
    assert [row["iteration"] for row in rows_of(out / "log.csv")] == [4]
    assert torch.load(out / "model.pt", weights_only=True)["iteration"] == 4


def test_a_finished_run_says_so_and_is_left_untouched(finished):
    before = snapshot(finished.folder)
    stdout, stderr = main("--resume", out_dir=finished.out)
    assert "finished" in stderr and "18" in stderr and stdout == ""
    assert snapshot(finished.folder) == before


def test_resume_refuses_what_would_make_another_run_and_lists_it_all(finished):
    before = snapshot(finished.folder)
    changes = dict(max_iters=30, n_embd=48, seed=1, batch_size=8, dropout=0.0)
    line = refusal(main, "--resume", out_dir=finished.out, **changes)
    for words in ("n_embd 32 -> 48", "seed 1337 -> 1", "batch_size 4 -> 8", "dropout 0.1 -> 0.0"):
        assert words in line, words
    assert "max_iters" not in line
    assert snapshot(finished.folder) == before


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_layer", 2), ("n_head", 4), ("block_size", 8), ("bias", "false"), ("gelu", "tanh"),
        ("gradient_accumulation_steps", 2), ("learning_rate", 1.0), ("min_lr", 0.0),
        ("warmup_iters", 0), ("warmup_start_factor", 0.0), ("weight_decay", 0.0), ("beta1", 0.0),
        ("beta2", 0.0), ("eps", 1.0), ("grad_clip", 0.0), ("preset", "demo"), ("dataset", "toy"),
        ("embedding_init", "subword"), ("eval_windows", 3),
        ("embedding_lr_mult", 2.0), ("matrix_optimizer", "muon"), ("momentum", 0.5),
    ],
)
def test_resume_refuses_a_change_of(finished, name, value):
    assert f"{name} " in refusal(main, "--resume", f"--out_dir={finished.out}", f"--{name}={value}")


def test_resume_takes_what_does_not_matter_and_what_is_said_again(finished, data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved")
    changes = dict(data_dir=moved, out_dir=copy_of(finished, tmp_path), plot_dir=tmp_path / "p",
                   max_iters=20, device_batch_size=3)
    main("--resume", **finished.flags | changes)
    assert [row["iteration"] for row in rows_of(tmp_path / "copy" / "log.csv")] == [6, 12, 18, 20]
    assert (tmp_path / "p" / "copy.png").exists()


def test_a_longer_run_whose_decay_moves_is_warned_of(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    stderr = main("--resume", out_dir=out, plot_dir=tmp_path, max_iters=20, lr_decay_iters=20)[1]
    assert "warning" in stderr and "until iteration 20, not" in stderr and "iteration 18" in stderr


def test_a_resume_says_that_the_settings_are_the_checkpoints_and_which_may_change(
    finished, tmp_path
):
    out = copy_of(finished, tmp_path)
    stderr = main("--resume", out_dir=out, plot_dir=tmp_path, max_iters=19, lr_decay_iters=19)[1]
    [line] = [line for line in stderr.splitlines() if "its settings hold" in line]
    assert str(out / "ckpt.pt") in line and "config.py" in line
    assert all(name in line for name in train.MAY_CHANGE)
    assert "its settings hold" not in finished.stderr  # a start is no resume


def test_a_resumed_run_keeps_its_settings_whatever_config_py_says_now(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setitem(config.PRESETS, "reference", dict(learning_rate=1.0, seed=5, beta1=0.1))
    out = copy_of(finished, tmp_path)
    stderr = main("--resume", out_dir=out, plot_dir=tmp_path, max_iters=20)[1]
    assert "learning rate 0.003" in stderr and "seed 1337" in stderr
    assert {"seed 1337", "beta1 0.9"} <= differences(stderr)  # from the preset as it is now
    kept = load_file(out / "ckpt.pt")["config"]
    assert kept == load_file(finished.out / "ckpt.pt")["config"] | dict(
        max_iters=20, out_dir=str(out), plot_dir=str(tmp_path)
    )


def test_what_is_not_typed_again_is_the_checkpoints_and_not_the_presets(finished, tmp_path):
    """19 iterations of decay are fewer than the reference's warmup, but not than this run's."""
    out = copy_of(finished, tmp_path)
    main("--resume", out_dir=out, plot_dir=tmp_path, max_iters=20, lr_decay_iters=19)
    # A width of 64 fits this run's two heads, but not six.
    assert "n_embd 32 -> 64" in refusal(main, "--resume", out_dir=finished.out, n_embd=64)


def test_data_that_has_changed_is_refused(finished, tmp_path):
    write_tales(tmp_path / "train.txt", 5, 100)
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(str(tmp_path / "train.txt"), tmp_path / "data", val_fraction=0.3, num_threads=1)
    before = snapshot(finished.folder)
    changes = dict(data_dir=tmp_path / "data", max_iters=20)
    assert "has changed" in refusal(main, "--resume", out_dir=finished.out, **changes)
    assert snapshot(finished.folder) == before


def test_resume_without_a_checkpoint_starts_from_the_beginning(data, tmp_path):
    folders = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    assert "from the beginning" in main("--resume", **TINY | folders | dict(max_iters=4))[1]
    assert (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"],
                         ids=["empty", "text", "damaged"])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_left(finished, tmp_path, content):
    out = copy_of(finished, tmp_path)
    (out / "ckpt.pt").write_bytes(content)
    before = snapshot(tmp_path)
    assert "ckpt.pt" in refusal(main, "--resume", out_dir=out)
    assert snapshot(tmp_path) == before


def test_a_checkpoint_of_something_else_is_refused(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    torch.save({"model": {}}, out / "ckpt.pt")
    assert "not a checkpoint of ours" in refusal(main, "--resume", out_dir=out)


def test_two_runs_in_one_folder_are_refused(finished):
    """The run of the fixture still holds its folder: this process has not ended."""
    before = snapshot(finished.folder)
    assert "another train.py" in refusal(main, "--resume", out_dir=finished.out, max_iters=20)
    assert snapshot(finished.folder) == before


# ------------------------------------------------------------------------------------------
# Starting from a model, and scoring one

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
    [line] = [line for line in text.splitlines() if line.startswith("validation loss")]
    return line


def test_eval_only_says_what_the_run_said_of_itself_and_changes_nothing(finished, data):
    """The run of the fixture still holds its folder, as one that is going on does."""
    before = snapshot(finished.folder)
    stdout, stderr = main("--eval_only", out_dir=finished.out, max_iters=3, learning_rate=7, **EVAL)
    run = train.start(load_model(str(finished.out / "model.pt")).config, {},
                      source=load_model(str(finished.out / "model.pt")))
    tokens = len(run.tokens["val"])
    text = [(run.tokens["val"], run.meta["splits"]["val"])]
    whole = train.in_words(train.score(run, text))
    assert stdout == score_in(whole) + "\n" and "tokens" not in stdout
    # A run scores itself on a fifth of the tokens that it was trained on, 18 iterations of 64.
    part = train.in_words(train.score(run, text, 18 * 64 // 5))
    assert score_in(finished.stderr) == part and part.endswith(f", on 224 of {tokens:,} tokens")
    assert str(finished.out / "model.pt") in stderr and str(data) in stderr
    assert "--eval_only" in main("--resume", out_dir=finished.out)[1]
    assert snapshot(finished.folder) == before


@torch.no_grad()
def test_eval_only_agrees_with_hugging_face_on_the_same_windows(export, data, monkeypatch):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(export).eval()
    tokens = torch.tensor(tokens_of(data, "val"))
    scored = [tokens[i : i + 17] for i in range(0, len(tokens) - 1, 16)]
    assert 2 < len(scored[-1]) < 17  # the last window is an odd one
    total = 0.0
    for window in scored:
        logits = theirs(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    expected = total / (len(tokens) - 1)
    seen, real = [], train.score

    def watched(run, text):
        seen.append(real(run, text))
        return seen[-1]

    monkeypatch.setattr(train, "score", watched)
    stdout, _ = main("--eval_only", init_from=export, data_dir=data, device_batch_size=7, **EVAL)
    assert seen[0]["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert seen[0]["tokens_scored"] == len(tokens) - 1
    size = sum(len(tale.encode()) for tale in write_tales(data.parent / "again.txt", 1, 25))
    bits = expected / math.log(2) * len(tokens) / size
    measures = [float(word) for word in stdout.replace(",", "").split() if word[0].isdigit()]
    assert measures == pytest.approx([expected, math.exp(expected), bits], abs=0.01, rel=1e-4)


def test_eval_only_scores_a_shorter_context_and_other_data(finished, tmp_path, data):
    write_tales(tmp_path / "other.txt", 3, 60)
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(str(tmp_path / "other.txt"), tmp_path / "data", val_fraction=0.3, num_threads=1)
    changes = ({}, {"block_size": 8}, {"data_dir": tmp_path / "data"})
    lines = {main("--eval_only", out_dir=finished.out, **flags)[0] for flags in changes}
    assert len(lines) == 3


def test_eval_only_refuses_what_it_cannot_score(finished, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "out/demo/model.pt" in refusal(main, "--eval_only", preset="demo")
    line = refusal(main, "--eval_only", "--resume", out_dir=finished.out)
    assert "--eval_only" in line and "--resume" in line
    assert "n_layer 1, not 2" in refusal(main, "--eval_only", out_dir=finished.out, n_layer=2)
    assert "prepare_data.py" in refusal(main, "--eval_only", init_from=export)
    assert "data/toy" in refusal(main, "--eval_only", init_from=export, dataset="toy")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["model.pt", "ckpt.pt", "folder"])
def test_a_run_starts_from_the_weights_of_a_model(
    finished, export, data, tmp_path, monkeypatch, form
):
    real = train.score
    monkeypatch.setattr(train, "score", lambda run, text, most=0: real(run, text))  # all of it
    source = export if form == "folder" else finished.out / form
    flags = FROZEN | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    stderr = main(init_from=source, **flags)[1]
    scored = main("--eval_only", init_from=source, data_dir=data, device_batch_size=4, **EVAL)[0]
    assert score_in(stderr) == score_in(scored)
    assert f"init_from {source}" in stderr
    ours, theirs = load_model(str(tmp_path / "out" / "model.pt")), load_model(str(source))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=1e-12)
    assert ours.config.init_from == str(source)
    assert (ours.config.n_embd, ours.config.block_size) == (32, 16)


def test_a_shorter_context_has_the_first_positions_and_a_longer_one_is_refused(
    finished, data, tmp_path
):
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


def test_only_a_typed_architecture_counts_not_the_presets(finished, tmp_path):
    overrides = dict(preset="demo", init_from=str(finished.out / "model.pt"),
                     out_dir=str(tmp_path / "out"))
    config, checkpoint, source = train.plan(overrides, "")
    # The demo has 3, 96, 128.
    assert (config.n_layer, config.n_embd, config.block_size, config.dropout) == (1, 32, 16, 0.0)
    assert checkpoint is None and isinstance(source, GPT)


def test_a_run_that_cannot_start_loses_nothing_and_one_that_can_may_replace_its_own_source(
    finished, tmp_path
):
    out = copy_of(finished, tmp_path)
    flags = FROZEN | dict(data_dir=finished.flags["data_dir"], out_dir=out, plot_dir=tmp_path)
    before = snapshot(tmp_path)
    for source, words in {
        tmp_path / "none.pt": "none.pt", tmp_path: "no checkpoint", out / "log.csv": "log.csv",
    }.items():
        assert words in refusal(main, "--overwrite", init_from=source, **flags)
    assert snapshot(tmp_path) == before
    main("--overwrite", init_from=out / "model.pt", **flags)
    lines = {main("--eval_only", out_dir=folder, **EVAL)[0] for folder in (out, finished.out)}
    assert len(lines) == 1 and len(rows_of(out / "log.csv")) == 1


def test_a_run_that_fails_before_its_first_evaluation_leaves_the_run_it_was_to_replace(
    finished, data, tmp_path
):
    out = copy_of(finished, tmp_path)
    before = snapshot(out)
    flags = FROZEN | dict(data_dir=data, out_dir=out, plot_dir=tmp_path, learning_rate=1e30)
    assert "not finite" in refusal(main, "--overwrite", init_from=out / "model.pt", **flags)
    assert snapshot(out) == before


def test_a_resumed_run_from_a_model_equals_an_uninterrupted_one_and_needs_its_source_no_more(
    finished, data, tmp_path
):
    source = shutil.copy(finished.out / "model.pt", tmp_path / "source.pt")
    flags = TUNING | dict(init_from=source, data_dir=data, plot_dir=tmp_path, eval_interval=8)
    main(**flags | dict(max_iters=16, out_dir=tmp_path / "whole"))
    main("--resume", **flags | dict(max_iters=8, out_dir=tmp_path / "part"))
    Path(source).unlink()
    shutil.copytree(tmp_path / "part", tmp_path / "rest")
    main("--resume", **flags | dict(max_iters=16, out_dir=tmp_path / "rest"))
    check_equal(tmp_path / "rest", tmp_path / "whole")
    assert "init_from" in refusal(main, "--resume", out_dir=tmp_path / "rest", init_from="other.pt")


# ------------------------------------------------------------------------------------------
# What has to be there


def test_auto_is_a_device_and_a_precision_that_are_there():
    device = pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert pick_dtype("float32", device) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("number", ["99", "127", "128", "300", "99999999999999999999"])
def test_a_gpu_that_is_not_there_is_refused(number):
    with pytest.raises(UserError, match=f"cuda:{number} .*--device cpu"):
        pick_device(f"cuda:{number}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--device cpu"):
        pick_device("cuda")


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="float16.*--dtype float32"):
        pick_dtype("float16", torch.device("cpu"))


def refused_early(tmp_path: Path, **flags) -> str:
    """The line of a run that is refused before a model is built: one this wide fits into no
    address space.
    """
    before = snapshot(tmp_path)
    folders = dict(out_dir=tmp_path / "out", plot_dir=tmp_path / "plots")
    line = refusal(main, **TINY | dict(n_embd=2**30, n_head=1) | folders | flags)
    assert snapshot(tmp_path) == before
    return line


def test_another_dataset_than_the_prepared_one_is_refused(data, tmp_path):
    line = refused_early(tmp_path, data_dir=data, dataset="toy")
    assert "toy" in line and "train.txt" in line and "--data_dir" in line


def test_the_prepared_dataset_may_be_named_again(finished, data, tmp_path):
    config = tiny(data, tmp_path, dataset=str(data.parent / "train.txt"))
    meta = train.open_data(config, {"dataset": config.dataset})
    assert meta["splits"]["val"]["stories"] == 25


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_shorter_than_a_crop_and_its_target_is_refused(data, tmp_path, split):
    tokens = json.loads((data / "meta.json").read_text())["splits"][split]["tokens"]
    config = tiny(data, tmp_path, block_size=len(tokens_of(data, "val")) - 1)
    meta = train.open_data(config, {})
    assert meta["splits"]["val"]["tokens"] == len(tokens_of(data, "val"))  # just enough
    line = refused_early(tmp_path, data_dir=data, block_size=tokens)
    assert "val" in line and "block_size" in line and str(tokens + 1) in line


def test_another_vocabulary_than_the_datas_is_refused(data, tmp_path):
    """A model from elsewhere may have one. It is refused before anything is prepared, which takes
    minutes with TinyStories: no prepared data has another vocabulary than GPT-2's.
    """
    config = Config(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=1000)
    save_file(tmp_path / "other.pt", config, GPT(config))
    flags = {"init_from": tmp_path / "other.pt", "plot_dir": tmp_path / "plots"}
    before = snapshot(tmp_path)
    for data_dir in (data, tmp_path / "data"):
        folders = dict(data_dir=data_dir, out_dir=tmp_path / "out")
        dataset = data.parent / "train.txt"
        line = refusal(main, **TUNING | flags | folders | dict(dataset=dataset))
        assert "vocab_size 1000" in line and "50257" in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name, damage",
    [
        ("train.bin", lambda content: content + b"\0\0"), ("val.bin", lambda content: content[:-2]),
        ("train.bin", lambda content: b"\1\0" + content[2:]), ("val.bin", lambda content: b""),
        ("meta.json", lambda content: b"{"),
    ],
    ids=["longer", "shorter", "changed", "empty", "meta"],
)
def test_files_that_disagree_with_each_other_are_refused(data, tmp_path, name, damage):
    broken = shutil.copytree(data, tmp_path / "data")
    path = broken / name
    path.write_bytes(damage(path.read_bytes()))
    line = refused_early(tmp_path, data_dir=broken)
    assert name in line and "--overwrite" in line


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_missing_file_is_refused_and_not_prepared_over(data, tmp_path, name):
    broken = shutil.copytree(data, tmp_path / "data")
    (broken / name).unlink()
    assert name in refused_early(tmp_path, data_dir=broken)


def test_several_ranks_do_not_prepare_data(data, tmp_path, monkeypatch):
    config = tiny(tmp_path / "data", tmp_path, dataset=str(data.parent / "train.txt"))
    monkeypatch.setattr(train, "Ranks", lambda device: SimpleNamespace(size=2))
    assert "prepare_data.py" in refusal(train.start, config, {})
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------
# Records, epochs, held-out text, TensorBoard


def record_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def test_run_json_says_what_the_run_was_and_how_it_went(finished, data):
    record, rows = record_of(finished.out), rows_of(finished.out / "log.csv")
    assert list(record) == ["settings", "differs", "data", "versions", "tokens", "seconds", "best",
                            "final"]
    kept = load_model(str(finished.out / "model.pt")).config
    assert record["settings"] == dataclasses.asdict(kept)
    assert record["differs"]["n_embd"] == 32 and "weight_decay" not in record["differs"]
    meta = json.loads((data / "meta.json").read_text())
    assert record["data"]["name"] == meta["dataset"]
    for split in ("train", "val"):
        assert record["data"]["hashes"][split] == meta["splits"][split]["sha256"]
        assert record["data"]["tokens"][split] == meta["splits"][split]["tokens"]
    assert record["versions"]["pytorch"] == torch.__version__
    assert "CPU" in record["versions"]["device"]
    assert record["tokens"] == 18 * 64 and record["seconds"] >= rows[-1]["seconds"]
    best = min(rows, key=lambda row: row["val_loss"])
    assert record["best"]["iteration"] == best["iteration"]
    assert record["best"]["val_loss"] == pytest.approx(best["val_loss"], abs=1e-5)
    final = record["final"]
    assert final["perplexity"] == pytest.approx(math.exp(final["val_loss"]))
    assert f"{final['val_loss']:.4f}" in score_in(finished.stderr)
    assert (final["tokens_scored"], final["tokens"]) == (224, meta["splits"]["val"]["tokens"])


def test_run_json_is_there_from_the_start_and_a_resume_adds_to_it(
    finished, data, tmp_path, monkeypatch
):
    out = copy_of(finished, tmp_path)
    seen = []
    real = train.train

    def watched(run):
        seen.append(record_of(run.out_dir))
        real(run)

    monkeypatch.setattr(train, "train", watched)
    main("--resume", max_iters=20, out_dir=out, plot_dir=tmp_path)
    assert seen[0]["tokens"] == 18 * 64 and seen[0]["final"] is None
    after = record_of(out)
    assert after["tokens"] == 20 * 64 and after["settings"]["max_iters"] == 20
    assert after["seconds"] > seen[0]["seconds"] > 0 and after["final"]
    again = shutil.copytree(out, tmp_path / "again")
    main("--overwrite", **finished.flags | dict(out_dir=again, plot_dir=tmp_path, max_iters=4))
    assert seen[1] == after  # until there is something to put in its place
    assert record_of(again)["tokens"] == 4 * 64


def test_a_loss_too_large_for_its_perplexity_is_json_all_the_same(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    train.write_record(run, train.measures(1000.0, 1, run.meta["splits"]["val"]))
    record = json.loads((run.out_dir / "run.json").read_text(), parse_constant=pytest.fail)
    assert record["final"]["perplexity"] is None


@pytest.mark.parametrize("epochs", [0.01, 0.5, 2.0])
def test_max_epochs_is_another_way_to_say_max_iters(data, tmp_path, epochs):
    run = train.start(tiny(data, tmp_path, max_epochs=epochs, lr_decay_iters=None), {})
    tokens = len(tokens_of(data, "train"))
    assert run.config.max_iters == math.ceil(epochs * tokens / 64)
    assert run.config.decay_iters == run.config.max_iters  # computed before anything looks at it


def test_max_epochs_and_max_iters_exclude_each_other_only_if_both_are_typed(
    data, tmp_path, monkeypatch
):
    assert "--max_epochs" in refusal(train.parse_command_line, ["--max_iters=3", "--max_epochs=1"])
    monkeypatch.setitem(config.PRESETS, "long", dict(max_epochs=3.0))
    overrides, mode = train.parse_command_line(["--preset=long", "--max_iters=5"])
    planned = train.plan(overrides | dict(out_dir=str(tmp_path / "out")), mode)[0]
    assert (planned.max_iters, planned.max_epochs) == (5, None)
    overrides, mode = train.parse_command_line(["--preset=demo", "--max_epochs=0.5"])
    planned = train.plan(overrides | dict(out_dir=str(tmp_path / "out")), mode)[0]
    assert planned.max_epochs == 0.5


def test_a_run_of_epochs_is_lengthened_by_more_of_them(data, tmp_path):
    flags = TINY | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    del flags["max_iters"], flags["lr_decay_iters"]
    size = len(tokens_of(data, "train"))
    said = main(**flags | dict(max_epochs=0.05))[1]
    first = math.ceil(0.05 * size / 64)
    assert f"{first} iterations" in said and f"{first * 64 / size:.2f} epochs" in said
    assert "is finished" in main("--resume", out_dir=tmp_path / "out")[1]
    shutil.copytree(tmp_path / "out", tmp_path / "longer")
    said = main("--resume", out_dir=tmp_path / "longer", max_epochs=0.1, plot_dir=tmp_path)[1]
    assert "schedule changes" in said
    last = rows_of(tmp_path / "longer" / "log.csv")[-1]
    assert last["iteration"] == math.ceil(0.1 * size / 64)


def test_full_is_one_epoch_and_says_so(data, tmp_path):
    flags = TINY | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    del flags["max_iters"], flags["lr_decay_iters"]
    said = main(preset="full", **flags)[1]
    count = math.ceil(len(tokens_of(data, "train")) / 64)
    assert f"\n{count} iterations in" in said and "1.00 epochs" in said
    differs = json.loads((tmp_path / "out" / "run.json").read_text())["differs"]
    assert "n_embd" in differs and not differs.keys() & {"max_iters", "max_epochs"}
    flags |= dict(max_iters=3, out_dir=tmp_path / "short")
    assert "\n3 iterations in" in main(preset="full", **flags)[1]
    shutil.copytree(tmp_path / "short", tmp_path / "longer")
    assert "is finished" in main("--resume", out_dir=tmp_path / "short")[1]
    longer = dict(out_dir=tmp_path / "longer", plot_dir=tmp_path, max_iters=4)
    assert "\n4 iterations in" in main("--resume", **longer)[1]
    differs = json.loads((tmp_path / "longer" / "run.json").read_text())["differs"]
    assert differs["max_iters"] == 4 and "max_epochs" not in differs


def test_full_is_tuned_in_larger_steps_and_any_max_iters_differs_from_its_pass():
    full, tuned = (Config.from_preset(name, out_dir="out") for name in ("full", "tuned"))
    assert (full.batch_size, full.max_epochs) == (64, 1.0)
    changed = dict(preset="tuned", batch_size=tuned.batch_size, max_epochs=None)
    assert dataclasses.replace(full, **changed) == tuned
    typed = Config.from_preset("full", max_iters=full.max_iters)
    assert typed.max_epochs is None
    assert train.differences(typed) == {"max_iters": full.max_iters}
    assert train.differences(full) == {}


def test_a_text_that_was_never_prepared_is_scored_whole_and_nothing_is_written(
    finished, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_tales(tmp_path / "held.txt", 1, 25)  # the text that val.bin was made from
    expected = main("--eval_only", out_dir=finished.out, **EVAL)[0]
    stdout, stderr = main("--eval_only", out_dir=finished.out, dataset="held.txt", **EVAL)
    assert stdout == expected
    assert f"held.txt ({len(tokens_of(data, 'val')):,} tokens)" in stderr
    assert files_in(tmp_path) == ["held.txt"]
    assert "gone.txt" in refusal(main, "--eval_only", out_dir=finished.out, dataset="gone.txt")
    (tmp_path / "empty.txt").touch()
    assert "no text" in refusal(main, "--eval_only", out_dir=finished.out, dataset="empty.txt")


def test_tensorboard_gets_the_logs_figures(data, tmp_path, monkeypatch):
    events = []

    class Recorder:
        def __init__(self, folder, purge_step):
            events.append(("begin", str(folder), purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            events.append("end")

    monkeypatch.setattr(train, "import_tensorboard", lambda: Recorder)
    flags = TINY | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    main(**flags | dict(tensorboard="true"))
    rows = rows_of(tmp_path / "out" / "log.csv")
    assert events[0] == ("begin", str(tmp_path / "out"), 1) and events[-1] == "end"
    told = {(name, step): value for name, value, step in events[1:-1]}
    for row in rows:
        assert told["val_loss", row["iteration"]] == pytest.approx(row["val_loss"], abs=1e-5)
    assert len(told) == len(rows) * len(COLUMNS.split(","))


def test_without_its_package_tensorboard_is_refused_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folders = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    assert "pip install -U tensorboard" in refusal(main, tensorboard="true", **TINY | folders)
    assert not any(tmp_path.iterdir())
