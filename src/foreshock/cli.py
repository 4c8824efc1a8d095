"""The command line. Every error of foreshock's own is one line and exit code 2; torch is imported only by what needs it."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated

import typer

from foreshock.errors import ForeshockError
from foreshock.printing import print_alarms, print_comparison, print_coverage, print_json, print_table

EXIT_CODES = (
    "Exit codes: 0 all went well; 1 something was found (doctor: a problem, scan: weights that are not finite, "
    "demo: a fault that was not heard); 2 a mistake in the command, the settings or the files; "
    "130 Ctrl-C. run and sites SCRIPT end with the script's own."
)
app = typer.Typer(
    help="Early warning for large-model training.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# torchrun takes --run for an abbreviation of one of its own, wherever it stands.
RunOption = Annotated[
    str | None, typer.Option("--run", "--run-dir", metavar="DIR", help="Keep the run in this folder.")
]
EveryOption = Annotated[int | None, typer.Option("--every", min=1, metavar="N", help="Sample one step in N.")]
ModuleOption = Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as for python -m.")]
EagerOption = Annotated[
    str | None,
    typer.Option(
        "--compile-eager",
        metavar="CLASS|auto",
        help="Compile what the script leaves eager as well: each module of a class, or the outermost module that is trained.",
    ),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Turn any failure inside foreshock into an error.")]
Script = Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python script.")]
ScriptArgs = Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Handed to the script.")]


class _Interrupted(BaseException):
    """The script ended by a KeyboardInterrupt, which is printed already."""


def main() -> None:
    """Entry point of the ``foreshock`` command."""
    try:
        app()
    except _Interrupted:
        sys.excepthook = lambda *_: None
        raise KeyboardInterrupt from None  # Python then ends by the signal, as it would for the script alone
    except ForeshockError as error:
        print("foreshock:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def _version(wanted: bool) -> None:
    if wanted:
        print("foreshock", installed("foreshock"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Script,
    args: ScriptArgs = None,
    module: ModuleOption = False,
    compile_eager: EagerOption = None,
    run: RunOption = None,
    every: EveryOption = None,
    strict: StrictOption = False,
) -> None:
    """Run SCRIPT with its own arguments; whatever it compiles is watched."""
    from foreshock.run import launch, speaks

    outcome = launch(
        script, args or [], module=module, compile_eager=compile_eager, run=run, every=every, strict=strict, last=True
    )
    for line in outcome.summary() if speaks(outcome) else ():
        print("foreshock:", line, file=sys.stderr)
    if outcome.interrupted:
        raise _Interrupted
    raise typer.Exit(outcome.code)


@app.command()
def sites(
    target: Annotated[
        str, typer.Argument(metavar="SCRIPT|MODEL", help="A script, package.module:callable, or config.json.")
    ],
    args: ScriptArgs = None,
    module: ModuleOption = False,
    compile_eager: EagerOption = None,
    every: Annotated[bool, typer.Option("--all", help="A row for each layer, also where they are alike.")] = False,
    draw: Annotated[Path | None, typer.Option("--draw", metavar="DIR", help="Draw each form of site into DIR.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what would be watched, what is left out, and why.

    A SCRIPT is run, with its arguments after --. A MODEL is captured, not trained: package.module:callable, where callable()
    returns (module, args, kwargs), or a Hugging Face config.json or the folder of one, built without weights.

    The exit code is the script's own, 0 for a model, 2 for a mistake in the command.
    """
    from foreshock.drawing import Drawings
    from foreshock.models import is_model, survey
    from foreshock.progress import spinner
    from foreshock.records import Coverage
    from foreshock.run import launch
    from foreshock.watch import NEVER_TRAINED

    drawings = Drawings()
    prepare = drawings.watch if draw is not None else lambda watch: None
    code = 0
    with redirect_stdout(sys.stderr):  # what the script prints must not stand in the table
        if is_model(target) and not module:
            with spinner(f"capturing {target}"):
                coverage = survey(target, args or [], prepare)
        else:
            outcome = launch(target, args or [], module=module, compile_eager=compile_eager, prepare=prepare)
            nothing = Coverage(warnings=(outcome.summary()[0],))
            coverage, code = outcome.watch.coverage if outcome.watch is not None else nothing, outcome.code
            coverage = coverage.without(
                NEVER_TRAINED
            )  # a script of a step or two: whether one was sampled says nothing
    if as_json:
        print_json(coverage.to_json())
    else:
        print_coverage(coverage, every)
    if draw is not None:
        for path in drawings.write(draw):
            print("drawn:", path, file=sys.stderr)
    raise typer.Exit(code)


@app.command()
def report(
    run: RunFolder, output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE")] = None
) -> None:
    """Write one self-contained HTML page about RUN."""
    from foreshock.monitors.report import write_report
    from foreshock.progress import spinner
    from foreshock.reader import open_run

    with open_run(run) as opened:
        with spinner(f"drawing {run}"):
            written = write_report(opened, output or opened.path.with_name("report.html"))
        print(written)


@app.command()
def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="Print the view once and end.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Serve the report, and what changes in it, on 127.0.0.1.")] = False,
    port: Annotated[int | None, typer.Option(metavar="N", help="For --web; 0 takes any.", min=0, max=65535)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: print JSON.")] = False,
) -> None:
    """Follow RUN while it is written: verdict, alarms, what stands nearest to its limit, cost. q or Ctrl-C ends it.

    Only the run folder is read, so this may start, end or fail without the training ever noticing.
    """
    if as_json and (web or not once):
        raise typer.BadParameter("it goes with --once", param_hint="--json")
    if web:
        from foreshock.serve import PORT, serve

        raise typer.Exit(serve(run, PORT if port is None else port))
    if port is not None:
        raise typer.BadParameter("it goes with --web", param_hint="--port")
    if as_json:
        from foreshock.following import Following
        from foreshock.live_view import snapshot

        print_json(Following(run).look(snapshot).to_json())
        return
    from foreshock.live import watch

    raise typer.Exit(watch(run, once=once))


@app.command()
def alarms(run: RunFolder, as_json: AsJson = False) -> None:
    """Print the alarms of RUN."""
    from foreshock.reader import open_run

    with open_run(run) as opened:
        found = opened.alarms
    if as_json:
        print_json([alarm.to_json() for alarm in found])
        return
    print_alarms(found)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="HEALTHY... RUN", help="Run folders: references, then the run.")],
    align: Annotated[str, typer.Option(metavar="step|tokens", help="What makes two samples the same place.")] = "step",
    every: Annotated[bool, typer.Option("--all", help="Every series outside the band, not only the first 25.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say since when, where and how far RUN, the last one named, differs from HEALTHY references."""
    from foreshock.monitors.compare import compare as compared
    from foreshock.progress import spinner
    from foreshock.reader import open_run
    from foreshock.rejudge import rejudge

    if len(runs) < 2:
        raise typer.BadParameter(
            f"got one run, {runs[0]}: name the healthy references before it", param_hint="HEALTHY... RUN"
        )
    with ExitStack() as stack:
        *others, opened = [stack.enter_context(open_run(path)) for path in runs]
        now = stack.enter_context(spinner(f"comparing {runs[-1]}"))
        comparison = compared(opened, others, align=align)
        now(f"judging {runs[-1]} again")
        alarms = rejudge(opened, baseline=others, align=align)
    if as_json:
        print_json(comparison.to_json() | {"alarms": [alarm.to_json() for alarm in alarms]})
    else:
        print_comparison(comparison, alarms, None if every else 25)


@app.command()
def metrics(as_json: AsJson = False) -> None:
    """Print every metric: its formula, what it runs over, how it merges, its cost and what a move of it means."""
    from foreshock.monitors.metrics import COSTS, METRICS

    if as_json:
        print_json([asdict(metric) for metric in METRICS])
        return
    columns = ("name", "formula", "unit", "axis", "merge", "cost", "source", "meaning")
    print_table(columns, [[str(getattr(metric, column)) for column in columns] for metric in METRICS])
    for cost, said in COSTS.items():
        print(f"{cost}: {said}")


@app.command()
def export(
    run: RunFolder,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="*.parquet, *.csv or *.jsonl.")],
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", metavar="GLOB", help="Only these metrics; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the series of RUN as one long table: step, metric, site, index, value."""
    from foreshock.export import export as exported
    from foreshock.progress import bar
    from foreshock.reader import open_run

    with open_run(run) as opened, bar("series") as progress:
        rows = exported(opened, output, metrics=metrics or ("*",), progress=progress)
    if as_json:
        print_json({"file": str(output), "rows": rows})
    else:
        print(f"{output}: {rows:,} rows")


@app.command()
def scan(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...", help="Files or folders: safetensors, torch.save or DCP; in their order."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="config.json or package.module:callable; else the config beside CHECKPOINT."
        ),
    ] = None,
    args: Annotated[
        list[str] | None, typer.Option("--arg", help="Handed to MODEL's callable; may be repeated.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Only keys that begin with it: one of several models.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Every head, not only the first 25.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what the weights in saved CHECKPOINTs show, and what moved between one and the next; nothing is trained.

    The exit code is 1 where weights are not finite.
    """
    from foreshock.progress import bar
    from foreshock.scan_tables import shown, told
    from foreshock.scanning import scan as scanned

    with redirect_stdout(sys.stderr), bar("sites") as progress:
        found = scanned(checkpoints, model, args=args or (), prefix=prefix, progress=progress)
    if as_json:
        print_json(found.to_json())
    for table in () if as_json else shown(found, None if every else 25):
        print(f"{table.title}:")
        print_table(table.columns, table.rows)
        print(f"and {table.of - len(table.rows)} more: --all\n" if table.of > len(table.rows) else "")
    for line in () if as_json else told(found):
        print(line)
    raise typer.Exit(1 if any(one.not_finite for one in found.checkpoints) else 0)


@app.command()
def doctor(
    compiles: Annotated[bool, typer.Option("--compile/--no-compile", help="Whether to compile a tiny model.")] = True,
    as_json: AsJson = False,
) -> None:
    """Look at versions, registration, compile caches and devices, and whether this machine compiles.

    The exit code is 1 where there is a problem.
    """
    from foreshock.doctor import examine
    from foreshock.progress import spinner

    with spinner("looking") as now:
        checks = list(examine(compiles=compiles, begin=now))
    if as_json:
        print_json([check.to_json() for check in checks])
    else:
        print_table(("", "what", "found", "what to do"), [[c.state, c.name, c.found, c.advice] for c in checks])
    raise typer.Exit(1 if any(check.state == "problem" for check in checks) else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the runs go.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two instead of several.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the model and the batches.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small mixture-of-experts model, break it on purpose, and show the alarms and their lead."""
    from foreshock.demo.driver import SEED, run_demo

    raise typer.Exit(run_demo(out, quick, SEED if seed is None else seed, as_json))
