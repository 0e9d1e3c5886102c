"""plots/: attention maps against Hugging Face's, heads made by hand, tables of runs."""

import json
import re
from pathlib import Path
from typing import Any

from config import Config, UserError

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from model import GPT, save_file, to_hugging_face
from plots import attention, loss_curve
from plots.attention import attention_maps, head_name, head_table, silence_each, silenced
from tests.benchmarks import extrapolate

SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, dropout=0.0)
PNG = b"\x89PNG"


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**SMALL, vocab_size=50)).eval()
    for weight in model.parameters():  # far from even attention
        weight.data += 0.3 * torch.randn_like(weight)
    return model


def test_attention_maps_are_those_of_hugging_face(model):
    ids = torch.randint(50, (12,))
    theirs = to_hugging_face(model).eval()
    theirs.set_attn_implementation("eager")
    expected = torch.cat(theirs(ids[None], output_attentions=True).attentions)
    torch.testing.assert_close(attention_maps(model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("short", [256, 0])  # 0: as on CUDA and in long texts, PyTorch's function
@torch.no_grad()
def test_attention_maps_follow_a_change_of_queries_and_keys(model, monkeypatch, short):
    """The oracle: with the maps, the values give what the model's attention gives."""
    monkeypatch.setattr("model.SHORT", short)
    attn, ids = model.transformer.h[1].attn, torch.randint(50, (16,))
    plain, before = attn.queries_keys_values, attention_maps(model, ids)

    def turned(x: torch.Tensor) -> torch.Tensor:
        """As rotary positions do, if coarsely: queries and keys depend on where they stand."""
        q, k, v = plain(x)
        return torch.stack([q * torch.arange(16).view(-1, 1).cos(), k.flip(-1), v])

    attn.queries_keys_values = turned
    maps = attention_maps(model, ids)[1]
    assert (maps - before[1]).abs().max() > 0.1
    (x,) = attention.inputs_of([attn], model, ids[None])
    expected = attn.c_proj((maps @ plain(x)[2]).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(attn(x), expected, rtol=0, atol=1e-5)


def test_every_text_of_a_tall_grid_is_inside_the_picture(monkeypatch, tmp_path):
    model = GPT(Config(n_layer=24, n_head=1, n_embd=8, block_size=16, dropout=0.0)).eval()
    figures, ids = [], torch.arange(5)
    monkeypatch.setattr(attention, "write_figure", lambda figure, path: figures.append(figure))
    attention.draw(tmp_path / "a.png", model, ids, head_table(model, ids[None]), None)
    figures[0].draw_without_rendering()
    texts = [text for text in figures[0].findobj(Text) if text.get_text() and text.get_visible()]
    assert any("shares its attention" in text.get_text() for text in texts)
    for text in texts:
        box = text.get_window_extent()
        assert box.y0 >= 0 and box.y1 <= figures[0].bbox.y1, text.get_text()


@torch.no_grad()
def test_silencing_a_head_is_zeroing_its_columns_of_the_projection(model, monkeypatch):
    windows = torch.randint(50, (6, 17)) % 20
    loss, rises = silence_each(model, windows, torch.float32)
    monkeypatch.setattr(attention, "COVERED", 1.0)
    exact = silence_each(model, windows, torch.float32)[1]
    intact = torch.stack([model(w[None, :-1], w[None, 1:]) for w in windows])
    assert loss == pytest.approx(intact.mean().item(), abs=1e-5)
    for layer in range(2):
        for head in range(2):
            weight = model.transformer.h[layer].attn.c_proj.weight
            kept = weight.clone()
            weight[:, 16 * head : 16 * head + 16] = 0
            zeroed = torch.stack([model(w[None, :-1], w[None, 1:]) for w in windows])
            features = model.features(windows[:, :-1])
            weight.copy_(kept)
            with silenced(model, layer, head):
                torch.testing.assert_close(model.features(windows[:, :-1]), features)
            # To first order in the rarest ids; with all of them, exactly.
            torch.testing.assert_close(rises[layer, head], zeroed - intact, rtol=0.01, atol=1e-3)
            torch.testing.assert_close(exact[layer, head], zeroed - intact, rtol=0, atol=1e-5)


def test_hooks_are_gone_after_use(model):
    ids = torch.arange(5)
    before = model.features(ids[None])
    attention_maps(model, ids)
    with silenced(model, 0, 1):
        assert not torch.equal(model.features(ids[None]), before)
    assert torch.equal(model.features(ids[None]), before)


@pytest.mark.parametrize("name", ["previous token", "first token", "same token", "itself", "broad"])
@torch.no_grad()
def test_a_head_made_by_hand_is_named_after_what_it_does(name):
    """Positions (or ids) are unit vectors; the key of what is to be found is the query's vector."""
    size = 16
    model = GPT(Config(n_layer=1, n_head=1, n_embd=size, block_size=size, vocab_size=size))
    ids = torch.tensor([1, 2, 3, 4] * 4)
    unit = torch.eye(size)
    target = {"previous token": unit.roll(-1, dims=0), "first token": 0 * unit,
              "broad": 0 * unit}.get(name, unit)
    tokens, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    tokens.copy_(unit * (name == "same token"))
    positions.copy_(unit * (name != "same token"))
    project = model.transformer.h[0].attn.c_attn
    project.bias.zero_()
    project.weight[:size] = 4 * target  # column i: what position i looks for
    project.bias[:size] = 20 * unit[0] * (name == "first token")
    project.weight[size : 2 * size] = unit
    table = head_table(model.eval(), ids[None])
    assert head_name(table, 0, 0) == name
    if name == "previous token":
        assert table["previous"].item() > 0.9 and abs(table["back"].item() - 1) < 0.2


def test_what_followed_earlier_copies_is_found():
    found = attention.places(torch.tensor([7, 8, 9, 7, 8]))
    assert found["after"].nonzero().tolist() == [[3, 1], [4, 2]]
    assert found["same"].nonzero().tolist() == [[3, 0], [4, 1]]


@pytest.mark.parametrize("token, drawn", [(b" time", "␣time"), (b"\n", "↵"), ("é".encode(), "é"),
                                          ("😀".encode()[:3], "<F0><9F><98>")])
def test_tokens_are_drawn_so_that_spaces_and_parts_of_letters_can_be_seen(token, drawn):
    assert attention.visible(token) == drawn


@pytest.fixture
def checkpoint(tmp_path) -> str:
    torch.manual_seed(0)
    config = Config(**SMALL)
    save_file(tmp_path / "model.pt", config, GPT(config))
    return str(tmp_path / "model.pt")


@pytest.mark.parametrize("extra", [[], ["--layer", "1", "--head", "0"],
                                   ["--prompt", "Costs $5, $6 \U0001f600 好\n" * 9]])
def test_the_program_draws_and_prints_a_line_a_head(checkpoint, tmp_path, capsys, recwarn, extra):
    out = tmp_path / "new" / "a.png"
    attention.main(["--checkpoint", checkpoint, "--out", str(out), *extra])
    lines = capsys.readouterr().out.splitlines()
    assert out.read_bytes()[:4] == PNG
    assert ["".join(line.split()[:2]) for line in lines[1:5]] == ["00", "01", "10", "11"]
    columns = "block head back bits first itself prev same after does worth"
    assert lines[0].split() == columns.split() and max(map(len, lines)) < 80
    assert not [str(w.message) for w in recwarn if "lyph" in str(w.message)]


@pytest.mark.parametrize("shares, name", [
    (dict(first=0.5, previous=0.4), "first token"), (dict(first=0.3, previous=0.1), "mixed"),
    (dict(previous=0.45, itself=0.2), "mixed"), (dict(itself=0.44, first=0.2, same=0.2), "itself"),
    (dict(previous=0.1), "mixed"), (dict(after=0.6), "induction"),
])
def test_a_head_is_named_by_what_most_of_its_attention_does(shares, name):
    """Half of it, or the largest share where that is twice the next; all others are one share."""
    table = {key: torch.tensor([[shares.get(key, 0.0)]]) for key in attention.NAMES}
    table |= {"bits": torch.tensor([[1.0]]), "even bits": torch.tensor([[4.0]])}
    assert head_name(table, 0, 0) == name


def test_over_validation_text_the_table_says_what_a_head_is_worth(checkpoint, tmp_path, capsys):
    from prepare_data import main as prepare

    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"Once upon a time, {n} cats." for n in range(40)))
    prepare(["--dataset", str(text), "--data_dir", str(tmp_path / "data"), "--val_fraction", "0.5"])
    capsys.readouterr()
    attention.main(["--checkpoint", checkpoint, "--out", str(tmp_path / "a.png"),
                    "--data_dir", str(tmp_path / "data")])
    out = capsys.readouterr().out
    assert "windows of 16 tokens" in out and "loss 10.8" in out
    assert "16 tokens of" in out and max(map(len, out.replace(str(tmp_path), "").splitlines())) < 80
    worth = [re.sub(r".*\b(first|itself|previous|same|induction|broad|mixed) +", "", line)
             for line in out.splitlines()[1:5]]
    assert all(re.fullmatch(r"0|-?\d\.\d{4} ± \d\.\d{4}", w) for w in worth)
    attention.main(["--checkpoint", checkpoint, "--out", str(tmp_path / "a.png"),
                    "--data_dir", str(tmp_path / "data"), "--windows", "1"])
    assert "Over 1 window of 16" in capsys.readouterr().out


def test_one_window_has_no_standard_error_and_so_no_worth(model, capsys):
    table = head_table(model, torch.arange(16)[None])
    blocks, heads = table["bits"].shape
    attention.print_heads(table, torch.ones(blocks, heads, 1))
    lines = capsys.readouterr().out.splitlines()[1 : blocks * heads + 1]
    assert [line.split()[-1] for line in lines] == ["-"] * len(lines)


@pytest.mark.parametrize("program, flags, message", [
    (attention, ["--checkpoint", "none.pt"], "no checkpoint none.pt"),
    (attention, ["--layer", "1"], "--layer and --head go together"),
    (attention, ["--checkpoint", "MODEL", "--layer", "2", "--head", "0"], "layers up to 1"),
    (attention, ["--checkpoint", "MODEL", "--data_dir", "nowhere"], "meta.json is missing"),
    (attention, ["--checkpoint", "MODEL", "--prompt", ""], "one token"),
    (attention, ["--checkpoint", "MODEL", "--prompt", "One"], "one token"),
    (loss_curve, [], "required"), (loss_curve, ["none"], "none"),
    (loss_curve, ["MODEL"], "is not a log.csv"),
    (loss_curve, ["none", "--out", "a.gif"], "ends in .png, .pdf or .svg, unlike a.gif"),
    (loss_curve, ["none", "--out", "a"], "ends in .png, .pdf or .svg, unlike a"),
    (loss_curve, ["RUN", "--out", "folder.png"], "Is a directory"),
    (loss_curve, ["a", "--x", "epochs"], "must be one of tokens, iteration, seconds"),
])
def test_wrong_input_is_one_error(checkpoint, tmp_path, monkeypatch, program, flags, message):
    """`cli` makes one line and status 2 of it: test_config.py."""
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    names = {"MODEL": checkpoint, "RUN": make_run(tmp_path / "run", [4, 3])}
    with pytest.raises((UserError, OSError), match=message):
        program.main([names.get(flag, flag) for flag in flags])


# -------------------------------------------------------------------------------- Runs side by side

LOG = "iteration,tokens,train_loss,val_loss,learning_rate,seconds\n"


def make_run(folder: Path, losses: list, data: str = "", final: Any = None, **settings) -> str:
    folder.mkdir(parents=True)
    rows = [f"{i},{i * 1000},{loss},{loss},0.001,{i}\n" for i, loss in enumerate(losses, 1)]
    (folder / "log.csv").write_text(LOG + "".join(rows))
    if settings:
        hashes = dict(hashes=dict(val=data or None))
        facts = dict(settings=settings, differs=["learning_rate"], final=final, data=hashes)
        (folder / "run.json").write_text(json.dumps(facts))
    return str(folder)


def table_of(capsys, *argv: str) -> list[list[str]]:
    """The printed lines, each split where two blanks or more stand."""
    loss_curve.main([*argv])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    return [re.split(" {2,}", line) for line in lines]


def test_runs_are_sorted_and_named_by_what_differs(tmp_path, capsys):
    part = dict(val_loss=2.125, tokens_scored=1000, tokens=5000)
    every = part | dict(tokens_scored=4999)  # all: nothing stands before the first token
    runs = [make_run(tmp_path / "slow", [4, 3], seed=1, rate=1, out_dir="a", final=every),
            make_run(tmp_path / "fast", [4, 2, 2.5], seed=1, rate=2, final=part),
            make_run(tmp_path / "bare", [3.5])]
    head, *rows = table_of(capsys, *runs, "--out", str(tmp_path / "runs.png"))
    assert [head[1], *[row[0] for row in rows]] == ["val loss", "fast", "slow", "bare"]
    assert rows[0][1:] == ["2.0000", "2.1250 on 20.0%", "2.0000", "3,000", "3", "rate 2"]
    assert rows[1][1:3] == ["3.0000", "2.1250"] and rows[1][-1] == "rate 1"
    assert rows[2][1:3] == ["3.5000", "-"] and rows[2][-1] == "-"  # its settings are not known


def test_runs_of_two_presets_are_told_apart_by_the_preset_and_what_was_typed():
    settings = dict(preset="demo", n_embd=96, learning_rate=2)
    demo = loss_curve.RunLog("a", settings=settings, changed=["learning_rate"])
    tuned = loss_curve.RunLog("b", settings=dict(preset="tuned", n_embd=384, learning_rate=1))
    assert loss_curve.remarks(demo, [demo, tuned]) == "preset demo, learning_rate 2"
    assert loss_curve.remarks(tuned, [demo, tuned]) == "preset tuned"


@pytest.mark.parametrize("log, record, problem", [
    (None, "{}", "no evaluation yet"), (None, None, "No such file"),
    ("Once upon a time", None, "log.csv is not a log.csv"), (LOG + "1,1,4", None, "not a log.csv"),
    (LOG + "1,1,nan,nan,1,1", None, "it diverged"), (LOG + "1,1,5e6,5e6,1,1", "{}", "it diverged"),
    ("iteration,train_loss,val_loss\n1,4,4", None, "has no tokens"),
    *[(text, None, "log.csv is not a log.csv") for text in (
        "", "\x89PNG", "iteration,val_loss\n5,\n", "iteration,val_loss\n5,1,2\n", "a" * 200_000)],
    *[(LOG + "1,1,4,4,1,1", text, "run.json is not") for text in (
        "", "[]", '{"settings": {}}', '{"settings": 1, "differs": {}, "final": null}',
        '{"settings": {}, "differs": {}, "final": 2}')],
])
def test_a_run_that_cannot_be_drawn_is_listed_last(tmp_path, capsys, log, record, problem):
    bad, out = tmp_path / "bad", tmp_path / "a.png"
    bad.mkdir()
    for name, text in (("log.csv", log), ("run.json", record)):
        if text is not None:
            (bad / name).write_text(text, encoding="latin-1")
    rows = table_of(capsys, str(bad), make_run(tmp_path / "b", [3]), make_run(tmp_path / "a", [2]),
                    "--out", str(out))[1:]
    said = " ".join(row[-1] for row in rows[2:])  # it may be wrapped
    assert [row[0] for row in rows[:3]] == ["a", "b", "bad"] and out.exists()
    assert said.startswith("not drawn: ") and problem in said
    out.unlink()
    with pytest.raises(UserError, match=f"{bad}: .*{problem}"):  # it alone
        loss_curve.main([str(bad), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("losses, settings, mark", [
    ([3, 2, "nan"], {}, "diverged"), ([3, 2, 986663.5], {}, "diverged"),
    ([2], dict(data="toys"), "other data"), ([2], dict(data=""), "-"), ([3, "nan", 2], {}, "-"),
    ([2], dict(block_size=64), "other context, block_size 64"),
    ([2], dict(data="toys", block_size=9), "other data, other context, block_size 9"),
])
def test_what_diverged_or_does_not_compare_is_marked(tmp_path, capsys, losses, settings, mark):
    same = dict(data="tales", block_size=128)
    runs = [make_run(tmp_path / "odd", losses, **same | settings),
            *[make_run(tmp_path / name, [3], **same) for name in "ab"]]
    rows = table_of(capsys, *runs, "--out", str(tmp_path / "a.png"))[1:]
    odd = rows.pop(2 if "diverged" in mark else 0)  # what diverged is drawn, but listed last
    assert odd[:2] == ["odd", "2.0000"] and odd[-1] == mark
    assert all("other" not in row[-1] and "diverged" not in row[-1] for row in rows)


@pytest.mark.parametrize("folders, names, pictures", [
    (["out/a/run", "out/b/run"], ["a/run", "b/run"], ["a-run", "b-run"]),
    (["x/a/run", "y/a/run", "y/b"], ["x/a/run", "y/a/run", "b"], ["run", "run", "b"]),
    (["/out/x/lr=1e-3", "./out/y/../z/"], ["lr=1e-3", "z"], ["x-lr=1e-3", "z"]),
    (["out", "timeout/x"], ["out", "x"], ["out", "x"]),
])
def test_how_runs_and_their_pictures_are_named(tmp_path, monkeypatch, folders, names, pictures):
    monkeypatch.chdir(tmp_path)
    assert loss_curve.tell_apart([loss_curve.locate(name)[1] for name in folders]) == names
    assert [loss_curve.picture_name(Path(name)) for name in folders] == pictures


@pytest.mark.parametrize("text, label, path", [
    ("out/lr=3e-3", "", "out/lr=3e-3"), ("mine=out/lr=3e-3", "mine", "out/lr=3e-3"),
    ("lr=3e-3=out/b", "lr=3e-3", "out/b"), ("mine=out/gone", "", "mine=out/gone"),
])
def test_labels_and_paths_may_both_have_an_equals_sign(tmp_path, monkeypatch, text, label, path):
    monkeypatch.chdir(tmp_path)
    for folder in ("out/lr=3e-3", "out/b"):
        Path(folder).mkdir(parents=True)
    assert loss_curve.split_label(text) == (label, path)
    assert loss_curve.locate(text)[:2] == (label, tmp_path / path)


@pytest.mark.parametrize("checkpoints, names", [
    (["a/demo/model.pt", "b/demo/model.pt"], ["a/demo", "b/demo"]),
    (["model.pt", "other/model.pt"], ["here", "other"]), (["./model.pt"], ["here"]),
    (["a/model.pt", "a/ckpt.pt", "b/ckpt.pt", "gpt2"], ["a", "a/ckpt.pt", "b/ckpt.pt", "gpt2"]),
])
def test_how_models_are_named(tmp_path, monkeypatch, checkpoints, names):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert loss_curve.model_names(checkpoints) == names


def test_one_run_is_drawn_as_train_draws_it(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(loss_curve, "draw_run", lambda *args, **more: calls.append((args, more)))
    run = make_run(tmp_path / "out" / "a" / "one", [4, 3], preset="reference")
    loss_curve.main([run])
    log = loss_curve.read_log(Path(run) / "log.csv")
    out = Path(loss_curve.__file__).with_name("a-one.png")
    assert calls == [((out, "one", log), {"published": True})]


@pytest.mark.parametrize("x, name, begins", [
    ("tokens", "a.png", PNG), ("iteration", "a.PDF", b"%PDF"), ("seconds", "a.svg", b"<?xml"),
])
def test_each_x_and_picture_and_long_labels_are_wrapped(tmp_path, capsys, x, name, begins):
    texts = [" ".join(f"{letter}={n}" for n in range(10, 40)) for letter in "xy"]
    runs = [f"{text}={make_run(tmp_path / text[0], [4], dataset=text)}/log.csv" for text in texts]
    out = tmp_path / "new" / name
    flags = ["--x", x, "--log", "--level", "2.9", "--out", str(out)]
    table = str(table_of(capsys, *runs, *flags))  # nothing is lost
    assert all(table.count(word) == 2 for word in " ".join(texts).split())
    assert out.read_bytes().startswith(begins)


def test_names_that_matplotlib_would_read_as_formulas_or_hide(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    legends, legend = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda axes: legends.append(legend(axes)))
    runs = [make_run(tmp_path / name, [4, 3]) for name in ("$5_vs_$6", "_a")]
    loss_curve.main([*runs, "--out", str(tmp_path / "runs.png")])
    names = [text.get_text() for text in legends[0].get_texts()]
    assert names[0].startswith(r" \$5_vs_\$6") and names[1].startswith(" _a")


def test_the_highest_loss_that_is_shown_and_tokens_in_millions(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(loss_curve, "write_figure", lambda figure, path: figures.append(figure))
    loss_curve.main([make_run(tmp_path / "a", [9, 4, 3]), "--top", "5"])
    figures[0].canvas.draw()
    axes = figures[0].axes[0]
    assert axes.get_ylim()[1] == 5 and axes.get_ylim()[0] < 3
    assert axes.xaxis.get_major_formatter()(4e6) == "4 M"


def write_law(folder: Path, lengths: list[float]) -> list[str]:
    """Logs of runs whose last losses follow L = 1.3 + 1.6 (T / 1 M)^-0.25."""
    paths = [folder / f"{millions}.csv" for millions in lengths]
    for path, millions in zip(paths, lengths, strict=True):
        row = f"2,{millions * 1e6},1,{1.3 + 1.6 * millions**-0.25}\n"
        path.write_text("iteration,tokens,train_loss,val_loss\n1,1,9,9\n" + row)
    return [str(path) for path in paths]


def test_a_power_law_is_found_again_and_extended(tmp_path, capsys):
    runs = write_law(tmp_path, [4, 0.2, 1, 0.4, 2])
    extrapolate.main([*runs, "--out", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    (law, _, *rows), (_, *refits) = [part.splitlines() for part in out.split("\n\n")]
    assert law == "L = 1.300 + 1.600 (T / 1 M)^-0.250"
    fitted = {row.split()[0]: float(row.split()[3]) for row in rows}
    assert fitted["472.00"] == pytest.approx(1.3 + 1.6 * 472**-0.25, abs=1e-3)
    said = {line[:line.index("  ")]: line.split()[-1] for line in refits}
    exact = ["all runs", *[f"without {n} M" for n in ("0.20", "0.40", "1.00", "2.00", "4.00")],
             "without 0.20 M and 0.40 M", "a = 1.3"]
    assert all(float(said[name]) == pytest.approx(fitted["472.00"], abs=2e-3) for name in exact)
    band = [float(rows[-1].split()[4]), float(rows[-1].split()[6])]
    assert band[0] <= float(said["a = 0.9"]) < float(said["a = 1.2"]) < fitted["472.00"] < band[1]
    assert (tmp_path / "a.png").read_bytes()[:4] == PNG


def test_a_law_needs_runs_of_four_lengths_with_finite_losses(tmp_path):
    runs = write_law(tmp_path, [1, 2, 4])
    with pytest.raises(UserError, match="four lengths"):
        extrapolate.main([*runs, *runs])
    for row in ("1,1e6,1,nan", "1,1e6,1,3\n2,2e6,1,nan", "1,0,1,3"):
        (tmp_path / "bad.csv").write_text(f"iteration,tokens,train_loss,val_loss\n{row}\n")
        with pytest.raises(UserError, match="cannot be used"):
            extrapolate.main([*runs, str(tmp_path / "bad.csv")])


@pytest.mark.parametrize("floor, best", [(None, 0), (0.2, 0.2)])
def test_a_law_without_a_limit_is_found_too_and_a_given_limit_is_kept(floor, best):
    tokens = np.array([0.2e6, 1e6, 2e6, 4e6])
    laws = extrapolate.fit(tokens, (3 * (tokens / 1e6) ** -0.1 - 0.5)[None], floor)
    assert best <= laws[0, 0] < best + 0.05  # as near as the grid of c allows
    assert extrapolate.predict(laws, np.array([1e6])).item() == pytest.approx(2.5, abs=0.01)


def test_a_table_of_many_columns_is_printed_whole(capsys):
    loss_curve.print_table(["right (chance: 50%)", *"abcdefghij"],
                           [["pronouns", *["48.4% ± 1.6%"] * 10]])
    printed = capsys.readouterr().out
    assert "pronouns" in printed and printed.count("48.4% ± 1.6%") == 10
