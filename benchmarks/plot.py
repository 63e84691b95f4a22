"""The table and the picture of a benchmark run, from its JSON: nothing in them is typed by hand.

    python -m benchmarks.plot benchmarks/results/cpu/benchmarks.json

writes benchmarks.md and benchmarks.png beside it and prints the table.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.common import OURS

HEADER = ("op", "workload", "phase", "provider", "median ms", "p20 - p80", "GB/s at the floor", "% of a copy",
          f"time / {OURS}", "extra MB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    arguments = parser.parse_args()
    run = json.loads(arguments.json.read_text())
    rows = [entry["extra_info"] for entry in run["benchmarks"]]
    if not rows:
        parser.error(f"{arguments.json}: no benchmark in it")
    text = f"{caption(run, rows)}\n\n{table(rows)}\n"
    arguments.json.with_suffix(".md").write_text(text)
    figure(rows, caption(run, rows)).savefig(arguments.json.with_suffix(".png"), dpi=130)
    print(text)


def caption(run: dict, rows: list[dict]) -> str:
    """Machine, versions, commit and the speed of a copy."""
    machine, commit = run["machine_info"], run["commit_info"]
    name = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"].get("brand_raw", machine["processor"])
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    state = "with changes" if commit["dirty"] else "clean"
    return (
        f"{name}, {machine['threads']} CPU threads; {versions}; commit {commit['id'][:10]} ({state}), "
        f"{run['datetime'][:10]}. A copy moves {rows[0]['copy_bytes_per_s'] / 1e9:.1f} GB/s."
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
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:.1f}"


def key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["workload"], row["phase"]


def figure(rows: list[dict], title: str) -> Figure:
    """One panel per op: the share of a copy's speed that each provider reaches on each workload, in its last phase."""
    ops = sorted({row["op"] for row in rows})
    result = Figure(figsize=(11, 3.2 * len(ops) + 0.6), layout="constrained")
    for op, axes in zip(ops, result.subplots(len(ops), 1, squeeze=False)[:, 0], strict=True):
        mine = [row for row in rows if row["op"] == op]
        phase = "both" if any(row["phase"] == "both" for row in mine) else "forward"
        mine = [row for row in mine if row["phase"] == phase]
        workloads = list(dict.fromkeys(row["workload"] for row in mine))
        providers = list(dict.fromkeys(row["provider"] for row in mine))
        for place, provider in enumerate(providers):
            shares = {row["workload"]: 100 * row["share_of_copy"] for row in mine if row["provider"] == provider}
            places = [workloads.index(w) + (place - (len(providers) - 1) / 2) * 0.8 / len(providers) for w in shares]
            color = matplotlib.color_sequences["tab10"][place % 10]
            axes.bar(places, shares.values(), 0.8 / len(providers), label=provider, color=color)
        axes.set_xticks(range(len(workloads)), workloads)
        axes.set_ylabel("% of a copy's bytes per second")
        axes.set_title(f"{op}, {'forward and backward' if phase == 'both' else phase}: bytes of the floor / time")
        axes.legend(fontsize="small", ncols=2)
    result.suptitle(title, fontsize=8, wrap=True)
    return result


if __name__ == "__main__":
    main()
