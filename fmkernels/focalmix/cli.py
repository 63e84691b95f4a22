"""The command ``fmkernels``.

Exit codes: 0 success, 1 training diverged, a scan could not be searched, a self-test failed or
`check` found errors, 2 invalid input, 130 interrupted.
"""

import argparse
import contextlib
import json
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fmkernels import __version__
from fmkernels.focalmix.errors import InputError, InputWarning, first_line, is_out_of_memory

INTERRUPTED = 130  # what a shell reports after Ctrl-C


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)  # or --seed would pass for --seeds

    def error(self, message: str) -> typing.NoReturn:
        # a list of arguments takes DATA for its last one
        lists = [
            name
            for action in self._actions
            if action.nargs == "+"
            for name in action.option_strings
        ]
        if "required: DATA" in message or any(f"argument {name}:" in message for name in lists):
            message += "; put DATA first"
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else list(argv))
        with _warnings_in_one_line():
            return arguments.run(arguments)
    except InputError as error:
        _say(error)
        return 2
    except OSError as error:
        known = error.filename is not None and error.strerror
        _say(f"{error.filename}: {error.strerror}" if known else error)
        return 2
    except ModuleNotFoundError as error:
        _say(f"{error.name} is not installed; install fmkernels[train]")
        return 2
    except FloatingPointError as error:
        _say(error)
        return 1
    except BrokenProcessPool:
        _say("a worker process died, perhaps out of memory; try fewer --workers")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _say(f"not enough memory ({first_line(error)}); try smaller patches or batches")
        return 2
    except KeyboardInterrupt as error:
        print(f"\nfmkernels: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


def _say(text: object) -> None:
    """Print a line on stderr, since stdout may hold the results."""
    print(f"fmkernels: {text}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print each `InputWarning` as a line of this command."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def print_line(message: Any, category: type[Warning], *rest: Any, **options: Any) -> None:
            if issubclass(category, InputWarning):
                _say(f"warning: {message}")
            else:
                show(message, category, *rest, **options)

        warnings.showwarning = print_line
        warnings.simplefilter("always", InputWarning)
        yield


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="fmkernels", description="Lung-nodule detection in CT scans, with FocalMix."
    )
    parser.add_argument("--version", action="version", version=f"fmkernels {__version__}")
    parser.set_defaults(run=partial(_help, parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, add, usage, text in (
        ("phantom", _add_phantom, "OUT", "write a synthetic data set in LUNA16's layout"),
        ("train", _add_train, "DATA [--out RUN]", "train a detector and evaluate it"),
        (
            "compare",
            _add_compare,
            "DATA --labeled N [N ...]",
            "train both methods with several seeds and print the paper's table",
        ),
        ("detect", _add_detect, "RUN SCAN [SCAN ...]", "detect nodules with a trained detector"),
        (
            "evaluate",
            _add_evaluate,
            "CANDIDATES [DATA]",
            "compute FROC and CPM of candidates by LUNA16's rules",
        ),
        ("check", _add_check, "DATA", "look at a data set: counts, grids, HU, coordinates"),
        ("doctor", _add_doctor, "", "show versions and devices, and self-test every operation"),
        ("warmup", _add_warmup, "", "compile the CPU path ahead of time, for later processes"),
    ):
        usage = " ".join(filter(None, ["fmkernels", name, usage, "[options]"]))
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=description, usage=usage)
        # importing the configuration is slow: add options only to the command that is asked for
        if name == next((word for word in argv if not word.startswith("-")), None):
            add(command)
    # argparse takes a list that begins with a negative number for an option, unless joined by "="
    for at in range(len(argv) - 1, 0, -1):
        if re.match(r"-[\d.]+,", argv[at]) and argv[at - 1].startswith("--"):
            argv[at - 1 : at + 1] = [f"{argv[at - 1]}={argv[at]}"]
    return parser.parse_args(argv)


def _help(parser: argparse.ArgumentParser, _: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def _add_phantom(parser: argparse.ArgumentParser) -> None:
    from fmkernels.focalmix.data.phantom import SIZES

    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="demo",
        help="size of the scans: tiny (20 scans, 30 MB, 30 s), demo (240 scans, 4 GB with the "
        "cache of training), or as large as those of LUNA16 (default: %(default)s)",
    )
    parser.add_argument(
        "--scans",
        metavar="N",
        type=_at_least(1),
        help="number of scans (default: depends on --size)",
    )
    parser.add_argument(
        "--test-scans",
        metavar="N",
        type=_at_least(0),
        default=0,
        help="number of additional scans that are only tested, in subset9 (default: %(default)s); "
        "a scan has 1.4 nodules on average",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=_at_least(0),
        default=0,
        help="random seed (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", metavar="N", type=_at_least(1), help="worker processes (default: one per core)"
    )
    parser.set_defaults(run=_phantom)


def _phantom(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.data.phantom import write_phantoms

    write_phantoms(
        arguments.out,
        size=arguments.size,
        scans=arguments.scans,
        test_scans=arguments.test_scans,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    _say_written(arguments.out)
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument(
        "--out", metavar="RUN", type=Path, help="folder of the run (default: runs/METHOD)"
    )
    _add_preset(parser, default=None)
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in RUN from its checkpoint"
    )
    parser.add_argument(
        "--profile", action="store_true", help="synchronize after each stage to time it (slower)"
    )
    _add_config(parser)
    parser.set_defaults(run=_train)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        help="folder of scans with a table of annotations, or in LUNA16's layout",
    )


def _add_coordinates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinates",
        choices=("LPS", "RAS"),
        default="LPS",
        help="world coordinates of the annotations (default: %(default)s)",
    )


def _add_preset(parser: argparse.ArgumentParser, default: str | None) -> None:
    from fmkernels.focalmix.config import PRESETS

    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=default,
        help="default values of the options below (default: demo)",
    )


def _add_config(
    parser: argparse.ArgumentParser,
    without: Sequence[str] = (),
    only: Sequence[str] = (),
) -> None:
    """Add the fields of a configuration as options; those that are not given set no attribute."""
    from fmkernels.focalmix.config import GROUPS, HINTS, PRESETS, Config

    groups = {
        name: parser.add_argument_group(
            name, "Lists are separated by commas; sizes are z,y,x." if name == GROUPS[0] else None
        )
        for name in GROUPS
    }
    for option in fields(Config):
        if option.name in without or (only and option.name not in only):
            continue
        hint, is_list = HINTS[option.name], isinstance(option.default, tuple)
        defaults = [_written(option.default)]
        defaults += [
            f"{name}: {_written(value)}"
            for name, preset in PRESETS.items()
            if (value := getattr(preset, option.name)) != option.default
        ]
        text = option.metadata["help"]
        if option.default not in (None, ()):
            text = f"{text} (default: {'; '.join(defaults)})"
        elif len(defaults) > 1:  # such texts name their default
            text = f"{text.removesuffix(')')}; {'; '.join(defaults[1:])})"
        if hint is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif choices := option.metadata["choices"]:
            how = {"choices": choices}
        elif hint == tuple[str, ...]:
            how = {"metavar": "FOLDER", "nargs": "+"}
        else:
            how = {"type": _reader(hint), "metavar": "LIST" if is_list else "VALUE"}
        groups[option.metadata["group"]].add_argument(
            f"--{option.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **how,
        )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    from fmkernels.focalmix.config import Config

    return {
        option.name: value
        for option in fields(Config)
        if (value := vars(arguments).get(option.name)) is not None
    }


def _train(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.config import PRESETS, load_config
    from fmkernels.focalmix.distributed import announced_processes
    from fmkernels.focalmix.training.loop import train

    given = _given(arguments)
    if arguments.resume and arguments.out is None:
        raise InputError("--resume: expected --out, the folder of the run to continue")
    out = arguments.out or Path("runs", given.get("method", "supervised"))
    stored = load_config(out) if arguments.resume and arguments.preset is None else None
    config = replace(stored or PRESETS[arguments.preset or "demo"], **given)
    if config.unlabeled_data and config.method != "focalmix":
        raise InputError(
            f"--unlabeled-data: expected --method focalmix, which uses scans without labels, got "
            f"{config.method}"
        )
    evaluation = train(
        config, arguments.data, out, resume=arguments.resume, profile=arguments.profile
    )
    if announced_processes()[0] == 0:
        pictures = []
        if evaluation is not None:
            print(evaluation)
            pictures = [out / "froc.png", out / "sheet.png"]
        _say_written(out, *pictures)
    return 0


def _say_written(*paths: Path) -> None:
    for path in paths:
        _say(f"wrote {path}")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    from fmkernels.focalmix.compare import ABLATIONS, EXTENSIONS

    _add_data(parser)
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("runs/compare"),
        help="folder of the runs and tables (default: %(default)s)",
    )
    parser.add_argument(
        "--labeled",
        metavar="N",
        type=_at_least(1),
        nargs="+",
        required=True,
        help="numbers of labeled scans",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=_at_least(1),
        default=5,
        help="number of seeds per method (default: %(default)s)",
    )
    parser.add_argument(
        "--without",
        choices=ABLATIONS,
        metavar="PART",
        nargs="+",
        default=[],
        help=f"ablations: add one row per component left out, of {', '.join(ABLATIONS)}",
    )
    parser.add_argument(
        "--with",
        dest="extended",
        choices=EXTENSIONS,
        metavar="NAME",
        nargs="+",
        default=[],
        help="variants: add rows with other options, or rivals of the same length, of "
        + ", ".join(EXTENSIONS),
    )
    parser.add_argument(
        "--all-labels",
        action="store_true",
        help="add a row with the labels of all training scans, and the share of the way to it",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_at_least(1),
        default=1,
        help="number of runs trained at once, with one thread each (default: %(default)s)",
    )
    _add_preset(parser, default="demo")
    _add_config(parser, without=("labeled", "seed", "method"))
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.compare import as_text, compare
    from fmkernels.focalmix.config import PRESETS

    given = {name: value for name, value in _given(arguments).items() if name != "labeled"}
    rows = compare(
        replace(PRESETS[arguments.preset], **given),
        arguments.data,
        arguments.out,
        labeled=arguments.labeled,
        seeds=arguments.seeds,
        without=arguments.without,
        extended=arguments.extended,
        all_labels=arguments.all_labels,
        jobs=arguments.jobs,
    )
    print(as_text(rows), end="")
    if arguments.seeds < 3:
        _say(
            "fewer than 3 seeds decide nothing: another seed may well turn the order of the "
            "methods around, and the intervals do not show this"
        )
    of_first = arguments.out / f"labeled-{arguments.labeled[0]}"
    sheet = of_first / "focalmix" / "seed-0" / "sheet.png"
    _say_written(arguments.out, of_first / "froc.png", sheet)
    return 0


def _add_detect(parser: argparse.ArgumentParser) -> None:
    from fmkernels.focalmix.data.formats import SUPPORTED

    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "scans",
        metavar="SCAN",
        type=Path,
        nargs="+",
        help=f"scans ({SUPPORTED}), or folders with scans at any depth",
    )
    parser.add_argument(
        "--out",
        metavar="CSV",
        type=Path,
        help="table of findings (default: RUN/detections.csv); it is continued if it exists",
    )
    parser.add_argument(
        "--threshold",
        metavar="P",
        type=_probability,
        default=0.0,
        help="minimum probability of a finding (default: %(default)g: the 100 most probable of "
        "each scan, as evaluate needs them)",
    )
    parser.add_argument(
        "--format",
        metavar="LIST",
        type=_formats,
        default=("csv",),
        help="csv, which is always written; json, in one file beside it; slicer, a folder beside "
        "it with a file for 3D Slicer per scan (default: csv)",
    )
    parser.add_argument(
        "--sheet", metavar="PNG", type=Path, help="draw the most probable findings, at most 32"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)"
    )
    parser.set_defaults(run=_detect)


def _detect(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.detect import detect_scans, peak_memory
    from fmkernels.focalmix.distributed import choose_device, keep_freed_memory
    from fmkernels.focalmix.evaluation.froc import count

    device = choose_device(arguments.device)
    keep_freed_memory(device)
    out = arguments.out or arguments.run_folder / "detections.csv"
    report = detect_scans(
        arguments.run_folder,
        arguments.scans,
        out,
        threshold=arguments.threshold,
        formats=arguments.format,
        sheet=arguments.sheet,
        device=device,
    )
    scans = report.table.finished.values()
    text = count(sum(len(scan.findings) for scan in scans), "finding")
    text += f" in {count(len(scans), 'scan')}"
    if earlier := len(scans) - report.searched:
        text += f", {earlier:,} of them searched earlier"
    if report.searched:
        text += f"; {report.seconds / report.searched:.1f} s per scan, {peak_memory(device)}"
    _say(text)
    _say_written(*report.written)
    if not report.failed:
        return 0
    _say(f"{count(len(report.failed), 'scan')} not searched:")
    for path, reason in report.failed.items():
        print(reason if str(path) in reason else f"{path}: {reason}", file=sys.stderr)
    return 1


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value


def _formats(text: str) -> tuple[str, ...]:
    from fmkernels.focalmix.detect import FORMATS

    formats = tuple(part.strip() for part in text.split(",") if part.strip())
    if not formats or not set(formats) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(FORMATS)}, got {text!r}")
    return formats


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "candidates",
        metavar="CANDIDATES",
        type=Path,
        help="table with the columns seriesuid,coordX,coordY,coordZ,probability",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        nargs="?",
        help="data set, or folder with its tables alone; not needed where the tables are given",
    )
    for name, text in (
        ("annotations", "table of nodules (default: annotations.csv in DATA)"),
        (
            "excluded",
            "table of findings that are not scored (default: annotations_excluded.csv in DATA); "
            "none: there is none",
        ),
        ("series", "list of the scans to evaluate (default: all scans of DATA, or its list)"),
    ):
        parser.add_argument(f"--{name}", metavar="TABLE", type=Path, help=text)
    parser.add_argument(
        "--subsets",
        metavar="LIST",
        type=_reader(tuple[int, ...]),
        help="subsets to evaluate, e.g. 8,9 (default: all)",
    )
    _add_coordinates(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="PNG", type=Path, help="write the FROC curve to this PNG")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.evaluate import evaluate, read_truth

    if arguments.data is None and arguments.annotations is None:
        raise InputError("evaluate: expected DATA, or --annotations and --series")
    truth = read_truth(
        arguments.data,
        annotations=arguments.annotations,
        excluded=arguments.excluded,
        series=arguments.series,
        subsets=arguments.subsets,
        coordinates=arguments.coordinates,
    )
    result = evaluate(arguments.candidates, truth)
    if arguments.json:
        print(json.dumps(result.to_dict(), allow_nan=False))
        for warning in result.warnings:
            _say(f"WARNING: {warning}")
    else:
        print(result)
    if arguments.plot:
        from fmkernels.focalmix.evaluation.figures import draw_froc

        draw_froc(arguments.plot, {arguments.candidates.stem: result.froc})
        _say_written(arguments.plot)
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    subsets = ("train_subsets", "validation_subsets", "test_subsets")
    _add_data(parser)
    _add_preset(parser, default="demo")
    _add_config(parser, only=("coordinates", "unlabeled_data", *subsets))
    parser.add_argument(
        "--out",
        metavar="PNG",
        type=Path,
        default=Path("check.png"),
        help="picture of slices with the annotated boxes (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_at_least(1),
        help="worker processes (default: one per core, at most 8)",
    )
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.check import check
    from fmkernels.focalmix.config import PRESETS

    given = {name: value for name, value in _given(arguments).items() if name != "workers"}
    config = replace(PRESETS[arguments.preset], **given)
    report = check(
        arguments.data,
        arguments.out,
        coordinates=config.coordinates,
        unlabeled=config.unlabeled_data,
        config=config,
        workers=arguments.workers,
    )
    print(report)
    if report.picture is not None:
        _say_written(report.picture)
    return int(report.has_errors)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from fmkernels.doctor import doctor

    return doctor()


def _add_warmup(parser: argparse.ArgumentParser) -> None:
    from fmkernels import functional

    parser.add_argument(
        "--ops",
        metavar="OP",
        choices=functional.__all__,
        nargs="+",
        default=[],
        help=f"operations to compile, among {', '.join(functional.__all__)} (default: all)",
    )
    parser.set_defaults(run=_warmup)


def _warmup(arguments: argparse.Namespace) -> int:
    try:
        from fmkernels.warmup import warmup
    except ImportError as error:  # Numba is missing or disabled
        raise InputError(str(error).removeprefix("fmkernels: ")) from None
    return warmup(arguments.ops)


def _reader(hint: Any) -> Callable[[str], Any]:
    """The function that reads a value of a type from an argument."""
    if isinstance(hint, types.UnionType):  # of: int | None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is not tuple:
        return hint
    return partial(_read_tuple, typing.get_args(hint)[0])


def _read_tuple(number: type, text: str) -> tuple:
    try:
        return tuple(number(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected {number.__name__}s separated by commas, got {text!r}"
        ) from None


def _written(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(_written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return integer
