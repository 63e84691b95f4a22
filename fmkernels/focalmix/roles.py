"""The scans of a run by their role, and digests of its data."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.data.dataset import DataSet
from fmkernels.focalmix.data.own import open_data
from fmkernels.focalmix.errors import InputError, InputWarning
from fmkernels.focalmix.files import write_text

DATA = "data.json"
"""Digests of the data of a run, in its folder."""


class Scans(NamedTuple):
    """Series ids by their role in a run."""

    train: list[str]
    unlabeled: list[str]
    validation: list[str]
    test: list[str]


def open_scans(config: Config, root: str | Path, unlabeled: Sequence[str]) -> DataSet:
    """Open the subsets of a data set that a run uses, and folders of unlabeled scans."""
    return open_data(
        root,
        spacing=config.spacing,
        subsets=[*config.train_subsets, *config.validation_subsets, *config.test_subsets],
        cache=config.cache,
        coordinates=config.coordinates,
        unlabeled=unlabeled,
    )


def choose_scans(config: Config, data: DataSet) -> Scans:
    """The scans of a run by their role; a supervised run has no unlabeled ones.

    Raises:
        InputError: there are too few scans, or a role has no nodule.
    """
    subsets = {
        "train": config.train_subsets,
        "validation": config.validation_subsets,
        "test": config.test_subsets,
    }
    scans = {
        role: [uid for uid in data.series if data.subset(uid) in numbers]
        for role, numbers in subsets.items()
    }
    if not data.series:
        if data.annotations is None:
            raise InputError(
                f"{data.root}: expected scans with labels, found no table of them; write "
                "annotations.csv or .json"
            )
        raise InputError(
            f"{data.annotations}: expected a row for each scan that was read, found no row of a "
            "scan"
        )
    for role, numbers in subsets.items():
        if not numbers or scans[role]:
            continue
        folds = sorted({data.subset(uid) for uid in data.series})
        found = f"{role}_subsets: no scans in {numbers}; the scans with labels are in {folds}"
        if role == "train":
            raise InputError(f"{found}; choose others, or give a column fold")
        without = "evaluation" if role == "test" else role
        warnings.warn(f"{found}: training goes without {without}", InputWarning, stacklevel=2)
    train, rng = scans["train"], np.random.default_rng(config.seed)
    left: list[str] = []
    if config.labeled is not None:
        if config.labeled > len(train):
            raise InputError(
                f"labeled: expected at most {len(train)} training scans, got {config.labeled}"
            )
        order = rng.permutation(len(train))
        scans["train"] = [train[i] for i in sorted(order[: config.labeled])]
        left = [train[i] for i in order[config.labeled :]]
    others = [*left, *data.unlabeled]
    if data.unlabeled:
        others = [others[i] for i in rng.permutation(len(others))]
    if config.method == "focalmix" and not others:
        raise InputError(
            f"labeled: expected fewer than the {len(train)} training scans, so that the others are "
            f"unlabeled, got {config.labeled or 'all'}; --unlabeled-data gives others"
        )
    asked = config.unlabeled or 0
    if (config.labeled is not None or config.method == "focalmix") and len(others) < asked:
        raise InputError(
            f"unlabeled: expected at most the {len(others)} other training scans, got {asked}"
        )
    chosen = set(others[: config.unlabeled] if config.method == "focalmix" else ())
    scans["unlabeled"] = [uid for uid in (*train, *data.unlabeled) if uid in chosen]
    for role, numbers in subsets.items():
        if scans[role] and not any(len(data.nodules(uid)) for uid in scans[role]):
            by_seed = role == "train" and config.labeled is not None
            where = f"the scans chosen by seed {config.seed}" if by_seed else numbers
            raise InputError(
                f"{role}_subsets: expected at least one nodule in {data.root}, "
                f"found none in {where}"
            )
    return Scans(**scans)


def digests(data: DataSet, scans: Scans) -> dict[str, str]:
    """Digests of the data of a run: its scans, annotations, excluded findings, unlabeled scans.

    They do not depend on where the data set is, nor on the order of rows.
    """
    labeled = scans._replace(unlabeled=[])
    parts = {
        "scans": [[(uid, data.checksums(uid)) for uid in role] for role in labeled],
        "annotations": [sorted(data.nodules(uid).tolist()) for role in labeled for uid in role],
        "excluded": [sorted(data.excluded(uid).tolist()) for role in labeled for uid in role],
        "unlabeled": [(uid, data.checksums(uid)) for uid in scans.unlabeled],
    }
    return {
        name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()
    }


def check_data(folder: Path, data: DataSet, scans: Scans) -> dict[str, str]:
    """The `digests` of the data, checked against those of the run in a folder.

    Warns:
        InputWarning: the run has none.

    Raises:
        InputError: the run was trained with other data.
    """
    path, found = folder / DATA, digests(data, scans)
    if not path.exists():
        warnings.warn(
            f"{folder}: expected {DATA}, found none: the data may be other than before",
            InputWarning,
            stacklevel=2,
        )
        return found
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{path}: expected digests of data, got something else") from None
    if changed := [name for name, value in stored.items() if found.get(name) != value]:
        raise InputError(
            f"{path}: {' and '.join(changed)}: expected those that the run was trained with, got "
            f"others in {data.root}; restore them, or choose another --out"
        )
    return found


def keep_data(folder: Path, found: dict[str, str]) -> None:
    """Keep digests in the folder of a run."""
    write_text(folder / DATA, json.dumps(found, indent=2) + "\n")
