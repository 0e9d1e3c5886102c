"""sample.py: what arrives on stdout and stderr, and how wrong inputs are answered."""

import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from config import Config

import pytest
import torch
from conftest import refusal
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

import sample
from model import GPT, save_file
from prepare_data import END_OF_TEXT, tokenizer

SAMPLE = Path(sample.__file__)
TINY = Config(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=50257, dropout=0.0)
FOX = "🦊"  # three tokens of GPT-2, none of them a whole character

pytestmark = pytest.mark.usefixtures("one_thread")


def random_model(path: Path, settings: Config = TINY, **state: Any) -> str:
    torch.manual_seed(0)
    save_file(path, settings, GPT(settings), **state)
    return str(path)


def parrot(path: Path, prompt: str, *tokens: int) -> str:
    """A model that goes on after `prompt` with `tokens`, when greedy: position p alone decides what
    comes after it.
    """
    model = GPT(TINY)
    start = len(tokenizer().encode_ordinary(prompt)) or 1  # an empty prompt is one end-of-text
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wpe.weight.copy_(1000.0 * torch.eye(TINY.block_size, TINY.n_embd))
        for position, token in enumerate(tokens, start - 1):
            model.transformer.wte.weight[token, position] = 1.0
    save_file(path, TINY, model)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A model that has learnt nothing: every seed tells another story. It has a training state
    beside its weights.
    """
    state = dict(optimizer={"state": {0: torch.zeros(2)}}, iteration=3)
    return random_model(tmp_path_factory.mktemp("sample") / "ckpt.pt", **state)


@pytest.fixture
def story(capsys):
    """Calls sample.py's main: (stdout, stderr)."""

    def call(*argv: str) -> tuple[str, str]:
        sample.main([*argv])
        return tuple(capsys.readouterr())

    return call


@pytest.fixture
def refused(capsys):
    """Calls sample.py's main: the one line it refuses with; nothing is on stdout."""

    def call(*argv: str) -> str:
        line = refusal(sample.main, [*argv])
        assert capsys.readouterr().out == ""
        return line

    return call


def stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def command(*argv: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SAMPLE, *argv], capture_output=True, timeout=120,
                          **options)


# --------------------------------------------------------------------------------------------- Text


def test_stdout_holds_the_prompt_and_its_continuation_and_stops_at_end_of_text(story, tmp_path):
    words = tokenizer().encode(f" a {FOX} ran.")
    path = parrot(tmp_path / "model.pt", "There was", *words, END_OF_TEXT, *words)
    flags = ("--prompt", "There was", "--temperature", "0", "--seed", "7")
    out, err = story("--checkpoint", path, *flags)
    assert out == f"There was a {FOX} ran.\n"
    assert path in err and "seed 7" in err


def test_several_samples_are_whole_in_order_and_a_line_between(story, checkpoint, tmp_path):
    path = parrot(tmp_path / "model.pt", "One day", *tokenizer().encode(f" a {FOX}"), END_OF_TEXT)
    flags = ("--prompt", "One day", "--temperature", "0", "--num_samples", "3")
    out, _ = story("--checkpoint", path, *flags)
    assert out.split("\n---\n") == [f"One day a {FOX}", f"One day a {FOX}", f"One day a {FOX}\n"]
    out, _ = story("--checkpoint", checkpoint, "--num_samples", "4", "--max_new_tokens", "12")
    texts = out.split("\n---\n")
    assert len(set(texts)) == 4 and all(text.startswith("Once upon a time") for text in texts)


@pytest.mark.parametrize("count", ["1", "3"])
def test_a_seed_is_told_and_gives_its_stories_again_and_another_gives_others(
    story, checkpoint, count
):
    flags = ("--checkpoint", checkpoint, "--num_samples", count, "--max_new_tokens", "20")
    out, err = story(*flags)
    seed = int(re.search(r"seed (\d+)", err)[1])
    assert story(*flags, "--seed", str(seed))[0] == out
    assert story(*flags, "--seed", str(seed + 1))[0] != out
    assert f"seed {seed}" not in story(*flags)[1]


def test_max_new_tokens_bounds_the_continuation(story, tmp_path):
    path = parrot(tmp_path / "model.pt", "Count", *tokenizer().encode(" one two three"))
    flags = ("--checkpoint", path, "--prompt", "Count", "--temperature", "0", "--max_new_tokens")
    assert story(*flags, "2")[0] == "Count one two\n"
    assert story(*flags, "0")[0] == "Count\n"
    assert story(*flags, "0", "--num_samples", "2")[0] == "Count\n---\nCount\n"


@pytest.mark.parametrize("content", [b"There was", b"There was\n", b"There was\r\n",
                                     b"\xef\xbb\xbfThere was\n"])
def test_a_prompt_of_a_dash_reads_standard_input(story, monkeypatch, tmp_path, content):
    path = parrot(tmp_path / "model.pt", "There was", *tokenizer().encode(" a cat"), END_OF_TEXT)
    stdin(monkeypatch, content)
    out, _ = story("--checkpoint", path, "--prompt", "-", "--temperature", "0")
    assert out == "There was a cat\n"


@pytest.mark.parametrize("prompt", ["", "a<|endoftext|>b"])  # it starts from end of text; is text
def test_an_empty_prompt_and_one_with_the_mark_are_continued(story, tmp_path, prompt):
    path = parrot(tmp_path / "model.pt", prompt, *tokenizer().encode(" and c"), END_OF_TEXT)
    out, _ = story("--checkpoint", path, "--prompt", prompt, "--temperature", "0")
    assert out == f"{prompt} and c\n"


def test_a_prompt_longer_than_the_context_is_told_printed_whole_and_continued(story, checkpoint):
    prompt = "cat " * 40
    out, err = story("--checkpoint", checkpoint, "--prompt", prompt, "--max_new_tokens", "20")
    assert out.startswith(prompt) and len(out) > len(prompt) + 20
    assert re.search(r"^warning: .*\b16\b", err, re.MULTILINE)


@pytest.mark.parametrize("prompt, warned", [("Once ", True), ("Once  ", True), ("Once", False)])
def test_a_space_at_the_prompts_end_is_warned_of(checkpoint, story, prompt, warned):
    err = story("--checkpoint", checkpoint, "--prompt", prompt, "--max_new_tokens", "1")[1]
    assert ("space" in err) == warned and ("warning" in err) == warned


# -------------------------------------------------------------------------------------- Checkpoints


def test_the_default_is_the_newest_model_and_a_real_stdin_loses_its_last_line_end(tmp_path):
    for age, name in enumerate(["b", "c", "a"]):
        (tmp_path / "out" / name).mkdir(parents=True)
        token = tokenizer().encode(f" {name}")[0]
        path = parrot(tmp_path / "out" / name / "model.pt", "Zoë is", token, END_OF_TEXT)
        os.utime(path, (1e9 - age, 1e9 - age))
    done = command("--prompt", "-", "--temperature", "0", cwd=tmp_path, input="Zoë is\r\n".encode(),
                   env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == "Zoë is b\n".encode(), done.stderr


def test_a_folder_without_a_model_is_told_what_was_looked_for(refused, tmp_path):
    line = refused("--checkpoint", str(tmp_path))
    assert all(words in line for words in (str(tmp_path), "model.pt", "config.json"))
    assert "transformers" not in line and len(line) < 100 + len(str(tmp_path))


def test_without_a_model_the_line_names_the_way_to_one(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "train.py --preset demo" in refused()
    folder = Path("out", "mine")
    folder.mkdir(parents=True)
    (folder / "ckpt.pt").touch()  # a run stopped before its first evaluation
    way = r"--checkpoint out/mine/ckpt.pt.*--resume --out_dir out/mine\b"
    assert re.search(way, refused())
    for path in (folder, folder / "model.pt"):
        assert str(folder / "ckpt.pt") in refused("--checkpoint", str(path))


# ---------------------------------------------------------------------------- A Hugging Face folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder that --save_hf wrote, the model.pt it was made from beside it."""
    folder = tmp_path_factory.mktemp("exported")
    settings = dataclasses.replace(TINY, n_layer=2, block_size=32, learning_rate=3e-4)
    torch.manual_seed(0)
    model = GPT(settings)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    save_file(folder / "model.pt", settings, model)
    sample.main(["--checkpoint", str(folder / "model.pt"), "--save_hf", str(folder / "new" / "hf")])
    return folder / "new" / "hf"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_an_export_holds_what_hugging_face_reads_and_nothing_else(exported):
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert {path.name for path in exported.iterdir()} == weights | tokenizer | {"README.md"}
    assert [path.name for path in exported.parent.iterdir()] == ["hf"]
    model = exported.parent.parent / "model.pt"
    assert {path.stat().st_mode for path in exported.iterdir()} == {model.stat().st_mode}


def test_a_pipeline_tells_what_sample_tells(exported, offline, story):
    tell = pipeline("text-generation", model=str(exported))
    settings = tell.model.generation_config
    assert (settings.max_length, settings.temperature, settings.top_k) == (32, 0.8, 50)
    torch.manual_seed(0)
    text = tell("One day")[0]["generated_text"]  # as long as the context, no longer
    assert text.startswith("One day")
    text = tell("Once upon a time", do_sample=False)[0]["generated_text"]
    assert len(tokenizer().encode(text)) > 20
    for path in (exported, exported.parent.parent / "model.pt"):
        flags = ("--temperature", "0", "--max_new_tokens", "28", "--dtype", "float32")
        out, _ = story("--checkpoint", str(path), *flags)
        assert out == text + "\n"


def test_the_exported_tokenizer_gives_tiktokens_ids(exported, offline):
    theirs = AutoTokenizer.from_pretrained(exported)
    odd = f" She didn't say {FOX}: “café”,  12,345 你好…\n\n\tEnd  "
    for text in ("Once upon a time", odd, "🏳️‍🌈 Zoë's 🙂👩‍👩‍👧"):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer().encode(text) and theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == END_OF_TEXT
    assert theirs("<|endoftext|>")["input_ids"] == [END_OF_TEXT]
    assert theirs.model_max_length == 32


def test_an_export_is_read_by_programs_that_pad_and_convert(exported, offline):
    """llama.cpp's converter reads n_ctx; a batch of unequal prompts is padded on the left."""
    assert json.loads((exported / "config.json").read_text())["n_ctx"] == 32
    theirs = AutoTokenizer.from_pretrained(exported)
    batch = theirs(["Once", "Once upon a time"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    model = GPT2LMHeadModel.from_pretrained(exported)
    alone = model.generate(**theirs(["Once"], return_tensors="pt"), do_sample=False, max_length=9)
    both = model.generate(**batch, do_sample=False, max_new_tokens=8)
    assert both[0, 3:].tolist() == alone[0].tolist()


def test_a_hugging_face_folder_goes_on_as_their_own_generate_does(tmp_path, offline, story):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64)).eval()
    for p in theirs.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "gpt2")
    prompt = torch.tensor([tokenizer().encode("Once upon a time")])
    ids = theirs.generate(prompt, do_sample=False, max_new_tokens=40, pad_token_id=END_OF_TEXT)
    out, _ = story("--checkpoint", str(tmp_path / "gpt2"), "--temperature", "0",
                   "--max_new_tokens", "40", "--device", "cpu", "--dtype", "float32")
    assert len(set(ids[0, 4:].tolist())) > 3
    assert out == tokenizer().decode(ids[0].tolist()).removesuffix("<|endoftext|>") + "\n"


def swap_two(ids: dict) -> dict:
    return ids | {"the": ids["cat"], "cat": ids["the"]}


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_model_with_another_tokenizer_is_refused(exported, tmp_path, refused, story, name):
    folder = shutil.copytree(exported, tmp_path / "other")
    content = json.loads((folder / name).read_text())
    if name == "vocab.json":
        content = swap_two(content)
    else:
        (folder / "vocab.json").unlink()
        story("--checkpoint", str(folder), "--max_new_tokens", "1")  # it is GPT-2's still
        content["model"]["vocab"] = swap_two(content["model"]["vocab"])
    (folder / name).write_text(json.dumps(content))
    assert "tokenizer of its own" in refused("--checkpoint", str(folder))
    (folder / name).unlink()
    story("--checkpoint", str(folder), "--max_new_tokens", "1")  # absent files are fine


def test_the_model_card_tells_data_losses_settings_and_where_the_weights_come_from(tmp_path):
    row = dict(iteration=500, tokens=2_048_000, train_loss=2.25, val_loss=2.5, val_bits_per_byte=1)
    after = dict(state=dict(iteration=900, log=[row]))
    cards, toys = {}, f"{tmp_path}/my_toys.txt"
    for name, content, changes in (
        ("model.pt", row, {}), ("toy.pt", row, dict(dataset="toy", init_from="gpt2")),
        ("ckpt.pt", after, dict(dataset=toys, init_from=f"{tmp_path}/mine/best.pt")),
    ):
        settings = dataclasses.replace(TINY, learning_rate=3e-4, **changes)
        save_file(tmp_path / name, settings, GPT(settings), **content)
        sample.main(["--checkpoint", str(tmp_path / name), "--save_hf", str(tmp_path / name[:-3])])
        cards[name] = ModelCard.load(tmp_path / name[:-3] / "README.md")
    head, text = cards["model.pt"].data, str(cards["model.pt"])
    assert (head.language, head.datasets) == ("en", ["roneneldan/TinyStories"])
    assert "tinystories" in head.tags and head.base_model is None
    for line in ("data | TinyStories", "learning_rate | 0.0003", "val_loss | 2.5", "| 2048000"):
        assert line in text
    head = cards["toy.pt"].data
    assert (head.language, head.datasets, head.base_model) == ("en", None, "gpt2")
    head, text = cards["ckpt.pt"].data, str(cards["ckpt.pt"])
    assert head.language is None and head.base_model is None and "tinystories" not in head.tags
    for line in ("began with | mine/best.pt", "data | my_toys.txt", "| iteration | 900",
                 "last evaluation: iteration | 500"):
        assert line in text
    assert str(tmp_path) not in text


def test_an_export_of_an_export_is_the_same_and_its_card_claims_nothing(exported, tmp_path):
    sample.main(["--checkpoint", str(exported), "--save_hf", str(tmp_path / "again")])
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "loss" not in card and "learning_rate" not in card and "new/hf" in card
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_a_folder_that_is_there_is_refused_before_the_model_is_read(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for there in (tmp_path, tmp_path / "file"):
        assert "--save_hf" in refused("--checkpoint", "none/model.pt", "--save_hf", str(there))
    flags = ("--checkpoint", "none/model.pt", "--save_hf", str(tmp_path / "new"))
    assert "none/model.pt" in refused(*flags)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The weights do not fit; the tokenizer does not fit.
@pytest.mark.parametrize("size", [1_000_000, 3_400_000])
def test_a_full_disk_leaves_no_half_export(refused, checkpoint, tmp_path, size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        (tmp_path / "hf").mkdir()  # an empty folder may be there
        line = refused("--checkpoint", checkpoint, "--save_hf", str(tmp_path / "hf"))
        assert "cannot be written" in line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*tmp_path.rglob("*")] == [tmp_path / "hf"]
    sample.main(["--checkpoint", checkpoint, "--save_hf", str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------- Wrong inputs

WRONG = {
    ("--temprature", "1"): "did you mean --temperature",
    ("--temperature", "-0.5"): "0 or more",
    ("--top_k", "2.5"): "type int",
    ("--num_samples", "0"): "1 or more",
    ("--top_p", "1.5"): "1 or less",
    ("--top_p", "0"): "--top_p",
    ("--seed", "99999999999999999999"): "--seed",
    ("--device", "gpu"): "gpu",
    ("--device", "cuda:99"): "cuda:99",
    ("--device", "cpu", "--dtype", "float16"): "float16",
    ("--prompt", "\udcff"): "UTF-8",
    ("--checkpoint", "none/model.pt"): "none/model.pt",
}


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_a_wrong_command_line_is_one_line_that_says_what_is_wrong(refused, argv):
    assert WRONG[argv] in refused(*argv)


def test_a_model_of_another_vocabulary_is_one_line(refused, tmp_path):
    path = random_model(tmp_path / "model.pt", dataclasses.replace(TINY, vocab_size=100))
    assert re.search("100.*50257", refused("--checkpoint", path))


@pytest.mark.parametrize("mocked", [True, False])
def test_the_hub_is_asked_once_for_ten_seconds_at_most(monkeypatch, offline, capsys, mocked):
    asked = []

    def model_info(self: Any, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise OSError("no network")

    if mocked:
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    assert "someone/gpt2" in refusal(sample.main, ["--checkpoint", "someone/gpt2"])
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch("[^\n]*asking the Hugging Face Hub\n", err)
    assert asked == ([("someone/gpt2", 10)] if mocked else [])


def test_standard_input_that_is_not_utf_8_is_one_line(refused, monkeypatch, checkpoint):
    stdin(monkeypatch, b"caf\xe9")
    assert "UTF-8" in refused("--prompt", "-", "--checkpoint", checkpoint)


def test_what_is_no_checkpoint_is_one_line_in_a_real_shell(tmp_path):
    """In a process of its own: warnings and tables of the libraries would show here."""
    theirs = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)
    GPT2LMHeadModel(theirs).save_pretrained(tmp_path / "gpt2")
    theirs.n_layer = 2
    theirs.save_pretrained(tmp_path / "gpt2")
    done = command("--checkpoint", "gpt2", "--max_new_tokens", "1", cwd=tmp_path, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*gpt2[^\n]*\n", done.stderr)


def test_a_reader_that_leaves_early_is_no_error(checkpoint):
    process = subprocess.Popen([sys.executable, SAMPLE, "--checkpoint", checkpoint, "--seed", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"O"
    process.stdout.close()
    notices = process.stderr.read().decode()
    process.stderr.close()
    process.wait(timeout=30)
    assert len(notices.splitlines()) == 1 and "seed 1" in notices


def test_ctrl_c_ends_the_line_and_exits_with_130(tmp_path):
    path = random_model(tmp_path / "model.pt", dataclasses.replace(TINY, block_size=1024))
    flags = ["--checkpoint", path, "--seed", "1", "--max_new_tokens", "1000000"]
    process = subprocess.Popen(
        [sys.executable, SAMPLE, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        # Whatever the tests were started with.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and (first + out).startswith(b"Once upon a time")
    # The line on the terminal is ended.
    assert err.endswith(b"\n\n") and len(err.splitlines()) == 2 and b"seed 1" in err
