"""Training patches of scans: item i depends on the seed and i only, whoever reads it and when."""

import itertools
import math
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from fmkernels.focalmix.data.dataset import DataSet
from fmkernels.focalmix.data.volume import cut_patch
from fmkernels.focalmix.errors import InputWarning

_AXES = tuple(itertools.permutations(range(3)))  # numbered as in fmkernels.apply_symmetry
_TISSUE = -950  # HU: the lungs and everything denser lie above, the air around the body below
_TRIES = 4
SHARED_MEMORY = Path("/dev/shm")
_BATCHES_PER_WORKER = 2  # that are read ahead
_MAX_OPEN = 256  # scans that a process keeps open: each memory map holds a file descriptor


@dataclass(frozen=True, eq=False)
class _Scan:
    voxels: np.ndarray
    boxes: np.ndarray  # float [n, 6], to place patches around
    ignore: np.ndarray  # float32 [m, 6]


class PatchDataset(Dataset, ABC):
    """Patches of scans: the base of `LabeledPatches` and `UnlabeledPatches`.

    With probability ``positive_fraction`` a box is drawn and a patch placed at random around it, so
    that the patch contains the box (or lies within it, if the box is larger). Otherwise, or if
    there are no boxes, the patch may be anywhere in a scan, preferably in the body. A patch lies
    within its scan, or the scan within the patch, with `volume.AIR` around it.

    An item is a dict:

    - ``image``: int16 [1, D, H, W], HU.
    - ``series``: str.
    - ``corner``: int64 [3], voxel of the resampled scan where the patch begins, z, y, x, as cut.
    - ``flips``: uint8 scalar, the axes that were flipped after the cut: 1 = D, 2 = H, 4 = W; with
      ``rotations``, the code of the symmetry, see `fmkernels.apply_symmetry`.

    Args:
        data: the scans; call ``data.prepare()`` first, or the first reader of each scan resamples
            it.
        series: the series to draw from; background patches are drawn evenly from them.
        patch_size: voxels along z, y, x.
        positive_fraction: probability of a patch around a box, in [0, 1].
        length: number of items.
        seed: any non-negative integer.
        flips: flip each axis with probability 1/2.
        rotations: permute the axes too, so that all 48 symmetries of a cube are equally likely.

    Raises:
        ValueError: an argument is out of its range, a series is not in ``data``, or rotations are
            asked of patches that are no cubes or of voxels that are none.
        InputError: from an item, as `DataSet.volume`.
    """

    def __init__(
        self,
        data: DataSet,
        series: Sequence[str],
        *,
        patch_size: Sequence[int] = (64, 64, 64),
        positive_fraction: float = 0.5,
        length: int,
        seed: int,
        flips: bool = True,
        rotations: bool = False,
    ) -> None:
        def expect(name: str, holds: bool, expected: str, value: Any) -> None:
            if not holds:
                raise ValueError(f"{type(self).__name__}: {name}: expected {expected}, got {value}")

        is_size = len(patch_size) == 3 and all(size == int(size) > 0 for size in patch_size)
        expect("patch_size", is_size, "3 positive integers", patch_size)
        is_probability = 0 <= positive_fraction <= 1
        expect("positive_fraction", is_probability, "a probability in [0, 1]", positive_fraction)
        for name, sides in (("patch_size", patch_size), ("spacing", data.spacing)):
            are_equal = not rotations or len(set(sides)) == 1
            expect(name, are_equal, "three equal numbers with rotations", tuple(sides))
        expect("length", length >= 1, "a positive number of items", length)
        expect("seed", seed >= 0, "a non-negative integer", seed)
        unknown = sorted(set(series).difference(data.series, data.unlabeled))
        expect("series", not unknown, f"series of {data.root}", repr(next(iter(unknown), "")))
        expect("series", len(series) > 0, "one or more", "none")
        self.data = data
        self.series = list(series)
        self.patch_size = tuple(map(int, patch_size))
        self.positive_fraction = positive_fraction
        self.length = length
        self.seed = seed
        self.flips = flips
        self.rotations = rotations
        weights = [self._weights(uid) for uid in self.series]
        self._boxes = [
            (uid, k) for uid, row in zip(self.series, weights, strict=True) for k in range(len(row))
        ]
        joined = np.concatenate(weights, dtype=np.float64)
        if not joined.any():
            self._boxes, joined = [], joined[:0]
        self._cumulative = joined.cumsum() / joined.cumsum()[-1:]
        self._open: dict[str, _Scan] = {}

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.length:
            raise IndexError(
                f"{type(self).__name__}: expected an item of 0 to {self.length - 1}, got {i}"
            )
        rng = np.random.default_rng((self.seed, i))
        if rng.random() < self.positive_fraction and self._boxes:
            uid, k = self._boxes[int(np.searchsorted(self._cumulative, rng.random(), side="right"))]
            scan = self._scan(uid)
            corner = self._corner_around(scan.boxes[k], scan.voxels.shape, rng)
        else:
            uid = self.series[rng.integers(len(self.series))]
            scan = self._scan(uid)
            corner = self._corner_of_background(scan.voxels, rng)
        flipped = rng.random(3) < 0.5 if self.flips else np.zeros(3, dtype=bool)
        number = int(rng.integers(len(_AXES))) if self.rotations else 0
        axes = _AXES[number]
        image = cut_patch(scan.voxels, corner, self.patch_size, flipped, axes)
        return {
            "image": torch.from_numpy(image[None]),
            "series": uid,
            "corner": torch.from_numpy(corner),
            "flips": torch.tensor(
                8 * number + int(flipped @ (1, 2, 4)), dtype=torch.uint8, device="cpu"
            ),
            **self._labels(scan, corner, axes, flipped),
        }

    @abstractmethod
    def _weights(self, uid: str) -> np.ndarray:
        """The relative frequency of each box of a series, [n]."""

    @abstractmethod
    def _read(self, uid: str) -> _Scan: ...

    def _labels(
        self, scan: _Scan, corner: np.ndarray, axes: Sequence[int], flipped: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """The entries of an item that depend on labels."""
        return {}

    def _scan(self, uid: str) -> _Scan:
        """A scan out of the most recently used ones."""
        scan = self._open.pop(uid, None)
        if scan is None:
            scan = self._read(uid)
            if len(self._open) == _MAX_OPEN:
                del self._open[next(iter(self._open))]
        self._open[uid] = scan
        return scan

    def _corner_around(
        self, box: np.ndarray, shape: Sequence[int], rng: np.random.Generator
    ) -> np.ndarray:
        size = np.array(self.patch_size)
        center = (box[:3] + box[3:]).astype(np.float64) / 2
        margin = np.minimum((box[3:] - box[:3]) / 2, size / 2)
        low = np.minimum(np.ceil(center + margin - size), np.floor(center)).astype(np.int64)
        high = np.maximum(np.floor(center - margin).astype(np.int64), low)
        inside = np.array(shape) - size
        return rng.integers(low, high, endpoint=True).clip(
            np.minimum(inside, 0), np.maximum(inside, 0)
        )

    def _corner_of_background(self, voxels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The first of a few random corners with half of the patch in the body, or the best one."""
        inside = np.array(voxels.shape) - self.patch_size
        low, high = np.minimum(inside, 0), np.maximum(inside, 0)
        steps = [max(size // 4, 1) for size in self.patch_size]
        corners = rng.integers(low, high, size=(_TRIES, 3), endpoint=True)
        best, highest = corners[0], -1.0
        for corner in corners:
            axes = zip(corner.tolist(), self.patch_size, steps, strict=True)
            samples = tuple(slice(max(c, 0), c + n, step) for c, n, step in axes)
            tissue = float(np.mean(voxels[samples] > _TISSUE))
            if tissue > highest:
                best, highest = corner, tissue
            if highest > 0.5:
                break
        return best


class LabeledPatches(PatchDataset):
    """Patches around nodules, each drawn equally often, and of the background.

    An item has two more entries than in `PatchDataset`, in voxels of the patch:

    - ``boxes``: float32 [n, 6], z1, y1, x1, z2, y2, x2: nodules whose center lies in the patch,
      clipped to it.
    - ``ignore``: float32 [m, 6], neither object nor background: the parts of excluded findings, and
      of nodules whose center lies outside the patch.
    """

    def _weights(self, uid: str) -> np.ndarray:
        return np.ones(len(self.data.nodules(uid)))

    def _read(self, uid: str) -> _Scan:
        return _Scan(np.asarray(self.data.volume(uid).voxels), *self.data.boxes(uid))

    def _labels(
        self, scan: _Scan, corner: np.ndarray, axes: Sequence[int], flipped: np.ndarray
    ) -> dict[str, torch.Tensor]:
        size = np.array(self.patch_size, dtype=np.float32)
        boxes = np.concatenate([scan.boxes, scan.ignore]) - np.tile(corner, 2).astype(np.float32)
        low, high = boxes[:, :3], boxes[:, 3:]
        center = (low + high) / 2
        is_object = ((center >= 0) & (center < size)).all(axis=1)
        is_object &= np.arange(len(boxes)) < len(scan.boxes)
        low, high = (ends.clip(0, size)[:, axes] for ends in (low, high))
        is_ignored = (high > low).all(axis=1) & ~is_object
        boxes = np.concatenate(
            [np.where(flipped, size - high, low), np.where(flipped, size - low, high)], axis=1
        )
        return {
            "boxes": torch.from_numpy(boxes[is_object]),
            "ignore": torch.from_numpy(boxes[is_ignored]),
        }


class UnlabeledPatches(PatchDataset):
    """Patches around pseudo-boxes and of the background; the findings of ``data`` are never read.

    The pseudo-boxes decide only where patches are placed: no item contains them.

    Args:
        pseudo_boxes: for series ids float [n, 7]: a box in voxels of the resampled scan, and its
            relative frequency (0 or more). A series may be missing.
        options: the other arguments of `PatchDataset`.
    """

    def __init__(
        self,
        data: DataSet,
        series: Sequence[str],
        pseudo_boxes: Mapping[str, np.ndarray],
        **options: Any,
    ) -> None:
        self._pseudo_boxes = {uid: np.asarray(rows) for uid, rows in pseudo_boxes.items()}
        super().__init__(data, series, **options)

    def _weights(self, uid: str) -> np.ndarray:
        return self._pseudo_boxes[uid][:, 6] if uid in self._pseudo_boxes else np.empty(0)

    def _read(self, uid: str) -> _Scan:
        boxes = self._pseudo_boxes.get(uid, np.empty((0, 7)))[:, :6]
        return _Scan(np.asarray(self.data.volume(uid).voxels), boxes, np.empty((0, 6)))


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch of `PatchDataset` items.

    Returns:
        ``image`` int16 [B, 1, D, H, W], ``corner`` int64 [B, 3], ``flips`` uint8 [B]; the other
        entries stay lists of length B.
    """
    batch = {name: [item[name] for item in items] for name in items[0]}
    return batch | {name: default_collate(batch[name]) for name in ("image", "corner", "flips")}


@dataclass(frozen=True)
class _Batches:
    """The items of the batches with these numbers; nothing is stored per batch."""

    numbers: range
    size: int

    def __iter__(self) -> Iterator[list[int]]:
        return (
            list(range(number * self.size, (number + 1) * self.size)) for number in self.numbers
        )

    def __len__(self) -> int:
        return len(self.numbers)


class _Loader(DataLoader):
    """A loader that starts under any default device: torch draws its base seed on that device."""

    def __iter__(self) -> Any:
        with torch.device("cpu"):
            return super().__iter__()


def _workers_that_fit(workers: int, batch_bytes: int) -> int:
    """Fewer workers where their batches would not fit into the shared memory of the machine.

    A container has 64 MB of it by default, and a worker that finds it full is killed.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return workers
    free = shutil.disk_usage(SHARED_MEMORY).free
    fitting = min(workers, max(0, (free // batch_bytes - 1) // _BATCHES_PER_WORKER))
    if fitting < workers:
        needed = (workers * _BATCHES_PER_WORKER + 1) * batch_bytes
        warnings.warn(
            f"{SHARED_MEMORY} has {free >> 20} MB free, {workers} workers need {needed >> 20} MB: "
            f"going on with {fitting}; see docker run --shm-size, or --workers 0",
            InputWarning,
            stacklevel=3,
        )
    return fitting


def patch_loader(
    dataset: PatchDataset,
    *,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Load one batch per step, the same items for any number of workers.

    Step s of rank r has the items from (s * world_size + r) * batch_size on. So all ranks together
    see what one process with the joint batch sees, and a run that resumes at step s sees what the
    uninterrupted run saw. The global random state of torch is not changed.

    Args:
        dataset: its length, divided by the joint batch, gives the number of steps; a remainder is
            dropped.
        batch_size: patches per step and rank.
        start: first step.
        workers: processes that read ahead; 0 reads in the current process. There are fewer, with a
            warning, where the machine has too little shared memory.
        rank: the rank of the current process.
        world_size: number of processes that train together.

    Returns:
        A loader whose batches come from `collate`, in pinned memory if CUDA is available.

    Raises:
        ValueError: an argument is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"patch_loader: batch_size: expected a positive integer, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"patch_loader: rank: expected one below world_size {world_size}, got {rank}"
        )
    steps = len(dataset) // (batch_size * world_size)
    if not 0 <= start <= steps:
        raise ValueError(f"patch_loader: start: expected a step of 0 to {steps}, got {start}")
    workers = _workers_that_fit(workers, 2 * batch_size * math.prod(dataset.patch_size))
    return _Loader(
        dataset,
        batch_sampler=_Batches(
            range(start * world_size + rank, steps * world_size, world_size), batch_size
        ),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
