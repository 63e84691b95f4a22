"""Launch parameters of every kernel, as data: one row per operation and architecture.

The default rows were chosen from the compiled code: registers, instructions per element. On a GPU,
`python -m benchmarks.tune` prints a row for its architecture where that was measured to be faster.
"""

import os
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Launch:
    """Elements per tile (16-byte vectors for mixup3d), warps per program and tiles per program.

    A tile of crop_and_resize3d is positions of one layer, one of its gradient a brick of voxels; a
    program takes tiles along z.

    ``max_registers`` per thread overrides NVIDIA's compiler, whose own lower limit would spill.
    """

    block: int
    num_warps: int
    max_registers: int | None = None
    max_tiles: int = 1
    enough_programs: int = (
        4096  # a program takes more tiles only where at least so many programs are left
    )

    def tiles(self, elements: int) -> int:
        """Tiles per program for so many elements."""
        return max(1, min(self.max_tiles, elements // (self.block * self.enough_programs)))

    @property
    def register_limit(self) -> dict[str, int]:
        """``max_registers`` as an option of a launch; none where there is no limit."""
        return {"maxnreg": self.max_registers} if self.max_registers else {}


DEFAULT = "default"

TABLE: dict[str, dict[str, Launch]] = {
    "object_mixup3d": {
        DEFAULT: Launch(block=512, num_warps=2, max_registers=160),
        "gfx942": Launch(block=512, num_warps=4),
    },
    "predict_targets": {
        DEFAULT: Launch(block=1024, num_warps=4),
    },
    "soft_target_focal_loss": {
        DEFAULT: Launch(block=1024, num_warps=2, max_tiles=8),
    },
    "crop_and_resize3d": {
        DEFAULT: Launch(block=512, num_warps=4, max_tiles=16, enough_programs=512),
        "gfx942": Launch(block=512, num_warps=2, max_tiles=16, enough_programs=512),
    },
    "crop_and_resize3d_backward": {
        DEFAULT: Launch(512, 4, max_registers=128, max_tiles=16, enough_programs=1024),
        "gfx942": Launch(512, 2, max_tiles=16, enough_programs=1024),
    },
    "group_norm3d": {
        DEFAULT: Launch(
            block=2048, num_warps=4, max_registers=160, max_tiles=64, enough_programs=2048
        ),
        "gfx942": Launch(block=2048, num_warps=4, max_tiles=64, enough_programs=2048),
    },
    "mixup3d": {
        DEFAULT: Launch(block=512, num_warps=4),
    },
    "mixup3d_in_place": {
        DEFAULT: Launch(block=512, num_warps=4),
    },
}


@cache
def architecture(device: torch.device) -> str:
    """The name of a device's row: sm_90, gfx942; DEFAULT for what is no GPU."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a device; those of an H100 for what is no GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_parameters(op: str, device: torch.device) -> Launch:
    """The row of ``op`` for this device, or its default row."""
    rows = TABLE[op]
    return rows.get(architecture(device), rows[DEFAULT])


@cache
def debug() -> bool:
    """Whether kernels check values that only the device knows: FMKERNELS_DEBUG=1, read once."""
    return os.environ.get("FMKERNELS_DEBUG") == "1"
