"""Figures: what they show, their formats, and bad input."""

import errno
import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib import colors, image
from matplotlib.figure import Figure

from fmkernels.focalmix.data.volume import boxes_on
from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation import figures
from fmkernels.focalmix.evaluation.figures import (
    Panel,
    draw_examples,
    draw_froc,
    draw_seeds,
    draw_training,
    slice_panel,
)
from fmkernels.focalmix.evaluation.froc import OPERATING_POINTS, evaluate
from tests.focalmix.data.test_volume import stored_as, volume_of


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved, in order."""
    saved = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def froc(*, bootstraps=50, scans=4):
    candidates = {
        str(scan): [[0, 0, 0, 0.9 - 0.1 * scan], [50, 0, 0, 0.55], [60, 0, 0, 0.1]]
        for scan in range(scans)
    }
    nodules = {str(scan): [[1, 0, 0, 6], [90, 0, 0, 6]] for scan in range(scans)}
    return evaluate(candidates, nodules, {}, list(nodules), bootstraps=bootstraps)


COLUMNS = "step,lr,loss,loss_cls,loss_box,seconds"


def metrics(path, *rows, header=f"{COLUMNS},val_cpm"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def training_rows(n, *, every=0):
    cpm = {i: 0.5 for i in range(every, n + 1, every or n + 1) if i}
    return [
        f"{i},{0.001 / i},{3 / i},{2 / i},{1 / i},0.1,{cpm.get(i, '')}" for i in range(1, n + 1)
    ]


def panel_of(true=(), predicted=(), *, detected=False, shape=(60, 80), hu=-300, title="a slice"):
    return Panel(
        np.full(shape, hu, np.int16),
        np.reshape(true, (-1, 4)),
        np.full(len(true), detected),
        np.reshape(predicted, (-1, 5)),
        title,
    )


def draw_each(folder, suffix=".png"):
    draw_froc(folder / f"froc{suffix}", {"fold 0": froc()})
    draw_training(
        folder / f"training{suffix}", metrics(folder / "metrics.csv", *training_rows(30, every=10))
    )
    draw_examples(
        folder / f"examples{suffix}", [panel_of([[10, 10, 20, 20]], [[10, 10, 20, 20, 0.5]])]
    )
    return [folder / f"{name}{suffix}" for name in ("froc", "training", "examples")]


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), ("", b"\x89PNG")]
)
def test_the_suffix_gives_the_format(tmp_path, suffix, magic):
    paths = draw_each(tmp_path, suffix)
    for path in paths:
        assert path.read_bytes().startswith(magic)
    assert set(tmp_path.iterdir()) == {*paths, tmp_path / "metrics.csv"}


def test_the_suffix_may_be_in_capitals(tmp_path):
    draw_examples(tmp_path / "examples.PNG", [panel_of()])
    assert (tmp_path / "examples.PNG").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_suffix_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"curve\.csv: expected a picture format \(.*png.*\), got \.csv"
    ):
        draw_froc(tmp_path / "curve.csv", {"a": froc()})
    assert list(tmp_path.iterdir()) == []


def test_the_callers_settings_neither_matter_nor_change(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = [path.read_bytes() for path in draw_each(tmp_path / "a")]
    with matplotlib.rc_context(
        {"font.size": 30, "savefig.dpi": 50, "axes.facecolor": "pink", "lines.linewidth": 9}
    ):
        before = dict(matplotlib.rcParams)
        assert [path.read_bytes() for path in draw_each(tmp_path / "b")] == plain
        assert dict(matplotlib.rcParams) == before


def test_a_failed_drawing_keeps_the_old_file(tmp_path, monkeypatch):
    def full_disk(figure, path, **kwargs):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    path = tmp_path / "examples.png"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"):
        draw_examples(path, [panel_of()])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("draw", "name"), [(draw_froc, "draw_froc: curves"), (draw_examples, "draw_examples: panels")]
)
def test_nothing_to_draw_is_an_error(tmp_path, draw, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least one, got none"):
        draw(tmp_path / "a.png", {})


def test_froc_marks_the_operating_points_and_names_the_cpm(tmp_path, drawn):
    with_band, without = froc(), froc(bootstraps=0, scans=3)
    draw_froc(tmp_path / "froc.png", {"one": with_band, "two": without})
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == (1 / 8, 8)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "1/8",
        "1/4",
        "1/2",
        "1",
        "2",
        "4",
        "8",
    ]
    for line, curve in zip(axes.lines, (with_band, without), strict=True):
        marked = slice(None, None, line.get_markevery())
        np.testing.assert_array_equal(line.get_xdata()[marked], OPERATING_POINTS)
        np.testing.assert_allclose(
            line.get_ydata()[marked], 100 * np.array(curve.operating_sensitivities)
        )
    assert len({line.get_color() for line in axes.lines}) == 2
    assert len(axes.collections) == 1
    (legend,) = figure.legends
    lower, upper = with_band.interval
    assert [text.get_text() for text in legend.get_texts()] == [
        f"one: CPM {with_band.cpm:.3f} [{lower:.3f}, {upper:.3f}]",
        f"two: CPM {without.cpm:.3f}",
    ]
    assert "95% bootstrap interval" in legend.get_title().get_text()


def test_froc_says_how_many_scans_where_all_curves_share_them(tmp_path, drawn):
    draw_froc(tmp_path / "froc.png", {"one": froc(bootstraps=0), "two": froc(bootstraps=0)})
    draw_froc(
        tmp_path / "froc.png", {"one": froc(bootstraps=0), "two": froc(bootstraps=0, scans=3)}
    )
    titles = [figure.axes[0].get_title() for figure in drawn]
    assert titles == ["Free-response ROC (scans: 4, nodules: 8)", "Free-response ROC"]


def test_froc_without_any_candidate_is_a_line_at_zero(tmp_path, drawn):
    draw_froc(
        tmp_path / "froc.png",
        {"untrained": evaluate({}, {"a": [[0, 0, 0, 6]]}, {}, ["a"], bootstraps=10)},
    )
    assert not drawn[0].axes[0].lines[0].get_ydata().any()


def test_training_shows_losses_rate_and_validation(tmp_path, drawn):
    draw_training(tmp_path / "t.png", metrics(tmp_path / "m.csv", *training_rows(200, every=50)))
    losses, rate, cpm = drawn[0].axes
    raw, smooth = losses.lines[:2]
    np.testing.assert_allclose(raw.get_ydata(), 3 / np.arange(1, 201))
    np.testing.assert_allclose(smooth.get_ydata()[100], np.mean(3 / np.arange(99, 104)), rtol=0.01)
    np.testing.assert_allclose(rate.lines[0].get_ydata(), 0.001 / np.arange(1, 201))
    np.testing.assert_array_equal(cpm.lines[0].get_xdata(), [50, 100, 150, 200])
    np.testing.assert_array_equal(cpm.lines[0].get_ydata(), 0.5)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "total",
        "classification",
        "box regression",
    ]


def test_training_without_validation_leaves_it_out(tmp_path, drawn):
    rows = training_rows(20)
    draw_training(tmp_path / "t.png", metrics(tmp_path / "m.csv", *rows))
    without = [row.rstrip(",") for row in rows]
    draw_training(tmp_path / "t.png", metrics(tmp_path / "m.csv", *without, header=COLUMNS))
    assert [len(figure.axes) for figure in drawn] == [2, 2]


@pytest.mark.parametrize("rows", [["1,0.001,nan,inf,,0.1,"], ["1,0,0,0,0,0.1,", "2,0,1,0,,0.1,1"]])
def test_training_draws_gaps_zeros_and_a_single_row(tmp_path, rows):
    draw_training(tmp_path / "t.png", metrics(tmp_path / "m.csv", *rows))


def test_the_running_mean_passes_over_gaps(tmp_path, drawn):
    rows = training_rows(120)
    rows[60] = "61,0.001,nan,nan,nan,0.1,"
    draw_training(tmp_path / "t.png", metrics(tmp_path / "m.csv", *rows))
    raw, smooth = drawn[0].axes[0].lines[:2]
    assert np.isnan(raw.get_ydata()[60])
    np.testing.assert_allclose(smooth.get_ydata()[60], (3 / 60 + 3 / 62) / 2)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("lr,loss", [], "expected a column step, got the columns lr,loss"),
        ("", [], "expected a column step, got the columns none"),
        ("step,lr,loss", [], "at least one row"),
        ("step,lr,loss", ["1,0.1,2", "2,0.1,high"], "row 3: loss: expected a number, got 'high'"),
        ("step,lr,loss", ["1,0.1,2", ",0.1,2"], "row 3: step: expected a number, got ''"),
        ("step,lr,loss", ["1"], "row 2: lr: expected a number, got ''"),
    ],
)
def test_bad_metrics_are_named(tmp_path, header, rows, message):
    with pytest.raises(InputError, match=f"m.csv.*{message}"):
        draw_training(tmp_path / "t.png", metrics(tmp_path / "m.csv", *rows, header=header))
    assert not (tmp_path / "t.png").exists()


@pytest.mark.parametrize("detected", [False, True])
@pytest.mark.parametrize("predicted", [[], [[15, 35, 45, 65, 0.9], [21, 41, 23, 43, 0.1]]])
def test_examples_tell_detected_from_missed(tmp_path, drawn, predicted, detected):
    panel = panel_of([[10, 30, 30, 50]], predicted, detected=detected)
    draw_examples(tmp_path / "examples.png", [panel])
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert ("missed" in texts) != detected
    assert [text for text in texts if text not in ("missed", "")] == [
        f"{row[4]:.2f}" for row in predicted
    ]
    (magnified,) = drawn[0].axes[0].child_axes
    assert magnified.get_xlim() == (20, 60) and magnified.get_ylim() == (40, 0)
    assert len(magnified.patches) == 1 + len(predicted)
    true, *others = drawn[0].axes[0].patches
    assert true.get_bbox().bounds == (30, 10, 20, 20)
    color = figures._TRUE if detected else figures._MISSED
    assert colors.same_color(true.get_edgecolor(), color)
    assert true.get_linestyle() == ("-" if detected else "--")
    assert [box.get_edgecolor() for box in others] == [colors.to_rgba(figures._PREDICTED)] * len(
        predicted
    )


@pytest.mark.parametrize("code", ["LPS", "RAI", "PIR"])
def test_a_slice_has_the_boxes_that_it_cuts_and_luna16s_hits(code):
    """A hit lies in the sphere: neither a box over the nodule nor a center in its circle is one."""
    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 30, 40))
    volume = volume_of(voxels, (2.0, 0.5, 1.0))
    nodules = np.array([[10.0, 5, 20, 8], [30, 10, 21, -1], [30, 2.5, 38, 6]])
    boxes = np.array([[8.0, 7, 7, 13, 14, 14], [5, 15, 25, 15, 26, 36], [18, 3, 27, 20, 8, 33]])
    points = volume.to_world((boxes[:, :3] + boxes[:, 3:]) / 2)
    points[1, 2] -= 6  # above the sphere of nodule 1, inside its circle in the slice
    candidates = np.c_[points, [0.9, 0.8, 0.7]]
    subject = np.array([[10.4, 15, 25, 11.4, 26, 36]])
    stored = stored_as(volume, code)
    (subject,), boxes = (boxes_on(stored, given, volume) for given in (subject, boxes))
    panel = slice_panel(stored, subject, nodules, boxes, candidates, "a slice")
    np.testing.assert_array_equal(panel.image, voxels[10])
    assert panel.title == "a slice" and panel.aspect == 0.5
    np.testing.assert_allclose(panel.true, [[2.5, 6.5, 18.5, 14.5], [10.5, 25.5, 30.5, 35.5]])
    assert panel.detected.tolist() == [True, False]
    np.testing.assert_allclose(panel.predicted, [[7, 7, 14, 14, 0.9], [15, 25, 26, 36, 0.8]])
    np.testing.assert_allclose(panel.subject, [15, 25, 26, 36])


def test_the_box_that_a_panel_is_about_is_magnified(tmp_path, drawn):
    panel = panel_of([[5, 5, 10, 10]], [[30, 40, 40, 50, 0.9]])
    draw_examples(tmp_path / "a.png", [panel, replace(panel, subject=np.array([30, 40, 40, 50]))])
    first, second = (axes.child_axes[0] for axes in drawn[0].axes)
    assert np.mean(first.get_xlim()) == 7.5 and np.mean(second.get_xlim()) == 45


def test_boxes_lie_on_their_pixels(tmp_path):
    pixels = np.full((60, 80), -1200, np.int16)
    pixels[10:30, 30:50] = 600
    path = tmp_path / "examples.png"
    draw_examples(path, [Panel(pixels, predicted=np.array([[10, 30, 30, 50, 0.5]]))])
    picture = image.imread(path)[..., :3]
    panel = np.argwhere((picture == 0).all(axis=-1))
    (top, left), (_, right) = panel.min(axis=0), panel.max(axis=0) + 1
    scale = (right - left) / 80
    bottom = top + round(60 * scale)  # the legend is below
    orange = np.abs(picture - colors.to_rgb(figures._PREDICTED)).max(axis=-1) < 0.02
    inside = orange[top:bottom, left:right]
    columns = np.flatnonzero(inside[round(20 * scale)])
    assert columns.min() == pytest.approx(30 * scale, abs=2)
    assert columns.max() == pytest.approx(50 * scale, abs=2)
    rows = np.flatnonzero(inside[:, round(32 * scale)])
    assert rows.min() == pytest.approx(10 * scale, abs=2)
    assert rows.max() == pytest.approx(30 * scale, abs=2)


@pytest.mark.parametrize(("hu", "gray"), [(-2000, 0), (-1200, 0), (-300, 0.5), (600, 1), (3000, 1)])
def test_slices_are_shown_in_the_lung_window(tmp_path, hu, gray):
    path = tmp_path / "examples.png"
    draw_examples(path, [panel_of(hu=hu)])
    picture = image.imread(path)
    np.testing.assert_allclose(
        picture[picture.shape[0] // 2, picture.shape[1] // 2, :3], gray, atol=0.01
    )


@pytest.mark.parametrize("panels", [1, 2, 4, 5, 9])
def test_examples_show_every_panel_in_order(tmp_path, drawn, panels):
    draw_examples(
        tmp_path / "examples.png",
        [panel_of(shape=(20 + i, 30), title=f"slice {i}") for i in range(panels)],
    )
    shown = [axes.get_title() for axes in drawn[0].axes if axes.images]
    assert shown == [f"slice {i}" for i in range(panels)]


@pytest.mark.parametrize("box", [[0, 0, 6, 6], [0, 74, 6, 80], [54, 0, 60, 6], [54, 74, 60, 80]])
def test_labels_stay_inside_the_slice(tmp_path, drawn, box):
    panels = [panel_of([box]), panel_of(predicted=[[*box, 0.5]])]
    draw_examples(tmp_path / "examples.png", panels)
    for axes in drawn[0].axes:
        (text,) = (text for text in axes.texts if text.get_text())
        label, panel = text.get_window_extent(), axes.get_window_extent()
        assert panel.x0 - 2 <= label.x0 < label.x1 <= panel.x1 + 2
        assert panel.y0 - 2 <= label.y0 < label.y1 <= panel.y1 + 2


def test_seeds_are_drawn_in_pairs_with_both_means(drawn, tmp_path):
    draw_seeds(tmp_path / "seeds.png", {"supervised": [0.3, 0.5], "FocalMix": [0.4, 0.45]})
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    low, high = (points.get_offsets() for points in axes.collections[1:])
    np.testing.assert_allclose(low, [[0, 0.30], [1, 0.50]])
    np.testing.assert_allclose(high, [[0, 0.40], [1, 0.45]])
    (segments,) = (lines.get_segments() for lines in axes.collections[:1])
    np.testing.assert_allclose(segments, [[[0, 0.30], [0, 0.40]], [[1, 0.50], [1, 0.45]]])
    np.testing.assert_allclose([line.get_ydata()[0] for line in axes.lines], [0.40, 0.425])
