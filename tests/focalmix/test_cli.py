"""The command line end to end; bad input ends with one clear line and exit code 2."""

import errno
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fmkernels import __version__
from fmkernels.focalmix import cli, detect
from fmkernels.focalmix.cli import main
from fmkernels.focalmix.config import GROUPS, PRESETS, Config
from fmkernels.focalmix.data.tables import read_candidates
from fmkernels.focalmix.data.volume import boxes_on
from fmkernels.focalmix.evaluation.results import Finding, ScanFindings
from tests.focalmix.conftest import SCANS, write_luna
from tests.focalmix.data.test_volume import stored_as, volume_of

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--spacing=2.5,2,2",
    "--patch-size=16,16,16",
    "--strides=2,4",
    "--diameters=6,12",
    "--widths=4,8",
    "--blocks=0,1",
    "--channels=4",
    "--batch-size=2",
    "--steps=4",
    "--train-subsets=0,1",
    "--validation-subsets=",
    "--test-subsets=9",
    "--overlap=4",
    "--log-every=2",
    "--workers=0",
    "--device=cpu",
]
FIRST = SCANS[0].uid


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_luna(tmp_path_factory.mktemp("cli") / "luna", SCANS)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(data), "--out", str(run), *SETTINGS]) == 0
    return run


@pytest.fixture
def copy(data, tmp_path) -> Path:
    """A data set that may be damaged."""
    return shutil.copytree(data, tmp_path / "luna", ignore=shutil.ignore_patterns(".cache*"))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def refuses(capsys, argv, *words) -> None:
    """The command ends with 2 and one line that holds the words."""
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:  # argparse leaves by itself
        code = stop.code
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("resampling:")]
    assert code == 2 and len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]


def test_the_commands_of_the_documents_are_understood():
    """Including the number of processes of torchrun."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", "")
    commands = re.findall(
        r"^(?:torchrun --nproc-per-node (\d+) -m )?fmkernels ([^#\n]+)", text, re.M
    )
    assert len(commands) >= 8 and any(world for world, _ in commands)
    for world, command in commands:
        arguments = cli._parse(command.split())
        if command.startswith("train"):
            config = replace(PRESETS[arguments.preset or "demo"], **cli._given(arguments))
            shared = (config.batch_size, config.unlabeled_batch_size, config.groups)
            assert not any(size % int(world or 1) for size in shared), command


def test_folders_have_default_names():
    assert cli._parse(["compare", "data", "--labeled", "4", "8"]).out == Path("runs/compare")
    assert cli._parse(["train", "data"]).out is None  # after the method, see below


def test_resume_needs_the_folder(data, capsys):
    refuses(capsys, ["train", data, "--resume"], "--resume: expected --out")


def test_train_writes_to_a_folder_of_the_method(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(data), *SETTINGS]) == 0
    assert (tmp_path / "runs" / "supervised" / "evaluation.json").exists()
    written = re.findall(r"fmkernels: wrote (.+)", capsys.readouterr().err)
    out = Path("runs", "supervised")
    assert list(map(Path, written)) == [out, out / "froc.png", out / "sheet.png"]
    assert all(map(Path.exists, map(Path, written)))


def test_options_are_written_out(capsys):
    refuses(
        capsys,
        ["compare", "data", "--labeled", "4", "--seed", "7"],
        "unrecognized arguments: --seed 7",
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--labeled", "5"], ("required: DATA", "put DATA first")),
        (["train", "--unlabeled-data", "archive", "data"], ("required: DATA", "put DATA first")),
        (["compare", "--labeled", "4", "8", "data"], ("--labeled", "'data'", "put DATA first")),
        (["compare", "--labeled", "4", "--without", "views", "data"], ("put DATA first",)),
        (["check", "--unlabeled-data", "archive", "data"], ("put DATA first",)),
    ],
)
def test_data_behind_a_list_is_told_to_come_first(capsys, argv, words):
    refuses(capsys, argv, *words)


def test_unlabeled_data_needs_a_method_that_uses_it(data, tmp_path, capsys):
    argv = [*train_arguments(data, tmp_path / "run"), "--unlabeled-data", data]
    refuses(capsys, argv, "--unlabeled-data: expected --method focalmix", "got supervised")
    assert not (tmp_path / "run").exists()


def train_arguments(data, out):
    return ["train", data, "--out", out, *SETTINGS]


def test_from_phantoms_to_a_score(tmp_path, capsys):
    data, run = tmp_path / "phantoms", tmp_path / "run"
    command = ["phantom", str(data), "--size=tiny", "--scans=10", "--test-scans=1", "--workers=1"]
    assert main(command) == 0
    settings = [
        "--spacing=4,4,4",
        "--diameters=8,16",
        "--test-subsets=8,9",
        "--train-subsets=0,1,2,3,4,5,6,7",
    ]
    assert main(["train", str(data), "--out", str(run), *SETTINGS, *settings]) == 0
    assert "CPM" in capsys.readouterr().out
    scans = [str(data / "subset8"), str(data / "subset9")]
    assert (
        main(["detect", str(run), *scans, "--out", str(tmp_path / "found.csv"), "--device=cpu"])
        == 0
    )
    ours, theirs = read_candidates(tmp_path / "found.csv"), read_candidates(run / "candidates.csv")
    assert ours.keys() == theirs.keys()
    for uid in ours:  # detect reads the scans themselves, train the cache
        assert np.allclose(ours[uid], theirs[uid], atol=1e-4)
    plot = tmp_path / "froc.png"
    arguments = [
        "evaluate",
        str(run / "candidates.csv"),
        str(data),
        "--subsets=8,9",
        "--json",
        "--plot",
        str(plot),
    ]
    capsys.readouterr()
    assert main(arguments) == 0
    evaluation = json.loads(capsys.readouterr().out)
    for name in ("scans_without_candidates", "warnings", "notes"):
        assert evaluation.pop(name) == []
    assert evaluation == json.loads((run / "evaluation.json").read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")


def detect_in(capsys, *argv) -> tuple[int, str]:
    """Exit code and messages of ``detect``."""
    capsys.readouterr()
    code = main(["detect", *map(str, argv), "--device=cpu"])
    return code, capsys.readouterr().err


def test_detect_continues_its_own_table(run, data, capsys, monkeypatch):
    """A scan is searched once, also if the call was interrupted; files beside are made up for."""
    table, seen, stock = run / "detections.csv", [], detect.detect

    def search(config, model, volume):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(volume)
        return stock(config, model, volume)

    monkeypatch.setattr(detect, "detect", search)
    code, text = detect_in(capsys, run, data)
    assert code == 130 and len(read_candidates(table)) == 2
    assert f"stopped; {table} holds 2 scans, the same command goes on\n" in text
    before = table.read_bytes()
    monkeypatch.setattr(detect, "detect", stock)
    code, text = detect_in(capsys, run, data, "--format=json,slicer")
    assert code == 0 and table.read_bytes().startswith(before)
    assert f"in {len(SCANS)} scans, 2 of them searched earlier; " in text
    assert re.search(r"s per scan, peak memory \d\.\d\d GB\n", text)
    for path in (table, run / "detections-slicer", run / "detections.json"):
        assert f"fmkernels: wrote {path}\n" in text
    names = {f"{uid}.mrk.json" for uid, rows in read_candidates(table).items() if len(rows)}
    assert names == {path.name for path in (run / "detections-slicer").iterdir()}
    assert len(json.loads((run / "detections.json").read_text())["scans"]) == len(SCANS)
    whole = table.read_bytes()
    code, text = detect_in(capsys, run, data)
    assert code == 0 and table.read_bytes() == whole and "s per scan" not in text


def test_detect_searches_a_changed_scan_again(run, copy, tmp_path, capsys):
    out, sheet = tmp_path / "found.csv", tmp_path / "sheet.png"
    code, text = detect_in(capsys, run, copy / "subset0", "--out", out, "--format=slicer")
    before = read_candidates(out)
    assert code == 0 and len(before[FIRST])
    stale = tmp_path / "found-slicer" / f"{FIRST}.mrk.json"
    assert stale.exists()
    raw = copy / "subset0" / f"{FIRST}.raw"
    voxels = np.frombuffer(raw.read_bytes(), np.int16)
    raw.write_bytes(np.full_like(voxels, -1000).tobytes())
    argv = [run, copy / "subset0", "--out", out, "--format=slicer", "--sheet", sheet]
    code, text = detect_in(capsys, *argv)
    assert code == 0 and f"{FIRST}: " in text and "1 of them searched earlier" in text
    after = read_candidates(out)
    assert not np.array_equal(after[FIRST], before[FIRST])
    assert np.array_equal(after[SCANS[1].uid], before[SCANS[1].uid])
    assert len(json.loads(stale.read_text())["markups"]) == len(after[FIRST])
    raw.write_bytes(b"bad")
    code, text = detect_in(capsys, *argv)
    assert code == 1 and read_candidates(out).keys() == {SCANS[1].uid} and not stale.exists()


def test_a_sheet_goes_without_scans_that_have_moved(run, copy, tmp_path, capsys):
    out, sheet = tmp_path / "found.csv", tmp_path / "sheet.png"
    assert detect_in(capsys, run, copy / "subset0", "--out", out)[0] == 0
    (copy / "subset0" / f"{FIRST}.mhd").rename(copy / "subset0" / "moved.txt")
    code, text = detect_in(capsys, run, copy / "subset0", "--out", out, "--sheet", sheet)
    assert code == 0 and sheet.exists()
    assert text.count(f"{FIRST}.mhd: expected the scan that was searched, found it moved") == 1


def test_detect_passes_over_bad_scans_and_lists_them(run, copy, tmp_path, capsys):
    bad = copy / "subset0" / f"{FIRST}.raw"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:1000])
    without_id = copy / "subset4" / "slice.dcm"
    without_id.write_bytes(bytes(128) + b"DICM")
    out = tmp_path / "found.csv"
    code, text = detect_in(capsys, run, copy, "--out", out)
    listed = text.splitlines()[-3:]
    assert code == 1 and listed[0] == "fmkernels: 2 scans not searched:"
    assert "subset4" in listed[1] and bad.name in listed[2] and "1000" in listed[2]
    without_id.unlink()
    assert read_candidates(out).keys() == {scan.uid for scan in SCANS[1:]}
    bad.write_bytes(whole)
    code, text = detect_in(capsys, run, copy, "--out", out)
    assert code == 0 and read_candidates(out).keys() == {scan.uid for scan in SCANS}


def test_a_scan_that_does_not_fit_into_memory_is_a_bad_one(
    run, data, tmp_path, capsys, monkeypatch
):
    def fail(*_):
        raise MemoryError("Unable to allocate 8.00 TiB")

    monkeypatch.setattr(detect, "load_volume", fail)
    code, text = detect_in(capsys, run, data / "subset0", "--out", tmp_path / "found.csv")
    assert code == 1 and text.count("Unable to allocate 8.00 TiB") == 2


def test_detect_refuses_values_that_are_no_hu(run, data, tmp_path, capsys):
    """A detector finds anything but nodules in them."""
    image = sitk.ReadImage(str(data / "subset9" / f"{SCANS[-1].uid}.mhd"))
    scan = tmp_path / "scan.nii.gz"
    sitk.WriteImage(sitk.Clamp(image, sitk.sitkInt16, -1000, 3000) + 1024, str(scan))
    assert main(["detect", str(run), str(scan), "--device=cpu", "--out", str(tmp_path / "f")]) == 1
    assert "scan.nii.gz: values look like HU + 1024" in capsys.readouterr().err


def test_a_full_disk_is_no_bad_scan(run, data, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    arguments = ["detect", run, data, "--out", tmp_path / "found.csv", "--device=cpu"]
    refuses(capsys, arguments, f"{tmp_path / 'found.csv'}: No space left on device")


def test_a_threshold_leaves_scans_without_findings(run, data, tmp_path, capsys):
    out = tmp_path / "found.csv"
    code, text = detect_in(capsys, run, data, "--out", out, "--threshold=1", "--sheet=none.png")
    assert code == 0 and f"0 findings in {len(SCANS)} scans" in text and "none.png" not in text
    candidates = read_candidates(out)
    assert {uid: len(rows) for uid, rows in candidates.items()} == {scan.uid: 0 for scan in SCANS}
    assert main(["evaluate", str(out), str(data)]) == 0


def test_a_sheet_shows_the_most_probable_findings(run, data, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(detect.figures, "draw_examples", lambda *given: drawn.append(given))
    out, sheet = tmp_path / "found.csv", tmp_path / "sheet.png"
    code, text = detect_in(capsys, run, data, "--out", out, "--sheet", sheet)
    assert code == 0 and f"wrote {sheet}" in text
    ((path, panels),) = drawn
    scores = sorted(
        (row[3] for rows in read_candidates(out).values() for row in rows), reverse=True
    )
    assert path == sheet and len(panels) == 32
    for panel, score in zip(panels, scores, strict=False):
        assert score in panel.predicted[:, 4]
        assert panel.image.size and panel.aspect == 1


@pytest.mark.parametrize("code", ["LPS", "RAI", "LSA"])
def test_a_sheet_shows_axial_slices_however_a_scan_is_stored(code):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 30, 40))
    volume = volume_of(voxels, (2.0, 0.5, 1.0))
    stored = stored_as(volume, code)
    boxes = boxes_on(stored, np.array([[8, 2, 3, 13, 9, 8], [9, 8, 7, 12, 11, 11.0]]), volume)
    findings = [
        Finding((0, 0, 0), 0.5, 5, int(box[[0, 3]].mean()), tuple(box[[2, 1, 0, 5, 4, 3]]))
        for box in boxes
    ]
    panel = detect.finding_panel(stored, ScanFindings("one", "", "", findings), 0, side=10)
    np.testing.assert_array_equal(panel.image, voxels[10, :16, :11])
    np.testing.assert_allclose(panel.predicted, [[2, 3, 9, 8, 0.5], [8, 7, 11, 11, 0.5]])
    np.testing.assert_allclose(panel.subject, [2, 3, 9, 8])
    assert panel.title == {"LPS": "one, slice 10", "RAI": "one, slice 9", "LSA": "one"}[code]


def test_standard_output_gets_the_table_alone(finished, data, tmp_path):
    scan = data / "subset9" / f"{SCANS[-1].uid}.mhd"
    arguments = ["detect", str(finished), str(scan), "--out=/dev/stdout", "--device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "fmkernels", *arguments], capture_output=True, cwd=ROOT, check=True
    )
    (tmp_path / "found.csv").write_bytes(done.stdout)
    assert read_candidates(tmp_path / "found.csv").keys() == {SCANS[-1].uid}


def test_what_detect_cannot_begin_with(run, data, copy, tmp_path, capsys):
    scan, out = data / "subset9" / f"{SCANS[-1].uid}.mhd", tmp_path / "found.csv"
    for argv, words in [
        ([tmp_path / "nope", scan], ("nope: expected the folder of a run",)),
        ([tmp_path, scan], ("checkpoint.pt: expected the checkpoint of a run",)),
        ([run, tmp_path / "missing.mhd", "--out", out], ("missing.mhd: expected a scan",)),
        ([run, run, "--out", out], ("expected scans", "in this folder")),
        ([run, scan, "--out", run], ("expected a file name in an existing folder",)),
        ([run, scan, "--out", tmp_path / "a.json", "--format=json,csv"], ("name of a CSV file",)),
        ([run, scan, "--out", out, "--format=xml"], ("--format", "csv,json,slicer", "xml")),
        ([run, scan, "--out", out, "--threshold=2"], ("--threshold", "0 to 1")),
        ([run, scan, "--out", out, "--sheet=a.csv"], ("a.csv: expected a picture format",)),
        ([run, scan, copy, "--out", out], (scan.name, "each scan once", str(copy))),
    ]:
        refuses(capsys, ["detect", *argv, "--device=cpu"], *words)
        assert not out.exists()
    assert main(["detect", str(run), str(scan), "--out", str(out), "--device=cpu"]) == 0
    capsys.readouterr()
    other = shutil.copytree(copy / "subset9", tmp_path / "other")
    refuses(capsys, ["detect", run, other, "--out", out], SCANS[-1].uid, "choose another --out")


def test_two_calls_do_not_write_one_table(run, data, tmp_path, capsys):
    pytest.importorskip("fcntl")
    out = tmp_path / "found.csv"
    out.touch()
    code = (
        "import sys\n"
        "from fmkernels.focalmix.files import lock_file\n"
        f"file = open({str(out)!r}, 'r+b')\n"
        "assert lock_file(file)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as holder:
        holder.stdout.readline()
        refuses(capsys, ["detect", run, data, "--out", out], "another process is writing it")
        holder.stdin.close()


def test_a_list_may_begin_with_a_negative_number(run, data, capsys):
    refuses(
        capsys,
        [*train_arguments(data, run), "--resume", "--window", "-1000,300"],
        "window: expected",
        "-1000.0",
    )


@pytest.mark.parametrize("preset", ["demo", "luna16"])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_few_steps_need_no_other_burn_in(preset, steps):
    arguments = ["train", "d", f"--preset={preset}", "--method=focalmix", f"--steps={steps}"]
    config = replace(PRESETS[preset], **cli._given(cli._parse(arguments)))
    assert config.burn_in_steps == {1: 0, 2: 1, 50: 25}[steps]


def test_one_process_of_a_cluster_s_is_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refuses(capsys, train_arguments(data, tmp_path / "run"), "MASTER_ADDR", "torchrun", "unset")
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_no_run_behind(data, tmp_path, capsys):
    run = tmp_path / "run"
    refuses(capsys, train_arguments(tmp_path / "typo", run), "typo")
    assert main([*map(str, train_arguments(data, run)), "--steps=1"]) == 0


def test_a_missing_library_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "fmkernels.focalmix.data.phantom", None)
    refuses(capsys, ["phantom", tmp_path], "fmkernels[train]")


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_help(capsys):
    text = help_of(capsys, "train")
    assert text.startswith("usage: fmkernels train DATA [--out RUN] [options] Train ")
    groups = [text.index(f" {group}: ") for group in GROUPS]
    assert groups == sorted(groups)
    assert "--method {supervised,focalmix} " in text and "--no-image-mixup" in text
    assert "--steps VALUE training steps (default: 3000; luna16: 50000)" in text
    assert "(default: all the others; luna16: 400)" in text and "None" not in text
    for option in fields(Config):
        name = option.name.replace("_", "-")
        assert f" --{name} " in text or f" --{name}, --no-{name} " in text
    assert "--seed " not in help_of(capsys, "compare")
    assert help_of(capsys).count("--") == 3  # help, and version twice


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    alone = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert alone == help_of(capsys) and "evaluate" in alone


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fmkernels {__version__}\n"


def test_the_program_itself():
    done = subprocess.run(
        [sys.executable, "-m", "fmkernels", "phantom", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: fmkernels phantom OUT [options]")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["fly"], "fly"),
        (["train", "data", "--out=x", "--steps=many"], "steps"),
        (["train", "data", "--out=x", "--spacing=1,a,1"], "spacing"),
        (["train", "data", "--out=x", "--steps=0"], "steps"),
        (["train", "data", "--out=x", "--method=magic"], "method"),
        (["train", "data", "--out=x", "--preset=huge"], "preset"),
        (["phantom", "x", "--scans=0"], "scans"),
        (["phantom", "x", "--test-scans=-1"], "test-scans"),
        (["phantom", "x", "--size=huge"], "size"),
    ],
)
def test_bad_arguments(argv, word, capsys):
    refuses(capsys, argv, word)


def first_scan(folder: Path) -> Path:
    return folder / "subset0" / f"{FIRST}.mhd"


def edit_header(folder: Path, old: str, new: str) -> None:
    path = first_scan(folder)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cut_raw(folder):
    raw = first_scan(folder).with_suffix(".raw")
    raw.write_bytes(raw.read_bytes()[:1000])


def remove_raw(folder):
    first_scan(folder).with_suffix(".raw").unlink()


def make_flat(folder):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((9, 9), np.int16)), str(first_scan(folder)))


def make_rgb(folder):
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((4, 9, 9, 3), np.uint8), isVector=True),
        str(first_scan(folder)),
    )


def make_mask(folder):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 9, 9), np.uint8)), str(first_scan(folder)))


def edit_row(field: int, value: str):
    def edit(folder):
        path = folder / "annotations.csv"
        rows = [line.split(",") for line in path.read_text().split()]
        rows[1][field] = value
        path.write_text("".join(",".join(row) + "\n" for row in rows))

    return edit


def drop_column(folder):
    path = folder / "annotations.csv"
    path.write_text(path.read_text().replace("diameter_mm", "size"))


def exclude_a_stranger(folder):
    (folder / "annotations_excluded.csv").write_text(
        "seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3.4,0,0,0,5\n"
    )


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_raw, (f"{FIRST}.raw", "1000")),
        (remove_raw, (f"{FIRST}.raw",)),
        (make_flat, (f"{FIRST}.mhd", "2")),
        (make_rgb, (f"{FIRST}.mhd",)),
        (make_mask, (f"{FIRST}.mhd", "MET_UCHAR")),
        (lambda folder: edit_header(folder, "DimSize = 44", "DimSize = 44000000"), (f"{FIRST}",)),
        (
            lambda folder: edit_header(folder, f"{FIRST}.raw", "../../secret.raw"),
            (f"{FIRST}.mhd", "ElementDataFile"),
        ),
        (drop_column, ("annotations.csv", "diameter_mm")),
        (edit_row(1, "nan"), ("annotations.csv", "2", "coordX")),
        (edit_row(2, "left"), ("annotations.csv", "2", "coordY")),
        (edit_row(3, "99999"), ("annotations.csv", "2", FIRST)),
        (edit_row(4, "0"), ("annotations.csv", "2", "diameter_mm")),
        (edit_row(0, "1.2.3.4"), ("annotations.csv", "1.2.3.4")),
        (exclude_a_stranger, ("annotations_excluded.csv", "row 2", "1.2.3.4")),
        (empty, ("luna",)),
        (shutil.rmtree, ("luna",)),
    ],
)
def test_damaged_data(copy, tmp_path, capsys, damage, words):
    damage(copy)
    refuses(capsys, train_arguments(copy, tmp_path / "run"), *words)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_folder_with_another_configuration(run, data, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    refuses(
        capsys,
        [*train_arguments(data, run), "--resume", "--gamma=3"],
        "config.json",
        "gamma",
        "2.0",
        "3.0",
    )
    refuses(capsys, train_arguments(data, run), "--resume")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_cut_in_half(run, data, capsys):
    path = run / "checkpoint.pt"
    scan = data / "subset9" / f"{SCANS[-1].uid}.mhd"
    whole = path.read_bytes()
    tensor, pickled = io.BytesIO(), pickle.dumps({"config": 1})
    torch.save(torch.zeros(3), tensor)
    for content in (whole[: len(whole) // 2], tensor.getvalue(), pickled):
        path.write_bytes(content)
        refuses(capsys, ["detect", run, scan, "--out", run / "new.csv"], "checkpoint.pt")
        refuses(capsys, [*train_arguments(data, run), "--resume"], "checkpoint.pt")


@pytest.mark.parametrize("content", ["5", "[1]", "{", '{"leaps": 4}'])
def test_a_configuration_that_is_none(run, data, capsys, content):
    (run / "config.json").write_text(content)
    refuses(capsys, [*train_arguments(data, run), "--resume"], "config.json")


def test_folders_that_cannot_be_written(run, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    blocked = tmp_path / "file" / "inside"
    refuses(capsys, train_arguments(data, blocked), "inside")
    refuses(capsys, ["phantom", blocked, "--size=tiny", "--scans=1"], "inside")
    scan = data / "subset9" / f"{SCANS[-1].uid}.mhd"
    refuses(capsys, ["detect", run, scan, "--out", blocked / "x.csv"], "inside")


def test_data_in_a_folder_that_takes_no_cache(copy, tmp_path, capsys):
    spacing = next(part for part in SETTINGS if part.startswith("--spacing")).split("=")[1]
    (copy / f".cache-{'x'.join(f'{float(step):g}' for step in spacing.split(','))}").touch()
    arguments = train_arguments(copy, tmp_path / "run")
    refuses(capsys, arguments, "cache", "--cache")
    assert main([*map(str, arguments), f"--cache={tmp_path / 'elsewhere'}", "--steps=1"]) == 0
    assert list((tmp_path / "elsewhere").rglob("*.npy"))


def test_candidates_that_do_not_fit(run, data, tmp_path, capsys):
    good = (run / "candidates.csv").read_text()
    bad = tmp_path / "bad.csv"
    for text, words in [
        (good.replace("probability", "score"), ("bad.csv", "probability")),
        (good.splitlines()[0] + "\n1.2.3,0,0,0,0.5\n", ("bad.csv", "seriesuid", "1.2.3")),
        (good.splitlines()[0] + f"\n{FIRST},0,nan,0,0.5\n", ("bad.csv", "2", "coordY")),
        ("", ("bad.csv",)),
    ]:
        bad.write_text(text)
        refuses(capsys, ["evaluate", bad, data], *words)
    refuses(capsys, ["evaluate", tmp_path / "none.csv", data], "none.csv")
    refuses(capsys, ["evaluate", run / "candidates.csv", data, "--subsets=4"], "4")


def test_a_dead_worker_process_is_one_line(tmp_path, monkeypatch, capsys):
    def die(*_, **__):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr("fmkernels.focalmix.data.phantom.write_phantoms", die)
    assert main(["phantom", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "fmkernels: a worker process died, perhaps out of memory; try fewer --workers\n"
    )
