"""config.py against the published recipe and the contract of the command line."""

import argparse
import dataclasses
import math
import os
import shutil
from pathlib import Path

import config as config_module
from config import PRESETS, Config, UserError, add_config_flags, atomic_write, default_data_dir

import conftest
import pytest
import torch
from conftest import ROOT, run_script

import model
import train

FIELDS = dataclasses.fields(Config)
FLAGS = [field for field in FIELDS if field.name != "vocab_size"]


def overrides_in(*argv: str) -> dict:
    """The settings that train.py's parser finds in a command line."""
    return train.parse_command_line(list(argv))[0]


def config(*argv: str) -> Config:
    return Config.from_preset(**overrides_in(*argv))


def refused(*argv: str) -> str:
    """The one line that refuses a command line."""
    return conftest.refusal(config, *argv)


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        train.main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def defaults_in(text: str) -> dict[str, str]:
    """The defaults that a help tells, by flag."""
    _, *entries = text.split("\n  --")
    told = {}
    for entry in entries:
        flag, words = entry.split()[0], " ".join(entry.split())
        _, found, rest = words.partition("(default: ")
        if found:
            told[flag] = rest.partition(")")[0]
    return told


# ------------------------------------------------------------------------------------------
# The recipe


# reference/README.md, row by row.
REFERENCE = {
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 128, "vocab_size": 50257,
    "dropout": 0.1, "bias": True, "gelu": "exact", "dataset": "roneneldan/TinyStories",
    "batch_size": 32, "gradient_accumulation_steps": 32, "max_iters": 10_000,
    "learning_rate": 1e-4, "min_lr": 5e-4, "warmup_iters": 1000, "warmup_start_factor": 1 / 3,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-9, "grad_clip": 0.5,
    "eval_interval": 500,
}


@pytest.mark.parametrize("name, value", REFERENCE.items())
def test_a_default_is_the_reference_runs(name, value):
    assert getattr(Config(), name) == value


def test_the_reference_run_is_41_million_tokens_in_313_steps():
    c = Config()
    assert c.tokens_per_iteration == 4096
    assert c.tokens_per_iteration * c.gradient_accumulation_steps == 131_072
    assert divmod(c.max_iters, c.gradient_accumulation_steps) == (312, 16)
    assert c.max_iters * c.tokens_per_iteration == pytest.approx(41e6, rel=0.01)


@pytest.mark.parametrize("preset", ["reference", "tuned"])
def test_an_evaluation_is_hundreds_of_windows_and_under_5_percent_of_the_run(preset):
    c = Config.from_preset(preset)
    assert 300 <= c.eval_windows <= 2000
    sequences = 2 * c.eval_windows * c.max_iters / c.eval_interval
    # A forward pass is a third of the work of an iteration's sequence.
    assert sequences / 3 < 0.05 * c.max_iters * c.batch_size


def test_a_short_run_of_tuned_is_evaluated_on_the_way():
    """Every 8,000 sequences: the shortest run that the README proposes is of 1.3 M tokens."""
    c = Config.from_preset("tuned")
    assert c.eval_interval * c.tokens_per_iteration <= 1.3e6


def test_tuned_has_the_budget_of_the_reference():
    tuned, reference = Config.from_preset("tuned"), Config()
    tokens = [c.max_iters * c.tokens_per_iteration for c in (tuned, reference)]
    assert tokens[0] == tokens[1]


def test_the_reference_preset_is_the_defaults():
    assert Config.from_preset("reference") == Config.from_preset() == Config()


def test_what_is_left_open_follows_other_fields():
    c = Config(max_iters=70, batch_size=5)
    assert (c.decay_iters, c.micro_batch_size) == (70, 5)
    c = Config(max_iters=70, lr_decay_iters=2000, batch_size=5, device_batch_size=2)
    assert (c.decay_iters, c.micro_batch_size) == (2000, 2)


def test_a_preset_sets_some_fields_and_flags_win_over_it():
    demo = config("--preset", "demo")
    assert {name: getattr(demo, name) for name in PRESETS["demo"]} == PRESETS["demo"]
    assert demo.dataset == "toy" and demo.beta1 == Config().beta1
    assert config("--max_iters", "7", "--preset", "demo") == dataclasses.replace(demo, max_iters=7)


def test_default_folders_have_the_names_of_preset_and_dataset():
    c = Config()
    assert (c.data_dir, c.out_dir, c.plot_dir) == ("data/TinyStories", "out/reference", "plots")
    demo = Config.from_preset("demo")
    assert (demo.data_dir, demo.out_dir) == ("data/toy", "out/demo")
    assert config("--dataset", "a/b.txt", "--out_dir", "elsewhere").data_dir == "data/b"


@pytest.mark.parametrize(
    "dataset, folder",
    [
        ("roneneldan/TinyStories", "data/TinyStories"), ("toy", "data/toy"),
        ("/a/train.txt", "data/train"), ("x.jsonl", "data/x"), ("../stories/", "data/stories"),
        ("v1.5", "data/v1.5"),
    ],
)
def test_default_data_dir(dataset, folder):
    assert default_data_dir(dataset) == folder


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().n_layer = 7


# ------------------------------------------------------------------------------------------
# Values


def text_of(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("field", FLAGS, ids=lambda field: field.name)
def test_every_field_is_a_flag_that_takes_its_own_default(field):
    value = getattr(Config(), field.name)
    if value is None:
        value = {int | None: 7, float | None: 0.5, str | None: "a/path"}[field.type]
    parsed = overrides_in(f"--{field.name}", text_of(value))
    assert parsed == {field.name: value} and type(parsed[field.name]) is type(value)


def test_the_vocabulary_is_gpt2s_and_no_flag():
    """It is a field for the models from elsewhere."""
    assert "unknown flag --vocab_size" in refused("--vocab_size", "50257")
    assert Config(vocab_size=1000).vocab_size == 1000


def test_flags_that_are_not_typed_are_not_set():
    assert overrides_in() == {}


@pytest.mark.parametrize(
    "text, value", [("true", True), ("false", False), ("True", True), ("FALSE", False)]
)
def test_a_boolean_takes_true_or_false(text, value):
    assert config("--bias", text).bias is value


def test_a_whole_number_is_a_number_too():
    c = config("--learning_rate", "1")
    assert c.learning_rate == 1.0 and type(c.learning_rate) is float
    assert type(Config(grad_clip=1).grad_clip) is float


@pytest.mark.parametrize("text, value", [("1e4", 10_000), ("2.0", 2), ("+7", 7)])
def test_a_whole_number_may_be_written_as_people_write_it(text, value):
    parsed = overrides_in("--max_iters", text)["max_iters"]
    assert parsed == value and type(parsed) is int


def test_a_whole_number_with_many_digits_stays_exact():
    assert config("--seed", str(2**63 - 1)).seed == 2**63 - 1


def test_the_last_of_a_repeated_flag_wins():
    assert config("--seed", "1", "--seed", "2").seed == 2
    assert config("--preset", "reference", "--preset", "demo").preset == "demo"


def test_a_value_may_stand_behind_an_equals_sign():
    assert config("--seed=5", "--eps=1e-6") == Config(seed=5, eps=1e-6)


@pytest.mark.parametrize(
    "flag, text, allowed",
    [
        ("eps", "nan", "more than 0"), ("eps", "inf", "more than 0"), ("eps", "0", "more than 0"),
        ("eps", "tiny", "a number"), ("learning_rate", "-1e-4", "more than 0"),
        ("learning_rate", "1e999", "more than 0"), ("learning_rate", "-inf", "more than 0"),
        ("learning_rate", "-nan", "more than 0"), ("min_lr", "-.5", "0 or more"),
        ("min_lr", "nan", "0 or more"), ("weight_decay", "-0.1", "0 or more"),
        ("grad_clip", "-1", "0 or more"), ("beta1", "1", "less than 1"),
        ("beta2", "1.5", "less than 1"), ("dropout", "1", "less than 1"),
        ("dropout", "-0.1", "0 or more"), ("warmup_start_factor", "1.1", "0 or more, 1 or less"),
        ("embedding_lr_mult", "nan", "0 or more"), ("momentum", "1", "less than 1"),
        ("n_layer", "0", "1 or more"), ("n_layer", "-3", "1 or more"),
        ("n_layer", "2.5", "whole number"), ("n_head", "six", "whole number"),
        ("n_head", "0", "1 or more"), ("n_embd", "0", "1 or more"),
        ("n_embd", str(2**31), "or less"), ("block_size", "0", "1 or more"),
        ("block_size", "", "whole number"), ("batch_size", "0", "1 or more"),
        ("gradient_accumulation_steps", "0", "1 or more"), ("device_batch_size", "0", "1 or more"),
        ("device_batch_size", "None", "whole"), ("max_iters", "1.5e0", "whole number"),
        ("max_iters", "0", "1 or more"), ("warmup_iters", "-1", "0 or more"),
        ("lr_decay_iters", "0", "1 or more"), ("eval_interval", "0", "1 or more"),
        ("eval_windows", "0", "1 or more"), ("checkpoint_minutes", "0", "more than 0"),
        ("seed", "-1", "0 or more"), ("seed", str(2**63), str(2**63 - 1)),
        ("bias", "maybe", "true or false"), ("bias", "1", "true or false"),
        ("compile", "maybe", "auto, true, false"), ("gelu", "relu", "exact, tanh"),
        ("embedding_init", "spelling", "random, subword"), ("device", "gpu", "cuda:N"),
        ("device", "cuda:x", "cuda:N"), ("dtype", "int8", "bfloat16"), ("out_dir", "", "a path"),
        ("data_dir", " ", "a path"), ("plot_dir", "", "a path"), ("dataset", "", "a path"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_name_value_and_what_is_allowed(flag, text, allowed):
    line = refused(f"--{flag}", text)
    assert flag in line and allowed in line
    assert text in line or repr(float(text)) in line  # -1e-4 may be told as -0.0001


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 1.0}, {"n_layer": True}, {"n_layer": "6"}, {"n_layer": None},
        {"learning_rate": "1e-4"}, {"learning_rate": True}, {"learning_rate": math.nan},
        {"bias": 1}, {"bias": None}, {"gelu": None}, {"data_dir": 3}, {"preset": 5},
        {"dtype": "float8"}, {"lr_decay_iters": 5.0}, {"vocab_size": 65537}, {"vocab_size": 0},
    ],
)
def test_a_config_built_in_python_is_checked_as_well(changes):
    with pytest.raises(UserError) as mistake:
        Config(**changes)
    ((name, value),) = changes.items()
    assert name in str(mistake.value) and repr(value) in str(mistake.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--n_embd 30 --n_head 4", ["n_head", "4", "n_embd", "30", "divide"]),
        ("--lr_decay_iters 999", ["lr_decay_iters", "999", "warmup_iters", "1000"]),
        (
            "--warmup_iters 50 --max_iters 60 --lr_decay_iters 40",
            ["lr_decay_iters", "40", "warmup_iters", "50"],
        ),
    ],
)
def test_a_combination_that_cannot_be_is_refused_with_names_and_values(argv, words):
    line = refused(*argv.split())
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    "argv",
    [
        "--max_iters 100",  # below warmup_iters
        "--max_iters 100 --lr_decay_iters 10000", "--lr_decay_iters 5000",
        "--lr_decay_iters 1000", "--warmup_iters 0 --lr_decay_iters 1", "--warmup_iters 10000",
        "--device_batch_size 100000", "--eval_interval 20000", "--eval_windows 1000000",
        "--min_lr 0 --weight_decay 0 --grad_clip 0",
        "--dropout 0 --beta1 0 --beta2 0 --warmup_start_factor 0",
        "--device cuda:3 --dtype float16 --compile true",  # whether they are there is found later
    ],
)
def test_unusual_values_that_make_sense_are_taken(argv):
    config(*argv.split())


# ------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "argv, guess",
    [
        ("--learning-rate 1e-4", "--learning_rate"), ("--batchsize 3", "--batch_size"),
        ("--resum", "--resume"), ("--max_itres=3", "--max_iters"),
        ("--preset refrence", "reference"), ("--preset demos", "demo"),
        ("--dtype float61", "float16"), ("--gelu exakt", "exact"), ("--compile ture", "true"),
        ("--device cdua", "cuda"), ("--bias flase", "false"),
    ],
)
def test_what_is_unknown_is_answered_with_the_nearest_real_one(argv, guess):
    assert guess in refused(*argv.split())


@pytest.mark.parametrize(
    "abbreviation", ["--learning 1", "--max_it 3", "--resum", "--over", "--prese demo", "--n_l=3"]
)
def test_abbreviated_flags_are_refused(abbreviation):
    assert f"unknown flag {abbreviation.split()[0].split('=')[0]}" in refused(*abbreviation.split())


def test_a_value_without_a_flag_is_not_called_a_flag():
    assert "'One day' belongs to no flag" in refused("One day")


@pytest.mark.parametrize(
    "argv",
    ["--max_iters", "--preset", "--out_dir --resume", "stray", "--resume=true", "--preset tuneddd"],
)
def test_a_malformed_command_line_is_one_line(argv):
    assert argv.split()[0].split("=")[0].lstrip("-") in refused(*argv.split())


def test_resume_and_overwrite_exclude_each_other():
    assert "--overwrite" in refused("--resume", "--overwrite")


def test_help_lists_every_flag_with_its_default(capsys):
    text = help_of(capsys)
    _, *entries = text.split("\n  --")
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    told = defaults_in(text)
    for field in FLAGS:
        assert len(entries[field.name].split()) > 4, f"{field.name} has no help"
        if field.default is not None:
            assert told[field.name] == text_of(field.default)
        else:
            assert field.name not in told
    assert entries.keys() > {"resume", "overwrite", "eval_only"} and "vocab_size" not in entries


def test_a_flag_without_a_default_says_what_holds_instead():
    for field in FLAGS:
        # Without these two, a run starts from nothing, and max_iters is what counts.
        if field.default is None and field.name not in ("init_from", "max_epochs"):
            assert "else " in field.metadata["help"], field.name


def test_help_is_grouped_as_config_py_is(capsys):
    text = help_of(capsys)
    titles = ["model", "data", "batch", "learning rate", "optimizer", "evaluation", "run"]
    heads = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert heads[-len(titles) :] == titles
    flags = [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]
    assert flags[-len(FLAGS) :] == [field.name for field in FLAGS]
    parts = dict(zip(titles, text.split("\n\n")[-len(titles) :], strict=True))
    for title, name in {
        "model": "n_layer",
        "data": "crops",
        "batch": "max_iters",
        "learning rate": "embedding_lr_mult",
        "optimizer": "grad_clip",
        "evaluation": "eval_windows",
        "run": "checkpoint_minutes",
    }.items():
        assert parts[title].startswith(f"{title}:\n") and f"\n  --{name} " in parts[title]


@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_a_preset_shows_its_defaults(capsys, preset):
    told = defaults_in(help_of(capsys, "--preset", preset))
    assert told["preset"] == preset
    for name, value in PRESETS[preset].items():
        assert value is None or told[name] == text_of(value)
    untouched = {field.name: field.default for field in FLAGS} | PRESETS[preset]
    del untouched["preset"]
    for name, value in untouched.items():
        assert told.get(name) == (None if value is None else text_of(value)), name


UNITS = {
    "block_size": "tokens", "batch_size": "sequences", "device_batch_size": "sequences",
    "gradient_accumulation_steps": "iterations", "max_iters": "iterations",
    "warmup_iters": "iterations", "lr_decay_iters": "iteration", "eval_interval": "iterations",
    "eval_windows": "windows", "checkpoint_minutes": "minutes", "dropout": "share",
    "warmup_start_factor": "share", "embedding_lr_mult": "multiple",
    "n_layer": "blocks", "n_head": "heads", "n_embd": "features", "out_dir": "folder",
    "data_dir": "folder", "plot_dir": "folder",
}


@pytest.mark.parametrize("name, unit", UNITS.items())
def test_help_says_the_unit(name, unit):
    assert unit in Config.__dataclass_fields__[name].metadata["help"]


def test_flags_can_be_added_to_any_parser():
    parser = argparse.ArgumentParser()
    add_config_flags(parser, [])
    assert vars(parser.parse_args(["--n_layer", "3"])) == {"n_layer": 3}


# ------------------------------------------------------------------------------------------
# config.py edited


def test_the_default_preset_is_what_train_py_trains_without_a_preset(monkeypatch, capsys):
    assert config() == Config.from_preset() == Config()  # reference
    monkeypatch.setattr(config_module, "DEFAULT_PRESET", "demo")
    demo = Config.from_preset("demo")
    assert config() == Config.from_preset() == demo
    assert config("--max_iters", "7") == Config.from_preset(max_iters=7)
    assert config("--max_iters", "7") == dataclasses.replace(demo, max_iters=7)
    assert train.plan(overrides_in("--out_dir", "/nonexistent"), "")[0].preset == "demo"
    assert train.folder_of(overrides_in()) == Path("out/demo")
    assert config("--preset", "reference") == Config()
    told = defaults_in(help_of(capsys))
    assert told["preset"] == "demo" and told["n_layer"] == "3" and told["dataset"] == "toy"
    assert defaults_in(help_of(capsys, "--preset", "reference"))["n_layer"] == "6"


def test_a_default_preset_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(config_module, "DEFAULT_PRESET", "tunde")
    for argv in ((), ("--max_iters", "3")):
        line = refused(*argv)
        assert "tunde" in line and "did you mean tuned?" in line


def test_a_preset_that_is_not_there_is_refused_with_the_nearest():
    line = conftest.refusal(Config.from_preset, "refrence")
    assert "refrence" in line and "did you mean reference?" in line
    line = conftest.refusal(Config.from_preset, "nothing")
    assert "nothing" in line and all(name in line for name in PRESETS)


def test_a_misspelt_setting_of_a_preset_is_one_line(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", dict(max_itres=5))
    for argv in (("--preset", "mine"), ("--preset", "mine", "--help")):
        line = refused(*argv)
        for words in ("config.py", "'mine'", "'max_itres'", "did you mean max_iters?"):
            assert words in line, words
    assert config("--preset", "demo").preset == "demo"  # the others are as good as they were


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(n_layer=0), ("n_layer", "1 or more")), (dict(beta2="0.9"), ("beta2", "a number")),
        (dict(gelu="relu"), ("gelu", "exact, tanh")), (dict(n_head=5), ("n_head 5", "n_embd 384")),
        (dict(max_iters=1e3), ("max_iters", "1000.0", "a whole number")),
        (dict(preset="demo"), ("preset",)),
    ],
    ids=str,
)
def test_a_preset_with_an_impossible_value_is_one_line(monkeypatch, settings, words):
    monkeypatch.setitem(PRESETS, "mine", settings)
    for argv in (("--preset", "mine"), ("--preset", "mine", "--help")):
        line = refused(*argv)
        assert all(word in line for word in words), line


def edited(folder: Path, **edits: str) -> Path:
    """A copy of config.py, in which every line that begins with a key reads as its value."""
    lines = (ROOT / "config.py").read_text().splitlines()
    for begin, new in edits.items():
        [at] = [i for i, line in enumerate(lines) if line.strip().startswith(f"{begin}:")]
        lines[at] = new
    (folder / "config.py").write_text("\n".join(lines) + "\n")
    return folder


def evaluated(folder: Path, expression: str) -> object:
    """An expression in the config.py of `folder`."""
    code = f"from config import *; print({expression})"
    done = run_script(folder, "-c", code)
    assert done.status == 0, done.stderr
    return eval(done.stdout)


def test_an_edited_default_changes_the_reference_but_no_preset_that_sets_it(tmp_path):
    edited(tmp_path, max_iters='    max_iters: int = setting(500, "iterations", at_least=1)',
           eps='    eps: float = setting(1e-7, "guard", above=0)')
    presets = "[Config.from_preset(name) for name in ('reference', 'tuned', 'demo')]"
    told = evaluated(tmp_path, f"[(c.max_iters, c.eps) for c in {presets}]")
    # `tuned` and `demo` say how long they are; `demo` has an eps of its own too.
    assert told == [(500, 1e-7), (40_000, 1e-7), (240, 1e-8)]


def test_an_impossible_default_is_one_line(tmp_path):
    edited(tmp_path, max_iters='    max_iters: int = setting(-5, "iterations", at_least=1)')
    code = "import config; config.cli(lambda argv: print(config.Config()))"
    done = run_script(tmp_path, "-c", code)
    assert done.status == 2 and done.stdout == ""
    assert done.stderr.startswith("error: max_iters -5 ") and done.stderr.count("\n") == 1


@pytest.fixture
def model_of_mine(tmp_path, monkeypatch) -> Path:
    """A model.pt made with a preset that has been removed since."""
    small = dict(n_layer=1, n_head=1, n_embd=8, block_size=8)
    monkeypatch.setitem(PRESETS, "mine", small)
    made = Config.from_preset("mine", beta1=0.8)
    path = tmp_path / "out" / "mine" / "model.pt"
    path.parent.mkdir(parents=True)
    model.save_file(path, made, model.GPT(made), iteration=3)
    monkeypatch.delitem(PRESETS, "mine")
    return path


def test_a_model_can_be_loaded_when_its_preset_is_gone(model_of_mine):
    assert "mine" in refused("--preset", "mine")
    loaded = model.load_model(str(model_of_mine))
    kept = model.load_file(model_of_mine)["model"]
    assert loaded.config.preset == "mine" and loaded.config.beta1 == 0.8
    assert all(torch.equal(weight, kept[name]) for name, weight in loaded.state_dict().items())


def test_a_run_can_start_from_a_model_whose_preset_is_gone(model_of_mine):
    overrides = overrides_in("--init_from", str(model_of_mine), "--preset", "demo")
    started, _, source = train.plan(overrides, "overwrite")
    assert (started.preset, started.n_embd) == ("demo", 8) and source.config.preset == "mine"


def test_a_run_can_be_resumed_and_scored_when_its_preset_is_gone(tmp_path):
    """In a copied tree whose config.py is edited, as a user would."""
    tree = tmp_path / "tree"
    (tree / "plots").mkdir(parents=True)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("plots/*.py"), *ROOT.glob("plots/*.csv")]:
        shutil.copy(file, tree / file.relative_to(ROOT))
    stories = [f"One day, Lily found {n} red balls. She was happy." for n in range(60)]
    (tree / "tales.txt").write_text("<|endoftext|>".join(stories))
    without = (tree / "config.py").read_text()
    mine = """
        dataset="tales.txt", n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2,
        gradient_accumulation_steps=1, max_iters=2, eval_windows=4, warmup_iters=0,
        device="cpu", dtype="float32", compile="false",
    """
    head = "PRESETS: dict[str, dict[str, Any]] = {\n"
    assert head in without
    (tree / "config.py").write_text(without.replace(head, f'{head}    "mine": dict({mine}),\n'))
    begun = run_script(tree, tree / "train.py", "--preset", "mine")
    assert begun.status == 0, begun.stderr
    assert "differs from the preset: nothing" in begun.stderr
    (tree / "config.py").write_text(without)
    refused = run_script(tree, tree / "train.py", "--preset", "mine")
    assert refused.status == 2 and "'mine'" in refused.stderr.splitlines()[-1]
    where = ("--out_dir", "out/mine")
    resumed = run_script(tree, tree / "train.py", "--resume", *where, "--max_iters", 4)
    assert resumed.status == 0, resumed.stderr
    assert "its settings hold" in resumed.stderr and "going on from iteration 2" in resumed.stderr
    scored = run_script(tree, tree / "train.py", "--eval_only", *where)
    assert scored.status == 0 and scored.stdout.startswith("validation loss"), scored.stderr
    story = run_script(tree, tree / "sample.py", "--max_new_tokens", 3, "--device", "cpu")
    assert story.status == 0 and "out/mine/model.pt" in story.stderr, story.stderr


# ------------------------------------------------------------------------------------------
# Errors and files


def test_one_line_takes_out_every_line_end():
    assert config_module.one_line("a\n  b\r\nc\td") == "a b c d"


@pytest.mark.parametrize(
    "action, status, error",
    [
        ("raise config.UserError('two\\nlines')", 2, "error: two lines\n"),
        ("open('/nonexistent/file')", 2, "error: No such file or directory: /nonexistent/file\n"),
        ("raise OSError('the disk is\\nfull')", 2, "error: the disk is full\n"),
        ("raise KeyboardInterrupt", 130, "\n"), ("raise BrokenPipeError", 1, ""),
        ("print('fine')", 0, ""),
    ],
)
def test_cli_turns_what_goes_wrong_into_a_line_and_a_status(action, status, error):
    code = f"import config\ndef main(argv):\n    {action}\nconfig.cli(main)"
    done = run_script(ROOT, "-c", code)
    assert (done.status, done.stderr) == (status, error)


def test_atomic_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == path.parent
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_leaves_the_old_file_and_no_debris_on_an_error(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as partial:
        partial.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_atomic_write_gives_the_permissions_of_an_ordinary_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.txt") as partial:
            partial.write_text("x")
    finally:
        assert os.umask(before) == umask  # and it leaves the umask as it was
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
