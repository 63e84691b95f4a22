"""The command ``fmkernels``: write phantoms, train, detect, evaluate, examine.

Bad input ends with one line and exit code 2.
"""

import argparse
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fmkernels.focalmix.errors import InputError, first_line

INTERRUPTED = 130  # what a shell reports after Ctrl-C


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)  # or --seed would pass for --seeds

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 1 where training diverged or a self-test failed; 2 on bad input; 130 after Ctrl-C.
    """
    try:
        arguments = _parse(sys.argv[1:] if argv is None else list(argv))
        return arguments.run(arguments)
    except (InputError, OSError) as error:
        print(f"fmkernels: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"fmkernels: {error.name} is not installed; the extra fmkernels[train] brings it",
            file=sys.stderr,
        )
        return 2
    except FloatingPointError as error:
        print(f"fmkernels: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print(
            "fmkernels: a worker process died, for lack of memory perhaps; try fewer --workers",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(
            f"fmkernels: not enough memory ({first_line(error)}); try smaller patches or batches",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        print(f"\nfmkernels: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


def _out_of_memory(error: Exception) -> bool:
    """Of Python, or as torch says it of a GPU (a type of its own) and of the host (a RuntimeError)."""
    told = any(text in str(error) for text in ("can't allocate memory", "not enough memory"))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or told


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="fmkernels", description="Lung-nodule detection on CT in LUNA16's format."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, add, text in (
        ("phantom", _add_phantom, "write a synthetic data set in LUNA16's layout"),
        ("train", _add_train, "train a detector and evaluate it on the test scans"),
        ("compare", _add_compare, "train both methods over seeds and print the paper's table"),
        ("detect", _add_detect, "find nodules in scans with a trained detector"),
        ("evaluate", _add_evaluate, "compute FROC and CPM of candidates by LUNA16's rules"),
        (
            "doctor",
            _add_doctor,
            "say what is installed and which path each operation takes here, and test each",
        ),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        # The options of train come from its configuration, whose import is slow: only where they are asked for.
        if name == next((word for word in argv if not word.startswith("-")), None):
            add(command)
    # argparse takes a list that begins with a negative number for an option, unless it is joined to its own
    for at in range(len(argv) - 1, 0, -1):
        if re.match(r"-[\d.]+,", argv[at]) and argv[at - 1].startswith("--"):
            argv[at - 1 : at + 1] = [f"{argv[at - 1]}={argv[at]}"]
    return parser.parse_args(argv)


def _add_phantom(parser: argparse.ArgumentParser) -> None:
    from fmkernels.focalmix.data.phantom import SIZES

    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--size", choices=SIZES, default="demo", help="of the scans (default: %(default)s)"
    )
    parser.add_argument("--scans", type=_at_least(1), help="how many (default: as the size has)")
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="of all randomness (default: %(default)s)"
    )
    parser.add_argument("--workers", type=_at_least(1), help="processes (default: one per core)")
    parser.set_defaults(run=_phantom)


def _phantom(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.data.phantom import write_phantoms

    write_phantoms(
        arguments.out,
        size=arguments.size,
        scans=arguments.scans,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    from fmkernels.focalmix.config import PRESETS

    parser.add_argument("data", metavar="DATA", type=Path, help="a folder in LUNA16's layout")
    parser.add_argument(
        "--out", metavar="RUN", type=Path, help="the folder of the run (default: runs/METHOD)"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="settings that the options below change (default: demo)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in RUN from its checkpoint"
    )
    parser.add_argument(
        "--profile", action="store_true", help="wait for the GPU at every stage, to time each"
    )
    _add_settings(parser)
    parser.set_defaults(run=_train)


def _add_settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """The fields of a configuration as options, which leave nothing behind where they are not given."""
    from fmkernels.focalmix.config import Config

    settings = parser.add_argument_group(
        "settings", "Lists are separated by commas, those of three are z,y,x."
    )
    hints = typing.get_type_hints(Config)
    for option in (option for option in fields(Config) if option.name not in without):
        default = "none" if option.default is None else _written(option.default)
        if hints[option.name] is bool:
            settings.add_argument(
                f"--{option.name.replace('_', '-')}",
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{option.metadata['help']} (demo: {'yes' if option.default else 'no'})",
            )
            continue
        settings.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=_reader(hints[option.name]),
            metavar="LIST" if isinstance(option.default, tuple) else "VALUE",
            default=argparse.SUPPRESS,
            help=f"{option.metadata['help']} (demo: {default})".replace("%", "%%"),
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
    from fmkernels.focalmix.training.loop import train

    given = _given(arguments)
    if arguments.resume and arguments.out is None:
        raise InputError("--resume: expected --out, the folder of the run to continue")
    out = arguments.out or Path("runs", given.get("method", "supervised"))
    stored = load_config(out) if arguments.resume and arguments.preset is None else None
    config = replace(stored or PRESETS[arguments.preset or "demo"], **given)
    evaluation = train(
        config, arguments.data, out, resume=arguments.resume, profile=arguments.profile
    )
    if evaluation is not None and int(os.environ.get("RANK", 0)) == 0:
        print(evaluation)
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    from fmkernels.focalmix.compare import ABLATIONS
    from fmkernels.focalmix.config import PRESETS

    parser.add_argument("data", metavar="DATA", type=Path, help="a folder in LUNA16's layout")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("runs/compare"),
        help="of runs and tables (default: %(default)s)",
    )
    parser.add_argument(
        "--labeled", metavar="N", type=_at_least(1), nargs="+", required=True, help="labelled scans"
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=_at_least(1),
        default=5,
        help="seeds of each (default: %(default)s)",
    )
    parser.add_argument(
        "--without",
        choices=ABLATIONS,
        nargs="+",
        default=[],
        help="parts to leave out, a row for each",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="demo", help="settings that the options below change"
    )
    _add_settings(parser, without=("labeled", "seed", "method"))
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
    )
    print(as_text(rows), end="")
    if arguments.seeds < 3:
        print(
            "fmkernels: from so few seeds the intervals do not tell how much training itself varies",
            file=sys.stderr,
        )
    return 0


def _add_detect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument(
        "scans", metavar="SCAN", type=Path, nargs="+", help=".mhd files, or folders of such"
    )
    parser.add_argument(
        "--out", metavar="CSV", type=Path, help="default: RUN/detections.csv, if not yet there"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)"
    )
    parser.set_defaults(run=_detect)


def _detect(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fmkernels.focalmix.data.formats import check_header, load_volume
    from fmkernels.focalmix.data.tables import write_candidates
    from fmkernels.focalmix.distributed import choose_device
    from fmkernels.focalmix.model.inference import search
    from fmkernels.focalmix.training.checkpoint import load_run

    out = arguments.out or arguments.run_folder / "detections.csv"
    if arguments.out is None and out.exists():
        raise InputError(f"{out}: expected no such file yet; give another one with --out")
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"{out}: expected the name of a file in an existing folder")
    paths = _scans(arguments.scans)
    for path in paths:
        check_header(path)
    config, model = load_run(arguments.run_folder, choose_device(arguments.device))
    found = {}
    for path in tqdm(paths, "detecting", unit="scan"):
        found[path.stem] = search(config, model, load_volume(path, config.spacing)).candidates
    write_candidates(out, found)
    return 0


def _scans(given: Sequence[Path]) -> list[Path]:
    """The headers of scans: files as they are, of a folder those in it, or else those in its subsets."""
    from fmkernels.focalmix.data.luna16 import scan_headers

    paths: dict[str, Path] = {}
    for path in given:
        inside = [path]
        if path.is_dir():
            folders = [path] if scan_headers(path) else sorted(path.glob("subset*"))
            inside = [scan for folder in folders for scan in scan_headers(folder)]
            if not inside:
                raise InputError(f"{path}: expected scans (.mhd) in this folder, found none")
        for scan in inside:
            if paths.setdefault(scan.stem, scan) != scan:
                raise InputError(f"{scan}: expected each series once, got {paths[scan.stem]} too")
    return list(paths.values())


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "candidates",
        metavar="CANDIDATES",
        type=Path,
        help="seriesuid,coordX,coordY,coordZ,probability",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="a folder in LUNA16's layout")
    parser.add_argument(
        "--subsets", type=_reader(tuple[int, ...]), help="such as 8,9 (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="PNG", type=Path, help="draw the curve")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from fmkernels.focalmix.data.luna16 import LUNA16
    from fmkernels.focalmix.data.tables import read_candidates
    from fmkernels.focalmix.evaluation.froc import evaluate

    data = LUNA16(arguments.data)
    chosen = [
        uid
        for uid in data.series
        if arguments.subsets is None or data.subset(uid) in arguments.subsets
    ]
    if not chosen:
        raise InputError(
            f"{arguments.data}: expected scans in the subsets {_written(arguments.subsets)}, found none"
        )
    elsewhere = set(data.series) - set(chosen)
    candidates = read_candidates(arguments.candidates)
    if unknown := sorted(set(candidates) - set(data.series)):
        raise InputError(
            f"{arguments.candidates}: seriesuid: expected series of {arguments.data}, got {unknown[0]}"
        )
    result = evaluate(
        {uid: rows for uid, rows in candidates.items() if uid not in elsewhere},
        *data.findings(chosen),
        chosen,
    )
    print(json.dumps(result.to_dict(), allow_nan=False) if arguments.json else result)
    if arguments.plot:
        from fmkernels.focalmix.evaluation.figures import draw_froc

        draw_froc(arguments.plot, {arguments.candidates.stem: result})
    return 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from fmkernels.doctor import doctor

    return doctor()


def _reader(hint: Any) -> Callable[[str], Any]:
    """What makes a value of a type out of an argument."""
    if isinstance(hint, types.UnionType):  # int | None: an option not given is None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is not tuple:
        return hint
    return partial(_read_tuple, typing.get_args(hint)[0])


def _read_tuple(kind: type, text: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected {kind.__name__}s separated by commas, got {text!r}"
        ) from None


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return integer
