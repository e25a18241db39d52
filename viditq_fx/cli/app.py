"""The commands: their options, and what they print."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from viditq_fx.cli.errors import OneLineErrors, user_errors
from viditq_fx.demo.config import (
    DEFAULT_IMAGES,
    DEFAULT_STEPS,
    QUICK_IMAGES,
    QUICK_STEPS,
    DemoConfig,
    parse_schemes,
)

# torch is imported inside the commands: `viditq --help` answers at once.
if TYPE_CHECKING:
    from viditq_fx.inspection import ExplainReport

app = typer.Typer(
    name="viditq",
    cls=OneLineErrors,
    help="Run diffusion transformers quantized through torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"viditq_fx {importlib.metadata.version('viditq_fx')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Options of no command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("viditq-demo"),
    images: Annotated[
        int | None, typer.Option(help=f"Digits to draw with each variant.  [default: {DEFAULT_IMAGES}]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help=f"Sampling steps.  [default: {DEFAULT_STEPS}]")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    schemes: Annotated[
        str | None,
        typer.Option(help="Schemes to compare, e.g. w8a8,w8a7.  [default: those that fit the device]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_IMAGES} images and {QUICK_STEPS} steps.")
    ] = False,
) -> None:
    """Draw digits in full precision and quantized; compare pictures, speed and memory."""
    with user_errors():
        if images is None:
            images = QUICK_IMAGES if quick else DEFAULT_IMAGES
        if steps is None:
            steps = QUICK_STEPS if quick else DEFAULT_STEPS
        config = DemoConfig(
            out=out,
            images=images,
            steps=steps,
            seed=seed,
            schemes=parse_schemes(schemes) if schemes is not None else (),
            device=device,
            command=shlex.join(["viditq", *sys.argv[1:]]),
        )
        _run_demo(config)


def _run_demo(config: DemoConfig) -> None:
    console, bars_console = Console(), Console(stderr=True)
    _quiet_libraries()
    with bars_console.status("importing torch and diffusers ..."):
        from viditq_fx.cli.progress import Bars
        from viditq_fx.cli.tables import demo_table
        from viditq_fx.demo.result import notes
        from viditq_fx.demo.run import run_demo
    with Bars(bars_console) as bars:
        result = run_demo(config, progress=bars)
    console.print(demo_table(result))
    for note in notes(result):
        console.print(f"• {note}", markup=False, highlight=False)
    console.print()
    console.print(f"Done in {result.seconds:.0f} s. Look at:", highlight=False)
    for name, what in (
        ("report.html", "the table, the pictures and every site, explained; open it in a browser"),
        ("grid.png", "the same digits by every variant, and their differences"),
        ("table.json", "all figures, versions and the machine"),
    ):
        console.print(f"  {config.out / name}  {what}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="'digits' (the demo's model), or package.module:function that returns (model, args, kwargs) "
            "or (model, kwargs); with --errors also (model, run) as calibrate takes it."
        ),
    ],
    scheme: Annotated[
        str | None, typer.Option(help="w8a8, w8a7, w4a8, w4a8-g128 or fp8.  [default: w8a8]")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Glob over module paths, or role, to keep in full precision."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="keep or release the memory of full-precision weights once packed.  [default: keep]"
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="auto, int8, int8-fp8, int8-int8 or keep: what becomes of attention.  [default: auto]"
        ),
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(help="auto or always: whether bf16 stays where it is faster on a GPU.  [default: auto]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write to this file (JSON if it ends in .json) instead of the terminal."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with sites and graphs to this file.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of one block to this file.")] = None,
    dot: Annotated[Path | None, typer.Option(help="Write the same block as Graphviz text.")] = None,
    block: Annotated[
        str | None,
        typer.Option(
            help="Block for --svg and --dot, e.g. blocks.0.  [default: of the kind that occurs most often]"
        ),
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="Pass after which to draw it, or 'captured'.  [default: the last]")
    ] = None,
    errors: Annotated[
        bool,
        typer.Option(
            "--errors", help="Run samples in full precision first: where errors come from, by site."
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(help="For 'digits' with --errors: how often ten digits are drawn.  [default: 1]"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help=f"For 'digits' with --errors: sampling steps.  [default: {DEFAULT_STEPS}]"),
    ] = None,
    branches: Annotated[
        int | None,
        typer.Option(help="With --errors: 2 keeps the halves of the batch apart.  [default: 1]"),
    ] = None,
) -> None:
    """Run a model once, quantized, and show what was done at every linear and why."""
    with user_errors():
        from viditq_fx.errors import ViditqError
        from viditq_fx.inspection.files import check_writable, write_text
        from viditq_fx.options import split_options

        given = {"scheme": scheme, "keep": keep, "weights": weights}
        given |= {"attention": attention, "selection": selection}
        options = {name: value for name, value in given.items() if value}
        # What is wrong is told now, before the imports, the model and the compiler.
        split_options(options)
        files = [path for path in (out, html, svg, dot) if path is not None]
        for path in files:
            check_writable(path)
        if (block or after) and svg is None and dot is None:
            raise ViditqError("--block and --after choose what --svg and --dot draw: give one of these too")
        asked = {"samples": samples, "steps": steps, "branches": branches}
        asked = {name: value for name, value in asked.items() if value is not None}
        if asked and not errors:
            raise ViditqError(f"--{next(iter(asked))} is about the samples of --errors: give that too")
        report = _explain(
            target,
            options,
            graphs=any(path is not None for path in (html, svg, dot)),
            sampling=asked if errors else None,
        )
        if svg is not None:
            report.to_svg(svg, block=block, after=after)
        if dot is not None:
            report.to_dot(dot, block=block, after=after)
        if html is not None:
            report.to_html(html)
        if out is not None:
            text = report.to_json() if as_json or out.suffix == ".json" else str(report)
            write_text(out, text + "\n")
        elif as_json:
            print(report.to_json())
        elif not files:
            _print_explanation(report)
        else:
            _print_answers(report)


def _explain(
    target: str, options: dict[str, Any], *, graphs: bool, sampling: dict[str, int] | None
) -> ExplainReport:
    """`sampling`: what of --samples, --steps and --branches was given with --errors; None without that."""
    _quiet_libraries()
    console, findings = Console(stderr=True), None
    if sampling is None:
        from viditq_fx.cli.target import load_target

        with console.status(f"loading {target} ..."):
            loaded = load_target(target)
    else:
        from viditq_fx.cli.explain import load_and_collect

        loaded, findings = load_and_collect(target, console, keep=options.get("keep") or (), **sampling)
    with console.status("compiling and running it once ..."):
        from viditq_fx.inspection import explain as explain_model

        return explain_model(
            loaded.model,
            *loaded.args,
            options=options or None,
            graphs=graphs,
            errors=findings,
            **loaded.kwargs,
        )


def _print_explanation(report: ExplainReport) -> None:
    from viditq_fx.cli.tables import explain_table, total_tables

    # Piped into a file or a pager, a table squeezed into 80 columns would be unreadable.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(explain_table(report))
    for table in total_tables(report):
        console.print(table)
    _print_answers(report)


def _print_answers(report: ExplainReport) -> None:
    from viditq_fx.inspection.answers import lines
    from viditq_fx.inspection.render import error_lines

    console = Console()
    for line in (*lines(report), *error_lines(report)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def calibrate(
    target: Annotated[
        str,
        typer.Argument(
            help="'digits' (the demo's model), or package.module:function that returns (model, run), run as "
            "vq.calibrate takes it, or one call: (model, args, kwargs) or (model, kwargs)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for recipe.json and recipe.safetensors.")],
    scheme: Annotated[
        str, typer.Option(help="e.g. w4a8, w8a8-static, w8a8-timestep, w8a8-position or w4a8-rot.")
    ] = "w4a8",
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Glob over module paths, or role, to keep in full precision."),
    ] = None,
    samples: Annotated[int, typer.Option(help="For 'digits': how often ten digits are drawn.")] = 4,
    steps: Annotated[int, typer.Option(help="For 'digits': sampling steps.")] = DEFAULT_STEPS,
    seed: Annotated[int, typer.Option(help="Of the noise, the rows that are kept and random signs.")] = 0,
    timestep: Annotated[
        str | None,
        typer.Option(help="Argument that holds the timestep.  [default: timestep, timesteps or t]"),
    ] = None,
    max_buckets: Annotated[int, typer.Option(help="Most ranges of the timestep.")] = 20,
    branches: Annotated[int, typer.Option(help="2 keeps the halves of the batch apart.")] = 1,
    rows: Annotated[int, typer.Option(help="Rows kept of each input, to measure errors on.")] = 64,
    balance: Annotated[str, typer.Option(help="search, off, or SmoothQuant's alpha in 0..1.")] = "search",
    rotation: Annotated[
        str | None, typer.Option(help="search, on or off.  [default: on for -rot schemes, else search]")
    ] = None,
    random_signs: Annotated[
        bool, typer.Option("--random-signs", help="Random signs before rotations.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Folder in which an interrupted calibration goes on.")
    ] = None,
) -> None:
    """Sample with a model, decide how each linear is best quantized, and write that as a recipe."""
    with user_errors():
        from viditq_fx.cli.calibrate import run_calibration

        _quiet_libraries()
        run_calibration(
            target,
            out,
            samples=samples,
            steps=steps,
            options={
                "scheme": scheme,
                "keep": keep or [],
                "seed": seed,
                "timestep": timestep,
                "max_buckets": max_buckets,
                "branches": branches,
                "rows": rows,
                "balance": balance,
                "rotation": rotation,
                "random_signs": random_signs,
                "resume": resume,
            },
        )


@app.command()
def doctor() -> None:
    """Check what this machine has: versions, compiler, CPU and GPU, and which kernels would run."""
    with user_errors():
        from viditq_fx.cli.doctor import examine
        from viditq_fx.cli.tables import doctor_table

        console = Console()
        with Console(stderr=True).status("looking around ..."):
            findings = examine(os.environ.get("CXX"))
        console.print(doctor_table(findings))
        missing = [finding.name for finding in findings if finding.state == "missing"]
        if missing:
            print(f"viditq: something essential is missing: {', '.join(missing)}", file=sys.stderr)
            raise typer.Exit(1)
        console.print("Everything essential is here.")


def _quiet_libraries() -> None:
    """Keep library chatter that a user can do nothing about out of the progress bars."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
