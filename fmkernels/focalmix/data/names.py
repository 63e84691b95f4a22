"""The names by which tables call scans."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from fmkernels.focalmix.data.annotations import Annotation
from fmkernels.focalmix.data.formats import scan_name
from fmkernels.focalmix.errors import InputError


class ScanNames:
    """The names by which a table may call each scan of a folder.

    Args:
        root: the folder.
        paths: the scans below it by their ids.
    """

    def __init__(self, root: Path, paths: Mapping[str, Path]) -> None:
        self.paths = paths
        self.whole: dict[str, str] = {}  # whole path in the folder -> id
        self.all: dict[str, list[str]] = {}
        siblings = Counter(path.parent for path in paths.values())
        for uid, path in paths.items():
            relative = path.relative_to(root)
            whole = {relative.as_posix(), _stem(relative)}
            names = {path.name, scan_name(path)} | whole
            if path.parent != root and siblings[path.parent] == 1:
                names |= {path.parent.name, relative.parent.as_posix()}
            self.whole |= dict.fromkeys(whole, uid)
            for name in names:
                self.all.setdefault(name, []).append(uid)
        self.whole |= {uid: uid for uid in paths}

    @classmethod
    def of_ids(cls, ids: Iterable[str]) -> "ScanNames":
        """The names of scans of which nothing but their ids is known."""
        return cls(Path(), {uid: Path(uid.lstrip("/")) for uid in ids})

    def find(self, name: str, where: str) -> str | None:
        """The id of the scan of a name; None if there is none.

        The whole path in the folder comes first; it may follow other folders, as on another disk.
        Then come the file, or a folder that holds nothing else, if only one scan has the name.

        Raises:
            InputError: two scans have the name.
        """
        found = self._find(name, where)
        return None if found is None else found[0]

    def by_scan(
        self, rows: Iterable[Annotation]
    ) -> tuple[dict[str, list[Annotation]], list[Annotation]]:
        """The rows of a table by the ids of their scans, and those that name no scan.

        Raises:
            InputError: a row names two scans, or two rows name one scan as if it were two.
        """
        found: dict[str, list[Annotation]] = {}
        lost = []
        first: dict[str, tuple[str, Annotation]] = {}
        for row in rows:
            match = self._find(row.scan, row.where)
            if match is None:
                lost.append(row)
                continue
            uid, before = match
            found.setdefault(uid, []).append(row)
            if before is None:
                continue
            known, other = first.setdefault(uid, (before, row))
            if known != before:
                raise InputError(
                    f"{row.where}: expected one path for the scan {uid}, got {row.scan!r} and, in "
                    f"{other.where.rpartition(', ')[2]}, {other.scan!r}; are these two scans?"
                )
        return found, lost

    def hint(self, name: str) -> str:
        """The scan that a name may stand for that is no scan's; see `hints`."""
        known = sorted(name for name, uids in self.all.items() if len(uids) == 1)
        return hints([name], known).get(name, "")

    def _find(self, name: str, where: str) -> tuple[str, str | None] | None:
        """The id of a scan, and the folders before its whole path; None where it is not whole."""
        path = PurePosixPath(name.replace("\\", "/"))
        spellings = [path.parts, PurePosixPath(_stem(path)).parts]
        for parts in spellings:
            if uid := self.whole.get("/".join(parts)):
                return uid, ""
        found = self.all.get(str(path)) or self.all.get(_stem(path), [])
        if len(found) > 1:
            raise InputError(
                f"{where}: expected the name of one scan, got {name!r}, which is "
                f"{self.paths[found[0]]} and {self.paths[found[1]]}; name it with its folder"
            )
        if found:
            return found[0], None
        for first in range(1, len(path.parts)):
            for parts in spellings:
                if uid := self.whole.get("/".join(parts[first:])):
                    return uid, "/".join(parts[:first])
        return None


def hints(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """For names, the known ones that they may stand for: zeros, case, folders or suffix differ.

    Of several such names, it is one with the most folders in common.
    """

    def parts(name: str) -> list[str]:
        """The parts of a path, the last one first."""
        folder, _, name = name.strip().replace("\\", "/").rpartition("/")
        own = [scan_name(name), *folder.split("/")[::-1]]
        return [re.sub(r"(?<!\d)0+(?=\d)", "", part).lower() for part in own]

    def shared(*paths: list[str]) -> int:
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*paths, strict=False))
        return len(list(pairs))

    alike: dict[str, list[str]] = {}
    for name in known:
        alike.setdefault(parts(name)[0], []).append(name)
    found = {}
    for name in names:
        given = parts(name)
        if near := alike.get(given[0]):
            found[name] = f" (is it {max(near, key=lambda name: shared(parts(name), given))}?)"
    return found


def _stem(path: Path | PurePosixPath) -> str:
    """A path without the suffix of its scan."""
    return (path.parent / scan_name(path.name)).as_posix()
