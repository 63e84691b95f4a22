"""FROC by LUNA16's rules, against a count in exact fractions."""

import json
from fractions import Fraction

import numpy as np
import pytest

from fmkernels.focalmix.errors import InputError
from fmkernels.focalmix.evaluation.froc import (
    BAND_RATES,
    OPERATING_POINTS,
    evaluate,
    hits,
)

FAR = 500.0


def wrong(n, probability=0.5):
    """Candidates far from any finding."""
    return [[FAR, 10.0 * i, FAR, probability] for i in range(n)]


def froc_of(candidates, nodules, excluded=(), *, scans=1, **options):
    """FROC where scan "0" holds everything and the other scans are empty."""
    series = [str(scan) for scan in range(scans)]
    return evaluate(
        {"0": candidates}, {"0": nodules}, {"0": excluded}, series, **{"bootstraps": 0, **options}
    )


def oracle(candidates, nodules, excluded, series):
    """The seven sensitivities, by counting afresh at every threshold, in exact fractions."""

    def inside(candidate, finding):
        radius = Fraction(10 if finding[3] < 0 else float(finding[3])) / 2
        offset = [
            Fraction(float(candidate[axis])) - Fraction(float(finding[axis])) for axis in range(3)
        ]
        return sum(x * x for x in offset) < radius * radius

    taken = {
        uid: sorted(map(tuple, candidates.get(uid, [])), key=lambda c: -c[3])[:100]
        for uid in series
    }
    total = sum(len(nodules.get(uid, [])) for uid in series)
    points = [(Fraction(0), Fraction(0))]
    for threshold in sorted({c[3] for marks in taken.values() for c in marks}, reverse=True):
        detected = false_positives = 0
        for uid in series:
            marks = [c for c in taken[uid] if c[3] >= threshold]
            true = nodules.get(uid, [])
            detected += sum(any(inside(c, nodule) for c in marks) for nodule in true)
            irrelevant = [*true, *excluded.get(uid, [])]
            false_positives += sum(
                not any(inside(c, finding) for finding in irrelevant) for c in marks
            )
        points.append((Fraction(false_positives, len(series)), Fraction(detected, total)))
    result = []
    for rate in map(Fraction, OPERATING_POINTS):
        last = max(i for i, (fps, _) in enumerate(points) if fps <= rate)
        (x0, y0), (x1, y1) = points[last], points[min(last + 1, len(points) - 1)]
        result.append(float(y0 if x1 == x0 else y0 + (y1 - y0) * (rate - x0) / (x1 - x0)))
    return result


def random_case(rng, *, extent, crowded):
    series = [f"scan-{i}" for i in range(rng.integers(1, 7))]
    candidates, nodules, excluded = {}, {}, {}
    levels = rng.integers(2, 40)

    def findings(n):
        return np.c_[rng.integers(0, extent, (n, 3)), rng.choice([-1, 2, 4, 5, 6, 10], n)].astype(
            float
        )

    for uid in series:
        n = rng.integers(90, 140) if crowded else rng.integers(0, 25)
        candidates[uid] = np.c_[
            rng.integers(0, extent, (n, 3)), rng.integers(0, levels, n) / levels
        ]
        nodules[uid] = findings(rng.integers(0, 4))
        excluded[uid] = findings(rng.integers(0, 3))
    nodules[series[-1]] = findings(2)
    for table in (candidates, excluded, nodules):
        if len(series) > 1 and rng.random() < 0.3:
            del table[series[0]]
    return candidates, nodules, excluded, series


@pytest.mark.parametrize(
    ("cases", "extent", "crowded"), [(100, 8, False), (60, 14, False), (6, 20, True)]
)
def test_it_agrees_with_a_count_at_every_threshold(cases, extent, crowded):
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(cases):
        case = random_case(rng, extent=extent, crowded=crowded)
        froc = evaluate(*case, bootstraps=0)
        expected = oracle(*case)
        np.testing.assert_allclose(froc.operating_sensitivities, expected, rtol=0, atol=1e-12)
        assert froc.cpm == pytest.approx(sum(expected) / 7, abs=1e-12)
        seen.update(np.round(expected, 6))
    assert len(seen) > 20


def counted(candidates, nodules, excluded, series):
    """Counts of the whole evaluation in the order of `Details`, and the nodules missed."""
    counts, missed = np.zeros(6, dtype=int), []
    for uid in series:
        ranked = sorted(map(tuple, candidates.get(uid, [])), key=lambda c: -c[3])
        taken, true = ranked[:100], np.reshape(nodules.get(uid, []), (-1, 4))
        on = [np.flatnonzero(hits(np.array([c[:3]]), true)[0]) for c in taken]
        best = {
            n: next(i for i, found in enumerate(on) if n in found)
            for n in np.concatenate([*on, []])
        }
        off = [c for c, found in zip(taken, on, strict=True) if not len(found)]
        dropped = np.reshape(excluded.get(uid, []), (-1, 4))
        ignored = sum(hits(np.array([c[:3]]), dropped).any() for c in off)
        repeated = sum(len(found) > 0 for found in on) - len(set(best.values()))
        counts += [
            len(ranked), len(best), len(off) - ignored, ignored, repeated, len(ranked) - len(taken),
        ]  # fmt: skip
        missed += [(uid, *row) for n, row in enumerate(true.tolist()) if n not in best]
    return counts.tolist(), missed


@pytest.mark.parametrize(
    ("cases", "extent", "crowded"), [(40, 8, False), (30, 14, False), (4, 20, True)]
)
def test_it_counts_what_becomes_of_candidates_and_nodules(cases, extent, crowded):
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(cases):
        case = random_case(rng, extent=extent, crowded=crowded)
        froc = evaluate(*case, bootstraps=0)
        details, (counts, missed) = froc.details, counted(*case)
        names = ("candidates", "true", "false", "ignored", "repeated", "capped")
        assert [getattr(details, f"n_{name}") for name in names] == counts
        assert [(miss.uid, *miss.point, miss.diameter) for miss in details.misses] == missed
        assert details.n_true + len(missed) == froc.n_nodules
        seen |= {name for name, value in zip(names, counts, strict=True) if value}
    assert len(seen) == 6 - (not crowded)


def test_groups_by_diameter_are_those_of_their_nodules_alone():
    """With the false positives of all: the other nodules become excluded findings."""
    rng, compared = np.random.default_rng(3), 0
    for _ in range(30):
        candidates, nodules, _, series = random_case(rng, extent=14, crowded=False)
        nodules = {uid: rows * [3, 3, 3, 2] for uid, rows in nodules.items()}
        candidates = {uid: rows * [3, 3, 3, 1] for uid, rows in candidates.items()}
        froc = evaluate(candidates, nodules, {}, series, bootstraps=0)
        for group in froc.details.groups:

            def inside(rows, group=group):
                size = np.where(rows[:, 3] < 0, 10, rows[:, 3])
                return (group.low <= size) & (size < group.high)

            own = {uid: rows[inside(rows)] for uid, rows in nodules.items()}
            rest = {uid: rows[~inside(rows)] for uid, rows in nodules.items()}
            alone = evaluate(candidates, own, rest, series, bootstraps=0)
            assert group.n_nodules == alone.n_nodules
            if np.array_equal(alone.fps_per_scan, froc.fps_per_scan):  # no point was left out
                np.testing.assert_allclose(group.sensitivities, alone.operating_sensitivities)
                compared += 1
        weights = [group.n_nodules for group in froc.details.groups]
        mean = np.average([group.sensitivities for group in froc.details.groups], 0, weights)
        np.testing.assert_allclose(mean, froc.operating_sensitivities, atol=1e-12)
        assert sum(weights) == froc.n_nodules
    assert compared > 10


def test_thresholds_keep_the_sensitivity_at_no_more_false_positives():
    rng = np.random.default_rng(4)
    for _ in range(40):
        candidates, nodules, excluded, series = random_case(rng, extent=14, crowded=False)
        froc = evaluate(candidates, nodules, excluded, series, bootstraps=0)
        for rate, threshold, sensitivity in zip(
            OPERATING_POINTS, froc.details.thresholds, froc.operating_sensitivities, strict=True
        ):
            if threshold is None:
                assert not len(froc.fps_per_scan) or froc.fps_per_scan[0] > rate
                continue
            kept = {uid: rows[rows[:, 3] >= threshold] for uid, rows in candidates.items()}
            at = evaluate(kept, nodules, excluded, series, bootstraps=0)
            assert at.fps_per_scan[-1] <= rate
            above = froc.sensitivities[froc.fps_per_scan <= rate].max()
            assert at.sensitivities[-1] == above <= sensitivity + 1e-12


def test_the_lowest_threshold_counts():
    froc = froc_of([[0, 0, 0, 0.4], *wrong(1, 0.5)], [[0, 0, 0, 6]])
    assert froc.operating_sensitivities == (0, 0, 0, 1, 1, 1, 1)
    assert froc.cpm == 4 / 7


@pytest.mark.parametrize(
    ("diameter", "distance", "detected"),
    [
        (10, 5, False),
        (10, 4.9999999, True),
        (-1, 5, False),
        (-1, 4.99, True),
        (-30, 6, False),
        (3, 1.49, True),
    ],
)
def test_a_hit_lies_strictly_inside_the_radius(diameter, distance, detected):
    froc = froc_of([[1, 2 + distance, 3, 0.9]], [[1, 2, 3, diameter]])
    assert froc.operating_sensitivities == (float(detected),) * 7
    assert froc.fps_per_scan[-1] == float(not detected)


def test_hits_are_pairs_of_points_and_findings():
    points = np.array([[0.0, 0, 0], [0, 0, 4.9], [9, 9, 9]])
    findings = np.array([[0.0, 0, 0, -1], [0, 0, 4, 3], [9, 9, 9, 1]])
    expected = [[True, False, False], [True, True, False], [False, False, True]]
    assert hits(points, findings).tolist() == expected
    assert hits(points[:0], findings).shape == (0, 3) and hits(points, findings[:0]).shape == (3, 0)


def test_distance_counts_all_three_axes():
    assert froc_of([[3, 3, 3, 0.9]], [[0, 0, 0, 10]]).cpm == 0
    assert froc_of([[2.8, 2.8, 2.8, 0.9]], [[0, 0, 0, 10]]).cpm == 1


def test_the_best_candidate_of_a_nodule_counts_and_its_other_hits_are_nothing():
    froc = froc_of([[0, 0, 0, 0.3], [1, 0, 0, 0.9], [0, 1, 0, 0.2], *wrong(1, 0.5)], [[0, 0, 0, 6]])
    assert froc.thresholds.tolist() == [0.9, 0.5]
    assert froc.fps_per_scan.tolist() == [0, 1]
    assert froc.sensitivities.tolist() == [1, 1]


def test_a_candidate_on_two_nodules_finds_both():
    froc = froc_of([[2, 0, 0, 0.9]], [[0, 0, 0, 6], [4, 0, 0, 6]])
    assert froc.cpm == 1
    assert froc.n_nodules == 2


def test_candidates_on_excluded_findings_are_dropped():
    froc = froc_of(
        [[0, 0, 0, 0.4], [50, 0, 0, 0.9], [50, 4.9, 0, 0.8]], [[0, 0, 0, 6]], [[50, 0, 0, -1]]
    )
    assert froc.cpm == 1
    assert froc.fps_per_scan.tolist() == [0]


def test_a_candidate_on_a_nodule_counts_for_it_even_on_an_excluded_finding():
    assert froc_of([[0, 0, 0, 0.4]], [[0, 0, 0, 6]], [[1, 0, 0, 20]]).cpm == 1


def test_missed_nodules_stay_in_the_denominator():
    froc = froc_of([[0, 0, 0, 0.9]], [[0, 0, 0, 6], [90, 0, 0, 6], [0, 90, 0, 6], [0, 0, 90, 6]])
    assert froc.operating_sensitivities == (0.25,) * 7


def test_false_positives_are_counted_over_all_scans():
    candidates = {"a": [[0, 0, 0, 0.4]], "b": wrong(2, 0.9)}
    froc = evaluate(candidates, {"a": [[0, 0, 0, 6]]}, {}, ["a", "b", "c", "d"], bootstraps=0)
    assert froc.fps_per_scan.tolist() == [0.5, 0.5]
    assert froc.operating_sensitivities == (0, 0, 1, 1, 1, 1, 1)
    assert froc.n_scans == 4


def test_nodules_of_other_scans_are_passed_over():
    froc = evaluate(
        {"a": [[0, 0, 0, 0.4]]}, {"a": [[0, 0, 0, 6]], "z": [[0, 0, 0, 6]]}, {}, ["a"], bootstraps=0
    )
    assert froc.n_nodules == 1
    assert froc.cpm == 1


@pytest.mark.parametrize(("n_wrong", "detected"), [(99, True), (100, False), (250, False)])
def test_at_most_the_100_most_probable_candidates_of_a_scan_count(n_wrong, detected):
    froc = froc_of([[0, 0, 0, 0.1], *wrong(n_wrong, 0.9)], [[0, 0, 0, 6]], scans=100)
    assert froc.sensitivities[-1] == float(detected)
    assert froc.fps_per_scan[-1] == min(n_wrong, 100) / 100


def test_the_cap_is_per_scan():
    candidates = {"a": wrong(100, 0.9), "b": [[0, 0, 0, 0.1]]}
    froc = evaluate(candidates, {"b": [[0, 0, 0, 6]]}, {}, ["a", "b"], bootstraps=0)
    assert froc.sensitivities[-1] == 1


def test_the_cap_comes_before_excluded_findings_are_dropped():
    on_excluded = [[50, 0, 0, 0.9]] * 100
    assert froc_of([[0, 0, 0, 0.1], *on_excluded], [[0, 0, 0, 6]], [[50, 0, 0, 8]]).cpm == 0


@pytest.mark.parametrize(
    ("position", "detected"), [(0, True), (99, True), (100, False), (120, False)]
)
def test_equal_probabilities_at_the_cap_go_by_the_order_of_the_file(position, detected):
    candidates = wrong(120)
    candidates.insert(position, [0, 0, 0, 0.5])
    assert froc_of(candidates, [[0, 0, 0, 6]], scans=1000).sensitivities[-1] == float(detected)


def test_equal_probabilities_are_taken_together():
    for candidates in ([[0, 0, 0, 0.5], *wrong(1, 0.5)], [*wrong(1, 0.5), [0, 0, 0, 0.5]]):
        froc = froc_of(candidates, [[0, 0, 0, 6]])
        assert froc.thresholds.tolist() == [0.5]
        assert froc.operating_sensitivities == (1 / 8, 1 / 4, 1 / 2, 1, 1, 1, 1)


def test_interpolation_between_before_and_beyond_the_points():
    candidates = [*wrong(2, 0.9), [0, 0, 0, 0.9], *wrong(2, 0.7), [90, 0, 0, 0.6], *wrong(2, 0.6)]
    froc = froc_of(candidates, [[0, 0, 0, 6], [90, 0, 0, 6], [0, 90, 0, 6], [0, 0, 90, 6]])
    assert list(zip(froc.fps_per_scan, froc.sensitivities, strict=True)) == [
        (2, 0.25),
        (4, 0.25),
        (6, 0.5),
    ]
    np.testing.assert_allclose(
        froc.operating_sensitivities, [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 4, 1 / 2]
    )


def test_without_candidates_nothing_is_found():
    froc = evaluate({}, {"a": [[0, 0, 0, 6]]}, {}, ["a", "b"])
    assert froc.cpm == 0
    assert froc.interval == (0, 0)
    assert froc.thresholds.size == 0


def test_any_finite_score_serves_as_a_probability():
    froc = froc_of([[0, 0, 0, -3.5], *wrong(2, 7.0)], [[0, 0, 0, 6]])
    assert froc.thresholds.tolist() == [7.0, -3.5]
    assert froc.operating_sensitivities == (0, 0, 0, 0, 1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, {}, {}, ["a"]), "nodules: expected at least one in the scans evaluated, got none"),
        (({}, {"b": [[0, 0, 0, 6]]}, {}, ["a"]), "nodules: expected at least one"),
        (({}, {}, {}, []), "nodules: expected at least one"),
        (
            ({"b": [[0, 0, 0, 1]]}, {"a": [[0, 0, 0, 6]]}, {}, ["a"]),
            "candidates: unknown series id b",
        ),
        (
            ({}, {"a": [[0, 0, 0, 6]]}, {}, ["a", "b", "b"]),
            "series: expected every id once, got b 2 times",
        ),
        (
            ({"a": [[0, 0, 0]]}, {"a": [[0, 0, 0, 6]]}, {}, ["a"]),
            r"candidates of series a: .*got \[1, 3\]",
        ),
        (
            ({"a": [[0, 0, 0, np.nan]]}, {"a": [[0, 0, 0, 6]]}, {}, ["a"]),
            "candidates of series a: .*got nan",
        ),
        (({}, {"a": [[0, np.inf, 0, 6]]}, {}, ["a"]), "nodules of series a: .*got inf"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(*arguments)


def bootstrap_case():
    rng = np.random.default_rng(5)
    series = [str(i) for i in range(12)]
    nodules = {
        uid: rng.uniform([0, 0, 0, 6], [60, 60, 60, 20], (rng.integers(0, 4), 4)) for uid in series
    }
    candidates = {uid: np.c_[rng.uniform(0, 60, (30, 3)), rng.random(30)] for uid in series}
    for uid in series[::2]:
        candidates[uid][: len(nodules[uid])] = nodules[uid] * [1, 1, 1, 0] + [0, 0, 0, 0.9]
    return candidates, nodules, {}, series


def test_bootstraps_resample_whole_scans():
    candidates, nodules, excluded, series = bootstrap_case()
    froc = evaluate(candidates, nodules, excluded, series, bootstraps=2000)
    rng = np.random.default_rng(99)
    samples = []
    while len(samples) < 1000:
        drawn = dict(enumerate(rng.choice(series, len(series))))
        true = {copy: nodules[uid] for copy, uid in drawn.items()}
        if any(map(len, true.values())):
            marks = {copy: candidates[uid] for copy, uid in drawn.items()}
            samples.append(
                evaluate(marks, true, {}, list(drawn), bootstraps=0).operating_sensitivities
            )
    lower, upper = np.quantile(np.mean(samples, axis=1), (0.025, 0.975))
    assert froc.interval == pytest.approx((lower, upper), abs=0.02)
    assert upper - lower > 0.1
    np.testing.assert_allclose(
        froc.band[:, ::10], np.quantile(samples, (0.025, 0.975), axis=0), atol=0.06
    )


def test_the_bootstrap_is_seeded_and_brackets_the_curve():
    case = bootstrap_case()
    first, again, other = (evaluate(*case, bootstraps=200, seed=seed) for seed in (3, 3, 4))
    assert first.interval == again.interval
    np.testing.assert_array_equal(first.band, again.band)
    assert first.interval != other.interval
    assert first.cpm == other.cpm
    assert first.interval[0] < first.cpm < first.interval[1]
    assert first.band.shape == (2, len(BAND_RATES))
    assert (first.band[0, ::10] <= first.operating_sensitivities).all()
    assert (first.band[1, ::10] >= first.operating_sensitivities).all()
    assert (np.diff(first.band) >= 0).all()


def test_draws_without_a_nodule_are_drawn_again():
    froc = froc_of([[0, 0, 0, 0.9]], [[0, 0, 0, 6]], scans=20, bootstraps=300)
    assert froc.interval == (1, 1)


def test_one_scan_found_and_one_missed_span_everything():
    case = {"a": [[0, 0, 0, 0.9]]}, {"a": [[0, 0, 0, 6]], "b": [[0, 0, 0, 6]]}, {}, ["a", "b"]
    froc = evaluate(*case)
    assert froc.cpm == 0.5
    assert froc.interval == (0, 1)


def test_the_interval_is_that_of_the_binomial_for_one_nodule_a_scan():
    series = [str(i) for i in range(100)]
    nodules = {uid: [[0, 0, 0, 6]] for uid in series}
    froc = evaluate({uid: [[0, 0, 0, 0.9]] for uid in series[:60]}, nodules, {}, series)
    assert froc.interval == pytest.approx(
        (0.50, 0.695), abs=0.011
    )  # 2.5 % and 97.5 % points of B(100, 0.6)


def test_every_tenth_rate_of_the_band_is_an_operating_point():
    assert tuple(BAND_RATES[::10]) == OPERATING_POINTS


@pytest.mark.parametrize("bootstraps", [0, 100])
@pytest.mark.parametrize("candidates", [[], [[0, 0, 0, 0.4], *wrong(1, 0.5)]])
def test_the_dictionary_is_strict_json(candidates, bootstraps):
    froc = froc_of(candidates, [[0, 0, 0, 6]], scans=2, bootstraps=bootstraps)
    read = json.loads(json.dumps(froc.to_dict(), allow_nan=False))
    assert read == froc.to_dict()
    assert (read["n_scans"], read["n_nodules"], read["n_bootstraps"]) == (2, 1, bootstraps)
    assert [point["fps_per_scan"] for point in read["operating_points"]] == list(OPERATING_POINTS)
    assert [point["sensitivity"] for point in read["operating_points"]] == list(
        froc.operating_sensitivities
    )
    assert ("lower" in read["operating_points"][0]) == bool(bootstraps)
    assert read["interval"] == (list(froc.interval) if bootstraps else None)
    assert (
        len(read["curve"]["threshold"])
        == len(read["curve"]["sensitivity"])
        == len(froc.fps_per_scan)
    )


def test_the_table_shows_what_counts():
    text = str(froc_of([[0, 0, 0, 0.4], *wrong(1, 0.5)], [[0, 0, 0, 6]]))
    lines, zeros, all_found = text.splitlines(), ["0.0"] * 3, ["100.0"] * 4
    assert lines[0] == "1 scan, 1 nodule"
    assert lines[1].split()[-7:] == ["1/8", "1/4", "1/2", "1", "2", "4", "8"]
    assert lines[2].split()[-7:] == [*zeros, *all_found]
    assert lines[3].split() == ["6", "to", "8", "mm", "(1)", *zeros, *all_found]
    assert lines[4].split() == ["Threshold", "-", "-", "-", "0.4", "0.4", "0.4", "0.4"]
    assert lines[5].startswith("Candidates 2: true positives 1, false positives 1, ignored")
    assert lines[6:] == ["CPM 0.571"]
    assert len(set(map(len, lines[1:5]))) == 1
    with_interval = str(froc_of([[0, 0, 0, 0.4]], [[0, 0, 0, 6]], scans=3, bootstraps=10))
    assert with_interval.startswith("3 scans, 1 nodule\n")
    assert with_interval.endswith("CPM 1.000 (95% interval 1.000 to 1.000, 10 bootstraps)")
