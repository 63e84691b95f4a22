"""The table and the picture of a benchmark run, from its JSON: nothing in them is typed by hand.

    python -m benchmarks.plot benchmarks/results/cpu/benchmarks.json

writes benchmarks.md and benchmarks.png beside it and prints the table; the same for every further JSON.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import OURS

HEADER = ("op", "workload", "phase", "provider", "median ms", "p20 - p80", "GB/s at the floor", "% of a copy",
          f"time / {OURS}", "extra MB", "launches")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, nargs="+", help="what pytest --benchmark-json wrote")
    problems = 0
    for path in parser.parse_args(arguments).json:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            rows = [entry["extra_info"] for entry in run["benchmarks"] if entry["extra_info"]]
        except (OSError, ValueError) as problem:
            print(f"{path}: {problem}", file=sys.stderr)
            problems += 1
            continue
        if not rows:
            print(f"{path}: no benchmark in it", file=sys.stderr)
            problems += 1
            continue
        text = f"{caption(run, rows)}\n\n{table(rows)}\n"
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        figure(rows, caption(run, rows)).savefig(path.with_suffix(".png"), dpi=130)
        print(text)
    return int(problems > 0)


def caption(run: dict, rows: list[dict]) -> str:
    """Machine, versions, commit and the speed of a copy by each number of threads."""
    machine, commit = run["machine_info"], run["commit_info"]
    name = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"].get("brand_raw", machine["processor"])
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    state = "with changes" if commit["dirty"] else "clean"
    speeds = {row["threads"]: row["copy_bytes_per_s"] / 1e9 for row in rows}
    copies = "; ".join(f"{speed:.1f} GB/s with {threads} CPU threads" for threads, speed in sorted(speeds.items()))
    return (
        f"{name}, {machine['threads']} CPU threads; {versions}; commit {commit['id'][:10]} ({state}), "
        f"{run['datetime'][:10]}. A copy moves {copies}."
    )


def table(rows: list[dict]) -> str:
    """Markdown, in the order of the run; times relative to ours within one comparison."""
    ours = {key(row): row["median_s"] for row in rows if row["provider"] == OURS}
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for row in sorted(rows, key=lambda row: (*key(row), row["provider"] != OURS)):
        relative = f"{row['median_s'] / ours[key(row)]:.2f}" if key(row) in ours else ""
        cells = (
            *key(row), row["provider"], f"{row['median_s'] * 1e3:.3f}",
            f"{row['p20_s'] * 1e3:.3f} - {row['p80_s'] * 1e3:.3f}", number(row["bytes_per_s"], 1e-9),
            number(row["share_of_copy"], 100), relative, number(row["peak_extra_bytes"], 1e-6),
            "" if row["launches"] is None else str(row["launches"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:.1f}"


def key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["workload"], row["phase"]


def figure(rows: list[dict], title: str) -> Figure:
    """One panel per op, in its last phase: time against size where it grows, else each workload's providers.

    Those are compared by the share of a copy's speed that they reach, or by their time where no bytes are counted.
    """
    ops = sorted({row["op"] for row in rows})
    result = Figure(figsize=(11, 3.2 * len(ops) + 0.6), layout="constrained")
    for op, axes in zip(ops, result.subplots(len(ops), 1, squeeze=False)[:, 0], strict=True):
        mine = [row for row in rows if row["op"] == op]
        phase = "both" if any(row["phase"] == "both" for row in mine) else "forward"
        mine = [row for row in mine if row["phase"] == phase]
        name = f"{op}, {'forward and backward' if phase == 'both' else phase}"
        if all(row["elements"] for row in mine):
            axes.set_title(f"{name}: median, from p20 to p80")
            _growth(axes, mine)
        elif all(row["share_of_copy"] is not None for row in mine):
            axes.set_title(f"{name}: bytes of the floor / time")
            axes.set_ylabel("% of a copy's bytes per second")
            _bars(axes, mine, lambda row: 100 * row["share_of_copy"])
        else:
            axes.set_title(f"{name}: median")
            axes.set_ylabel("milliseconds")
            _bars(axes, mine, lambda row: 1e3 * row["median_s"])
        axes.legend(fontsize="small", ncols=2)
    result.suptitle(title, fontsize=8, wrap=True)
    return result


def _bars(axes: Axes, rows: list[dict], height: Callable[[dict], float]) -> None:
    """Of all providers, side by side for each workload."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / len(providers)
    for place, provider in enumerate(providers):
        heights = {row["workload"]: height(row) for row in rows if row["provider"] == provider}
        places = [workloads.index(w) + (place - (len(providers) - 1) / 2) * width for w in heights]
        axes.bar(places, heights.values(), width, label=provider, color=_color(place))
    axes.set_xticks(range(len(workloads)), [textwrap.fill(w, 130 // len(workloads)) for w in workloads])


def _growth(axes: Axes, rows: list[dict]) -> None:
    """A line for each provider, both axes logarithmic."""
    for place, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        line = sorted((row for row in rows if row["provider"] == provider), key=lambda row: row["elements"])
        sizes = [row["elements"] for row in line]
        low, median, high = ([1e3 * row[name] for row in line] for name in ("p20_s", "median_s", "p80_s"))
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
