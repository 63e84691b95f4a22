"""What the programs of a launch do to memory: bounds, races, and bytes moved.

A pointer given to a kernel carries the number of its tensor in its upper 16 bits (user addresses
need 47 bits). So an access is checked against the tensor that its pointer was made from, even where
the address happens to lie in another one.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
import torch

TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)
PAGE_BITS = 16
DENSE_CELLS = 1 << 22  # larger buffers keep state for touched pages only
FIRST_READ, READ, READ_LANE, WRITE, WRITE_LANE, ATOMIC = range(6)  # rows of Buffer.state
MANY = -1  # a cell read by more than one lane


class KernelFault(AssertionError):
    """A kernel did what is undefined or wrong on a GPU."""


@dataclass
class Traffic:
    """Bytes moved for one tensor, over all launches. `*_once` counts a cell once per launch."""

    read: int = 0
    read_once: int = 0
    written: int = 0
    written_once: int = 0
    atomic: int = 0


@dataclass
class Clock:
    """The progress of a launch.

    Epochs are the spans between barriers, numbered over all programs of the launch.
    """

    epoch: int = 0
    start: int = 0  # the first epoch of the running program
    unfenced: bool = False  # whether the running program has stored a block since its last barrier
    starts: list[int] = field(default_factory=list)
    programs: list[int] = field(default_factory=list)
    # programs whose release the running one has acquired
    known: set[int] = field(default_factory=set)
    # address -> programs that released there
    released: dict[int, set[int]] = field(default_factory=dict)

    def begin(self, program: int) -> None:
        self.epoch += 1
        self.start = self.epoch
        self.starts.append(self.epoch)
        self.programs.append(program)
        self.known, self.unfenced = set(), False

    def barrier(self) -> None:
        self.epoch += 1
        self.unfenced = False

    def program(self, epoch: int) -> int:
        return self.programs[bisect_right(self.starts, epoch) - 1]

    def synchronize(self, address: int) -> None:
        """An acquire-release atomic of this program. Stores of other warps need a barrier."""
        released = self.released.setdefault(address, set())
        self.known |= released
        if not self.unfenced:
            released |= self.known | {self.programs[-1]}


class Buffer:
    """One storage. Its cells have the size of its smallest elements.

    For each launch, a cell remembers who touched it last, and how.
    """

    def __init__(self, lo: int, nbytes: int, cell: int):
        self.lo, self.nbytes, self.cell = lo, nbytes, cell
        self.table: np.ndarray | None = None
        slots = -(-nbytes // cell)
        if slots > DENSE_CELLS:
            self.table = np.full((slots >> PAGE_BITS) + 1, -1, np.int64)
            slots = 0
        self.state = np.zeros((6, slots), np.int32)
        self.ever_written = np.zeros(slots, bool)
        self.dirty = False

    def refine(self, cell: int) -> None:
        """Switch to smaller cells, for a view with smaller elements."""
        finer = Buffer(self.lo, self.nbytes, cell)
        if self.table is None and finer.table is None:
            finer.ever_written = np.repeat(self.ever_written, self.cell // cell)[
                : finer.ever_written.size
            ]
        self.__dict__.update(finer.__dict__)

    def begin_launch(self) -> None:
        if self.dirty:
            self.state[:] = 0
            self.dirty = False

    def slots(self, cells: np.ndarray) -> np.ndarray:
        if self.table is None:
            return cells
        pages = cells >> PAGE_BITS
        missing = np.unique(pages[self.table[pages] < 0])
        if missing.size:
            known = self.ever_written.size >> PAGE_BITS
            self.table[missing] = np.arange(known, known + missing.size)
            room = missing.size << PAGE_BITS
            self.state = np.concatenate([self.state, np.zeros((6, room), np.int32)], axis=1)
            self.ever_written = np.concatenate([self.ever_written, np.zeros(room, bool)])
        return (self.table[pages] << PAGE_BITS) | (cells & ((1 << PAGE_BITS) - 1))

    def _foreign(self, row: int, at: np.ndarray, clock: Clock) -> tuple[int, int] | None:
        """The first of the cells `at` that another program touched, and that program.

        Programs that are ordered by atomics do not count.
        """
        epochs = self.state[row][at]
        lanes = np.flatnonzero((epochs > 0) & (epochs < clock.start))
        for lane in lanes if clock.known else lanes[:1]:
            if (program := clock.program(int(epochs[lane]))) not in clock.known:
                return int(lane), program
        return None

    def _conflict(self, rows: tuple[tuple[int, str], ...], at: np.ndarray, clock: Clock, verb: str):
        for row, done in rows:
            if found := self._foreign(row, at, clock):
                return found[
                    0
                ], f"race: it {verb} a cell that program {found[1]} of the same launch {done}"
        return None

    def _hazard(self, row: int, at: np.ndarray, lanes: np.ndarray, clock: Clock) -> int | None:
        """The first cell that another lane of this program touched since the last barrier."""
        state = self.state
        bad = (state[row][at] == clock.epoch) & (state[row + 1][at] != lanes)
        return int(bad.argmax()) if bad.any() else None

    def read(
        self, cells: np.ndarray, lanes: np.ndarray, clock: Clock
    ) -> tuple[tuple[int, str] | None, int]:
        """Note a load. Returns the fault (position, message), if any, and the cells it adds."""
        at, state = self.slots(cells), self.state
        self.dirty = True
        if fault := self._conflict(
            ((WRITE, "writes"), (ATOMIC, "updates atomically")), at, clock, "reads"
        ):
            return fault, 0
        if (bad := self._hazard(WRITE, at, lanes, clock)) is not None:
            return (
                bad,
                "it reads a cell that another lane of it wrote, without a barrier in between",
            ), 0
        mixed = (state[READ][at] == clock.epoch) & (state[READ_LANE][at] != lanes)
        state[READ_LANE][at] = lanes
        shared = state[READ_LANE][at] != lanes
        if repeated := bool(shared.any()):
            mixed |= shared
        state[READ_LANE][at[mixed]] = MANY
        state[READ][at] = clock.epoch
        new = at[state[FIRST_READ][at] == 0]
        state[FIRST_READ][new] = clock.epoch
        return None, int(np.unique(new).size if repeated else new.size)

    def write(
        self, cells: np.ndarray, lanes: np.ndarray, clock: Clock
    ) -> tuple[tuple[int, str] | None, int]:
        """Note a store. Returns the fault (position, message), if any, and the cells it adds."""
        at, state = self.slots(cells), self.state
        self.dirty = True
        rows = ((WRITE, "writes too"), (FIRST_READ, "reads"), (ATOMIC, "updates atomically"))
        if fault := self._conflict(rows, at, clock, "writes"):
            return fault, 0
        if (bad := self._hazard(READ, at, lanes, clock)) is not None:
            return (
                bad,
                "it writes a cell that another lane of it read, without a barrier in between",
            ), 0
        if (bad := self._hazard(WRITE, at, lanes, clock)) is not None:
            return (
                bad,
                "it writes a cell that another lane of it wrote, without a barrier in between",
            ), 0
        state[WRITE_LANE][at] = lanes
        twice = state[WRITE_LANE][at] != lanes
        if twice.any():
            return (int(twice.argmax()), "two lanes of one store write the same cell"), 0
        new = int(np.count_nonzero(state[WRITE][at] == 0))
        state[WRITE][at] = clock.epoch
        self.ever_written[at] = True
        return None, new

    def update(self, cells: np.ndarray, clock: Clock) -> tuple[tuple[int, str] | None, int]:
        """Note an atomic. Atomics race with plain accesses only, never with each other."""
        at = self.slots(cells)
        self.dirty = True
        if fault := self._conflict(
            ((WRITE, "writes"), (FIRST_READ, "reads")), at, clock, "updates atomically"
        ):
            return fault, 0
        first = at[self.state[ATOMIC][at] == 0]
        self.state[ATOMIC][first] = clock.epoch
        self.ever_written[at] = True
        return None, 0


class View:
    """The part of a buffer that a kernel may touch: an address range, and its elements."""

    def __init__(self, name: str, tensor: torch.Tensor, buffer: Buffer):
        self.name, self.tensor, self.buffer = name, tensor, buffer
        self.lo, self.itemsize = tensor.data_ptr(), tensor.element_size()
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        self.extent = (
            sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
            if tensor.numel()
            else 0
        )
        self.pointer = self.lo
        self.elements: np.ndarray | None = None
        if self.extent != tensor.numel() and self.extent <= DENSE_CELLS:
            gaps = torch.zeros(self.extent, dtype=torch.bool)
            gaps.as_strided(self.shape, self.strides).fill_(True)
            self.elements = gaps.numpy()

    def index(self, cell: int) -> str:
        """The subscript of a cell, for messages."""
        subscript = [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda a: -self.strides[a]):
            if self.strides[axis] and self.shape[axis] > 1:
                subscript[axis] = min(cell // self.strides[axis], self.shape[axis] - 1)
                cell -= subscript[axis] * self.strides[axis]
        return f"'{self.name}'[{', '.join(map(str, subscript))}]"

    def outside(self, offsets: np.ndarray, size: int) -> int | None:
        """The first access of `size` bytes at `offsets` that leaves the tensor, or None."""
        if offsets.min() < 0 or offsets.max() + size > self.extent * self.itemsize:
            return int(((offsets < 0) | (offsets + size > self.extent * self.itemsize)).argmax())
        if (
            self.elements is not None
            and not (inside := self.elements[offsets // self.itemsize]).all()
        ):
            return int(inside.argmin())
        return None


class Memory:
    """All tensors of a checked block, and what its launches did to them."""

    def __init__(self, tensors: dict[str, torch.Tensor], races: bool):
        self.races = races
        self.buffers: dict[int, Buffer] = {}
        self.traffic = {name: Traffic() for name in tensors}
        self.lanes: dict[tuple[int, ...], np.ndarray] = {}
        self.clock = Clock()
        self.views: list[View] = []
        self.named = [View(name, tensor, self._buffer(tensor)) for name, tensor in tensors.items()]
        self.seen: dict[str, dict[tuple, View]] = {
            view.name: {(view.lo, view.shape): view} for view in self.named
        }

    def _buffer(self, tensor: torch.Tensor) -> Buffer:
        storage, cell = tensor.untyped_storage(), tensor.element_size()
        buffer = self.buffers.get(storage.data_ptr())
        if buffer is None or buffer.nbytes != storage.nbytes():
            buffer = self.buffers[storage.data_ptr()] = Buffer(
                storage.data_ptr(), storage.nbytes(), cell
            )
        elif cell < buffer.cell:
            buffer.refine(cell)
        return buffer

    def begin_launch(self) -> None:
        self.clock = Clock()
        self.views = []
        for buffer in self.buffers.values():
            buffer.begin_launch()

    def moved(self) -> int:
        """Bytes moved so far."""
        return sum(t.read + t.written + t.atomic for t in self.traffic.values())

    def bind(self, argument: str, tensor: torch.Tensor) -> int:
        """Add a tensor argument to the launch. Returns the pointer for the kernel."""
        view = View(argument, tensor, self._buffer(tensor))
        for known in self.named:
            if known.buffer is view.buffer and known.lo <= view.lo < known.lo + max(
                known.extent * known.itemsize, 1
            ):
                view.name = known.name
                break
        self.seen.setdefault(view.name, {}).setdefault((view.lo, view.shape), view)
        self.traffic.setdefault(view.name, Traffic())
        self.views.append(view)
        view.pointer = view.lo | (len(self.views) << int(TAG_SHIFT))
        return view.pointer

    def name(self, key: str | torch.Tensor) -> str:
        """The name of a tensor given to `checked` or to a launch."""
        if isinstance(key, str):
            return key
        return next(
            n
            for n, views in self.seen.items()
            for lo, shape in views
            if (lo, shape) == (key.data_ptr(), key.shape)
        )

    def never_written(self, name: str) -> int:
        """Elements of a tensor that no store and no atomic of the checked block has written."""
        count = 0
        given = [view for view in self.named if view.name == name]
        for view in given or self.seen[name].values():
            buffer = view.buffer
            steps = view.itemsize // buffer.cell
            first = (view.lo - buffer.lo) // buffer.cell
            if buffer.table is None:
                written = buffer.ever_written[first : first + view.extent * steps : steps]
                count += int(
                    np.count_nonzero(
                        ~written if view.elements is None else ~written & view.elements
                    )
                )
            else:
                count += view.tensor.numel() - int(np.count_nonzero(buffer.ever_written)) // steps
        return count

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int, ordered: bool = False
    ) -> None:
        """Check and count a load, store or atomic. `ordered` marks an acquire-release atomic."""
        flat, lanes = pointers.reshape(-1), self._lanes(pointers.shape)
        if not mask.all():
            active = np.flatnonzero(np.broadcast_to(mask, pointers.shape))
            flat, lanes = flat[active], lanes[active]
        if not flat.size:
            return
        tags = flat >> TAG_SHIFT
        if (tags == tags[0]).all():
            self._touch(kind, int(tags[0]), flat, lanes, size)
        else:
            for tag in np.unique(tags):
                self._touch(kind, int(tag), flat[tags == tag], lanes[tags == tag], size)
        if ordered and flat.size == 1:
            self.clock.synchronize(int(flat[0]))
        self.clock.unfenced |= kind == "write" and flat.size > 1

    def _lanes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Lane numbers of a block. Blocks of other shapes map to threads differently."""
        shape = tuple(n for n in shape if n != 1)
        if shape not in self.lanes:
            self.lanes[shape] = np.arange(np.prod(shape, dtype=int), dtype=np.int32) + (
                len(self.lanes) << 20
            )
        return self.lanes[shape]

    def _touch(self, kind: str, tag: int, flat: np.ndarray, lanes: np.ndarray, size: int) -> None:
        view = self._view(tag, int(flat[0]))
        offsets = (flat - np.uint64(view.pointer)).view(np.int64)
        if (bad := view.outside(offsets, size)) is not None:
            wider = next((v for v in self.named if v.buffer is view.buffer), view)
            if wider.outside(offsets + (view.lo - wider.lo), size) is not None:
                raise KernelFault(
                    f"out of bounds: it {kind}s '{view.name}' at element "
                    f"{offsets[bad] // view.itemsize:+d} from its first; "
                    f"shape {view.shape}, strides {view.strides}"
                )
        if (offsets & (size - 1)).any():
            raise KernelFault(
                f"misaligned: it {kind}s {size} bytes of '{view.name}' "
                f"at an offset that is not a multiple of {size} bytes"
            )
        traffic, nbytes, once = self.traffic[view.name], flat.size * size, 0
        if self.races:
            buffer = view.buffer
            cells = (offsets + (view.lo - buffer.lo)) // buffer.cell
            if (steps := size // buffer.cell) > 1:
                cells, lanes = (cells[:, None] + np.arange(steps)).ravel(), np.repeat(lanes, steps)
            note = {"read": buffer.read, "write": buffer.write}.get(kind)
            fault, new = (
                note(cells, lanes, self.clock) if note else buffer.update(cells, self.clock)
            )
            if fault:
                raise KernelFault(
                    f"{fault[1]}: {view.index(int(offsets[fault[0] // steps] // view.itemsize))}"
                )
            once = new * buffer.cell
        if kind == "read":
            traffic.read += nbytes
            traffic.read_once += once
        elif kind == "write":
            traffic.written += nbytes
            traffic.written_once += once
        else:
            traffic.atomic += nbytes

    def _view(self, tag: int, address: int) -> View:
        if 0 < tag <= len(self.views):
            return self.views[tag - 1]
        for view in [*self.views, *self.named]:
            if view.lo <= address < view.lo + view.extent * view.itemsize:
                return View(view.name, view.tensor, view.buffer)
        raise KernelFault(
            f"out of bounds: the address {address:#x} was not made from a tensor of the launch"
        )
