"""What can go wrong, and the exit code of each.

QConvertError                 1
├── Bug                       1  in qconvert, where nothing below fits
├── UsageError                2  wrong flags or arguments
├── InputError                3  the input is wrong: missing or corrupt file, NaN, unconsumed config key
│   └── AdapterError          3  an adapter does not fit the model or its own configuration
│       ├── UnusedAdapterKey  3  a tensor of it matches no weight
│       └── MissingAdapterKey 3  a module that it names has no tensor
├── ResourceError             4  not enough disk or memory, found before the first byte
├── UnsupportedError          5  architecture, type or combination, with the nearest thing that is
│   └── MissingDependency     5  an optional package is not installed
├── VerificationError         6  the file is not what it should be; names stage and tensor
├── GateError                 7  a quality gate failed
├── NotVerifiedError          8  not verified where --require-verified asked for it
├── Interrupted             130  by Ctrl-C; what was done can be resumed
├── GraphError                1  a pass left an invalid graph
└── OutputsError                 of several outputs some were not made: the code of the first of these
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import NamedTuple


class Place(NamedTuple):
    """Where a mistake is: a file; a line of it, from 1; a key or a tensor in it."""

    file: str
    line: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    @classmethod
    def parse(cls, text: str) -> Place | None:
        """Of FILE:LINE; None for all else."""
        file, _, line = text.rpartition(":")
        return cls(file, int(line)) if file and line.isdecimal() else None


class QConvertError(Exception):
    """A failure to tell the user about: what was found and wanted, where, and (hint) what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, place: Place | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.place = place
        self.output: int | None = None  # of several, the one that it is of
        self.report: object = None  # what was found until then, where there is a report

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class Bug(QConvertError):
    pass


class UsageError(QConvertError):
    exit_code = 2


class InputError(QConvertError):
    exit_code = 3


class AdapterError(InputError):
    pass


class UnusedAdapterKey(AdapterError):
    pass


class MissingAdapterKey(AdapterError):
    pass


class ResourceError(QConvertError):
    exit_code = 4


class UnsupportedError(QConvertError):
    exit_code = 5


class MissingDependency(UnsupportedError):
    pass


class VerificationError(QConvertError):
    exit_code = 6


class GateError(QConvertError):
    exit_code = 7


class NotVerifiedError(QConvertError):
    exit_code = 8


class Interrupted(QConvertError):
    exit_code = 130


class GraphError(QConvertError):
    pass


class OutputsError(QConvertError):
    """Of several outputs some were not made. results: of all, in the order of the requests (conversion.Result)."""

    def __init__(self, message: str, exit_code: int, results: Sequence[object]) -> None:
        super().__init__(message, hint="the others have their files")
        self.exit_code = exit_code
        self.results = results


# what Python raises where nested data has other types, keys or lengths than were counted on
MISSHAPEN = (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError, ZeroDivisionError)


@contextmanager
def located(place: Place) -> Iterator[None]:
    """Errors from within lie there, where they do not know better."""
    try:
        yield
    except QConvertError as e:
        e.place = e.place or place
        raise


@contextmanager
def of_output(*of: int) -> Iterator[None]:
    """Errors from within are of these outputs: of the one that they name by its index in `of`, else of the first."""
    try:
        yield
    except QConvertError as e:
        e.output = of[e.output or 0]
        raise


@contextmanager
def misshapen(what: str, hint: str = "the file is damaged, or not what its name says") -> Iterator[None]:
    """Around the reading of nested data that somebody else wrote: where it is not built as its format says, an InputError."""
    try:
        yield
    except MISSHAPEN as e:
        raise InputError(f"{what} is not built as its format says ({type(e).__name__}: {str(e)[:200]})", hint=hint) from e


def require(module: str, for_: str, install: str | None = None) -> ModuleType:
    """Import an optional module, or say which feature wants it and how to install it."""
    try:
        with uninterrupted():
            return import_module(module)
    except ImportError as e:
        package = install or module.partition(".")[0]
        raise MissingDependency(f"{for_} needs {module} ({e})", hint=f"pip install {package}") from e


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the body is done: torch and its like abort when it strikes while they are imported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    struck: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: struck.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if struck:
        raise KeyboardInterrupt
