"""Make the table and the figure of a benchmark run from its JSON.

    python -m benchmarks.plot benchmarks/results/cpu/benchmarks.json

writes benchmarks.md and a chart per op, benchmarks-<op>.png, next to each JSON and prints the
table. `--page docs/benchmarks.md` also writes a short table of the workloads in `SPEED` between the
markers for that JSON. `--chart docs/images/speed` draws the chart of the README, light and dark.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.common import OURS

Style = tuple[tuple[float, float, float], str]  # color and marker of a provider
HEADER = (
    "op",
    "workload",
    "phase",
    "provider",
    "median ms",
    "p20 - p80",
    "GB/s of minimum traffic",
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
# of the chart: indices of SPEED and their labels
BARS = (
    (0, "soft_target_focal_loss, 4 M"),
    (1, "predict_targets, 4 views of 96 K"),
    (3, "mixup3d, int16 with window, 8 x 96³"),
    (4, "crop_and_resize3d, 64 boxes"),
    (5, "crop_and_resize3d, fractional boxes"),
    (6, "object_mixup3d, 16 objects"),
    (7, "group_norm3d, float32, channels last"),
    (8, "group_norm3d, bfloat16, channels last"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, nargs="+", help="what pytest --benchmark-json wrote")
    parser.add_argument("--page", type=Path, help="a file with markers for the short table")
    parser.add_argument("--chart", type=Path, help="path of the short chart, without its ending")
    options = parser.parse_args(arguments)
    problems = 0
    for path in options.json:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if not rows_of(run):
                raise ValueError("no benchmark in it")
            text = report(run)
            path.with_suffix(".md").write_text(text, encoding="utf-8")
            for op, drawn in figures(rows_of(run)).items():
                name = f"{path.stem}-{op.replace(' ', '-')}.png"
                drawn.savefig(path.with_name(name), dpi=110)
            print(text)
            if options.page:
                write_speed(options.page, path, speed(run))
            for theme in ("light", "dark") if options.chart else ():
                target = options.chart.with_name(f"{options.chart.name}-{theme}.png")
                chart(run, target, dark=theme == "dark")
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
            at = rivals(rows, (op, workload + threads, phase))
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


def rivals(rows: list[dict], comparison: tuple[str, str, str]) -> dict[str, dict]:
    """The rows of a comparison by provider, without copies and formulas, which do only a part."""
    return {
        row["provider"]: row
        for row in rows
        if key(row) == comparison and row["provider"] != "copy" and "formula" not in row["provider"]
    }


def chart(run: dict, path: Path, *, dark: bool) -> None:
    """Speed-up over the best rival of the workloads in BARS, with all threads and with one."""
    rows, lines = rows_of(run), []
    for index, label in BARS:
        op, workload, phase, _ = SPEED[index]
        factors, names = [], []
        for threads in ("", ", one thread"):
            at = rivals(rows, (op, workload + threads, phase))
            if OURS in at and len(at) > 1:
                ours = at.pop(OURS)
                factor, _, name = faster(ours, list(at.values())).partition(", ")
                factors.append(float(factor))
                names.append(name)
        if factors:
            lines.append((label, factors, names[0]))
    ink, ours = ("#e6edf3", "#56B4E9") if dark else ("#1f2328", "#0072B2")
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.style.context(["default", dict.fromkeys(names, ink)]):
        drawn = Figure(figsize=(8, 0.45 * len(lines) + 0.8), layout="constrained")
        axes = drawn.subplots()
        for place, (_, factors, name) in enumerate(lines):
            axes.barh(place, factors[0], height=0.55, color=ours)
            axes.plot(factors[1:], [place] * len(factors[1:]), "o", color="#D55E00", markersize=7)
            text = f"   {factors[0]:.1f}x {name}"
            axes.text(max(factors), place, text, va="center", fontsize=8.5)
        axes.axvline(1, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(lines)), [label for label, _, _ in lines])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.45 * max(max(factors) for _, factors, _ in lines))
        axes.set_xlabel("times faster than the best rival; bar: all threads, dot: one thread")
        axes.spines[["top", "right"]].set_visible(False)
        drawn.savefig(path, dpi=120, transparent=True, metadata={"Software": None})


def faster(ours: dict, others: Sequence[dict]) -> str:
    """By how much ours is faster than the best of the others, and which that is."""
    if not others:
        return ""
    best = min(others, key=lambda row: row["median_s"])
    return f"{best['median_s'] / ours['median_s']:.1f}, {best['provider']}"


def host_time(rows: list[dict]) -> str:
    """Host time of one element, as a multiple of that of the only other provider there."""
    times = {(row["workload"], row["provider"] == OURS): row for row in whole(rows) if row["host"]}
    shares = [
        f"`{op}` {row['median_s'] / times[op, False]['median_s']:.1f}"
        for (op, is_ours), row in times.items()
        if is_ours and (op, False) in times
    ]
    return (
        "Host time of one element, as a multiple of a call of the cheapest registered op: "
        f"{', '.join(shares)}."
        if shares
        else ""
    )


def write_speed(page: Path, path: Path, text: str) -> None:
    """Put the text where the file has the JSON's markers."""
    name = Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()
    start = f"<!-- speed: {name} -->"
    before, found, after = page.read_text(encoding="utf-8").partition(start)
    _, ended, rest = after.partition(END)
    if not (found and ended):
        raise ValueError(f"{page} has no {start} with {END} behind it")
    page.write_text(f"{before}{start}\n{text}\n{END}{rest}", encoding="utf-8")


def whole(rows: list[dict]) -> list[dict]:
    """The rows of each workload's longest phase: forward and backward, else forward."""
    both = {key(row)[:2] for row in rows if row["phase"] == "both"}
    return [row for row in rows if row["phase"] == ("both" if key(row)[:2] in both else "forward")]


def key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["workload"], row["phase"]


def figures(rows: list[dict]) -> dict[str, Figure]:
    """A chart per op: time against size in a series that grows, else a line per workload.

    Providers are compared by their share of copy bandwidth, or by time where no bytes are counted.
    A provider has the same color and marker in all charts.
    """
    others = sorted({row["provider"] for row in rows} - {OURS})
    palette = matplotlib.color_sequences["tab20"]
    styles = {name: (palette[i % 20], "os^"[i // 20 % 3]) for i, name in enumerate(others)}
    styles[OURS] = ((0.0, 0.0, 0.0), "D")
    charts: dict[str, list[dict]] = {}
    for row in sorted(whole(rows), key=lambda row: (row["op"], row["provider"] != OURS)):
        charts.setdefault(row["op"], []).append(row)
    results = {}
    for op, mine in charts.items():
        grows = bool(mine[0]["elements"])
        height = 4.0 if grows else 1.4 + 0.32 * len(set(map(key, mine)))
        results[op] = Figure(figsize=(11, max(height, 2.6)), layout="constrained")
        axes = results[op].subplots()
        if grows:
            axes.set_title(f"{op}, {_phase(mine[0])}: median, from p20 to p80")
            _growth(axes, mine, styles)
        elif all(row["share_of_copy"] is not None for row in mine):
            axes.set_title(f"{op}: minimum traffic / time")
            axes.set_xlabel("% of a copy's bytes per second")
            _dots(axes, mine, lambda row: 100 * row["share_of_copy"], styles)
        else:
            axes.set_title(f"{op}: median")
            axes.set_xlabel("milliseconds")
            _dots(axes, mine, lambda row: 1e3 * row["median_s"], styles)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return results


def _phase(row: dict) -> str:
    return "forward and backward" if row["phase"] == "both" else row["phase"]


def _dots(
    axes: Axes, rows: list[dict], value: Callable[[dict], float], styles: dict[str, Style]
) -> None:
    """Of all providers, on a line for each workload."""
    lines = {key(row): f"{row['workload']}, {_phase(row)}" for row in rows}
    places = {line: place for place, line in enumerate(lines)}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        values = {places[key(row)]: value(row) for row in rows if row["provider"] == provider}
        axes.plot(
            values.values(),
            values.keys(),
            styles[provider][1],
            label=provider,
            color=styles[provider][0],
            zorder=3 if provider == OURS else 2,
        )
    axes.set_yticks(range(len(lines)), lines.values(), fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _growth(axes: Axes, rows: list[dict], styles: dict[str, Style]) -> None:
    """A line for each provider, both axes logarithmic."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        line = sorted(
            (row for row in rows if row["provider"] == provider), key=lambda row: row["elements"]
        )
        sizes = [row["elements"] for row in line]
        low, median, high = (
            [1e3 * row[name] for row in line] for name in ("p20_s", "median_s", "p80_s")
        )
        axes.plot(sizes, median, ".-", label=provider, color=styles[provider][0])
        axes.fill_between(sizes, low, high, alpha=0.2, linewidth=0, color=styles[provider][0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("elements")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
