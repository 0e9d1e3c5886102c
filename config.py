"""Every constant people tweak: the settings of a run, and the presets.

Edit a value here and it holds from now on; type it as a flag (`python train.py --max_iters 500`)
and it holds for one run. The fields of `Config` are the `reference` preset. Every other preset
lists what it changes, and its own lines win: to tweak `tuned`, edit PRESETS["tuned"]. A run that
is resumed keeps the settings it began with. After the constants comes what the command lines
share: flags, errors, atomic writes.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

DEFAULT_PRESET = "reference"  # what `python train.py` trains
DEVICE = "auto, cpu, cuda, cuda:N or mps"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class UserError(Exception):
    """A mistake the user can mend: `cli` prints it as one line and exits with status 2."""


def setting(default: Any, help: str, group: str = "", **limits: Any) -> Any:
    """A field of Config, a flag if it has a help text; `group` is --help's heading from it on."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, limits=limits))


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run. UserError if a value, or a combination of them, is impossible."""

    preset: str = setting("reference", "the recipe to start from; other flags change it")

    # The model: GPT-2's architecture, 30 M parameters, two thirds of them token embeddings.
    n_layer: int = setting(6, "Transformer blocks", "model", at_least=1)
    n_head: int = setting(6, "attention heads in a block", at_least=1)
    n_embd: int = setting(384, "width: features per token", at_least=1)
    block_size: int = setting(128, "context: tokens the model sees at once", at_least=1)
    vocab_size: int = setting(50257, "", at_least=1, at_most=65536)  # GPT-2's; not a flag
    dropout: float = setting(0.1, "share of activations dropped", at_least=0, below=1)
    bias: bool = setting(True, "biases in the linear layers and LayerNorms")
    gelu: str = setting("exact", "GELU, or GPT-2's approximation", one_of=("exact", "tanh"))
    init: str = setting("gpt2", "first weights, see model.py", one_of=("gpt2", "fan_in"))
    embedding_init: str = setting("random", "first token embeddings", one_of=("random", "subword"))
    init_from: str | None = setting(None, "model.pt, ckpt.pt or Hugging Face GPT-2 to start from")

    # The data.
    dataset: str = setting("roneneldan/TinyStories", "a Hub name, toy, or a path", "data")
    data_dir: str | None = setting(None, "folder of the prepared data; else data/<dataset>")
    crops: str = setting("random", "where sequences begin: anywhere, or every window once before "
                         "any twice", one_of=("random", "shuffled"))

    # The batch. An iteration is batch_size sequences, forward and backward (4,096 tokens); an
    # optimizer step is over gradient_accumulation_steps iterations (131,072 tokens).
    batch_size: int = setting(32, "sequences in an iteration", "batch", at_least=1)
    gradient_accumulation_steps: int = setting(32, "iterations in an optimizer step", at_least=1)
    device_batch_size: int | None = setting(None, "sequences on the device at once, for memory "
                                            "and speed; else batch_size", at_least=1)
    max_iters: int = setting(10_000, "iterations in the run; nanoGPT counts steps", at_least=1)
    max_epochs: float | None = setting(None, "passes over the training data; of a preset with "
                                       "both, this is the length", above=0, at_most=1e6)

    # The learning rate, a function of the iteration: linear warmup, then a decay from
    # learning_rate to min_lr. The reference's "minimum" lies above its start, so the rate
    # RISES from 1e-4 to 5e-4. That is what ran, and so it is what this preset does.
    learning_rate: float = setting(1e-4, "rate after the warmup", "learning rate", above=0)
    min_lr: float = setting(5e-4, "rate at the end of the decay", at_least=0)
    lr_schedule: str = setting("cosine", "shape of the decay", one_of=("cosine", "linear"))
    warmup_iters: int | None = setting(1000, "iterations, not steps, of warmup; if None, a "
                                       "twentieth of max_iters", at_least=0)
    warmup_start_factor: float = setting(1 / 3, "the warmup starts at this share of learning_rate",
                                         at_least=0, at_most=1)
    lr_decay_iters: int | None = setting(None, "iteration at which min_lr is reached; else "
                                         "max_iters", at_least=1)
    embedding_lr_mult: float = setting(1.0, "rate of embeddings, biases and LayerNorms, as a "
                                       "multiple of the matrices'", at_least=0)

    # AdamW, or Muon for the matrices of the blocks. The reference decayed every parameter; biases
    # and LayerNorms are left alone here, since pulling a scale of one to zero regularizes nothing.
    matrix_optimizer: str = setting("adamw", "for the blocks' matrices; AdamW does the rest",
                                    "optimizer", one_of=("adamw", "muon"))
    momentum: float = setting(0.95, "Muon's memory of the gradient", at_least=0, below=1)
    weight_decay: float = setting(0.1, "decay of matrices and embeddings", at_least=0)
    beta1: float = setting(0.9, "AdamW's memory of the gradient", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's memory of its square", at_least=0, below=1)
    eps: float = setting(1e-9, "AdamW's guard against division by zero", above=0)
    grad_clip: float = setting(0.5, "largest norm of a gradient; 0 = no clipping", at_least=0)

    # Evaluation, on fixed windows: two evaluations differ only by the weights. The reference
    # drew 500 random batches of each split, two thirds of its forward passes.
    eval_interval: int = setting(500, "iterations between evaluations", "evaluation", at_least=1)
    eval_windows: int = setting(384, "windows of each split in an evaluation", at_least=1)

    # The run.
    seed: int = setting(1337, "start of all random numbers", "run", at_least=0, at_most=2**63 - 1)
    device: str = setting("auto", f"{DEVICE}; auto is a GPU if there is one", form=DEVICE)
    dtype: str = setting("auto", "arithmetic; auto is the device's fastest", one_of=DTYPES)
    compile: str = setting("auto", "use torch.compile", one_of=("auto", "true", "false"))
    out_dir: str | None = setting(None, "folder of the checkpoints and the log; else out/<preset>")
    plot_dir: str = setting("plots", "folder of the loss plot")
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints", above=0)
    tensorboard: bool = setting(False, "write the log for TensorBoard into out_dir too")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and isinstance(None, field.type):
                continue
            value = checked(field.name, value, kind_of(field), **field.metadata["limits"])
            object.__setattr__(self, field.name, value)
        if self.n_embd % self.n_head:
            raise UserError(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        if self.max_epochs is None and self.decay_iters < min(self.warmup, self.max_iters):
            raise UserError(f"lr_decay_iters {self.decay_iters} is below warmup_iters "
                            f"{self.warmup}")
        if self.data_dir is None:
            object.__setattr__(self, "data_dir", default_data_dir(self.dataset))
        if self.out_dir is None:
            object.__setattr__(self, "out_dir", f"out/{self.preset}")

    @classmethod
    def from_preset(cls, preset: str | None = None, **overrides: Any) -> "Config":
        """A preset's settings (None: DEFAULT_PRESET's), some of them overridden. UserError if the
        preset is not there, or sets what is no setting.
        """
        preset = DEFAULT_PRESET if preset is None else preset
        if preset not in PRESETS:
            names = ", ".join(PRESETS)
            raise UserError(f"preset {preset!r} is not known{nearest(preset, PRESETS)}: {names}")
        known = {field.name for field in dataclasses.fields(cls)} - {"preset"}
        for key in PRESETS[preset].keys() - known:
            raise UserError(f"config.py: {preset!r} sets {key!r}, which is no setting"
                            f"{nearest(key, known)}")
        settings: dict[str, Any] = {"preset": preset}
        for given in (PRESETS[preset], overrides):
            if "max_iters" in given:  # wins over a max_epochs from before
                settings["max_epochs"] = None
            settings |= given
        try:
            return cls(**settings)
        except UserError as problem:
            raise UserError(f"preset {preset}: {problem}") from None

    @property
    def decay_iters(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def warmup(self) -> int:
        return self.max_iters // 20 if self.warmup_iters is None else self.warmup_iters

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size if self.device_batch_size is None else self.device_batch_size

    @property
    def tokens_per_iteration(self) -> int:
        return self.batch_size * self.block_size


PRESETS: dict[str, dict[str, Any]] = {
    # The published run, which the fields above spell out.
    "reference": {},
    # The same model and budget, learning far more from every token; the README says why.
    "tuned": dict(
        dropout=0.0, init="fan_in", embedding_init="subword", crops="shuffled",
        batch_size=8, gradient_accumulation_steps=1, max_iters=40_000, eval_interval=1000,
        matrix_optimizer="muon", learning_rate=3e-3, min_lr=2e-4, lr_schedule="linear",
        warmup_iters=None, warmup_start_factor=0.0,  # None: a twentieth of max_iters
        beta2=0.999, grad_clip=1.0,
    ),
    # Prepare, train and sample in a minute or two on two CPU cores: a small model, toy stories.
    "demo": dict(
        dataset="toy", n_layer=3, n_head=4, n_embd=96, dropout=0.0, crops="shuffled",
        init="fan_in", batch_size=8, gradient_accumulation_steps=1, max_iters=240, eval_interval=60,
        eval_windows=64, learning_rate=3e-3, min_lr=0.0,
        warmup_iters=20, warmup_start_factor=0.02, beta2=0.99, eps=1e-8, grad_clip=1.0,
    ),
}
# `tuned` in larger steps, for a GPU; its length is max_epochs, whatever max_iters says.
PRESETS["full"] = PRESETS["tuned"] | dict(batch_size=64, max_epochs=1.0)


SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")  # of the texts that can be prepared


def default_data_dir(dataset: str) -> str:
    """data/<name of the dataset>: TinyStories for roneneldan/TinyStories, train for a/train.txt."""
    name = Path(dataset).name
    for endings in ((".gz",), SUFFIXES):
        if Path(name).suffix.lower() in endings:
            name = Path(name).stem
    return f"data/{name.strip('.') or Path(dataset).resolve().name or 'dataset'}"


# -------------------------------------------------------------------------------------------- Flags

NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# What a text must look like: in the words of the error message, and as a pattern.
TEXT, PATH = "any text", "a path"
FORMS = {TEXT: "(?s).*", PATH: r"[^\0]*\S[^\0]*",
         DEVICE: r"auto|cpu|mps|cuda(:(0|[1-9][0-9]{0,5}))?"}
LIMITS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {  # in words, and as a test
    "at_least": ("{} or more", operator.ge),
    "above": ("more than {}", operator.gt),
    "at_most": ("{} or less", operator.le),
    "below": ("less than {}", operator.lt),
    "one_of": ("one of {}", lambda value, names: value in names),
    "form": ("{}", lambda value, form: re.fullmatch(FORMS[form], value)),
}


def checked(name: str, value: Any, kind: type, **limits: Any) -> Any:
    """`value`, a path's ~ expanded. UserError if its kind or LIMITS forbid it."""
    if kind is int:
        limits.setdefault("at_most", 2**31 - 1)
    if kind is str and not limits:
        limits["form"] = PATH
    if kind is float and type(value) is int:
        value = float(value)
    fits = type(value) is kind and (kind is not float or math.isfinite(value))
    wanted = [NOUNS[kind]]
    for rule, limit in limits.items():
        words, test = LIMITS[rule]
        wanted.append(words.format(", ".join(limit) if rule == "one_of" else limit))
        fits = fits and test(value, limit)
    if not fits:
        guess = nearest(str(value), limits.get("one_of", ()))
        raise UserError(f"{name} {value!r} is not possible: it must be {', '.join(wanted)}{guess}")
    return os.path.expanduser(value) if limits.get("form") == PATH else value


def from_text(text: str, kind: type) -> Any:
    """What was typed, as this kind: 1e4 is a whole number too. The text itself if it is none."""
    with contextlib.suppress(ValueError, KeyError):
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    with contextlib.suppress(ValueError):
        if kind is int and float(text).is_integer():
            return int(float(text))
    return text


def kind_of(field: dataclasses.Field) -> type:
    """int, for a field of int as for one of int | None."""
    return (get_args(field.type) or (field.type,))[0]


def add_flag(parser: Any, name: str, kind: type, default: Any, help: str, **limits: Any) -> Any:
    """Adds `--name VALUE` to a parser, or a group of one; returns argparse's action."""
    choices = limits.get("one_of", ())

    def parse(text: str) -> Any:
        text = text.lower() if text.lower() in choices else text  # --compile False
        return checked(f"--{name}", from_text(text, kind), kind, **limits)

    metavar = {int: "N", float: "X", bool: "true|false", str: name.upper()}[kind]
    if choices:
        help += "; one of " + ", ".join(choices)
    if default is not None:
        help += f" (default: {str(default).lower() if kind is bool else default})"
    help = help.replace("%", "%%")
    return parser.add_argument(f"--{name}", type=parse, default=default, metavar=metavar, help=help)


def add_config_flags(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """A flag for every setting, absent unless typed; help shows the defaults of argv's preset."""
    chooser = Parser("", add_help=False)
    chooser.add_argument("--preset", default=DEFAULT_PRESET)
    preset = chooser.parse_known_args(argv)[0].preset
    Config.from_preset(preset)  # one that cannot be is told before anything else
    group: Any = parser
    for field in dataclasses.fields(Config):
        help, limits = field.metadata["help"], field.metadata["limits"]
        default = PRESETS[preset].get(field.name, field.default)
        if field.name == "preset":
            default, limits = preset, {"one_of": tuple(PRESETS)}
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        if help:
            action = add_flag(group, field.name, kind_of(field), default, help, **limits)
            action.default = argparse.SUPPRESS  # its help has told the default


# What people type who know other programs.
ALIASES = dict(
    lr="learning_rate", epochs="max_epochs", num_epochs="max_epochs", steps="max_iters",
    max_steps="max_iters", batch="batch_size", ctx="block_size", seq_len="block_size",
    wd="weight_decay", grad_accum="gradient_accumulation_steps", data="data_dir",
    output_dir="out_dir", wandb="tensorboard", model="checkpoint", n="num_samples",
    length="max_new_tokens",
)


def nearest(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the known word that looks most like `word`, else nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, one-line errors, and a guess at what was meant."""

    def __init__(self, description: str, **options: Any):
        super().__init__(description=description, allow_abbrev=False, **options)
        # A flag's value may be any negative number ("-1e-4" too): the limits answer it.
        self._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> None:
        if message == "argument --prompt: expected one argument":
            message += " (one that begins with - is written behind a =, as in --prompt=-Pip)"
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, argv: list[str]) -> argparse.Namespace:  # type: ignore[override]
        args, unknown = self.parse_known_args(argv)
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"{unknown[0]!r} belongs to no flag: a value stands behind its flag")
        if unknown:
            flag = unknown[0].split("=")[0]
            name = flag.lstrip("-").replace("-", "_")
            guess = nearest("--" + ALIASES.get(name, name), self._option_string_actions)
            raise UserError(f"unknown flag {flag}{guess} (--help lists them all)")
        return args


# --------------------------------------------------------------------------- Errors, notices, files

# A process that was started with its input or output closed (cron, daemons) would give their
# numbers to the first files it opens, and messages would land in those.
for number in (0, 1, 2):
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
# PyTorch's threads spin while they wait for each other, which starves them beside another job.
# Read when torch is imported, by PyTorch builds that use GNU's OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def no_traceback_of_ctrl_c(kind: type[BaseException], *problem: Any) -> None:
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, *problem)


sys.excepthook = no_traceback_of_ctrl_c  # while torch is imported; later `cli` sees to it


def cli(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the command line; a user's mistake becomes one line and status 2."""
    sys.stdout = sys.stdout or io.StringIO()  # None where Python was started with it closed
    sys.stderr = Lossy(sys.stderr or io.StringIO())
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        try:
            return main(sys.argv[1:])
        finally:  # --help leaves by SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nothing to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor when Python ends and flushes the rest
        sys.exit(1)
    except KeyboardInterrupt:
        notice("")
        sys.exit(130)
    except UserError as mistake:
        line = str(mistake)
    except OSError as problem:  # disk full, no permission, a folder where a file should be
        line = str(problem.strerror or problem)
        place = problem.filename2 or problem.filename  # of a rename, where it goes to
        line += f": {place}" if place else ""
    except (MemoryError, RuntimeError) as problem:  # PyTorch's are RuntimeErrors, on a GPU or not
        memory = "out of memory|allocate memory|not enough memory"
        if isinstance(problem, RuntimeError) and not re.search(memory, str(problem)):
            raise
        line = ("out of memory: halve --device_batch_size (the result stays the same), "
                "--num_samples, --num_threads or the model, whichever there is")
    notice(f"error: {one_line(line)}")
    sys.exit(2)


class Lossy:
    """A stream that may go, as a closed terminal: what is written then is lost, nothing fails."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()


def notice(line: str) -> None:
    """A line for the person at the terminal: stderr, so that stdout holds results only."""
    print(line, file=sys.stderr, flush=True)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def lock_folder(folder: Path) -> int | None:
    """A descriptor that holds `folder` for this process until it is closed; None if it is taken.
    What a kill left of atomic writes there goes.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        lock = functools.partial(fcntl.flock, handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows, where a folder cannot be opened
        import msvcrt

        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        lock = functools.partial(msvcrt.locking, handle, msvcrt.LK_NBLCK, 1)
    try:
        lock()
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            os.close(handle)
            return None
        return handle  # a file system without locks (some network drives): it is used without
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    return handle


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; renames it to `path` once it is on the disk: a reader
    or a crash sees the old file or the new one, never half of one.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is no file that could be replaced: name another")  # /dev/null
    path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed meanwhile
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
