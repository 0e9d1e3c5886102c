"""plots/tour.md and what it shows: the picture of the GPT, and one head's arithmetic."""

import dataclasses
import math
import re
from pathlib import Path

from config import Config

import conftest
import numpy as np
import pytest
import torch
from matplotlib.text import Text

import model as gpt
from model import GPT, save_file
from plots import architecture, attention

TOUR = Path(architecture.__file__).with_name("tour.md")
PROMPT = "Tom was walking by the lake"
PNG = b"\x89PNG"


@pytest.fixture
def model() -> GPT:
    """Its attention is far from even."""
    torch.manual_seed(0)
    model = GPT(Config(n_layer=2, n_head=2, n_embd=32, block_size=16, dropout=0.0)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture
def checkpoint(model, tmp_path) -> str:
    (tmp_path / "run").mkdir()
    save_file(tmp_path / "run" / "model.pt", model.config, model)
    return str(tmp_path / "run" / "model.pt")


def drawn(monkeypatch, module, *argv: str) -> tuple[object, list[Text]]:
    """The figure that a program of plots/ draws, and its texts."""
    figures, write = [], module.write_figure

    def keep(figure, path: Path) -> None:
        figures.append(figure)
        write(figure, path)

    monkeypatch.setattr(module, "write_figure", keep)
    module.main([*argv])
    figures[0].set_dpi(120)  # as it was written
    figures[0].draw_without_rendering()
    texts = [text for text in figures[0].findobj(Text) if text.get_text() and text.get_visible()]
    return figures[0], texts


def test_no_text_of_the_architecture_is_cut_or_covers_another(monkeypatch, tmp_path):
    out = tmp_path / "new" / "a.png"
    figure, texts = drawn(monkeypatch, architecture, "--out", str(out))
    assert out.read_bytes()[:4] == PNG and len(texts) > 40
    boxes = [text.get_window_extent() for text in texts]
    for place, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, texts[place].get_text()
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, texts[place].get_text()
        for other in boxes[:place]:
            assert not box.overlaps(other), texts[place].get_text()


# What the picture and the tour must show; and boxes that are no function of model.py.
FUNCTIONS = {"make_norm", "fused_linear_cross_entropy", "draw_token", "GPT.features",
             "GPT.forward", "Block.forward", "Attention.forward", "Attention.queries_keys_values",
             "Attention.weights", "MLP.forward"}
STEPS = {"token ids", "weights @ v", "c_proj", "c_fc, F.gelu"}


def test_the_boxes_have_names_and_sizes_of_the_model():
    names = {name for *_, name, _ in architecture.BOXES} - STEPS
    names |= {title.split(",")[0] for *_, title in architecture.FRAMES}
    assert names >= FUNCTIONS
    for name in names:
        assert callable(named(name)), name
    parts = {name for name, _ in GPT(Config.from_preset("demo")).named_modules()}
    for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        assert f"transformer.h.2.{layer}" in parts and "transformer.ln_f" in parts


def named(name: str) -> object:
    """The function or class of model.py with this name, such as Attention.weights."""
    found = gpt
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_tour_is_short_and_names_what_exists():
    text = TOUR.read_text(encoding="utf-8")
    assert len(text.split()) <= 1800
    names = re.findall(r"\[`([\w.]+)`\]\(\.\./model\.py\)", text)
    assert set(names) >= FUNCTIONS
    assert all(callable(named(name)) for name in names)
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and all((TOUR.parent / link).exists() for link in links)
    assert not re.search(r"\.py#L\d|\.py:\d", text)  # a line number breaks with the next edit


def tables(out: str) -> list[np.ndarray]:
    """The numbers of each printed table, without its names."""
    found = []
    for table in re.split(r"\n\n.*\n\n", out)[1:]:
        lines = table.replace(" earlier", "_earlier").splitlines()[1:]
        found.append(np.array([line.split()[1:] for line in lines], dtype=float))
    return found


@torch.no_grad()
def by_numpy(model: GPT, ids: torch.Tensor, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head of block 1 over ids (T,), from its matrix alone: scores and weights (T, T), values
    (T, width), one number after the other.
    """
    first, second = model.transformer.h
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[: len(ids)]
    x = second.ln_1(first(x[None])[0]).numpy()
    matrix, bias = (p.numpy() for p in second.attn.c_attn.parameters())
    width = x.shape[1] // model.config.n_head
    q, k, v = ((x @ matrix.T + bias)[:, 32 * part + width * head :][:, :width] for part in range(3))
    scores, weights = np.zeros((2, len(ids), len(ids)))
    for i in range(len(ids)):
        for j in range(len(ids)):
            scores[i, j] = sum(q[i] * k[j]) / math.sqrt(width)
        weights[i, : i + 1] = np.exp(scores[i, : i + 1])
        weights[i] /= sum(weights[i])
    return scores, weights, v


@pytest.mark.parametrize("prompt, before", [("Tom was walking by", 0), (PROMPT, 2), ("Tom was", 0)])
def test_a_heads_numbers_are_those_of_the_model_and_of_numpy(
        checkpoint, model, capsys, prompt, before):
    attention.main(["--checkpoint", checkpoint, "--prompt", prompt, "--numbers",
                    "--layer", "1", "--head", "1"])
    scores, masked, weights, mix = tables(capsys.readouterr().out)
    ids = attention.prompt_ids(prompt, model)
    raw, expected, v = by_numpy(model, ids, head=1)
    close = dict(rtol=0, atol=0.006)  # two digits are printed
    np.testing.assert_allclose(scores, raw[before:, before:], **close)
    future = np.triu(np.ones_like(masked), 1) > 0
    assert (masked[future] == -math.inf).all()
    np.testing.assert_array_equal(masked[~future], scores[~future])
    ours = attention.attention_maps(model, ids)[1, 1].numpy()
    for shares in (ours, expected):
        np.testing.assert_allclose(weights[:, -len(future) :], shares[before:, before:], **close)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=0, atol=0.03)
    assert weights[:, 0].max() > 0.3 and weights.shape[1] == len(future) + (before > 0)
    # The mix: each token's weight and value, and below them their sum.
    np.testing.assert_array_equal(mix[:-1, 0], weights[-1])
    np.testing.assert_allclose(mix[-len(future) - 1 : -1, 1:], v[before:, :4], **close)
    np.testing.assert_allclose(mix[-1], [1, *(expected[-1] @ v)[:4]], **close)
    np.testing.assert_allclose(mix[:-1, 0] @ mix[:-1, 1:], mix[-1, 1:], rtol=0, atol=0.05)


def test_the_mask_that_is_printed_is_the_models(checkpoint, monkeypatch, capsys):
    """As in the exercise that removes it."""
    plain = staticmethod(lambda q, k: (q @ k.transpose(-2, -1) / k.size(-1) ** 0.5).softmax(-1))
    monkeypatch.setattr(gpt.Attention, "weights", plain)
    attention.main(["--checkpoint", checkpoint, "--prompt", "Tom was walking by", "--numbers",
                    "--layer", "0", "--head", "0"])
    _, masked, weights, _ = tables(capsys.readouterr().out)
    assert np.isfinite(masked).all() and weights[0, 1:].sum() > 0.1


def test_stages_are_maps_of_one_head_side_by_side(checkpoint, model, monkeypatch, tmp_path):
    (tmp_path / "later").mkdir()
    later = GPT(model.config)
    save_file(tmp_path / "later" / "model.pt", model.config, later)
    figure, texts = drawn(monkeypatch, attention, "--layer", "1", "--head", "0", "--prompt", PROMPT,
                          "--stages", checkpoint, str(tmp_path / "later" / "model.pt"),
                          "--out", str(tmp_path / "a.png"))
    assert [axes.get_title() for axes in figure.axes] == ["run", "later"]
    ids = attention.prompt_ids(PROMPT, model)
    for axes, one in zip(figure.axes, (model, later.eval()), strict=True):
        expected = attention.attention_maps(one, ids)[1, 0].numpy()
        np.testing.assert_allclose(np.nan_to_num(axes.images[0].get_array().filled(0)), expected)
    assert [text.get_text() for text in texts].count("␣lake") == 4
    small = GPT(Config(n_layer=1, n_head=2, n_embd=32, block_size=16))
    save_file(tmp_path / "model.pt", small.config, small)
    stages = [str(tmp_path / "model.pt"), checkpoint]
    line = conftest.refusal(attention.main, ["--layer", "1", "--head", "0", "--stages", *stages])
    assert line.startswith(stages[0]) and "layers up to 0" in line
    long = ["--prompt", "One day, a girl and a boy", "--layer", "0", "--head", "0"]
    short = GPT(dataclasses.replace(model.config, block_size=4))
    save_file(tmp_path / "model.pt", short.config, short)
    line = conftest.refusal(attention.main, [*long, "--stages", *stages])
    assert line.startswith(f"{stages[0]} reads 4 tokens, the prompt has 8")
    attention.main([*long, "--numbers", "--checkpoint", stages[0]])  # its last four


@pytest.mark.parametrize("flags, words", [
    (["--numbers"], "add --layer and --head"), (["--stages", "a.pt"], "add --layer and --head"),
    (["--numbers", "--layer", "0", "--head", "0", "--stages", "a.pt"],
     "--stages: not allowed with argument --numbers")])
def test_numbers_and_stages_are_about_one_head_and_exclude_each_other(flags, words):
    assert words in conftest.refusal(attention.main, flags)


def test_the_model_that_was_not_named_is_told(checkpoint, monkeypatch, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    Path(checkpoint).parent.rename(tmp_path / "out" / "run")
    monkeypatch.chdir(tmp_path)
    attention.main(["--layer", "0", "--head", "0", "--numbers"])
    assert capsys.readouterr().err == "reading out/run/model.pt\n"
