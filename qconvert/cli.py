"""The command: options to a request, progress and report to the terminal, errors to exit codes.

click alone is imported here; the rest when a command runs, so that --help answers at once.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from qconvert import __version__
from qconvert.errors import Bug, Interrupted, OutputsError, Place, QConvertError, UsageError
from qconvert.options import Sectioned, conversion_options, report_options
from qconvert.reports import Asked, Run, json_text, put

if TYPE_CHECKING:
    from qconvert.emit import Plan
    from qconvert.request import Request

BUG = "run again with -v for the traceback, and report it"
ABOUT = ("quiet", "verbose")  # of the command, not of a conversion


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
        ctx.obj = ctx.obj or Run(args)
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
@click.pass_obj
def convert(
    run: Run, /, model: str | None, listing: str | None, recipe: Path | None, save_config: Path | None, **options: Any
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
    run_convert(run, runs, save_config)


def run_convert(run: Run, runs: Sequence[dict[str, Any]], save_config: Path | None) -> None:
    from qconvert.conversion import Result, convert_all, request_of
    from qconvert.manifest import apart
    from qconvert.printing import plan_text, report_text
    from qconvert.recipe import recipe_text

    quiet, verbose = [{options.pop(key) for options in runs}.pop() for key in ABOUT]
    set_up_log(quiet, verbose)
    requests = [request_of(**options) for options in runs]
    run.begin(*map(asked_for, requests), baseline=requests[0].baseline)
    if save_config is not None:
        save_config.write_text(recipe_text(tuple(requests)), encoding="utf-8")
    manifests = apart([r.manifest or path for r, path in zip(requests, run.manifests(), strict=True)])
    requests = [replace(r, manifest=path) for r, path in zip(requests, manifests, strict=True)]
    stopped, results = None, list[Result]()
    try:
        results += convert_all(requests, lambda plan: bar(plan, quiet))
    except OutputsError as e:
        stopped, results = e, cast("list[Result]", list(e.results))
        if len(results) == 1 and results[0].error:
            raise results[0].error from None
    for request, result in zip(requests, results, strict=True):
        if not run.prints and (request.dry_run or result.outputs):
            click.echo(plan_text(result) if request.dry_run else "\n".join(map(str, result.outputs)))
        if (not quiet and not request.dry_run) or result.error:
            click.echo(report_text(result.report), err=True)
        run.add(result.report.data(), result.error)
    run.write()
    if stopped:
        raise stopped


def asked_for(request: Request) -> Asked:
    """What a report says of an output that is not begun."""
    model = "+".join([request.model, *map(str, (a.path for a in request.adapters))])
    known = {"provenance": {"model": model}, "quant": ":".join(filter(None, (request.to, request.quant)))}
    return Asked(known, Place.parse(request.places.get("to", "")))


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
    if json_file is not None:
        put(json_text(facts), json_file)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL[+ADAPTER[:WEIGHT]]...", help="What it was made from.")
@click.option("-a", "--adapter", "adapters", multiple=True, metavar="PATH[:WEIGHT]")
@report_options
@click.pass_obj
def verify(
    run: Run, file: Path, against: str | None, adapters: tuple[str, ...], quiet: bool, verbose: bool, threads: int | None
) -> None:
    """Prove a GGUF or an ONNX folder that exists, whoever made it, against the model and adapters it came from.

    Without --against: look it over by itself, for NaN, wrong labels, stop tokens, keys that contradict each other; and
    where --certify put a certificate into it, prove it by that.
    """
    from qconvert.certifying import certificate_report
    from qconvert.doctor import diagnose, diagnosis_text
    from qconvert.printing import report_text
    from qconvert.verification import verify_file

    set_up_log(quiet, verbose)
    if against is None and adapters:
        raise click.UsageError("-a needs --against MODEL")
    run.begin(Asked({"path": str(file)}))
    if against is None:
        found, report = diagnose(file), certificate_report(file, threads)
        said = "\n".join([diagnosis_text(found, report is not None), *([report_text(report)] if report else [])])
        proof = report.data() if report else {"exit": 0}
        data = {**proof, **found.data(), "exit": max(found.exit, proof["exit"])}
    else:
        report = verify_file(file, against, adapters, threads)
        said, data = report_text(report), report.data()
    if not quiet or (against is None and data["exit"]):
        click.echo(said, err=run.prints)
    run.add(data)
    run.write()
    sys.exit(data["exit"])


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
    name, start, lock = plan.paths[0].name, time.monotonic(), Lock()
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


def record(run: Run, error: QConvertError) -> None:
    """Put into the reports what is known of a command that failed. No second error hides the first."""
    if not run.targets:
        return
    try:
        run.fail(error)
        run.write()
    except Exception as e:
        click.echo(f"reports: {e if isinstance(e, QConvertError) else repr(e)}", err=True)


def fail(run: Run, error: QConvertError) -> int:
    """Say what went wrong, on stderr and in the reports."""
    report: Any = error.report
    if report is not None:
        from qconvert.printing import report_text

        click.echo(report_text(report), err=True)
    record(run, error)
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    return error.exit_code


def main() -> None:
    gc.set_threshold(50_000, 20, 20)  # hardly anything here is cyclic, and to look for it was a tenth of a short run
    args = sys.argv[1:]
    run = Run(args)
    try:
        cli.main(args=args or ["--help"], prog_name="qconvert", standalone_mode=False, obj=run)
    except QConvertError as e:
        sys.exit(fail(run, e))
    except (click.exceptions.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        click.echo("\ninterrupted", err=True)
        record(run, Interrupted("interrupted", hint="the same command goes on"))
        sys.stdout.flush()
        # an interpreter that was interrupted within an extension would end by the signal instead
        os._exit(Interrupted.exit_code)
    except click.ClickException as e:
        e.show()
        record(run, UsageError(e.format_message()))
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as e:
        bug = Bug(f"a bug in qconvert: {type(e).__name__}: {e}", hint=BUG)
        record(run, bug)
        if "-v" in args or "--verbose" in args:
            raise
        click.echo(f"error: {bug.message}\nhint: {bug.hint}", err=True)
        sys.exit(bug.exit_code)
