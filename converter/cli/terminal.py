"""What comes on the terminal besides tables: messages, progress, and a failure as one sentence."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from converter.errors import ConverterError
from converter.progress import SILENT, Progress

__all__ = [
    "DEBUG",
    "INTERNAL",
    "INTERRUPTED",
    "libraries_quiet",
    "one_sentence",
    "progress_of",
    "say",
]


DEBUG = "TWOFOLD_DEBUG"
"""Environment variable that shows tracebacks and the warnings of libraries."""

INTERNAL = 5
"""Exit code of what nobody expected."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Keep what libraries say about themselves off the terminal."""
    if os.environ.get(DEBUG):
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn whatever goes wrong into one sentence and an exit code."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has gone; typer ends the program quietly
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        say("interrupted; no file was left half-written")
        raise typer.Exit(INTERRUPTED) from None
    except ConverterError as error:
        _debug()
        say(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    except Exception as error:  # noqa: BLE001  # the last line of defence against a traceback
        _debug()
        if _out_of_memory(error):
            say("error: there is not enough memory; free some, or lower --memory and --patches")
        else:
            say(
                f"error: internal error, {type(error).__name__}: {error}; "
                f"set {DEBUG}=1 to see the traceback, and please report it"
            )
        raise typer.Exit(INTERNAL) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether memory is what is lacking; torch and onnxruntime say so in words of their own."""
    words = ("can't allocate memory", "Failed to allocate memory", "bad_alloc", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _debug() -> None:
    """Show the traceback of the exception in hand, where that is asked for."""
    if os.environ.get(DEBUG):
        import traceback

        traceback.print_exc()


def say(text: str) -> None:
    """Print a message on standard error."""
    from converter.report.console.output import print_message

    print_message(text)


def progress_of(*, quiet: bool) -> Progress:
    """Give what shows progress on standard error, or nothing where it is to be quiet."""
    if quiet:
        return SILENT
    from converter.report.console.output import output_console
    from converter.report.console.progress import ConsoleProgress

    return ConsoleProgress(output_console(stderr=True))
