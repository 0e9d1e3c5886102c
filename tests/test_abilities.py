"""plots/abilities.py: the items are twins; scores against Hugging Face's; a model made by hand."""

import csv
import math
from collections import Counter

from config import Config

import pytest
import torch
from conftest import refusal

from model import GPT, save_file, to_hugging_face
from plots import abilities
from plots.abilities import PAIRS, category_shares, choices, log_probability
from prepare_data import encode_text

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, dropout=0.0)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with open(PAIRS, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def random_model(seed: int = 0, **settings) -> GPT:
    torch.manual_seed(seed)
    model = GPT(Config(**(SMALL | settings))).eval()
    for weight in model.transformer.h.parameters():  # its blocks matter
        weight.data += 0.3 * torch.randn_like(weight)
    return model


def copying_model() -> GPT:
    """One head looks at all tokens alike and adds up their vectors, which are nearly at right
    angles: so the model expects what it has read.
    """
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=1, n_embd=384, block_size=64, dropout=0.0)).eval()
    attention = model.transformer.h[0].attn
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.zero_()  # queries and keys too: even attention
    model.transformer.wte.weight.data.normal_()
    attention.c_attn.weight.data[2 * 384 :] = torch.eye(384)  # values
    attention.c_proj.weight.data = 100 * torch.eye(384)  # the last token alone counts little
    return model


def test_items_are_twins_in_ten_categories_and_their_continuations_are_equally_long(rows):
    counts = Counter(row["category"] for row in rows)
    assert len(counts) == 10 and min(counts.values()) >= 60
    assert len({row["context"] for row in rows}) == len(rows)
    for row, twin in zip(rows[::2], rows[1::2], strict=True):
        assert row["category"] == twin["category"]
        assert (row["right"], row["wrong"]) == (twin["wrong"], twin["right"])
        assert row["right"] != row["wrong"]
    for row in rows:
        lengths = set()
        for side in ("right", "wrong"):
            parts = [encode_text(row["context"]), encode_text(f" {row[side]}")]
            whole = encode_text(f"{row['context']} {row[side]}")
            assert whole.tolist() == [*parts[0], *parts[1]], row  # it begins at a token
            lengths.add(len(parts[1]))
        assert len(lengths) == 1, row


@torch.no_grad()
def test_scores_and_choices_are_those_of_the_hugging_face_model(rows):
    model = random_model()
    theirs = to_hugging_face(model).eval()
    chosen = choices(model, "a model")
    longer = [at for at, row in enumerate(rows) if len(encode_text(f" {row['right']}")) > 1]
    assert longer  # sums of several tokens are among them
    for at in [*longer, *range(0, len(rows), 32)]:
        context, scores = encode_text(rows[at]["context"]).tolist(), []
        for side in ("right", "wrong"):
            answer = encode_text(f" {rows[at][side]}").tolist()
            ids = torch.tensor([context + answer])
            logs = theirs(ids).logits[0].log_softmax(1)
            places = range(len(context) - 1, len(context) + len(answer) - 1)
            total = sum(logs[place, token] for place, token in zip(places, answer, strict=True))
            ours = log_probability(model, ids, len(context))
            torch.testing.assert_close(ours, total.view(1), rtol=0, atol=1e-4)
            scores.append(total.item())
        assert chosen[at]["margin"] == pytest.approx(scores[0] - scores[1], abs=2e-4)
        assert (chosen[at]["margin"] > 0) == (scores[0] > scores[1])


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_are_within_three_standard_errors_of_a_half(seed):
    shares = category_shares(choices(random_model(seed), "a model"))
    assert len(shares) == 10
    for mean, error in shares.values():
        assert abs(mean - 0.5) <= 3 * error


def test_a_model_that_always_likes_one_word_more_has_exactly_a_half():
    model = random_model()
    model.transformer.ln_f.weight.data.zero_()  # the same features everywhere
    model.transformer.ln_f.bias.data.normal_()
    assert set(category_shares(choices(model, "a model")).values()) == {(0.5, 0.0)}


def test_a_model_that_copies_has_what_is_repeated_right_and_no_other_category():
    shares = category_shares(choices(copying_model(), "a model"))
    assert shares.pop("repeated") == (1.0, 0.0)
    assert max(mean for mean, _ in shares.values()) < 0.75


def test_the_standard_error_is_over_pairs():
    rows = [dict(category="a", margin=value) for value in (2, 9, 1, -1, 0, 0, 0.1, -3)]
    mean, error = category_shares(rows)["a"]
    assert mean == 5 / 8
    assert error == pytest.approx(0.25 / math.sqrt(4))  # of 1, 1/2, 1/2, 1/2


def test_a_column_for_each_checkpoint_and_a_picture(tmp_path, monkeypatch, capsys):
    model, out = random_model(), tmp_path / "abilities.png"
    for name, facts in (("a", dict(tokens=1000, val_loss=3.25)), ("b", {})):
        save_file(tmp_path / f"{name}.pt", model.config, model, **facts)
    (tmp_path / "b.pt").rename(tmp_path / "lr=1.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [f"{tmp_path / 'a.pt'}", "later=~/lr=1.pt"]
    abilities.main(["--checkpoint", *names, "--out", str(out)])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["right", "(chance:", "50%)", "a.pt", "later"]
    assert len(table) == 1 + 10 + 2
    assert table[-2].split() == ["tokens", "1,000", "-"]  # the other does not say how long
    assert table[-1].split() == ["val", "loss", "3.2500", "-"]
    assert out.read_bytes().startswith(b"\x89PNG")


def test_columns_are_told_apart_and_the_default_model_is_told(tmp_path, monkeypatch, capsys):
    model, paths = random_model(), ("out/demo/model.pt", "b/demo/model.pt", "b/demo/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tmp_path / path, model.config, model)
    abilities.main(["--checkpoint", *paths, "--out", "a.png"])
    names = capsys.readouterr().out.splitlines()[0].split()
    assert names[3:] == ["out/demo", "b/demo", "ckpt.pt"]
    abilities.main([])
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[3:] == ["demo"] and err == "reading out/demo/model.pt\n"


def test_a_mistake_is_one_line(tmp_path):
    text, short, missing = (tmp_path / name for name in ("notes.pt", "short.pt", "missing.pt"))
    text.write_text("no model")
    model = random_model(block_size=8)
    save_file(short, model.config, model)
    assert "not a checkpoint of ours" in refusal(abilities.main, ["--checkpoint", str(text)])
    assert str(missing) in refusal(abilities.main, ["--checkpoint", str(missing)])
    assert "reads 8 tokens" in refusal(abilities.main, ["--checkpoint", str(short)])
    assert "cuda:99 is not there" in refusal(abilities.main, ["--device", "cuda:99"])
