"""Every constant people tweak, as one dataclass `Config`; its presets; its command line.

The fields below read as the table of the recipe, and each is a flag of the same name:
`python train.py --learning_rate 3e-4` changes one for a run, an edit here changes it for
good. What the command lines share (errors, flags, whole-file writes) is at the end.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class UserError(Exception):
    """A mistake the user can mend: `run` prints it as one line and exits with status 2."""


class Allowed(NamedTuple):
    """The values a setting may take: in words, and as a test."""

    text: str
    test: Callable[[Any], bool]


def at_least(low: float) -> Allowed:
    return Allowed(f"{low} or more (below 2**31)", lambda value: low <= value < 2**31)


def above(low: float) -> Allowed:
    return Allowed(f"more than {low}", lambda value: value > low)


def between(low: float, high: float) -> Allowed:
    return Allowed(f"from {low} to {high}", lambda value: low <= value <= high)


def below_one() -> Allowed:
    return Allowed("from 0 to just under 1", lambda value: 0 <= value < 1)


def one_of(*names: str) -> Allowed:
    return Allowed("one of " + ", ".join(names), lambda value: value in names)


PATH = Allowed("a path", lambda value: value.strip() != "" and "\0" not in value)
DEVICE = Allowed("auto, cpu, cuda or cuda:N", lambda value: re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,5}))?", value))
DTYPE = one_of("auto", "float32", "bfloat16", "float16")
SEED = between(0, 2**63 - 1)


def setting(default: Any, help: str, allowed: Allowed | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The defaults are the `reference` preset: the published recipe, to the digit.

    Raises UserError when it is built with a value, or a combination, that cannot be.
    """

    preset: str = setting("reference", "the recipe to start from; other flags change single settings")

    # The model: GPT-2's architecture, 30 M parameters, two thirds of them token embeddings.
    n_layer: int = setting(6, "Transformer blocks", at_least(1))
    n_head: int = setting(6, "attention heads in a block", at_least(1))
    n_embd: int = setting(384, "width: features per token", at_least(1))
    block_size: int = setting(128, "context: tokens the model sees at once", at_least(1))
    vocab_size: int = setting(50257, "token ids; GPT-2's vocabulary", between(1, 65536))
    dropout: float = setting(0.1, "share of activations dropped in training", below_one())
    bias: bool = setting(True, "biases in the linear layers and LayerNorms")
    gelu: str = setting("exact", "the MLP's activation; tanh is GPT-2's approximation", one_of("exact", "tanh"))
    init: str = setting("gpt2", "first weights: GPT-2's, or fitted to each matrix (see model.py)", one_of("gpt2", "fan_in"))
    embedding_std: float = setting(0.02, "standard deviation of the first embeddings", above(0))
    embedding_init: str = setting("random", "first token embeddings: random, or alike if spelled alike", one_of("random", "spelling"))
    init_from: str | None = setting(None, "model.pt, ckpt.pt, Hugging Face GPT-2 folder or name that gives architecture and first weights; "
                                          "random weights if not given", PATH)  # fmt: skip

    # The data.
    dataset: str = setting("roneneldan/TinyStories", "what to prepare if data_dir is empty: a Hub name, toy, or a path", PATH)
    data_dir: str | None = setting(None, "folder of the prepared data; data/<name of dataset> if not given", PATH)

    # The batch. An iteration is batch_size sequences, forward and backward (4,096 tokens);
    # an update is one optimizer step over gradient_accumulation_steps iterations (131,072 tokens).
    batch_size: int = setting(32, "sequences of block_size tokens in an iteration", at_least(1))
    gradient_accumulation_steps: int = setting(32, "iterations in an update (one optimizer step)", at_least(1))
    device_batch_size: int | None = setting(None, "sequences on the device at once (memory, speed); batch_size if not given", at_least(1))
    max_iters: int = setting(10_000, "iterations in the run", at_least(1))
    crops: str = setting("random", "where sequences begin: anywhere, or all windows once before any twice", one_of("random", "shuffled"))

    # The learning rate, a function of the iteration: linear warmup, then a decay from
    # learning_rate to min_lr. The reference's "minimum" lies above its start, so the rate
    # RISES from 1e-4 to 5e-4. That is what ran, and so it is what this preset does.
    learning_rate: float = setting(1e-4, "rate at the end of the warmup", above(0))
    min_lr: float = setting(5e-4, "rate at the end of the decay", at_least(0))
    lr_schedule: str = setting("cosine", "shape of the decay", one_of("cosine", "linear"))
    warmup_iters: int | None = setting(1000, "iterations of linear warmup; in tuned a twentieth of max_iters", at_least(0))
    warmup_start_factor: float = setting(1 / 3, "the warmup starts at this share of learning_rate", between(0, 1))
    lr_decay_iters: int | None = setting(None, "iteration at which min_lr is reached; max_iters if not given", at_least(1))

    # Rates of single kinds of parameters, as multiples of that.
    embedding_lr: float = setting(1.0, "the embeddings' rate, as a multiple of the matrices'", at_least(0))
    vector_lr: float = setting(1.0, "the biases' and LayerNorms' rate, as a multiple of the matrices'", at_least(0))
    mlp_out_lr: float = setting(1.0, "the rate of the MLP's second matrix, as a multiple of the other matrices'", at_least(0))

    # The optimizer: AdamW. The reference decayed every parameter; biases and LayerNorms
    # are left alone here, since pulling a scale of one towards zero regularizes nothing.
    weight_decay: float = setting(0.1, "AdamW's decay of matrices and embeddings", at_least(0))
    beta1: float = setting(0.9, "AdamW's memory of the gradient", below_one())
    beta2: float = setting(0.95, "AdamW's memory of the squared gradient", below_one())
    eps: float = setting(1e-9, "AdamW's guard against division by zero", above(0))
    grad_clip: float = setting(0.5, "largest norm of an update's gradient; 0 = no clipping", at_least(0))

    # Evaluation. The reference drew 500 random batches of each split: two thirds of its forward
    # passes. 24 fixed batches a split are 3 % of the work, and two evaluations compare exactly.
    eval_interval: int = setting(500, "iterations between evaluations", at_least(1))
    eval_iters: int = setting(24, "batches of each split in an evaluation", at_least(1))

    # The run.
    seed: int = setting(1337, "start of every random choice: weights, crops, dropout", SEED)
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N", DEVICE)
    dtype: str = setting("auto", "arithmetic: auto (the fastest the device has), float32, bfloat16 or float16", DTYPE)
    compile: str = setting("auto", "torch.compile the model: auto, true or false", one_of("auto", "true", "false"))
    out_dir: str | None = setting(None, "folder of model.pt, ckpt.pt and log.csv; out/<preset> if not given", PATH)
    plot_dir: str = setting("plots", "folder of the loss plot", PATH)
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints, besides those at evaluations", above(0))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, optional = kind_of(field)
            if value is None and optional:
                continue
            if kind is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if reason := refusal(value, kind, field.metadata["allowed"]):
                raise UserError(f"{field.name} {reason}")
        if self.preset not in PRESETS:
            raise UserError(f"preset {self.preset!r} is not known{nearest(self.preset, PRESETS)}: {', '.join(PRESETS)}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        if self.decay_iters < min(self.warmup, self.max_iters):
            raise UserError(f"lr_decay_iters {self.decay_iters} must be warmup_iters ({self.warmup}) or more")
        if self.data_dir is None:
            object.__setattr__(self, "data_dir", default_data_dir(self.dataset))
        if self.out_dir is None:
            object.__setattr__(self, "out_dir", f"out/{self.preset}")

    @classmethod
    def from_preset(cls, preset: str = "reference", **changes: Any) -> "Config":
        """The preset with single settings changed."""
        return cls(**{"preset": preset, **PRESETS.get(preset, {}), **changes})

    @property
    def decay_iters(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def warmup(self) -> int:
        return self.max_iters // 20 if self.warmup_iters is None else self.warmup_iters

    @property
    def pass_sequences(self) -> int:
        """Sequences on the device at once (device_batch_size, batch_size if not given)."""
        return self.batch_size if self.device_batch_size is None else self.device_batch_size

    @property
    def tokens_per_iteration(self) -> int:
        return self.batch_size * self.block_size


PRESETS: dict[str, dict[str, Any]] = {
    # The published run, which the defaults above spell out.
    "reference": {},
    # The same model and budget, learning far more from every token; the README says why each change helps.
    "tuned": dict(
        batch_size=8, gradient_accumulation_steps=1, max_iters=40_000, dropout=0.0, crops="shuffled",
        init="fan_in", embedding_std=0.03, embedding_init="spelling",
        learning_rate=7e-4, min_lr=5e-5, lr_schedule="linear", warmup_iters=None, warmup_start_factor=0.0,
        embedding_lr=3.0, vector_lr=3.0, mlp_out_lr=2.0, beta1=0.85, beta2=0.999, grad_clip=2.0,
    ),
    # Prepare, train and sample in a minute or two on two CPU cores: a small model on the toy corpus.
    "demo": dict(
        dataset="toy", n_layer=3, n_head=4, n_embd=96, dropout=0.0, init="fan_in", embedding_std=0.03,
        batch_size=8, gradient_accumulation_steps=1, max_iters=240, crops="shuffled",
        learning_rate=3e-3, min_lr=0.0, warmup_iters=20, warmup_start_factor=0.02,
        beta2=0.99, grad_clip=1.0, eps=1e-8, eval_interval=60, eval_iters=8,
    ),
}  # fmt: skip


def default_data_dir(dataset: str) -> str:
    """data/<name of the dataset>: TinyStories for roneneldan/TinyStories, train for a/train.txt."""
    path = Path(dataset)
    name = path.stem if path.suffix in (".txt", ".json", ".jsonl", ".parquet") else path.name
    return f"data/{name.strip('.') or path.resolve().name or 'dataset'}"


# ------------------------------------------------------------------------------------------
# What the three command lines share.


def kind_of(field: dataclasses.Field) -> tuple[type, bool]:
    """A field's plain type, and whether it may be None."""
    names = str(field.type.__name__ if isinstance(field.type, type) else field.type).split(" | ")
    return {"int": int, "float": float, "bool": bool, "str": str}[names[0]], "None" in names


def refusal(value: Any, kind: type, allowed: Allowed | None) -> str | None:
    """Why `value` cannot be, in words, or None if it can."""
    noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    wanted = noun if allowed is None else allowed.text if kind is str else f"{noun}, {allowed.text}"
    finite = kind is not float or type(value) is float and math.isfinite(value)
    if type(value) is not kind or not finite or allowed is not None and not allowed.test(value):
        return f"{value!r} is not possible: it must be {wanted}"
    return None


def parser_of(kind: type, allowed: Allowed | None = None) -> Callable[[str], Any]:
    """For argparse's `type=`: text to a checked value."""

    def parse(text: str) -> Any:
        value: Any = text
        with contextlib.suppress(ValueError, KeyError):
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if reason := refusal(value, kind, allowed):
            hint = ""
            if kind is str and allowed is not None and allowed.text.startswith("one of "):
                hint = nearest(text, allowed.text.removeprefix("one of ").split(", "))
            raise argparse.ArgumentTypeError(reason + hint)
        return value

    return parse


def nearest(word: str, known: Any) -> str:
    """', did you mean X?' for the known word that looks most like `word`, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, one-line errors, and a guess at what was meant."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        # A flag's value may be any negative number ("-1e-4" too): the range check answers it.
        self._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, argv: list[str]) -> argparse.Namespace:  # type: ignore[override]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                raise UserError(f"{unknown[0]!r} belongs to no flag: a value stands behind its flag (--help lists them)")
            raise UserError(f"unknown flag {flag}{nearest(flag, self._option_string_actions)} (--help lists them all)")
        return args


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of Config; those not typed are absent from the parsed namespace."""
    for field in dataclasses.fields(Config):
        kind, _ = kind_of(field)
        allowed = one_of(*PRESETS) if field.name == "preset" else field.metadata["allowed"]
        default = str(field.default).lower() if kind is bool else field.default
        choices = f"; {allowed.text}" if allowed is not None and allowed.text.startswith("one of ") else ""
        help = field.metadata["help"] + choices + ("" if default is None else f" (default: {default})")
        metavar = {int: "N", float: "X", bool: "true|false", str: field.name.upper()}[kind]
        parser.add_argument(
            f"--{field.name}", type=parser_of(kind, allowed), default=argparse.SUPPRESS, metavar=metavar, help=help.replace("%", "%%")
        )


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the command line; a user's mistake becomes one line and status 2."""
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # stories are, whatever the terminal says
    try:
        try:
            main(sys.argv[1:])
        finally:  # --help leaves by SystemExit
            sys.stdout.flush()
    except UserError as mistake:
        fail(one_line(mistake))
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nothing to say
        for stream in (sys.stdout, sys.stderr):  # what they still hold must not fail once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(1)
    except OSError as problem:  # disk full, no permission, a folder where a file should be
        fail(one_line(f"{problem.strerror or problem}" + (f": {problem.filename}" if problem.filename else "")))
    except MemoryError:
        fail("the machine is out of memory: try smaller numbers")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def fail(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def notice(line: str) -> None:
    """A line for the person at the terminal: stderr, so that stdout holds results only."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; renames it to `path` once it is on the disk.

    A reader, a crash or a full disk sees the old file or the new one, never half of one.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        settle(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Sees a file onto the disk, and makes an ordinary one of it (mkstemp's and safetensors' are private)."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder beside `path` to fill; renames it to `path`, which is missing or empty, once it is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as parent:
        partial = Path(parent, path.name)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            settle(file)
        os.replace(partial, path)


def clear_partials(folder: Path, names: Iterable[str]) -> None:
    """Removes what a kill or a power cut left of `whole_file`'s writes; nobody else may be writing there."""
    for name in names:
        for partial in folder.glob(f".{name}.????????"):
            partial.unlink(missing_ok=True)
