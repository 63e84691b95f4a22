"""Label maps: segmentations in the formats of scans, often stored next to them."""

import re
from collections.abc import Iterable
from pathlib import Path

from fmkernels.focalmix.data.formats import check_header, scan_name
from fmkernels.focalmix.data.headers import HU_TYPE, Header
from fmkernels.focalmix.errors import InputError

_NAMES = re.compile(r"(^|[^a-z])(seg|segmentation|mask|label|labelmap)s?([^a-z]|$)", re.I)
_FOLDERS = re.compile(r"(seg|segmentation|mask|label)s?(tr|ts)?", re.I)
_FEW = 5  # scans in the folder of a patient
_LABELS = 255  # the largest label


def label_maps(root: Path, scans: Iterable[Path]) -> set[Path]:
    """The label maps among the scans below a folder; none where all would be.

    They hold integers of 0 to 255, or have a type that holds no HU. They are looked for where names
    of files or folders say so, and in folders with few scans among those on one grid.
    """
    folders: dict[Path, list[Path]] = {}
    for path in scans:
        folders.setdefault(path if path.is_dir() else path.parent, []).append(path)
    found: set[Path] = set()
    for folder, paths in folders.items():
        files = [path for path in paths if path != folder]
        found |= {path for path in files if _says_labels(path.relative_to(root)) and _is_map(path)}
        if 2 <= len(paths) <= _FEW:
            rest = [path for path in files if path not in found]
            found |= _maps_beside(rest, has_series=folder in paths)
    return found if len(found) < sum(map(len, folders.values())) else set()


def _maps_beside(files: Iterable[Path], has_series: bool) -> set[Path]:
    """The label maps of a folder; ``has_series``: it is that of a DICOM series, too."""
    headers = {path: _header(path) for path in files}
    grids = [(header.shape, header.spacing, header.origin) for header in headers.values() if header]
    return {
        path
        for path, header in headers.items()
        if (
            has_series
            or (header is None and grids)
            or (header and grids.count((header.shape, header.spacing, header.origin)) > 1)
        )
        and _is_map(path)
    }


def _says_labels(path: Path) -> bool:
    in_folder = any(_FOLDERS.fullmatch(part) for part in path.parent.parts)
    return in_folder or bool(_NAMES.search(scan_name(path)))


def _header(path: Path) -> Header | None:
    try:
        return check_header(path)
    except (InputError, OSError):
        return None


def _is_map(path: Path) -> bool:
    try:
        voxels = check_header(path).read()
    except (InputError, OSError) as error:
        return HU_TYPE in str(error)
    return voxels.dtype.kind == "i" and bool(voxels.min() >= 0 and voxels.max() <= _LABELS)
