"""Make the table and the figure of a benchmark run from its JSON.

    python -m benchmarks.plot benchmarks/results/cpu/benchmarks.json

writes benchmarks.md and benchmarks.png next to each JSON and prints the table. `--readme README.md`
also writes a short table of the workloads in `SPEED` between the markers for that JSON.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.common import OURS

HEADER = (
    "op",
    "workload",
    "phase",
    "provider",
    "median ms",
    "p20 - p80",
    "GB/s at the floor",
    "% of a copy",
    f"time / {OURS}",
    "extra MB",
    "launches",
)


CROPS = "float32 64 boxes of 8-48 to 24^3, {}, without gradient"
# of the short table: operation, workload, phase, and the PyTorch that one would write first
SPEED = (
    ("soft_target_focal_loss", "float32/float32 4,000,000", "both", "eager"),
    ("predict_targets", "float32 384,000", "forward", "eager"),
    ("mixup3d", "float32 8 x 96^3", "forward", "eager"),
    ("mixup3d", "int16 to float32 8 x 96^3, window", "forward", "eager"),
    ("crop_and_resize3d", CROPS.format("whole voxels"), "forward", "interpolate loop"),
    ("crop_and_resize3d", CROPS.format("fractions"), "forward", "grid_sample loop"),
    (
        "object_mixup3d",
        "float32 8 x 96^3, 16 boxes of 8 to 48, donors, in place",
        "forward",
        "interpolate",
    ),
    ("group_norm3d", "float32 8 x 24 x 32^3, channels last", "both", "eager"),
    ("group_norm3d", "bfloat16 8 x 24 x 32^3, channels last", "both", "eager, autocast"),
)
SPEED_HEADER = (
    "operation",
    "workload",
    "phase",
    "threads",
    "ms",
    "plain PyTorch",
    "best of eager PyTorch",
    "torch.compile",
    "best of other libraries",
    "% of a copy",
)
LIBRARIES = (
    "apex",
    "kornia",
    "mmcv",
    "monai",
    "simpleitk",
    "timm",
    "torchvision",
)  # as providers begin
END = "<!-- end of speed -->"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, nargs="+", help="what pytest --benchmark-json wrote")
    parser.add_argument(
        "--readme", type=Path, help="a file with markers, to write the short table into"
    )
    options = parser.parse_args(arguments)
    problems = 0
    for path in options.json:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if not rows_of(run):
                raise ValueError("no benchmark in it")
            text = report(run)
            path.with_suffix(".md").write_text(text, encoding="utf-8")
            figure(rows_of(run), caption(run)).savefig(path.with_suffix(".png"), dpi=130)
            print(text)
            if options.readme:
                write_speed(options.readme, path, speed(run))
        except (OSError, ValueError, KeyError) as problem:
            print(f"{path}: {problem}", file=sys.stderr)
            problems += 1
    return int(problems > 0)


def rows_of(run: dict) -> list[dict]:
    return [entry["extra_info"] for entry in run["benchmarks"] if entry["extra_info"]]


def report(run: dict) -> str:
    """The whole table, with machine and versions above and what was left out below."""
    return "\n\n".join(filter(None, [caption(run), table(rows_of(run)), left_out(run)])) + "\n"


def caption(run: dict) -> str:
    """Machine, versions, commit and the speed of a copy by each number of threads."""
    machine, commit = run["machine_info"], run["commit_info"]
    name = (
        machine["gpu"]["name"]
        if "gpu" in machine
        else machine["cpu"].get("brand_raw", machine["processor"])
    )
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    state = "with changes" if commit["dirty"] else "clean"
    speeds = {row["threads"]: row["copy_bytes_per_s"] / 1e9 for row in rows_of(run)}
    copies = "; ".join(
        f"{speed:.1f} GB/s with {threads} CPU thread{'s' * (threads > 1)}"
        for threads, speed in sorted(speeds.items())
    )
    return (
        f"{name}, {machine['threads']} CPU threads; {versions}; commit {commit['id'][:10]} "
        f"({state}), {run['datetime'][:10]}. A copy moves {copies}."
    )


def left_out(run: dict) -> str:
    """What has no row, and why; nothing where there is none."""
    names: dict[str, set[str]] = {}
    for name, why in run.get("left_out", {}).items():
        why = "not installed" if "No module named" in why else why
        names.setdefault(why, set()).add(name.partition(" (")[0])
    return " ".join(
        f"{why[0].upper()}{why[1:]}: {'; '.join(sorted(names[why]))}." for why in sorted(names)
    )


def table(rows: list[dict]) -> str:
    """Markdown, sorted, ours first within a comparison; times relative to ours there."""
    ours = {key(row): row["median_s"] for row in rows if row["provider"] == OURS}
    lines = []
    for row in sorted(rows, key=lambda row: (*key(row), row["provider"] != OURS)):
        relative = f"{row['median_s'] / ours[key(row)]:.2f}" if key(row) in ours else ""
        cells = (
            *key(row),
            row["provider"],
            f"{row['median_s'] * 1e3:.3f}",
            f"{row['p20_s'] * 1e3:.3f} - {row['p80_s'] * 1e3:.3f}",
            number(row["bytes_per_s"], 1e-9),
            number(row["share_of_copy"], 100),
            relative,
            number(row["peak_extra_bytes"], 1e-6),
            "" if row["launches"] is None else str(row["launches"]),
        )
        lines.append(cells)
    return markdown(HEADER, lines)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)
    )


def number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:.1f}"


def speed(run: dict) -> str:
    """The short table: speedups over other providers, on the workloads of SPEED in the run."""
    rows, lines = rows_of(run), []
    for op, workload, phase, first in SPEED:
        for threads in ("", ", one thread"):
            at = {
                row["provider"]: row for row in rows if key(row) == (op, workload + threads, phase)
            }
            at = {
                name: row for name, row in at.items() if name != "copy" and "formula" not in name
            }  # no rivals
            if OURS not in at:
                continue
            ours = at.pop(OURS)
            compiled = [row for row in at.values() if row["compiled"]]
            libraries = [row for name, row in at.items() if name.lower().startswith(LIBRARIES)]
            eager = [row for row in at.values() if row not in compiled and row not in libraries]
            plain = [row for row in eager if row["provider"] == first]
            others = (faster(ours, several) for several in (plain, eager, compiled, libraries))
            lines.append(
                (
                    f"`{op}`",
                    workload,
                    _phase(ours),
                    str(ours["threads"]),
                    number(ours["median_s"], 1e3),
                    *others,
                    number(ours["share_of_copy"], 100),
                )
            )
    return "\n\n".join(
        filter(None, [markdown(SPEED_HEADER, lines), host_time(rows), caption(run), left_out(run)])
    )


def faster(ours: dict, others: Sequence[dict]) -> str:
    """By how much ours is faster than the best of the others, and which that is."""
    if not others:
        return ""
    best = min(others, key=lambda row: row["median_s"])
    return f"{best['median_s'] / ours['median_s']:.1f}, {best['provider']}"


def host_time(rows: list[dict]) -> str:
    """How long one element takes the host, in times of the only other provider there."""
    times = {(row["workload"], row["provider"] == OURS): row for row in whole(rows) if row["host"]}
    shares = [
        f"`{op}` {row['median_s'] / times[op, False]['median_s']:.1f}"
        for (op, is_ours), row in times.items()
        if is_ours and (op, False) in times
    ]
    return (
        f"One element takes the host, in calls of the cheapest registered op: {', '.join(shares)}."
        if shares
        else ""
    )


def write_speed(readme: Path, path: Path, text: str) -> None:
    """Put the text where the file has the JSON's markers."""
    start = f"<!-- speed: {path.resolve().relative_to(readme.resolve().parent).as_posix()} -->"
    before, found, after = readme.read_text(encoding="utf-8").partition(start)
    _, ended, rest = after.partition(END)
    if not (found and ended):
        raise ValueError(f"{readme} has no {start} with {END} behind it")
    readme.write_text(f"{before}{start}\n{text}\n{END}{rest}", encoding="utf-8")


def whole(rows: list[dict]) -> list[dict]:
    """The rows of each workload's longest phase: forward and backward, else forward."""
    both = {key(row)[:2] for row in rows if row["phase"] == "both"}
    return [row for row in rows if row["phase"] == ("both" if key(row)[:2] in both else "forward")]


def key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["workload"], row["phase"]


def figure(rows: list[dict], title: str) -> Figure:
    """One panel per op: time against size in a series that grows, else a line per workload.

    Providers are compared by their share of copy bandwidth, or by time where no bytes are counted.
    """
    panels: dict[str, list[dict]] = {}
    for row in sorted(whole(rows), key=lambda row: row["op"]):
        panels.setdefault(row["op"], []).append(row)
    heights = [
        2.8 if mine[0]["elements"] else 1 + 0.3 * len(set(map(key, mine)))
        for mine in panels.values()
    ]
    result = Figure(figsize=(12, sum(heights) + 0.6), layout="constrained")
    grid = result.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for (op, mine), axes in zip(panels.items(), grid[:, 0], strict=True):
        if mine[0]["elements"]:
            axes.set_title(f"{op}, {_phase(mine[0])}: median, from p20 to p80")
            _growth(axes, mine)
        elif all(row["share_of_copy"] is not None for row in mine):
            axes.set_title(f"{op}: bytes of the floor / time")
            axes.set_xlabel("% of a copy's bytes per second")
            _dots(axes, mine, lambda row: 100 * row["share_of_copy"])
        else:
            axes.set_title(f"{op}: median")
            axes.set_xlabel("milliseconds")
            _dots(axes, mine, lambda row: 1e3 * row["median_s"])
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    result.suptitle(textwrap.fill(title, 180), fontsize=8)
    return result


def _phase(row: dict) -> str:
    return "forward and backward" if row["phase"] == "both" else row["phase"]


def _dots(axes: Axes, rows: list[dict], value: Callable[[dict], float]) -> None:
    """Of all providers, on a line for each workload."""
    lines = {key(row): f"{row['workload']}, {_phase(row)}" for row in rows}
    places = {line: place for place, line in enumerate(lines)}
    for place, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        values = {places[key(row)]: value(row) for row in rows if row["provider"] == provider}
        axes.plot(
            values.values(),
            values.keys(),
            "osD"[place // 10 % 3],
            label=provider,
            color=_color(place),
        )
    axes.set_yticks(range(len(lines)), lines.values(), fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _growth(axes: Axes, rows: list[dict]) -> None:
    """A line for each provider, both axes logarithmic."""
    for place, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        line = sorted(
            (row for row in rows if row["provider"] == provider), key=lambda row: row["elements"]
        )
        sizes = [row["elements"] for row in line]
        low, median, high = (
            [1e3 * row[name] for row in line] for name in ("p20_s", "median_s", "p80_s")
        )
        axes.plot(sizes, median, ".-", label=provider, color=_color(place))
        axes.fill_between(sizes, low, high, alpha=0.2, linewidth=0, color=_color(place))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("elements")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)


def _color(place: int) -> tuple[float, float, float]:
    return matplotlib.color_sequences["tab10"][place % 10]


if __name__ == "__main__":
    sys.exit(main())
