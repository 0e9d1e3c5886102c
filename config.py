"""The settings of a run, their presets, and what the command lines of the scripts share.

The fields of `Config` are the `reference` preset. Every other preset lists what it changes, and
its own lines win: to tweak `tuned`, edit PRESETS["tuned"]. An edit of this file holds for every
new run; a flag (`python train.py --max_iters 500`) holds for one run. A resumed run keeps the
settings that it began with.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import itertools
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

DEFAULT_PRESET = "reference"  # what `python train.py` trains
DEVICE = "auto, cpu, cuda, cuda:N or mps"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class UserError(Exception):
    """A mistake that the user can mend. `cli` prints it as one line and exits with status 2."""


def setting(default: Any, help: str | None, group: str = "", **limits: Any) -> Any:
    """A field of `Config`, whose value has to fit the `limits` (low, high, choices) of `checked`.

    A setting whose `help` is None has no flag. `group` begins a new heading in --help.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, limits=limits))


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run. UserError if a value, or a combination of them, is impossible."""

    preset: str = setting("reference", "the recipe to start from; other flags change it")

    # The model: GPT-2's architecture, 30 M parameters, two thirds of them token embeddings.
    n_layer: int = setting(6, "Transformer blocks", "model", low=1)
    n_head: int = setting(6, "attention heads in each block", low=1)
    n_embd: int = setting(384, "width: features of each token", low=1)
    block_size: int = setting(128, "context: tokens that the model sees at once", low=1)
    vocab_size: int = setting(50257, None, low=1, high=65536)  # GPT-2's
    dropout: float = setting(0.1, "share of activations dropped in training", low=0, high=0.999)
    bias: bool = setting(True, "biases in the linear layers and LayerNorms")
    gelu: str = setting("exact", "exact GELU, or GPT-2's approximation", choices=("exact", "tanh"))
    init: str = setting("gpt2", "first weights, see model.py", choices=("gpt2", "fan_in"))
    init_from: str | None = setting(None, "start from a model.pt, a ckpt.pt or Hugging Face GPT-2")

    # The data.
    dataset: str = setting("roneneldan/TinyStories", "name on the Hub, toy, or a path", "data")
    data_dir: str | None = setting(None, "folder of the prepared data (default: data/<dataset>)")
    crops: str = setting("random", "where sequences begin: anywhere, or shuffled (every window "
                         "once before any window twice)", choices=("random", "shuffled"))

    # The batch. An iteration is batch_size sequences, forward and backward (4,096 tokens). An
    # optimizer step covers gradient_accumulation_steps iterations (131,072 tokens).
    batch_size: int = setting(32, "sequences in an iteration", "batch", low=1)
    gradient_accumulation_steps: int = setting(32, "iterations in an optimizer step", low=1)
    device_batch_size: int | None = setting(None, "sequences on the device at once; changes memory "
                                            "and speed only (default: batch_size)", low=1)
    max_iters: int = setting(10_000, "iterations in the run (nanoGPT counts steps instead)", low=1)
    max_epochs: float | None = setting(None, "passes over the training data; overrides max_iters "
                                       "where a preset has both", low=1e-9, high=1e6)

    # A linear warmup, then a decay from learning_rate to min_lr. The reference's "minimum" lies
    # above its start: its rate RISES from 1e-4 to 5e-4. That is what ran, so it is kept.
    learning_rate: float = setting(1e-4, "rate after the warmup", "learning rate", low=1e-30)
    min_lr: float = setting(5e-4, "rate at the end of the decay", low=0)
    lr_schedule: str = setting("cosine", "shape of the decay", choices=("cosine", "linear"))
    warmup_iters: int | None = setting(1000, "iterations (not steps) of warmup; if None, a "
                                       "twentieth of max_iters", low=0)
    warmup_start_factor: float = setting(1 / 3, "the warmup starts at this share of learning_rate",
                                         low=0, high=1)
    lr_decay_iters: int | None = setting(None, "iteration at which the rate reaches min_lr "
                                         "(default: max_iters)", low=1)
    embedding_lr_mult: float = setting(1.0, "rate of embeddings, biases and LayerNorms, as a "
                                       "multiple of the matrices' rate", low=0)

    # The optimizer. The reference decayed every parameter. Here biases and LayerNorms do not
    # decay, since pulling a scale of one towards zero regularizes nothing.
    matrix_optimizer: str = setting("adamw", "rule for the matrices of the blocks; AdamW steps all "
                                    "other parameters", "optimizer", choices=("adamw", "muon"))
    momentum: float = setting(0.9, "decay rate of Muon's momentum", low=0, high=0.9999999)
    weight_decay: float = setting(0.1, "weight decay of matrices and embeddings", low=0)
    beta1: float = setting(0.9, "AdamW: decay rate of the first moment", low=0, high=0.9999999)
    beta2: float = setting(0.95, "AdamW: decay rate of the second moment", low=0, high=0.9999999)
    eps: float = setting(1e-9, "AdamW: added to the denominator", low=1e-30)
    grad_clip: float = setting(0.5, "largest norm of the gradient; 0 turns clipping off", low=0)

    # Evaluation is on fixed windows, so that two evaluations differ only by the weights. The
    # reference drew 500 random batches of each split, two thirds of its forward passes.
    eval_interval: int = setting(500, "iterations between evaluations", "evaluation", low=1)
    eval_windows: int = setting(384, "windows of each split in an evaluation", low=1)

    # The run.
    seed: int = setting(1337, "seed of all random numbers", "run", low=0, high=2**63 - 1)
    device: str = setting("auto", f"{DEVICE}; auto is a GPU if there is one")
    dtype: str = setting("auto", "arithmetic; auto is the device's fastest", choices=DTYPES)
    compile: str = setting("auto", "whether to use torch.compile; auto is where it works",
                           choices=("auto", "true", "false"))
    out_dir: str | None = setting(None, "folder of the run (default: out/<preset>)")
    plot_dir: str = setting("plots", "folder of the loss plot")
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints", low=0)
    tensorboard: bool = setting(False, "also write the log for TensorBoard into out_dir")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kind_of(field)
            if value is None and isinstance(None, field.type):
                continue
            value = checked(field.name, value, kind, **limits_of(field))
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

    def __getattr__(self, name: str) -> Any:
        """Called for what is no attribute: a field that was deleted from this file."""
        if name.startswith("__"):  # Python itself asks for some that need not exist
            raise AttributeError(name)
        raise UserError(f"config.py has no setting {name}, which is needed: put it back")

    @classmethod
    def from_preset(cls, preset: str | None = None, **overrides: Any) -> "Config":
        """A preset's settings (None: DEFAULT_PRESET's), some of them overridden.

        UserError if there is no such preset, or if it sets what is no setting.
        """
        preset = DEFAULT_PRESET if preset is None else preset
        settings: dict[str, Any] = {"preset": preset}
        for given in (preset_settings(preset), overrides):
            if "max_iters" in given:  # the later of the two says how long the run is
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
        dropout=0.0, init="fan_in", crops="shuffled",
        batch_size=8, gradient_accumulation_steps=1, max_iters=40_000, eval_interval=1000,
        matrix_optimizer="muon", learning_rate=3e-3, min_lr=2e-4, lr_schedule="linear",
        warmup_iters=None, warmup_start_factor=0.0,  # None: a twentieth of max_iters
        beta2=0.999, grad_clip=1.0,
    ),
    # Prepare, train and sample in a minute or two on two CPU cores: a small model, toy stories.
    "demo": dict(
        dataset="toy", n_layer=3, n_head=4, n_embd=96, dropout=0.0, crops="shuffled",
        init="fan_in", batch_size=8, gradient_accumulation_steps=1, max_iters=240, eval_interval=20,
        eval_windows=64, learning_rate=3e-3, min_lr=0.0,
        warmup_iters=20, warmup_start_factor=0.02, beta2=0.99, eps=1e-8, grad_clip=1.0,
    ),
}
# `tuned` in larger steps, for a GPU. Its length is max_epochs, whatever max_iters says.
PRESETS["full"] = PRESETS["tuned"] | dict(batch_size=64, max_epochs=1.0)


def preset_settings(preset: str) -> dict[str, Any]:
    """What a preset lists. UserError if there is no such preset, or it sets what is no setting."""
    if preset not in PRESETS:
        asked = "DEFAULT_PRESET in config.py" if preset == DEFAULT_PRESET else "preset"
        raise UserError(f"{asked} {preset!r} is not known{nearest(preset, PRESETS)}: "
                        f"there are {', '.join(PRESETS)}")
    if not isinstance(PRESETS[preset], dict):
        raise UserError(f"config.py: the preset {preset!r} must be a dict")
    known = {field.name for field in dataclasses.fields(Config)} - {"preset"}
    unknown = [name for name in PRESETS[preset] if name not in known]
    if unknown:
        raise UserError(f"config.py: the preset {preset!r} sets {unknown[0]!r}, which is no "
                        f"setting{nearest(unknown[0], known)}")
    return PRESETS[preset]


SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")  # of the texts that can be prepared


def default_data_dir(dataset: str) -> str:
    """data/<name of the dataset>: TinyStories for roneneldan/TinyStories, train for a/train.txt."""
    name = Path(dataset).name
    for endings in ((".gz",), SUFFIXES):
        if Path(name).suffix.lower() in endings:
            name = Path(name).stem
    return f"data/{name.strip('.') or Path(dataset).resolve().name or 'dataset'}"


# -------------------------------------------------------------------------- Values and their flags


def kind_of(field: dataclasses.Field) -> type:
    """int for a field of type int, and for one of type int | None. UserError for another type."""
    kind = (get_args(field.type) or (field.type,))[0]
    if kind not in (int, float, bool, str):
        raise UserError(f"config.py: the type of {field.name} must be int, float, bool or str")
    return kind


def limits_of(field: dataclasses.Field) -> dict[str, Any]:
    """A field's limits for `checked`. A field without `setting(...)` may hold any text."""
    return field.metadata.get("limits", {"any_text": True})


def checked(name: str, value: Any, kind: type, low: float | None = None,
            high: float | None = None, choices: Iterable[str] = (), any_text: bool = False) -> Any:
    """The value. A text without `choices` is taken for a path, whose ~ is expanded; only
    `any_text` may be empty.

    UserError if it has another type than `kind`, is below low or above high, or no choice.
    """
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and high is None:
        high = 2**31 - 1
    if type(value) is not kind:
        wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise UserError(f"{name} {value!r:.60} must be {wanted}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} {value} must be a finite number")
    if low is not None and value < low:
        raise UserError(f"{name} {value} must be {low} or more")
    if high is not None and value > high:
        raise UserError(f"{name} {value} must be {high} or less")
    if choices and value not in choices:
        guess = nearest(value, choices)
        raise UserError(f"{name} {value!r} must be one of {', '.join(choices)}{guess}")
    if kind is not str or choices:
        return value
    if not any_text and not value.strip() or "\0" in value:
        raise UserError(f"{name} {value!r} must be a path or a name")
    return os.path.expanduser(value)


def from_text(text: str, kind: type) -> Any:
    """The text as a value of this kind (1e4 is an int too), or the text itself if it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    with contextlib.suppress(ValueError):
        return kind(text)
    with contextlib.suppress(ValueError):
        if kind is int and float(text).is_integer():
            return int(float(text))
    return text


def add_flag(parser: Any, name: str, kind: type, default: Any, help: str, **limits: Any) -> Any:
    """Adds `--name VALUE` to a parser or group; `checked` has the limits. Returns the action."""
    choices = limits.get("choices", ())

    def parse(text: str) -> Any:
        text = text.lower() if text.lower() in choices else text  # --compile False
        return checked(f"--{name}", from_text(text, kind), kind, **limits)

    metavar = {int: "N", float: "X", bool: "{true,false}", str: name.upper()}[kind]
    if choices:
        metavar = "{" + ",".join(choices) + "}"
    if default is not None:
        text = f"{default:g}" if kind is float else str(default)
        help += f" (default: {text.lower() if kind is bool else text})"
    help = help.replace("%", "%%")
    return parser.add_argument(f"--{name}", type=parse, default=default, metavar=metavar, help=help)


def add_config_flags(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Adds a flag for every setting; the parsed arguments hold only those that were typed.

    --help shows the defaults of the preset that argv names. UserError if that one is impossible.
    """
    chooser = Parser("", add_help=False)
    chooser.add_argument("--preset", default=DEFAULT_PRESET)
    preset = chooser.parse_known_args(argv)[0].preset
    Config.from_preset(preset)
    group: Any = parser
    for field in dataclasses.fields(Config):
        help, limits = field.metadata.get("help", ""), limits_of(field)
        default = PRESETS[preset].get(field.name, field.default)
        if field.name == "preset":
            default, limits = preset, {"choices": tuple(PRESETS)}
        if field.metadata.get("group"):
            group = parser.add_argument_group(field.metadata["group"])
        if help is not None:
            action = add_flag(group, field.name, kind_of(field), default, help, **limits)
            action.default = argparse.SUPPRESS


# What people type who know other programs.
ALIASES = dict(
    lr="learning_rate", epochs="max_epochs", num_epochs="max_epochs", steps="max_iters",
    max_steps="max_iters", batch="batch_size", ctx="block_size", seq_len="block_size",
    wd="weight_decay", grad_accum="gradient_accumulation_steps", data="data_dir",
    output_dir="out_dir", wandb="tensorboard", model="checkpoint", n="num_samples",
    length="max_new_tokens", eval_iters="eval_windows", wandb_log="tensorboard",
)
# Flags of one script that people type behind another.
FLAG_OF = dict(
    val_fraction="prepare_data.py", val_dataset="prepare_data.py", separator="prepare_data.py",
    prompt="sample.py", temperature="sample.py", top_k="sample.py", learning_rate="train.py",
    checkpoint="sample.py: train.py has --init_from",
)


def nearest(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the known word that looks most like `word`; '' if none is close."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f", did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, one-line errors, and a guess at what was meant."""

    def __init__(self, description: str, **options: Any):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        # A flag's value may be any negative number, as -1e-4: `checked` refuses it if need be.
        self._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> None:
        message = message.removeprefix("argument ")
        if message.endswith(": expected one argument"):
            flag = message.partition(":")[0]
            message += f" (one that begins with - is written behind a =, as in {flag}=-X)"
        raise UserError(message)

    def parse_args(self, argv: list[str]) -> argparse.Namespace:  # type: ignore[override]
        args, unknown = self.parse_known_args(argv)
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"{unknown[0]!r} belongs to no flag: a value stands behind its flag")
        if unknown:
            flag = unknown[0].split("=")[0]
            name = flag.lstrip("-").replace("-", "_")
            known = [option.removeprefix("--") for option in self._option_string_actions]
            name = ALIASES.get(name, name)
            guess = nearest(name, known).replace("mean ", "mean --")
            if name not in known and name in FLAG_OF:
                guess = f", which is a flag of {FLAG_OF[name]}"
            raise UserError(f"unknown flag {flag}{guess} (--help lists them all)")
        return args


# ------------------------------------------------------------------------- Errors, notices, files

# PyTorch's threads spin while they wait for each other, which starves them beside another job.
# GNU's OpenMP reads this when torch is imported. sample.py's threads spin on, since that makes its
# small products a tenth faster.
if not sys.argv[0].endswith("sample.py"):
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


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
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        line = ("out of memory: halve --device_batch_size (the result stays the same), "
                "--num_samples, --num_threads or the model, whichever there is")
    if is_silent():
        # Usually local rank 0 prints the same error, and torchrun ends this process. Otherwise:
        time.sleep(5)
        line = f"rank {os.environ.get('RANK')}: {line}"
    print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
    sys.exit(2)


class Lossy:
    """A stream that may close, as a terminal does: what is written then is lost, with no error."""

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


def is_out_of_memory(problem: Exception) -> bool:
    """Whether memory is what was lacking: PyTorch raises RuntimeErrors then, on a GPU or not."""
    words = "out of memory|allocate memory|not enough memory|ALLOC_FAILED"  # the last is cuBLAS's
    return isinstance(problem, MemoryError) or bool(re.search(words, str(problem)))


def is_silent() -> bool:
    """Whether torchrun started this process beside local rank 0, which prints for its machine."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def notice(line: str) -> None:
    """A line for the person at the terminal: stderr, so that stdout holds results only."""
    if "\n    " not in line:  # a command is indented, and copied whole
        line = "".join(wrapped([line], sys.stderr))
    if not is_silent():
        print(line, file=sys.stderr, flush=True)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def wrapped(pieces: Iterable[str], stream: Any) -> Iterator[str]:
    """The pieces of a text as they come, for `stream`: a terminal gets line ends between words,
    where the next word would not fit; a file or a pipe gets the text unchanged.
    """
    if not stream.isatty():
        yield from pieces
        return
    width, column, rest = shutil.get_terminal_size().columns - 1, 0, ""
    for piece in itertools.chain(pieces, [" "]):
        # Each word has its white space before it. The last one may go on in the next piece.
        *words, rest = re.split(r"(?=\s)", rest + piece)
        for word in words:
            if word.startswith(" ") and column + len(word) > width:
                word = "\n" + word[1:]
            column = len(word) - 1 if word.startswith("\n") else column + len(word)
            yield word


def path_end(path: str) -> str:
    """The last two parts of a path or a Hub name, which are enough to tell people which it is."""
    return "/".join(Path(path).parts[-2:])


def lock_folder(folder: Path) -> int | None:
    """A descriptor that holds `folder` for this process until it is closed; None if it is taken.
    Also deletes unfinished files that a killed process left in the folder.
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
    for partial in folder.glob(".*." + "[0-9a-f]" * 8 + ".partial"):
        partial.unlink()
    return handle


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it to `path` once it is on the disk, so
    that `path` is always whole.
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
