"""The command: options to a request, progress and report to the terminal, errors to exit codes.

click alone is imported here; the rest when a command runs, so that --help answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from qconvert import __version__
from qconvert.errors import QConvertError
from qconvert.options import Sectioned, conversion_options, report_options

if TYPE_CHECKING:
    from qconvert.conversion import Result
    from qconvert.emit import Plan
    from qconvert.report import Report

INTERRUPTED = 130
ABOUT = ("json_file", "html_file", "quiet", "verbose")  # of the command, not of a conversion


class DefaultGroup(click.Group):
    """`qconvert MODEL --to gguf` means `qconvert convert MODEL --to gguf`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [a for a in args if not a.startswith("-")]
        if (
            args
            and not (words and words[0] in self.commands and args[0] == words[0])
            and args[0] not in ("--version", "--help", "-h")
        ):
            args = ["convert", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="qconvert %(version)s")
def cli() -> None:
    """Convert a Hugging Face checkpoint and its adapters into a quantized file that its runtime has proven.

    \b
    qconvert MODEL[+ADAPTER[:WEIGHT]]... --to gguf --bits 4     convert (the default command); or --to onnx
    qconvert inspect FILE                                       what is in a file or folder
    qconvert verify FILE --against MODEL[+ADAPTER]              prove a file that exists
    qconvert verify FILE                                        what is wrong with it by itself

    All options of the conversion: qconvert convert --help
    """


@cli.command(cls=Sectioned)
@click.argument("model", required=False)
@conversion_options
@report_options
def convert(
    model: str | None, listing: str | None, recipe: Path | None, save_config: Path | None, **options: Any
) -> None:
    """Convert MODEL: a folder, a .gguf, or org/name[@revision] in the local Hugging Face cache.

    MODEL+ADAPTER[:WEIGHT] adds adapters, as -a does.
    """
    if listing:
        from qconvert.listing import lines

        click.echo("\n".join(lines(listing)))
        return
    from qconvert.recipe import asked

    source = click.get_current_context().get_parameter_source
    said = {k: v for k, v in options.items() if source(k) is not ParameterSource.DEFAULT}
    runs = asked(recipe, options, said if model is None else {"model": model, **said})
    if any("model" not in each for each in runs):
        raise click.UsageError("Missing argument 'MODEL'.")
    run_convert(runs, save_config)


def run_convert(runs: Sequence[dict[str, Any]], save_config: Path | None) -> None:
    from qconvert.conversion import convert as run
    from qconvert.conversion import request_of
    from qconvert.printing import plan_text, report_text
    from qconvert.recipe import recipe_text

    about = [{key: options.pop(key) for key in ABOUT} for options in runs]
    json_file, html_file, quiet, verbose = (about[0][key] for key in ABOUT)
    if html_file is not None and len(runs) > 1:
        raise click.UsageError(f"--html {html_file}: one page is of one output, and there are {len(runs)}.")
    set_up_log(quiet, verbose)
    if save_config is not None:
        save_config.write_text(recipe_text(tuple(request_of(**options) for options in runs)), encoding="utf-8")
    reports = []
    for options in runs:
        result: Result = run(**options, progress=lambda plan: bar(plan, quiet))
        dry_run = options["dry_run"]
        if json_file != "-":
            click.echo(plan_text(result) if dry_run else "\n".join(map(str, result.outputs)))
        if not quiet and not dry_run:
            click.echo(report_text(result.report), err=True)
        reports.append(result.report)
    if len(reports) == 1:
        write_report(reports[0], json_file, html_file)
    else:
        dump([report.data() for report in reports], json_file)


@cli.command()
@click.argument("file")
@click.option("--ir", is_flag=True, help="Print the graph of a checkpoint folder (and adapters: MODEL+ADAPTER).")
@click.option("--json", "json_file", metavar="FILE", help="Write the facts as JSON; - for standard output.")
def inspect(file: str, ir: bool, json_file: str | None) -> None:
    """What is in a GGUF, an ONNX, a safetensors file or a folder of such: tensors, types, true bits per weight."""
    from qconvert.inspection import graph_text, inspect_file, inspection_text

    if ir:
        click.echo(graph_text(file), nl=False)
        return
    facts = inspect_file(file)
    if json_file != "-":
        click.echo(inspection_text(facts))
    dump(facts, json_file)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL[+ADAPTER[:WEIGHT]]...", help="What it was made from.")
@click.option("-a", "--adapter", "adapters", multiple=True, metavar="PATH[:WEIGHT]")
@report_options
def verify(
    file: Path,
    against: str | None,
    adapters: tuple[str, ...],
    json_file: str | None,
    html_file: str | None,
    quiet: bool,
    verbose: bool,
    threads: int | None,
) -> None:
    """Prove a GGUF or an ONNX folder that exists, whoever made it, against the model and adapters it came from.

    Without --against: look it over by itself, for NaN, wrong labels, stop tokens, keys that contradict each other; and
    where --certify put a certificate into it, prove it by that.
    """
    from qconvert.printing import report_text
    from qconvert.verification import verify_file

    set_up_log(quiet, verbose)
    if against is None:
        if adapters:
            raise click.UsageError("-a needs --against MODEL")
        look_over(file, json_file, quiet, threads)
    report = verify_file(file, against, adapters, threads)
    if not quiet:
        click.echo(report_text(report), err=json_file == "-")
    write_report(report, json_file, html_file)
    sys.exit(report.exit)


def look_over(file: Path, json_file: str | None, quiet: bool, threads: int | None) -> NoReturn:
    from qconvert.certifying import certificate_report
    from qconvert.doctor import diagnose, diagnosis_text
    from qconvert.printing import report_text

    found, report = diagnose(file), certificate_report(file, threads)
    code = max(found.exit, report.exit if report else 0)
    if not quiet or code:
        click.echo(diagnosis_text(found), err=json_file == "-")
        if report:
            click.echo(report_text(report), err=json_file == "-")
    dump({**found.data(), **({"certificate": report.data()} if report else {}), "exit": code}, json_file)
    sys.exit(code)


def set_up_log(quiet: bool, verbose: bool) -> None:
    log = logging.getLogger("qconvert")
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def bar(plan: Plan, quiet: bool) -> Callable[[int], None]:
    """A progress callback: one line that moves on a terminal, one line at the end elsewhere."""
    from threading import Lock

    total = sum(e.nbytes for e in plan.entries)
    name, start, lock = (plan.folder or plan.files[0].path).name, time.monotonic(), Lock()
    done = drawn = 0.0
    terminal = sys.stderr.isatty()

    def progress(nbytes: int) -> None:
        nonlocal done, drawn
        with lock:
            done += nbytes
            now = time.monotonic()
            if quiet or (done < total and (not terminal or now - drawn < 0.1)):
                return
            drawn, seconds = now, max(now - start, 1e-6)
            rate = done / seconds
            left = f"   {(total - done) / rate:4.0f} s left" if done < total else ""
            amount = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB  {rate / 1e6:.0f} MB/s"
            line = f"write {name}  {100 * done / total:3.0f} %  {amount}  {seconds:.1f} s{left}"
            click.echo(f"\r\033[K{line}" if terminal else line, err=True, nl=not terminal or done >= total)

    return progress


def write_report(report: Report, json_file: str | None, html_file: str | None) -> None:
    dump(report.data(), json_file)
    if html_file is not None:
        from qconvert.html_report import html_page

        Path(html_file).write_text(html_page(report), encoding="utf-8")


def dump(facts: dict[str, Any] | list[Any], file: str | None) -> None:
    if file is None:
        return
    text = json.dumps(facts, indent=2, ensure_ascii=False, default=str)
    if file == "-":
        click.echo(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def fail(error: QConvertError, args: list[str]) -> int:
    """Say what went wrong on stderr; what is known goes where --json says."""
    report: Any = error.report
    facts = {"outputs": [], "verified": False} if report is None else report.data()
    if report is not None:
        from qconvert.printing import report_text

        click.echo(report_text(report), err=True)
        if page := value_of("--html", args):
            write_report(report, None, page)
    if target := value_of("--json", args):
        dump({**facts, "exit": error.exit_code, "error": error.message, "hint": error.hint}, target)
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    return error.exit_code


def value_of(flag: str, args: list[str]) -> str | None:
    """What a flag was given, also where no command got to read it."""
    for i, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
    return None


def main() -> None:
    args = sys.argv[1:]
    try:
        cli.main(args=args or ["--help"], prog_name="qconvert", standalone_mode=False)
    except QConvertError as e:
        sys.exit(fail(e, args))
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("\ninterrupted", err=True)
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # an interpreter that was interrupted within an extension would end by the signal instead
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as e:
        if "-v" in args or "--verbose" in args:
            raise
        click.echo(f"error: a bug in qconvert: {type(e).__name__}: {e}", err=True)
        click.echo("hint: run again with -v for the traceback, and report it", err=True)
        sys.exit(1)
