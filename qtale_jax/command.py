"""What the entry points share: arguments, help, and errors that are one line.

Nothing here imports JAX, so that `--help` and a refused configuration answer at once. An entry point looks like this:

    def main(argv: Sequence[str] | None = None) -> None:
        config = parse("train", STAGES["train"], argv, dry_run)
        ...

    if __name__ == "__main__":
        run(main)
"""

import argparse
import functools
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import yaml

from qtale_jax.allocator import keep_freed_memory
from qtale_jax.config.help import help_text
from qtale_jax.config.loading import load_config, resolve
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError, disk_error

STAGES = {
    "plan": "say what training and inference take on accelerators, before there are any",
    "convert": "Hugging Face checkpoint to model directory, and back with --to-hf",
    "train": "train a model from nothing, or fine-tune one with adapters and routers",
    "quantize": "store the linears of a model in few bits: RTN, AWQ, GPTQ, MagR",
    "calibrate": "find the threshold that gives an executed ratio, keeps the quality, or meets a speed",
    "evaluate": "measure accuracy, perplexity, executed ratio and cost of a model",
    "generate": "continue prompts",
    "serve": "answer requests over HTTP, in the form of the OpenAI API, many at a time",
    "experiment": "run all stages over methods, quantizers and seeds, then report",
    "report": "write results.json, the Markdown tables, the HTML page and the model card of an experiment",
}
"""The entry points `python -m qtale_jax.<stage>`, in the order of use."""

DRY_RUN = "check the configuration, the input and the output, print what would be done, and write nothing"
"""What `--dry-run` does, for help."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `InputError`s, and whose epilog may be a function that is called only for help."""

    def __init__(self, *args: Any, keys: Callable[[int], str] | None = None, **settings: Any):
        super().__init__(*args, allow_abbrev=False, **settings)
        self._keys = keys

    def error(self, message: str) -> NoReturn:
        """Raises the message instead of printing the usage and exiting."""
        raise InputError(f"command line: {message}; see {self.prog} --help")

    def format_help(self) -> str:
        """Returns usage and arguments, then the configuration keys."""
        text = super().format_help()
        return f"{text}\n{self._keys(shutil.get_terminal_size((140, 24)).columns)}\n" if self._keys else text


def stage_parser(stage: str, description: str) -> Parser:
    """Returns the parser of a stage that is driven by a configuration file."""
    usage = "%(prog)s [-h] [--print-config] [--dry-run] CONFIG [key=value ...]"
    parser = Parser(prog=f"python -m qtale_jax.{stage}", usage=usage, description=description, keys=help_text)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value of the file")
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    return parser


def parse(
    stage: str,
    description: str,
    argv: Sequence[str] | None = None,
    dry_run: Callable[[Config], None] = lambda config: None,
) -> Config:
    """Returns the checked configuration that the command line asks for; serves `--help`, `--print-config`, `--dry-run`.

    Args:
        stage: its name.
        description: of the stage, for help.
        argv: arguments; default: those of the process.
        dry_run: called for `--dry-run`: checks the input and prints what would be done, without writing anything.

    Raises:
        InputError: a wrong argument, file, key, value or combination.
        SystemExit: after `--help`, `--print-config` or `--dry-run`.
    """
    parser = stage_parser(stage, description)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is None:
        parser.error("no CONFIG given")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        yaml.safe_dump(resolve(config), sys.stdout, sort_keys=False, allow_unicode=True)
        raise SystemExit(0)
    if arguments.dry_run:
        dry_run(config)
        raise SystemExit(0)
    return config


@contextmanager
def _plain_messages() -> Iterator[None]:
    """The library's own log messages go to stderr as they are, whatever handlers other libraries have installed."""
    logger, handler = logging.getLogger("qtale_jax"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def _report(usual: Callable[[Any], Any], found: Any) -> None:
    """Reports what a thread or a destructor raised, where no caller can catch it: in one line if the disk is full.

    A write that fails also closes the event loop of others that are under way; what they say then is not news.
    """
    reason = disk_error(found.exc_value) if isinstance(found.exc_value, Exception) else None
    if reason is not None:
        if hasattr(found, "thread"):
            _say(f"warning: {reason}")
    elif not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        usual(found)


def _say(message: str) -> None:
    """Prints to stderr, unless that goes to the disk that is full: the exit code still says what happened."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def run(main: Callable[[], int | None], *, repeats: bool = False) -> NoReturn:
    """Calls `main` and exits with its result, 2 and one line on stderr for an `InputError`, 130 if interrupted.

    With `repeats` it runs the same programs again and again, and memory that they free is kept for the next time.
    """
    if repeats:
        keep_freed_memory()
    # For good: such reports come as late as the interpreter's end.
    sys.unraisablehook = functools.partial(_report, sys.unraisablehook)
    threading.excepthook = functools.partial(_report, threading.excepthook)
    try:
        with _plain_messages():
            code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        _say(f"error: {' '.join(str(error).split())}")
        code = 2
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except BrokenPipeError:  # `... | head` closed the pipe; stop quietly, also when the interpreter flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        # What threads and destructors say now follows from it.
        sys.unraisablehook = threading.excepthook = lambda found: None
        _say(f"error: {reason}; what was complete before is kept")
        code = 2
    raise SystemExit(code)
