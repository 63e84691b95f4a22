"""Compile a kernel ahead of time and read its machine code.

Reports registers, spills, the width of memory accesses and the instructions on the main path.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton

from .driver import Variant

Line = tuple[str, int]  # file, without its folder, which is where the code was compiled; number
Lines = tuple[str, int, int]  # file, the first and the last

WIDTH = {
    "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16,
    "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    op: str
    predicated: bool
    target: str | None  # the label of a branch
    falls_through: bool
    access: tuple[str, int] | None  # global memory: ("load" or "store", bits per thread)
    line: Line | None = None  # of an access


@dataclass(frozen=True)
class MainPath:
    """The path from entry to exit with the widest global accesses; unconditional ones count double.

    In a kernel that also has a masked tail this is the unmasked path. The longest of equal paths
    counts. A loop counts once, a call as one instruction. After an atomic that is in no loop, the
    shortest way to the exit counts: what the program that finishes last does for all is left out.
    `loops` are those that no other loop of the path contains, in order, each with the loops inside
    it.
    """

    instructions: int
    loads: dict[int, int]  # bits of an access -> number
    stores: dict[int, int]
    loops: tuple[MainPath, ...] = ()
    transcendental: int = 0  # instructions of the unit for reciprocals, exponentials and the like
    double: int = 0  # instructions of the units for float64

    @property
    def loop(self) -> MainPath | None:
        """The longest loop."""
        return max(self.loops, key=lambda loop: loop.instructions, default=None)


@dataclass(frozen=True)
class Compiled:
    """One variant on one target. Registers are per thread (on AMD: vector registers)."""

    registers: int
    scalar_registers: int | None
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    conversions: int  # ttg.convert_layout in the final Triton IR
    threads: int
    instructions: int  # of all paths
    loads: dict[int, int]  # of all paths: bits per thread -> number of instructions
    stores: dict[int, int]
    main: MainPath | None  # None on AMD, where an exec mask replaces control flow

    def narrow(self, bits: int = 128) -> int:
        """Loads and stores of fewer bits per thread, on the main path (on AMD: on all paths)."""
        path = self.main or self
        return sum(
            n for widths in (path.loads, path.stores) for width, n in widths.items() if width < bits
        )

    @classmethod
    def from_json(cls, data: dict) -> Compiled:
        def widths(d: dict) -> dict[int, int]:
            return {int(k): v for k, v in d.items()}

        def parsed(d: dict) -> dict:
            return {**d, "loads": widths(d["loads"]), "stores": widths(d["stores"])}

        def path(d: dict | None) -> MainPath | None:
            return d and MainPath(**{**parsed(d), "loops": tuple(map(path, d["loops"]))})

        return cls(**{**parsed(data), "main": path(data["main"])})


def compile_variant(variant: Variant, without: tuple[Lines, ...] = ()) -> Compiled:
    """Compile a recorded variant and read its machine code. Triton's cache keeps both.

    The main path has no access to memory that comes from lines in `without`.
    """
    kernel = triton.compile(variant.source, target=variant.target, options=variant.options)
    key = f"{kernel.hash}{without}".encode()
    digest = hashlib.sha256(Path(__file__).read_bytes() + key).hexdigest()
    cached = Path(triton.knobs.cache.dir) / "main-paths" / f"{digest}.json"
    if not cached.exists():
        nvidia = variant.target.backend == "cuda"
        result = _nvidia(kernel, without) if nvidia else _amd(kernel)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False) as file:
            json.dump(asdict(result), file)
        Path(file.name).replace(cached)
    return Compiled.from_json(json.loads(cached.read_text()))


def _nvidia(kernel, without: tuple[Lines, ...]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", "-g", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code = parse(sass, _sass)
    spills = Counter(
        i.op for i in code if isinstance(i, Instruction) and i.op.startswith(("LDL", "STL"))
    )
    return _result(
        kernel,
        code,
        without,
        registers=registers,
        scalar_registers=None,
        spill_bytes=sum(_sass_bits(op) // 8 * n for op, n in spills.items()),
        stack_bytes=stack,
    )


def _amd(kernel) -> Compiled:
    text = kernel.asm["amdgcn"]

    def count(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return _result(
        kernel,
        parse(text.split(".Lfunc_end0")[0], _gcn),
        (),
        registers=count("vgpr_count"),
        scalar_registers=count("sgpr_count"),
        spill_bytes=4 * (count("vgpr_spill_count") + count("sgpr_spill_count")),
        stack_bytes=count("private_segment_fixed_size"),
    )


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _result(
    kernel, code: list[Instruction | str], without: tuple[Lines, ...], **figures
) -> Compiled:
    instructions = [i for i in code if isinstance(i, Instruction)]
    loads, stores = _widths(instructions)
    return Compiled(
        **figures,
        shared_bytes=kernel.metadata.shared,
        conversions=kernel.asm["ttgir"].count("ttg.convert_layout"),
        threads=kernel.metadata.num_warps * kernel.metadata.target.warp_size,
        instructions=len(instructions),
        loads=loads,
        stores=stores,
        main=main_path(code, without) if kernel.metadata.target.backend == "cuda" else None,
    )


def _widths(instructions: list[Instruction]) -> tuple[dict[int, int], dict[int, int]]:
    accesses = Counter(i.access for i in instructions if i.access)
    return tuple(
        {bits: n for (kind, bits), n in sorted(accesses.items()) if kind == k}
        for k in ("load", "store")
    )


# --- assembly ------------------------------------------------------------------------------------


def parse(text: str, instruction: Callable[[str], Instruction | None]) -> list[Instruction | str]:
    """Labels (as strings) and instructions, in order."""
    code: list[Instruction | str] = []
    source: Line | None = None
    for line in text.splitlines():
        if place := re.match(r'\s*//## File "(.*)", line (\d+)', line):
            source = Path(place[1]).name, int(place[2])
        elif label := re.match(r"(\.?[\w$]+):", line):
            code.append(label[1])
        elif found := instruction(line):
            code.append(replace(found, line=source) if found.access else found)
    return code


def _sass(line: str) -> Instruction | None:
    found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)", line)
    if not found or found[2] == "NOP":
        return None
    predicate, op, rest = found.groups()
    stem = op.split(".")[0]
    # a call of a local label is a branch to where none reaches
    branches = stem == "BRA" or (stem == "CALL" and "`(.L_" in rest)
    # BRA.U has its predicate among the operands
    branch = re.match(r"\s*([!\w]+,)?.*`\((\S+?)\)", rest) if branches else None
    kind = {"LDG": "load", "STG": "store"}.get(stem)
    ends = branches or stem in ("BRX", "EXIT", "RET")
    ends = ends and not predicate and not (branch and branch[1])
    return Instruction(
        op, bool(predicate), branch and branch[2], not ends, kind and (kind, _sass_bits(op))
    )


def _sass_bits(op: str) -> int:
    found = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", op)
    return int(found[1]) if found else 32


def _gcn(line: str) -> Instruction | None:
    found = re.match(r"\t((?:s|v|global|buffer|flat|ds|scratch)_\w+)", line)
    if not found:
        return None
    memory = re.match(r"(?:global|buffer|flat)_(load|store)_([a-z0-9]+)", found[1])
    return Instruction(found[1], False, None, True, memory and (memory[1], WIDTH[memory[2]]))


def main_path(code: list[Instruction | str], without: tuple[Lines, ...] = ()) -> MainPath:
    """Split the code into basic blocks and find the path that MainPath describes."""
    blocks: list[list[Instruction]] = [[]]
    names: dict[str, int] = {}
    counted = False  # an atomic came before
    for item in code:
        if blocks[-1] and (
            isinstance(item, str)
            or blocks[-1][-1].target
            or not blocks[-1][-1].falls_through
            or (counted and blocks[-1][-1].op == "EXIT")
        ):
            blocks.append([])
        if isinstance(item, str):
            names[item] = len(blocks) - 1
        else:
            blocks[-1].append(item)
            counted |= item.op.startswith("ATOM")

    def is_left_out(i: Instruction) -> bool:
        return i.line is not None and any(
            i.line[0] == file and first <= i.line[1] <= last for file, first, last in without
        )

    left_out = {b for b, instructions in enumerate(blocks) if any(map(is_left_out, instructions))}

    def successors(block: int) -> list[int]:
        last = blocks[block][-1] if blocks[block] else None
        following = (
            [block + 1] if (last is None or last.falls_through) and block + 1 < len(blocks) else []
        )
        following += [names[last.target]] if last and last.target in names else []
        return [onward(s) for s in following]

    def onward(block: int) -> int:
        """Where a block leads that does nothing but branch, as at the end of a loop."""
        only = blocks[block][0] if len(blocks[block]) == 1 else None
        if only is None or only.falls_through or only.target not in names:
            return block
        return block if names[only.target] == block else names[only.target]

    def may_end(block: int) -> bool:
        return not successors(block) or any(i.op == "EXIT" for i in blocks[block])

    def reachable(block: int) -> set[int]:
        found, new = set(), [block]
        while new:
            new = [s for s in successors(new.pop()) if s not in found] + new
            found.update(new)
        return found

    after_atomics: set[int] = set()
    for block, instructions in enumerate(blocks):
        if any(i.op.startswith("ATOM") for i in instructions):
            after = reachable(block)
            after_atomics |= after if block not in after else set()

    def way_out(block: int) -> list[int]:
        queue = [(len(blocks[block]), [block])]
        while not may_end((shortest := heapq.heappop(queue))[1][-1]):
            length, path = shortest
            for s in successors(path[-1]):
                if s not in path:
                    heapq.heappush(queue, (length + len(blocks[s]), [*path, s]))
        return shortest[1]

    best: dict[int, tuple[float, int, list[int]]] = {}

    def visit(block: int, above: frozenset[int]) -> tuple[float, int, list[int]]:
        if block in left_out:
            best[block] = -math.inf, 0, [block]
        if block not in best and block in after_atomics:
            path = way_out(block)
            best[block] = 0, sum(len(blocks[b]) for b in path), path
        if block not in best:
            seen = above | {block}
            following = [s for s in successors(block) if s not in seen]
            if not following and not may_end(block):  # the end of a loop that is left at its head
                following = [n for s in successors(block) for n in successors(s) if n not in seen]
            end = (0.0 if may_end(block) else -math.inf, 0, [])
            weight, length, rest = max([end, *(visit(s, seen) for s in following)])
            weight += sum(i.access[1] ** 2 * (2 - i.predicated) for i in blocks[block] if i.access)
            best[block] = weight, length + len(blocks[block]), [block, *rest]
        return best[block]

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 4 * len(blocks) + 1000))
    path = visit(0, frozenset())[2]
    back = [
        (path.index(s), i)
        for i, block in enumerate(path)
        for s in successors(block)
        if s in path[: i + 1]
    ]

    def count(code: list[Instruction], *stems: str) -> int:
        return sum(i.op.startswith(stems) for i in code)

    def figured(first: int, last: int, back: list[tuple[int, int]]) -> MainPath:
        inside = [(a, b) for a, b in back if first <= a and b <= last]
        outermost = [
            (a, b)
            for a, b in inside
            if not any(c <= a and b <= d for c, d in inside if (c, d) != (a, b))
        ]
        loops = [figured(a, b, [loop for loop in inside if loop != (a, b)]) for a, b in outermost]
        code = [i for block in path[first : last + 1] for i in blocks[block]]
        return MainPath(
            len(code),
            *_widths(code),
            tuple(loops),
            transcendental=count(code, "MUFU"),
            double=count(code, "DADD", "DMUL", "DFMA", "DSETP"),
        )

    return figured(0, len(path) - 1, sorted(set(back)))
