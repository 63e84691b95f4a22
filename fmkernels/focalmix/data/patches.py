"""Training patches of LUNA16's scans: item i depends on the seed and i only, whoever reads it and in which order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from fmkernels.focalmix.data.luna16 import AIR, LUNA16

_TISSUE = -950  # HU: lung and all that is denser lies above, the air around the body below
_TRIES = 4
_MAX_OPEN = 256  # memory maps a process keeps: each holds a file descriptor


@dataclass(frozen=True, eq=False)
class _Scan:
    voxels: np.ndarray
    nodules: np.ndarray  # float32 [n, 6]
    excluded: np.ndarray  # float32 [m, 6]


class PatchDataset(Dataset):
    """Patches around nodules and of the background.

    With probability ``positive`` a nodule is drawn and a patch placed at random around it, so that it lies in it whole
    (or fills it, where it is larger); else a patch anywhere in a scan, preferring the body to the air around it. A
    patch lies within its scan; a scan that is smaller lies within its patch, and `luna16.AIR` is around it. Where no
    series has a nodule, all patches are background.

    An item is a dict:

    - ``image``: int16 [1, D, H, W], HU.
    - ``boxes``: float32 [n, 6], z1, y1, x1, z2, y2, x2 in voxels of the patch, half-open: nodules whose centre lies in
      the patch, clipped to it.
    - ``ignore``: float32 [m, 6]: what is neither object nor background: the parts within the patch of excluded
      findings, and of nodules whose centre lies outside.
    - ``series``: str; ``corner``: int64 [3], voxel of the resampled scan where the unflipped patch begins, z, y, x.
    - ``flips``: uint8 scalar, the axes that were flipped after the cut: 1 = D, 2 = H, 4 = W.

    Args:
        data: the scans; run ``data.prepare()`` before, or the first reader of each scan resamples it.
        series: the series to draw from; background patches are drawn evenly from them.
        patch_size: voxels along z, y, x.
        positive: probability of a patch around a nodule, in [0, 1].
        balance: draw nodules evenly ("nodule"), or evenly a scan that has any and then one of its nodules ("scan").
        length: number of items.
        seed: any non-negative integer.
        flips: flip each axis with probability 1/2.
        around: draw patches around these boxes instead of the nodules: for series ids float [n, 7], a box in voxels of
            the resampled scan and the weight, not negative, with which it is drawn.

    Raises:
        ValueError: an argument is out of its range, or a series is not in ``data``.
        InputError: from an item, as `LUNA16.volume`.
    """

    def __init__(
        self,
        data: LUNA16,
        series: Sequence[str],
        *,
        patch_size: Sequence[int] = (64, 64, 64),
        positive: float = 0.5,
        balance: Literal["nodule", "scan"] = "nodule",
        length: int,
        seed: int,
        flips: bool = True,
        around: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if len(patch_size) != 3 or not all(size == int(size) > 0 for size in patch_size):
            raise ValueError(
                f"PatchDataset: patch_size: expected 3 positive integers, got {patch_size}"
            )
        if not 0 <= positive <= 1:
            raise ValueError(
                f"PatchDataset: positive: expected a probability in [0, 1], got {positive}"
            )
        if balance not in ("nodule", "scan"):
            raise ValueError(f"PatchDataset: balance: expected 'nodule' or 'scan', got {balance!r}")
        if length < 1:
            raise ValueError(
                f"PatchDataset: length: expected a positive number of items, got {length}"
            )
        if seed < 0:
            raise ValueError(f"PatchDataset: seed: expected a non-negative integer, got {seed}")
        if unknown := sorted(set(series).difference(data.series)):
            raise ValueError(
                f"PatchDataset: series: expected series of {data.root}, got {unknown[0]!r}"
            )
        if len(series) == 0:
            raise ValueError("PatchDataset: series: expected one or more, got none")
        self.data = data
        self.series = list(series)
        self.patch_size = tuple(map(int, patch_size))
        self.positive = positive
        self.length = length
        self.seed = seed
        self.flips = flips
        self._around = around
        centres = data.nodules if around is None else lambda uid: around.get(uid, ())
        counts = np.array([len(centres(uid)) for uid in self.series])
        self._places = [
            (uid, k) for uid, count in zip(self.series, counts, strict=True) for k in range(count)
        ]
        weights = np.repeat(
            1 / counts.clip(1) if balance == "scan" else np.ones(len(counts)), counts
        )
        if around is not None:
            weights = weights * [around[uid][k, 6] for uid, k in self._places]
        if not weights.any():
            self._places, weights = [], weights[:0]
        self._chances = weights.cumsum() / weights.cumsum()[-1:]
        self._open: dict[str, _Scan] = {}

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.length:
            raise IndexError(f"PatchDataset: expected an item of 0 to {self.length - 1}, got {i}")
        rng = np.random.default_rng((self.seed, i))
        if rng.random() < self.positive and self._places:
            uid, k = self._places[int(np.searchsorted(self._chances, rng.random(), side="right"))]
            scan = self._scan(uid)
            box = scan.nodules[k] if self._around is None else self._around[uid][k, :6]
            corner = self._corner_around(box, scan.voxels.shape, rng)
        else:
            uid = self.series[rng.integers(len(self.series))]
            scan = self._scan(uid)
            corner = self._corner_of_background(scan.voxels, rng)
        flipped = rng.random(3) < 0.5 if self.flips else np.zeros(3, dtype=bool)
        boxes, ignore = self._boxes(scan, corner, flipped)
        return {
            "image": torch.from_numpy(self._cut(scan.voxels, corner, flipped)[None]),
            "boxes": torch.from_numpy(boxes),
            "ignore": torch.from_numpy(ignore),
            "series": uid,
            "corner": torch.from_numpy(corner),
            "flips": torch.tensor(int(flipped @ (1, 2, 4)), dtype=torch.uint8),
        }

    def _scan(self, uid: str) -> _Scan:
        scan = self._open.pop(uid, None)
        if scan is None:
            volume = self.data.volume(uid)
            nodules, excluded = (
                volume.boxes(self.data.nodules(uid)),
                volume.boxes(self.data.excluded(uid)),
            )
            scan = _Scan(np.asarray(volume.voxels), nodules, excluded)
            if len(self._open) == _MAX_OPEN:
                del self._open[next(iter(self._open))]
        self._open[uid] = scan
        return scan

    def _corner_around(
        self, box: np.ndarray, shape: Sequence[int], rng: np.random.Generator
    ) -> np.ndarray:
        size = np.array(self.patch_size)
        centre = (box[:3] + box[3:]).astype(np.float64) / 2
        margin = np.minimum((box[3:] - box[:3]) / 2, size / 2)
        low = np.minimum(np.ceil(centre + margin - size), np.floor(centre)).astype(np.int64)
        high = np.maximum(np.floor(centre - margin).astype(np.int64), low)
        inside = np.array(shape) - size
        return rng.integers(low, high, endpoint=True).clip(
            np.minimum(inside, 0), np.maximum(inside, 0)
        )

    def _corner_of_background(self, voxels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        inside = np.array(voxels.shape) - self.patch_size
        low, high = np.minimum(inside, 0), np.maximum(inside, 0)
        steps = [max(size // 4, 1) for size in self.patch_size]
        corners = rng.integers(low, high, size=(_TRIES, 3), endpoint=True)
        best, most = corners[0], -1.0
        for corner in corners:
            region = _region(corner, self.patch_size, steps)
            tissue = float(np.mean(voxels[region] > _TISSUE))
            if tissue > most:
                best, most = corner, tissue
            if most > 0.5:
                break
        return best

    def _boxes(
        self, scan: _Scan, corner: np.ndarray, flipped: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The boxes and what to ignore, in voxels of the patch."""
        size = np.array(self.patch_size, dtype=np.float32)
        both = np.concatenate([scan.nodules, scan.excluded]) - np.tile(corner, 2).astype(np.float32)
        low, high = both[:, :3], both[:, 3:]
        centre = (low + high) / 2
        held = ((centre >= 0) & (centre < size)).all(axis=1) & (
            np.arange(len(both)) < len(scan.nodules)
        )
        low, high = low.clip(0, size), high.clip(0, size)
        cut = (high > low).all(axis=1) & ~held
        both = np.concatenate(
            [np.where(flipped, size - high, low), np.where(flipped, size - low, high)], axis=1
        )
        return both[held], both[cut]

    def _cut(self, voxels: np.ndarray, corner: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """The patch int16 [D, H, W], flipped, with air where there is no scan."""
        patch = np.full(self.patch_size, AIR, dtype=np.int16)
        unflipped = patch[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
        end = np.minimum(corner + self.patch_size, voxels.shape)
        begin = np.maximum(corner, 0)
        target = tuple(slice(a, b) for a, b in zip(begin - corner, end - corner, strict=True))
        unflipped[target] = voxels[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
        return patch


def _region(corner: np.ndarray, size: Sequence[int], steps: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(max(c, 0), c + n, step)
        for c, n, step in zip(corner.tolist(), size, steps, strict=True)
    )


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch of `PatchDataset` items.

    Returns:
        ``image`` int16 [B, 1, D, H, W], ``corner`` int64 [B, 3], ``flips`` uint8 [B]; ``boxes``, ``ignore`` and
        ``series`` stay lists of B.
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


def patch_loader(
    dataset: PatchDataset,
    *,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Load one batch a step, the same items whatever the number of workers.

    Step s of rank r has the items from (s * world_size + r) * batch_size on, so that the ranks see together what one
    process with the joint batch sees, and a run that resumes at step s sees what the uninterrupted run saw. The global
    random state of torch is left alone.

    Args:
        dataset: its length, divided by the joint batch, gives the number of steps; a rest is dropped.
        batch_size: patches a step and rank.
        start: first step.
        workers: processes that read ahead; 0 reads in this one.
        rank: this process, of ``world_size``.
        world_size: number of processes that train together.

    Returns:
        A loader whose batches are as `collate` makes them, in pinned memory where CUDA is there.

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
    return DataLoader(
        dataset,
        batch_sampler=_Batches(
            range(start * world_size + rank, steps * world_size, world_size), batch_size
        ),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
