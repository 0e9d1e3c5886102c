"""train.py against independent oracles: PyTorch's schedulers, a plain training step, plain loops over the tokens."""

import contextlib
import csv
import io
import itertools
import json
import math
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import train
from config import Config, UserError
from model import GPT, load_file, load_model, save_hugging_face
from prepare_data import prepare, tokenizer
from sample import pick_device, pick_dtype

TINY = dict(
    n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=4, gradient_accumulation_steps=4, dropout=0.1,
    max_iters=18, lr_decay_iters=18, warmup_iters=4, learning_rate=3e-3, min_lr=1e-4, eval_interval=6, eval_iters=2,
    device="cpu", dtype="float32", compile="false",
)  # fmt: skip
COLUMNS = "iteration,tokens,train_loss,val_loss,val_bits_per_byte,learning_rate,grad_norm,skipped_updates,tokens_per_second,seconds"


def tale(rng: random.Random) -> str:
    who, what = rng.choice(["Lily", "Tom", "Zoë", "the cat"]), rng.choice(["ball", "red kite", "small boat", "drum"])
    return f"One day, {who} found a {what}. It was {rng.choice(['new', 'old', 'big'])}. {who} was happy to play with the {what}."


def write_tales(path: Path, seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    tales = [tale(rng) for _ in range(count)]
    path.write_text("<|endoftext|>".join(tales), encoding="utf-8")
    return tales


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A small prepared dataset."""
    folder = tmp_path_factory.mktemp("tales")
    write_tales(folder / "train.txt", 0, 300)
    write_tales(folder / "val.txt", 1, 25)
    prepare(str(folder / "train.txt"), folder / "data", str(folder / "val.txt"), num_threads=1)
    return folder / "data"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other take longer than one that works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signals():
    """train.py catches SIGINT and SIGTERM for the life of its process: here they are given back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tiny(data: Path, folder: Path, **changes) -> Config:
    folders = dict(data_dir=str(data), out_dir=str(folder / "out"), plot_dir=str(folder / "plots"))
    return Config(**(TINY | folders | changes))


def new_run(config: Config) -> train.Run:
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    return train.start(config, {}, None)


def main(*argv: str, **flags) -> tuple[str, str]:
    """train.py's main with flags; what it wrote to stdout and to stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        train.main([*argv, *(f"--{name}={value}" for name, value in flags.items())])
    return out.getvalue(), err.getvalue()


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


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(log: Path) -> list[dict[str, float]]:
    with open(log, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------
# The learning rate


def pytorch_rates(config: Config, count: int) -> list[float]:
    """The rates of the first `count` iterations, by PyTorch's schedulers; the reference run used those of the cosine."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)

    def decay() -> LRScheduler:
        length = config.decay_iters - config.warmup
        if config.lr_schedule == "linear":
            return LinearLR(optimizer, 1.0, config.min_lr / config.learning_rate, total_iters=length)
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
        {}, {"min_lr": 0.0}, {"warmup_iters": 0}, {"warmup_iters": 1}, {"lr_decay_iters": 20_000}, {"warmup_start_factor": 1.0},
        {"lr_schedule": "linear", "learning_rate": 1e-3},
        {"lr_schedule": "linear", "learning_rate": 7e-4, "min_lr": 5e-5, "warmup_iters": None},
    ],
    ids=str,
)  # fmt: skip
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
    assert [train.learning_rate_at(short, i) for i in range(100)] == [train.learning_rate_at(long, i) for i in range(100)]


def test_the_rate_stays_at_its_minimum_behind_the_decay():
    config = Config(max_iters=3000, lr_decay_iters=2000)
    np.testing.assert_allclose([train.learning_rate_at(config, i) for i in range(2000)], pytorch_rates(config, 2000), rtol=1e-9)
    assert {train.learning_rate_at(config, i) for i in range(2000, 3000)} == {config.min_lr}


def test_a_decay_of_no_length_jumps_to_the_minimum_after_the_warmup():
    config = Config(lr_decay_iters=1000, warmup_iters=1000)
    np.testing.assert_allclose([train.learning_rate_at(config, i) for i in range(1000)], pytorch_rates(Config(), 1000), rtol=1e-9)
    assert {train.learning_rate_at(config, i) for i in (1000, 1001, 9999)} == {config.min_lr}


# ------------------------------------------------------------------------------------------
# Updates and evaluations: when


def boundaries(config: Config) -> list[int]:
    ends = [0]
    while ends[-1] < config.max_iters:
        ends.append(train.update_end(config, ends[-1]))
    return ends[1:]


def test_an_update_is_over_consecutive_iterations_and_the_last_may_hold_fewer():
    assert boundaries(Config(max_iters=18, gradient_accumulation_steps=4)) == [4, 8, 12, 16, 18]
    assert boundaries(Config(max_iters=3, gradient_accumulation_steps=4)) == [3]
    ends = boundaries(Config())
    assert len(ends) == 313 and ends[-2:] == [9984, 10_000]


def test_an_update_that_was_begun_in_the_middle_ends_where_it_always_does():
    config = Config(max_iters=18, gradient_accumulation_steps=4)
    assert [train.update_end(config, i) for i in range(18)] == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4 + [18] * 2


def test_the_evaluation_at_500_happens_at_the_last_update_before_it():
    config = Config()
    rows = {end: train.evaluation_at(config, end) for end in boundaries(config) if train.evaluation_at(config, end) is not None}
    assert rows[480] == 500 and rows[992] == 1000 and rows[9472] == 9500
    assert list(rows.values()) == list(range(500, 10_001, 500))


@pytest.mark.parametrize("steps, interval, length", itertools.product([1, 3, 4, 32], [1, 3, 4, 10, 500], [1, 7, 32, 100]))
def test_evaluations_fall_on_their_boundaries(steps, interval, length):
    config = Config(gradient_accumulation_steps=steps, eval_interval=interval, max_iters=length)
    ends = boundaries(config)
    rows = {end: label for end in ends if (label := train.evaluation_at(config, end)) is not None}
    assert train.evaluation_at(config, 0) is None  # never before training
    assert rows[length] == length  # always at the end
    due = {}  # the oracle: an iteration's evaluation belongs to the last boundary not behind it, a boundary has its first
    for label in range(interval, length, interval):
        if before := [end for end in ends if end <= label]:
            due.setdefault(before[-1], label)
    assert rows == due | {length: length}


# ------------------------------------------------------------------------------------------
# Batches


def test_crops_are_a_function_of_seed_and_iteration_alone():
    config = Config(seed=3)
    starts = train.crop_starts(config, 7, 10_000)
    np.random.seed(99)
    torch.manual_seed(99)
    other = Config(seed=3, device_batch_size=5, gradient_accumulation_steps=2, max_iters=50, dropout=0.0, n_layer=1, learning_rate=1.0)
    assert np.array_equal(starts, train.crop_starts(other, 7, 10_000))
    assert starts.shape == (config.batch_size,)


def test_seeds_and_iterations_do_not_overlap():
    crops = {(s, i): tuple(train.crop_starts(Config(seed=s), i, 10**6)) for s in (0, 1, 2, 2**32, 2**63 - 1) for i in (0, 1, 2, 3)}
    assert len(set(crops.values())) == len(crops)


def test_crops_reach_both_ends_of_a_split_and_never_over_them():
    config = Config(block_size=16, batch_size=64)
    length = 16 + 5
    seen = np.concatenate([train.crop_starts(config, i, length) for i in range(20)])
    assert set(seen) == {0, 1, 2, 3, 4}  # a crop and its targets are 17 tokens
    assert set(train.crop_starts(config, 0, 17)) == {0}


def test_crops_are_spread_evenly():
    config = Config(block_size=16, batch_size=1000)
    counts = np.bincount(np.concatenate([train.crop_starts(config, i, 26) for i in range(10)]), minlength=10)
    assert len(counts) == 10 and (abs(counts - 1000) < 5 * math.sqrt(1000)).all()


def test_shuffled_crops_take_every_window_once_before_any_twice():
    config, length = Config(crops="shuffled", block_size=16, batch_size=8, seed=2), 16 * 40 + 7
    starts = np.concatenate([train.crop_starts(config, i, length) for i in range(10)])  # 39 windows: the fifth batch is of two epochs
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
    config = Config(block_size=16, batch_size=5, eval_iters=4)
    starts = train.even_starts(config, 10_000)
    assert np.array_equal(starts, train.even_starts(Config(block_size=16, batch_size=5, eval_iters=4, seed=8), 10_000))
    assert (len(starts), starts[0], starts[-1]) == (20, 0, 10_000 - 17)
    assert np.ptp(np.diff(starts)) <= 1


def test_a_split_with_few_windows_is_evaluated_on_each_of_them_once():
    config = Config(block_size=16, batch_size=32, eval_iters=4)
    assert train.even_starts(config, 20).tolist() == [0, 1, 2, 3]
    assert train.even_starts(config, 17).tolist() == [0]


# ------------------------------------------------------------------------------------------
# The first embeddings


def test_the_spelling_of_a_token():
    letters = ["<do", "dog", "ogs", "gs>", "<dog", "dogs", "ogs>", "<dogs", "dogs>"]
    assert train.spelling_of(b" Dogs") == {"word": ["dogs"], "letters": letters}
    assert train.spelling_of(b" I") == {"word": ["i"], "letters": ["<i>"]}
    assert train.spelling_of(b"\n")["word"] == ["\n"]
    assert train.spelling_of(b"\xc3") != train.spelling_of(b"\xe3")  # parts of letters, not letters


def test_first_vectors_are_alike_where_the_spelling_is():
    torch.manual_seed(1)
    embedding = torch.nn.Embedding(20_000, 128)
    before = embedding.weight.detach().clone()
    train.spell(embedding)
    after = embedding.weight.detach()
    ids = {tokenizer().decode_single_token_bytes(i).decode("latin-1"): i for i in range(len(after))}

    def alike(pairs: list[tuple[str, str]]) -> float:
        a, b = (after[[ids[pair[side]] for pair in pairs]] for side in (0, 1))
        return torch.cosine_similarity(a, b).mean().item()

    nouns = [text for text in ids if re.fullmatch(" [a-z]{4,7}", text) and text + "s" in ids and len(set(text)) == len(text)]
    assert len(nouns) > 300
    # A word of n letters has 3n - 3 groups, its plural 3n, and 3n - 6 are in both.
    lengths = [len(noun.strip()) for noun in nouns]
    expected = np.mean([0.4 * (3 * n - 6) / math.sqrt((3 * n - 3) * 3 * n) for n in lengths])
    assert alike([(noun, noun + "s") for noun in nouns]) == pytest.approx(expected, abs=0.02)
    for form in (str.strip, str.title):
        assert alike([(noun, form(noun)) for noun in nouns if form(noun) in ids]) == pytest.approx(0.9, abs=0.01)
    assert abs(alike(list(itertools.pairwise(nouns)))) < 0.05
    assert torch.cosine_similarity(before, after).mean().item() == pytest.approx(0.1**0.5, abs=0.01)  # the rest is its own
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))


def test_a_run_begins_with_the_first_vectors_it_is_told(data, tmp_path):
    plain, run = (new_run(tiny(data, tmp_path, embedding_init=name)) for name in ("random", "spelling"))
    dog, capital, cat = (tokenizer().encode_ordinary(text)[0] for text in (" dog", " Dog", " cat"))
    for of, low, high in ((plain, -1, 0.7), (run, 0.7, 1)):
        rows = of.model.transformer.wte.weight.detach()
        assert low < torch.cosine_similarity(rows[dog], rows[capital], dim=0) < high
        assert torch.cosine_similarity(rows[dog], rows[cat], dim=0) < 0.7
    rest = [{name: p for name, p in weights_of(of).items() if "wte" not in name} for of in (plain, run)]
    assert same(*rest)
    source = GPT(run.config)
    assert same(weights_of(train.start(run.config, {}, None, source)), dict(source.named_parameters()))
    shake(run)
    run.save(0.0)
    assert same(weights_of(train.start(run.config, {}, load_file(run.out_dir / "ckpt.pt"))), weights_of(run))


# ------------------------------------------------------------------------------------------
# One update

# A large eps keeps AdamW's step in proportion to the gradient, so that its size counts (a
# mean, not a sum; clipped or not) and rounding does not; the clipping is at work.
PLAIN = dict(dropout=0.0, eps=1e-3, learning_rate=0.1, grad_clip=0.3, max_iters=6, warmup_iters=3, lr_decay_iters=10, weight_decay=0.5)


def plain_updates(run: train.Run, data: Path, updates: list[range]) -> tuple[dict[str, torch.Tensor], float, float]:
    """The oracle: each update one big batch, full logits, plain AdamW. Weights, the last update's loss and gradient norm."""
    config = run.config
    model = GPT(config)
    model.load_state_dict(run.model.state_dict())
    named = list(model.named_parameters())
    spared = [p for name, p in named if name.endswith(".bias") or ".ln_" in name]
    decayed = [p for name, p in named if not (name.endswith(".bias") or ".ln_" in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=False, foreach=False)
    tokens = tokens_of(data, "train")
    rates = pytorch_rates(config, config.max_iters)
    for iterations in updates:
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
def test_updates_equal_plain_ones_on_one_large_batch(data, tmp_path, device_batch_size):
    """Four iterations, then the last two: the mean over those an update holds, however they are cut into passes."""
    run = new_run(tiny(data, tmp_path, device_batch_size=device_batch_size, **PLAIN))
    expected, loss, norm = plain_updates(run, data, [range(0, 4), range(4, 6)])
    before = weights_of(run)
    run.update(train.update_end(run.config, 0))
    run.update(train.update_end(run.config, 4))
    assert run.state.iteration == 6
    assert run.loss.item() == pytest.approx(loss, rel=1e-5)
    assert run.grad_norm.item() == pytest.approx(norm, rel=1e-4) and norm > run.config.grad_clip
    for name, p in run.model.named_parameters():
        moved = (expected[name] - before[name]).abs().max()
        assert (p - expected[name]).abs().max() < 1e-3 * moved, name


def test_without_clipping_the_gradient_is_left_as_it_is(data, tmp_path):
    run = new_run(tiny(data, tmp_path, **PLAIN | {"grad_clip": 0.0}))
    expected, _, _ = plain_updates(run, data, [range(0, 4)])
    before = weights_of(run)
    run.update(4)
    name = "transformer.wpe.weight"
    moved = (expected[name] - before[name]).abs().max()
    assert (run.model.get_parameter(name) - expected[name]).abs().max() < 1e-3 * moved


KINDS = {
    "embedding_lr": ("wte.weight", "wpe.weight"),
    "vector_lr": (".bias", "ln_1.weight", "ln_2.weight", "ln_f.weight"),
    "mlp_out_lr": ("mlp.c_proj.weight",),
}
RATES = [{}, {"embedding_lr": 3.0, "vector_lr": 4.0, "mlp_out_lr": 2.0}]


def rate_of(name: str, config: Config) -> float:
    """A parameter's rate, as a multiple of the learning rate, by its name."""
    return next((getattr(config, kind) for kind, ends in KINDS.items() if name.endswith(ends)), 1.0)


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_each_kind_of_parameter_moves_at_its_rate(data, tmp_path, rates):
    run = new_run(tiny(data, tmp_path, weight_decay=0.0, grad_clip=0.0, **rates))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.step(learning_rate=0.1)
    for name, p in run.model.named_parameters():  # AdamW's first step is the rate, whatever the gradient's size
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, 0.1 * rate_of(name, run.config)), msg=name)


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_decay_pulls_matrices_and_embeddings_at_their_rate_but_no_bias_or_layernorm(data, tmp_path, rates):
    run = new_run(tiny(data, tmp_path, weight_decay=0.5, **rates))
    for p in run.model.parameters():
        p.data.add_(1.0)
        p.grad = torch.zeros_like(p)  # then AdamW does nothing but decay
    before = weights_of(run)
    run.step(learning_rate=0.1)
    for name, p in run.model.named_parameters():
        spared = name.endswith(".bias") or ".ln_" in name
        rate = 0.1 * rate_of(name, run.config)
        torch.testing.assert_close(p.detach(), before[name] * (1.0 if spared else 1 - rate * 0.5), msg=name)


def test_dropout_is_a_function_of_seed_and_place(data, tmp_path):
    def weights_after(seed, noise):
        run = new_run(tiny(data, tmp_path, dropout=0.3, seed=seed))
        torch.manual_seed(noise)  # what the process did before must not matter
        run.update(4)
        return weights_of(run)

    assert same(weights_after(5, 0), weights_after(5, 1))
    assert not same(weights_after(5, 0), weights_after(6, 0))


def test_dropout_differs_between_the_passes_of_an_update(data, tmp_path):
    """Twice the same sequences, in two passes: with one mask for both, the second would repeat the first's loss."""
    run = new_run(tiny(data, tmp_path, dropout=0.5, gradient_accumulation_steps=2))
    losses = []
    run.model.register_forward_hook(lambda module, arguments, loss: losses.append(loss.item()))
    x, y = windows(tokens_of(data, "train"), [0, 1, 2, 3], 16)
    run.model.register_forward_pre_hook(lambda module, arguments: (x, y))
    run.update(2)
    assert len(losses) == 2 and losses[0] != losses[1]


HARDWARE = [
    pytest.param("cpu", "bfloat16"),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))
        for dtype in ("float16", "bfloat16", "float32")
    ),
]


@pytest.mark.parametrize("device, dtype", HARDWARE)
def test_updates_in_every_precision_stay_close_to_float32(data, tmp_path, device, dtype):
    if (device, dtype) == ("cuda", "bfloat16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    changes = dict(dropout=0.0, learning_rate=1e-2, warmup_iters=0)
    exact, run = new_run(tiny(data, tmp_path, **changes)), new_run(tiny(data, tmp_path, device=device, dtype=dtype, **changes))
    assert run.scaler.is_enabled() == (dtype == "float16")
    start = exact.loss_over("val", train.even_starts(exact.config, 500))
    for end in (4, 8, 12):
        exact.update(end)
        run.update(end)
        assert run.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    assert run.grad_norm.item() == pytest.approx(exact.grad_norm.item(), rel=5e-2)  # unscaled before it is measured
    run.settle()
    assert run.state.skipped_updates == 0
    losses = [r.loss_over("val", train.even_starts(exact.config, 500)) for r in (exact, run)]
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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(data, tmp_path, value):
    run = new_run(tiny(data, tmp_path))
    before = weights_of(run)
    handle = poison(run, value)
    run.update(4)
    handle.remove()
    run.settle()
    assert same(weights_of(run), before)
    assert run.state.skipped_updates == 1 and run.state.iteration == 4
    # The optimizer has not noticed either: the next update is that of a run which never saw the bad one.
    clean = new_run(tiny(data, tmp_path))
    clean.state.iteration = 4
    for r in (run, clean):
        r.update(8)
    assert same(weights_of(run), weights_of(clean)) and not same(weights_of(run), before)


def test_ten_skipped_updates_in_a_row_end_the_run_in_one_line(data, tmp_path):
    run = new_run(tiny(data, tmp_path, gradient_accumulation_steps=1, max_iters=12, eval_interval=100))
    before = weights_of(run)
    poison(run, math.nan)
    with pytest.raises(UserError, match="gradient is not finite since iteration 0: .*learning_rate") as mistake:
        train.train(run)
    assert "\n" not in str(mistake.value)
    assert same(weights_of(run), before)


def test_nine_skipped_updates_in_a_row_are_only_counted(data, tmp_path):
    run = new_run(tiny(data, tmp_path, gradient_accumulation_steps=1, max_iters=12, eval_interval=100))
    poison(run, math.nan, times=train.MAX_SKIPPED - 1)
    assert train.train(run)
    assert rows_of(run.out_dir / "log.csv")[-1]["skipped_updates"] == train.MAX_SKIPPED - 1 == 9


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    run.update(4)
    run.save_evaluated(run.evaluate(6, 1.0, 1.0))
    files = snapshot(run.out_dir)
    run.model.transformer.ln_f.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="ckpt.pt") as mistake:
        run.evaluate(12, 1.0, 1.0)
    assert "\n" not in str(mistake.value) and snapshot(run.out_dir) == files


# ------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def plain_loss(run: train.Run, tokens: np.ndarray, starts: list[int], size: int) -> tuple[float, int]:
    """Summed cross-entropy, one window at a time, and how many tokens that is."""
    total, count = 0.0, 0
    run.model.eval()
    for start in starts:
        window = torch.tensor(tokens[start : start + size + 1])
        total += F.cross_entropy(run.model(window[None, :-1])[0].double(), window[1:], reduction="sum").item()
        count += len(window) - 1
    run.model.train()
    return total, count


@pytest.mark.parametrize("device_batch_size", [None, 3, 1000])
def test_an_evaluation_is_the_mean_over_its_windows_with_dropout_off(data, tmp_path, device_batch_size):
    run = new_run(tiny(data, tmp_path, dropout=0.5, device_batch_size=device_batch_size))
    shake(run)
    tokens = tokens_of(data, "val")
    starts = train.even_starts(run.config, len(tokens))
    total, count = plain_loss(run, tokens, starts, 16)
    assert run.loss_over("val", starts) == pytest.approx(total / count, rel=1e-5)
    assert run.model.training  # and training goes on with it


def test_two_evaluations_differ_only_by_the_weights(data, tmp_path):
    run = new_run(tiny(data, tmp_path, dropout=0.5))
    shake(run)
    first, second = (run.evaluate(label, 1.0, 1.0) for label in (6, 12))
    assert (first["train_loss"], first["val_loss"]) == (second["train_loss"], second["val_loss"])


@pytest.mark.parametrize("length", [17, 18, 32, 33, 100, None])
def test_the_whole_split_scores_every_token_but_the_first_exactly_once(data, tmp_path, length):
    run = new_run(tiny(data, tmp_path, device_batch_size=3))
    shake(run)
    tokens = run.splits["val"] = tokens_of(data, "val")[:length]
    total, count = plain_loss(run, tokens, list(range(0, len(tokens) - 1, 16)), 16)
    assert count == len(tokens) - 1
    assert run.whole_split_loss("val") == pytest.approx(total / count, rel=1e-5)


def test_bits_per_byte():
    a_byte_a_token = {"tokens": 1000, "bytes": 1000}
    assert train.bits_per_byte(math.log(256), a_byte_a_token) == pytest.approx(8)  # a uniform guess of bytes
    assert train.bits_per_byte(math.log(50257), {"tokens": 250, "bytes": 1000}) == pytest.approx(math.log2(50257) / 4)


# ------------------------------------------------------------------------------------------
# A whole run


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> SimpleNamespace:
    """A run of 18 iterations that came to its end; treat as read-only."""
    folder = tmp_path_factory.mktemp("finished")
    flags = TINY | dict(data_dir=data, out_dir=folder / "out" / "first", plot_dir=folder / "plots")
    stdout, stderr = main(**flags)
    return SimpleNamespace(folder=folder, flags=flags, out=folder / "out" / "first", stdout=stdout, stderr=stderr)


def copy_of(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """Its out_dir elsewhere, to work on (a run holds its own folder until its process ends)."""
    return shutil.copytree(finished.out, tmp_path / "copy")


def test_a_run_leaves_its_files_and_nothing_else(finished):
    assert sorted(snapshot(finished.folder)) == ["out/first/ckpt.pt", "out/first/log.csv", "out/first/model.pt", "plots/first.png"]


def test_the_log_has_the_columns_and_a_row_an_evaluation(finished, data):
    assert (finished.out / "log.csv").read_text().splitlines()[0] == COLUMNS
    rows = rows_of(finished.out / "log.csv")
    assert [row["iteration"] for row in rows] == [6, 12, 18]
    assert [row["tokens"] for row in rows] == [4 * 64, 12 * 64, 18 * 64]  # what the weights have seen: whole updates of 4
    rates = pytorch_rates(Config(**TINY), 18)
    assert [row["learning_rate"] for row in rows] == pytest.approx([rates[3], rates[11], rates[17]], rel=1e-6)
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows)
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"] < 600
    text = (data.parent / "val.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    size = sum(len(story.encode()) for story in text)
    for row in rows:
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2) * len(tokens_of(data, "val")) / size, rel=1e-5)


def test_every_row_of_the_log_has_a_speed(finished):
    """The first one too, though its evaluation follows the first update, which is no measure of the others."""
    assert all(row["tokens_per_second"] > 0 for row in rows_of(finished.out / "log.csv"))


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
    for words in (f"{parameters / 1e6:.1f} M parameters", "CPU", "float32", str(data), "256 tokens", "1,152 tokens"):
        assert words in said, words
    for words in ("iteration 6:", "iteration 18:", "validation loss", "perplexity", "bits per byte", "first.png"):
        assert words in said, words


def test_checkpoints_hold_tensors_and_plain_values_only(finished):
    for name in ("model.pt", "ckpt.pt"):
        content = torch.load(finished.out / name, weights_only=True)
        assert content["config"]["n_embd"] == 32
        assert set(content["model"]) == set(GPT(Config(**TINY)).state_dict())


def test_the_plot_is_a_png_with_something_in_it(finished):
    from matplotlib.image import imread

    path = finished.folder / "plots" / "first.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 300 and len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 10


def test_only_the_reference_preset_has_the_published_curve_behind_it(tmp_path):
    log = [dict(iteration=i, train_loss=9.0, val_loss=9.1, learning_rate=1e-4) for i in (500, 1000)]
    pictures = []
    for preset in ("reference", "demo"):
        config = Config(preset=preset, out_dir=str(tmp_path), max_iters=1000)
        train.draw_curves(tmp_path / f"{preset}.png", config, log)
        pictures.append((tmp_path / f"{preset}.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_the_plot_shows_the_rates_that_were_used(tmp_path):
    """After a resume with another max_iters they are not those of the schedule."""
    pictures = set()
    for rate in (1e-4, 2e-4):
        log = [dict(iteration=i, train_loss=9.0, val_loss=9.1, learning_rate=rate) for i in (500, 1000)]
        train.draw_curves(tmp_path / "curve.png", Config(out_dir=str(tmp_path), max_iters=1000), log)
        pictures.add((tmp_path / "curve.png").read_bytes())
    assert len(pictures) == 2


def test_the_published_curve_is_the_reference_runs():
    rows = rows_of(train.REFERENCE_CURVE)
    at = {row["iteration"]: row["val_loss"] for row in rows}
    assert at[500] == pytest.approx(9.448, abs=1e-3) and at[1000] == pytest.approx(8.471, abs=1e-3)
    assert at[9500] == pytest.approx(2.963, abs=1e-3)


def test_model_pt_is_the_best_by_validation_loss_and_ckpt_pt_the_last(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    run.save_evaluated(run.evaluate(6, 1.0, 1.0))
    best = weights_of(run)
    for p in run.model.parameters():
        p.data.mul_(3)
    worse = run.evaluate(12, 1.0, 1.0)
    run.save_evaluated(worse)
    kept = torch.load(run.out_dir / "model.pt", weights_only=True)
    assert same(kept["model"], best) and kept["iteration"] == 6 and kept["val_loss"] < worse["val_loss"]
    assert same(torch.load(run.out_dir / "ckpt.pt", weights_only=True)["model"], weights_of(run))


# ------------------------------------------------------------------------------------------
# Going on


LONG = TINY | dict(max_iters=24, lr_decay_iters=24, eval_interval=8, embedding_lr=3.0, vector_lr=2.0, mlp_out_lr=0.5)


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    main(**LONG, data_dir=data, out_dir=folder / "out", plot_dir=folder)
    return folder / "out"


def without_times(log: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in ("tokens_per_second", "seconds")} for row in rows_of(log)]


def test_a_run_resumed_twice_equals_one_that_was_never_interrupted(uninterrupted, data, tmp_path):
    main(**LONG | dict(max_iters=8), data_dir=data, out_dir=tmp_path / "0", plot_dir=tmp_path)
    for i, length in enumerate((16, 24)):
        shutil.copytree(tmp_path / str(i), tmp_path / str(i + 1))
        main("--resume", max_iters=length, lr_decay_iters=24, out_dir=tmp_path / str(i + 1), plot_dir=tmp_path)
    check_equal(tmp_path / "2", uninterrupted)


def test_a_run_resumed_between_evaluations_equals_one_that_was_never_interrupted(uninterrupted, data, tmp_path):
    run = new_run(Config(**LONG, data_dir=str(data), out_dir=str(tmp_path / "out")))
    for end in (4, 8, 12):
        run.update(end)
        if end == 8:
            run.save_evaluated(run.evaluate(8, 1.0, 1.0))
    run.save(1.0)
    main("--resume", out_dir=tmp_path / "out", plot_dir=tmp_path)
    check_equal(tmp_path / "out", uninterrupted)


def check_equal(out: Path, other: Path) -> None:
    assert without_times(out / "log.csv") == without_times(other / "log.csv")
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (out, other))
    assert ours["iteration"] == theirs["iteration"] and same(ours["model"], theirs["model"])
    ours, theirs = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (out, other))
    assert same(ours["model"], theirs["model"])
    for number, moments in theirs["optimizer"]["state"].items():
        assert same(ours["optimizer"]["state"][number], moments)


def test_the_seconds_of_a_resumed_run_go_on(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    main("--resume", max_iters=20, out_dir=out, plot_dir=tmp_path)
    seconds = [row["seconds"] for row in rows_of(out / "log.csv")]
    assert len(seconds) == 4 and seconds == sorted(seconds)


def refusal(*argv: str, **flags) -> str:
    with pytest.raises(UserError) as mistake:
        main(*argv, **flags)
    line = str(mistake.value)
    assert line and "\n" not in line
    return line


def test_a_folder_that_holds_a_run_is_refused_and_left_untouched(finished):
    before = snapshot(finished.folder)
    line = refusal(**finished.flags)
    assert "--resume" in line and "--overwrite" in line and "--out_dir" in line
    assert snapshot(finished.folder) == before


def test_overwrite_starts_again(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    main("--overwrite", **finished.flags | dict(out_dir=out, plot_dir=tmp_path, max_iters=4, eval_interval=2))
    assert [row["iteration"] for row in rows_of(out / "log.csv")] == [4]
    assert torch.load(out / "model.pt", weights_only=True)["iteration"] == 4


def test_a_finished_run_says_so_and_is_left_untouched(finished):
    before = snapshot(finished.folder)
    stdout, stderr = main("--resume", out_dir=finished.out)
    assert "finished" in stderr and "18" in stderr and stdout == ""
    assert snapshot(finished.folder) == before


def test_resume_refuses_what_would_make_another_run_and_lists_it_all(finished):
    before = snapshot(finished.folder)
    line = refusal("--resume", out_dir=finished.out, max_iters=30, n_embd=48, seed=1, batch_size=8, dropout=0.0)
    assert all(words in line for words in ("n_embd 32 -> 48", "seed 1337 -> 1", "batch_size 4 -> 8", "dropout 0.1 -> 0.0"))
    assert "max_iters" not in line
    assert snapshot(finished.folder) == before


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_layer", 2), ("n_head", 4), ("block_size", 8), ("bias", "false"), ("gelu", "tanh"), ("gradient_accumulation_steps", 2),
        ("learning_rate", 1.0), ("min_lr", 0.0), ("warmup_iters", 0), ("warmup_start_factor", 0.0), ("weight_decay", 0.0), ("beta1", 0.0),
        ("beta2", 0.0), ("eps", 1.0), ("grad_clip", 0.0), ("preset", "demo"), ("dataset", "toy"), ("embedding_init", "spelling"),
        ("embedding_lr", 2.0), ("vector_lr", 2.0), ("mlp_out_lr", 2.0),
    ],
)  # fmt: skip
def test_resume_refuses_a_change_of(finished, name, value):
    assert f"{name} " in refusal("--resume", f"--out_dir={finished.out}", f"--{name}={value}")


def test_resume_takes_what_does_not_matter_and_what_is_said_again(finished, data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved")
    changes = dict(data_dir=moved, out_dir=copy_of(finished, tmp_path), plot_dir=tmp_path / "p", max_iters=20, device_batch_size=3)
    main("--resume", **finished.flags | changes)
    assert [row["iteration"] for row in rows_of(tmp_path / "copy" / "log.csv")] == [6, 12, 18, 20]
    assert (tmp_path / "p" / "copy.png").exists()


def test_a_longer_run_whose_decay_moves_is_warned_of(finished, tmp_path):
    stderr = main("--resume", out_dir=copy_of(finished, tmp_path), plot_dir=tmp_path, max_iters=20, lr_decay_iters=20)[1]
    assert "warning" in stderr and "until iteration 20, not" in stderr and "iteration 18" in stderr


def test_what_is_not_typed_again_is_the_checkpoints_and_not_the_presets(finished, tmp_path):
    """19 iterations of decay are fewer than the reference's warmup, but not than this run's."""
    main("--resume", out_dir=copy_of(finished, tmp_path), plot_dir=tmp_path, max_iters=20, lr_decay_iters=19)
    assert "n_embd 32 -> 64" in refusal("--resume", out_dir=finished.out, n_embd=64)  # 64 fits this run's two heads, not six


def test_data_that_has_changed_is_refused(finished, tmp_path):
    write_tales(tmp_path / "train.txt", 5, 100)
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(str(tmp_path / "train.txt"), tmp_path / "data", val_fraction=0.3, num_threads=1)
    before = snapshot(finished.folder)
    assert "has changed" in refusal("--resume", out_dir=finished.out, data_dir=tmp_path / "data", max_iters=20)
    assert snapshot(finished.folder) == before


def test_resume_without_a_checkpoint_starts_from_the_beginning(data, tmp_path):
    folders = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    assert "from the beginning" in main("--resume", **TINY | folders | dict(max_iters=4))[1]
    assert (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"], ids=["empty", "text", "damaged"])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_left(finished, tmp_path, content):
    out = copy_of(finished, tmp_path)
    (out / "ckpt.pt").write_bytes(content)
    before = snapshot(tmp_path)
    assert "ckpt.pt" in refusal("--resume", out_dir=out)
    assert snapshot(tmp_path) == before


def test_a_checkpoint_of_something_else_is_refused(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    torch.save({"model": {}}, out / "ckpt.pt")
    assert "not a checkpoint of ours" in refusal("--resume", out_dir=out)


def test_two_runs_in_one_folder_are_refused(finished):
    """The run of the fixture still holds its folder: this process has not ended."""
    before = snapshot(finished.folder)
    assert "another train.py" in refusal("--resume", out_dir=finished.out, max_iters=20)
    assert snapshot(finished.folder) == before


# ------------------------------------------------------------------------------------------
# Starting from a model, and scoring one

# What fine-tuning types: no architecture.
TUNING = {name: value for name, value in TINY.items() if name not in ("n_layer", "n_head", "n_embd", "block_size")}
EVAL = dict(device="cpu", dtype="float32", compile="false")
FROZEN = TUNING | dict(learning_rate=1e-30, min_lr=0.0, max_iters=4, lr_decay_iters=4, weight_decay=0.0)  # a run that learns nothing


@pytest.fixture(scope="session")
def export(finished, tmp_path_factory) -> Path:
    """The finished run's model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("export")
    save_hugging_face(load_model(str(finished.out / "model.pt")), folder)
    return folder


def score_in(text: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith("validation loss")]
    return line


def test_eval_only_says_what_the_run_said_of_itself_and_changes_nothing(finished, data):
    """The run of the fixture still holds its folder, as one that is going on does."""
    before = snapshot(finished.folder)
    stdout, stderr = main("--eval_only", out_dir=finished.out, max_iters=3, learning_rate=7, **EVAL)
    assert stdout == score_in(finished.stderr) + "\n" and str(finished.out / "model.pt") in stderr and str(data) in stderr
    assert "--eval_only" in main("--resume", out_dir=finished.out)[1]
    assert snapshot(finished.folder) == before


@torch.no_grad()
def test_eval_only_agrees_with_hugging_face_on_the_same_windows(export, data, monkeypatch):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(export).eval()
    tokens = torch.tensor(tokens_of(data, "val"))
    scored = [tokens[i : i + 17] for i in range(0, len(tokens) - 1, 16)]
    assert 2 < len(scored[-1]) < 17  # the last window is an odd one
    losses = [F.cross_entropy(theirs(window[None, :-1]).logits[0], window[1:], reduction="sum").item() for window in scored]
    expected = sum(losses) / (len(tokens) - 1)
    seen, whole = [], train.Run.whole_split_loss
    monkeypatch.setattr(train.Run, "whole_split_loss", lambda run, split: seen.append(whole(run, split)) or seen[-1])
    stdout, _ = main("--eval_only", init_from=export, data_dir=data, device_batch_size=7, **EVAL)
    assert seen == [pytest.approx(expected, abs=1e-5)]
    bits = expected / math.log(2) * len(tokens) / sum(len(tale.encode()) for tale in write_tales(data.parent / "again.txt", 1, 25))
    measures = [float(word) for word in stdout.replace(",", "").split() if word[0].isdigit()]
    assert measures == pytest.approx([expected, math.exp(expected), bits], abs=0.01, rel=1e-4)


def test_eval_only_scores_a_shorter_context_and_other_data(finished, tmp_path, data):
    write_tales(tmp_path / "other.txt", 3, 60)
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(str(tmp_path / "other.txt"), tmp_path / "data", val_fraction=0.3, num_threads=1)
    lines = {main("--eval_only", out_dir=finished.out, **flags)[0] for flags in ({}, {"block_size": 8}, {"data_dir": tmp_path / "data"})}
    assert len(lines) == 3


def test_eval_only_refuses_what_it_cannot_score(finished, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "out/demo/model.pt" in refusal("--eval_only", preset="demo")
    assert "choose one" in refusal("--eval_only", "--resume", out_dir=finished.out)
    assert "n_layer 1, not 2" in refusal("--eval_only", out_dir=finished.out, n_layer=2)
    assert "prepare_data.py" in refusal("--eval_only", init_from=export)
    assert "data/toy" in refusal("--eval_only", init_from=export, dataset="toy")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["model.pt", "ckpt.pt", "folder"])
def test_a_run_starts_from_the_weights_of_a_model(finished, export, data, tmp_path, form):
    source = export if form == "folder" else finished.out / form
    flags = FROZEN | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    stderr = main(init_from=source, **flags)[1]
    assert score_in(stderr) == score_in(main("--eval_only", init_from=source, data_dir=data, device_batch_size=4, **EVAL)[0])
    assert f"first weights: {source}" in stderr
    ours, theirs = load_model(str(tmp_path / "out" / "model.pt")), load_model(str(source))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=1e-12)
    assert ours.config.init_from == str(source) and (ours.config.n_embd, ours.config.block_size) == (32, 16)


def test_a_shorter_context_has_the_first_positions_and_a_longer_one_is_refused(finished, data, tmp_path):
    source, flags = finished.out / "model.pt", FROZEN | dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path / "plots")
    for typed, words in (
        (dict(block_size=17), "positions for 16 tokens only"), (dict(n_layer=2, n_embd=64), "n_layer 1, not 2, n_embd 32, not 64"),
        (dict(gelu="tanh"), "gelu exact, not tanh"), (dict(bias="false"), "bias True, not False"),
    ):  # fmt: skip
        assert words in refusal(init_from=source, **flags | typed)
    assert not any(tmp_path.iterdir())
    main(init_from=source, block_size=8, n_layer=1, **flags)
    ours, theirs = load_model(str(tmp_path / "out" / "model.pt")), load_model(str(source))
    torch.testing.assert_close(ours.transformer.wpe.weight, theirs.transformer.wpe.weight[:8], rtol=0, atol=1e-12)


def test_only_a_typed_architecture_counts_not_the_presets(finished, tmp_path):
    typed = dict(preset="demo", init_from=str(finished.out / "model.pt"), out_dir=str(tmp_path / "out"))
    config, settings, _, _ = train.plan_run(typed, "")
    assert (config.n_layer, config.n_embd, config.block_size, config.dropout) == (1, 32, 16, 0.0)  # the demo has 3, 96, 128
    assert settings.keys() > {"n_layer", "n_head", "n_embd", "vocab_size", "bias", "gelu", "block_size"}


def test_a_run_that_cannot_start_loses_nothing_and_one_that_can_may_replace_its_own_source(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    flags = FROZEN | dict(data_dir=finished.flags["data_dir"], out_dir=out, plot_dir=tmp_path)
    before = snapshot(tmp_path)
    for source, words in ((tmp_path / "none.pt", "none.pt"), (tmp_path, "no checkpoint"), (out / "log.csv", "log.csv")):
        assert words in refusal("--overwrite", init_from=source, **flags)
    assert snapshot(tmp_path) == before
    stderr = main("--overwrite", init_from=out / "model.pt", **flags)[1]
    assert score_in(stderr) == score_in(finished.stderr) and len(rows_of(out / "log.csv")) == 1


def test_a_run_that_fails_before_its_first_evaluation_leaves_the_model_it_began_with(finished, data, tmp_path):
    out = copy_of(finished, tmp_path)
    flags = FROZEN | dict(data_dir=data, out_dir=out, plot_dir=tmp_path, learning_rate=1e30)
    assert "not finite" in refusal("--overwrite", init_from=out / "model.pt", **flags)
    assert [path.name for path in out.iterdir()] == ["model.pt"]
    assert (out / "model.pt").read_bytes() == (finished.out / "model.pt").read_bytes()


def test_a_resumed_run_from_a_model_equals_an_uninterrupted_one_and_needs_its_source_no_more(finished, data, tmp_path):
    source = shutil.copy(finished.out / "model.pt", tmp_path / "source.pt")
    flags = TUNING | dict(init_from=source, data_dir=data, plot_dir=tmp_path, eval_interval=8)
    main(**flags | dict(max_iters=16, out_dir=tmp_path / "whole"))
    main("--resume", **flags | dict(max_iters=8, out_dir=tmp_path / "part"))
    Path(source).unlink()
    shutil.copytree(tmp_path / "part", tmp_path / "rest")
    stderr = main("--resume", **flags | dict(max_iters=16, out_dir=tmp_path / "rest"))[1]
    assert "config.py has changed" not in stderr
    check_equal(tmp_path / "rest", tmp_path / "whole")
    assert "init_from" in refusal("--resume", out_dir=tmp_path / "rest", init_from="other.pt")
    assert "config.py has changed" not in main("--resume", out_dir=tmp_path / "rest")[1]


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


def test_without_a_compiler_auto_does_not_compile_and_true_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not train.should_compile("auto") and not train.should_compile("false")
    with pytest.raises(UserError, match="--compile false"):
        train.should_compile("true")


def refused_early(tmp_path: Path, **flags) -> str:
    """The line of a run that is refused before a model is built (a model this wide fits into no address space)."""
    before = snapshot(tmp_path)
    line = refusal(**TINY | dict(n_embd=2**30, n_head=1, out_dir=tmp_path / "out", plot_dir=tmp_path / "plots") | flags)
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists() and not (tmp_path / "plots").exists()
    return line


def test_another_dataset_than_the_prepared_one_is_refused(data, tmp_path):
    line = refused_early(tmp_path, data_dir=data, dataset="toy")
    assert "toy" in line and "train.txt" in line and "--data_dir" in line


def test_the_prepared_dataset_may_be_named_again(finished, data, tmp_path):
    config = tiny(data, tmp_path, dataset=str(data.parent / "train.txt"))
    assert train.prepared_data(config, {"dataset": config.dataset}, may_prepare=True)["splits"]["val"]["stories"] == 25


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_shorter_than_a_crop_and_its_target_is_refused(data, tmp_path, split):
    tokens = json.loads((data / "meta.json").read_text())["splits"][split]["tokens"]
    meta = train.prepared_data(tiny(data, tmp_path, block_size=len(tokens_of(data, "val")) - 1), {}, may_prepare=True)
    assert meta["splits"]["val"]["tokens"] == len(tokens_of(data, "val"))  # just enough
    line = refused_early(tmp_path, data_dir=data, block_size=tokens)
    assert "val" in line and "block_size" in line and str(tokens + 1) in line


def test_another_vocabulary_than_the_datas_is_refused(data, tmp_path):
    line = refused_early(tmp_path, data_dir=data, vocab_size=1000)
    assert "vocab_size 1000" in line and "50257" in line


def test_another_vocabulary_is_refused_before_anything_is_prepared(data, tmp_path):
    """Preparing TinyStories takes minutes, and no prepared data has another vocabulary."""
    line = refused_early(tmp_path, data_dir=tmp_path / "data", dataset=data.parent / "train.txt", vocab_size=1000)
    assert "vocab_size 1000" in line and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "name, damage",
    [
        ("train.bin", lambda content: content + b"\0\0"), ("val.bin", lambda content: content[:-2]),
        ("train.bin", lambda content: b"\1\0" + content[2:]), ("val.bin", lambda content: b""), ("meta.json", lambda content: b"{"),
    ],
    ids=["longer", "shorter", "changed", "empty", "meta"],
)  # fmt: skip
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


def test_several_ranks_do_not_prepare_data(data, tmp_path):
    config = tiny(tmp_path / "data", tmp_path, dataset=str(data.parent / "train.txt"))
    with pytest.raises(UserError, match="prepare_data.py"):
        train.prepared_data(config, {}, may_prepare=False)
    assert not any(tmp_path.iterdir())


def test_the_time_left_is_true_within_a_tenth_evaluations_included(monkeypatch):
    """Iterations take 3 s, forward passes 1 s; an evaluation is half as long as what lies between two."""
    config = Config(max_iters=1000, eval_interval=100, eval_iters=75)
    now = 1000.0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    clock = train.Clock(config, train.State(), val_tokens=200 * config.tokens_per_iteration)
    told = []
    for iteration in range(1, 1001):
        now += 3
        if iteration % 50 == 20:  # the first after a minute
            told.append((now, clock.seconds_left(iteration)))
        if iteration % 100 == 0:
            clock.stop(iteration)
            now += 2 * 75
            clock.restart(iteration)
    end = now + 200
    for at, left in told:
        assert left == pytest.approx(end - at, rel=0.1), at
