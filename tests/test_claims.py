# SPDX-License-Identifier: Apache-2.0
"""Verdicts follow from results, and from nothing else."""

import json
import math

import pytest

from benchmarks import rows as grouping
from tests.helpers import BENCHMARKS, benchmark


@pytest.fixture
def tables():
    return benchmark("report.tables")


@pytest.fixture
def evidence():
    return benchmark("report.evidence")


@pytest.fixture
def claims():
    return benchmark("report.claims")


def row(method, n, seed, value, task="text", **other):
    return {
        "format": 3, "kind": "run", "task": task, "split": "iid", "method": method, "workers": n,
        "seed": seed, "learning_rate": 1e-3, "weight_decay": 0.1, "setting": "small", "steps": 100,
        "loss": value, "accuracy": value, "curve": [3.0, 2.0, value], "bits": 3.0, "bytes": 10,
        "parameters": 7, "versions": {"jax": "1"},
    } | other  # fmt: skip


def rows_of(losses, **other):
    """Of ``{method: {n: [a loss a seed]}}``."""
    return [
        row(method, n, seed, value, **other)
        for method, by_n in losses.items()
        for n, values in by_n.items()
        for seed, value in enumerate(values)
    ]


CASES = {
    "level": [2.000, 2.002, 1.998],
    "ahead": [1.900, 1.910, 1.890],
    "behind": [2.100, 2.110, 2.090],
    "undecided": [2.000, 2.200, 1.900],
}


@pytest.mark.parametrize("word", CASES)
def test_words_are_by_the_interval_and_the_margin(tables, evidence, word):
    losses = {"Lion": {4: [2.0] * 3, 8: [2.0] * 3}, "AdamW": {4: CASES[word], 8: CASES[word]}}
    found = grouping.runs(rows_of(losses), "text", "iid")
    got = evidence.standing(found, "text", "AdamW", "Lion")
    assert got.word == word
    assert got.far == (word == "ahead")
    assert list(got.by_workers) == [4, 8]
    back = evidence.standing(found, "text", "Lion", "AdamW")
    assert back.gain == pytest.approx(-got.gain)
    assert got.on_par is {"behind": False, "undecided": None}.get(word, True)
    assert str(got).startswith(f"text: {got.short[:-1]}; n = 4: ")
    assert got.short.startswith(f"{word} (")


def test_intervals_are_over_seeds_not_over_all_pairs(tables, evidence):
    """Workers share a seed's weights: more numbers of workers give no more certainty."""
    few = {"Lion": {4: [2.0] * 3}, "AdamW": {4: [1.9, 2.0, 1.95]}}
    many = {name: dict.fromkeys((4, 8, 16), by_n[4]) for name, by_n in few.items()}
    got = [
        evidence.standing(grouping.runs(rows_of(x), "text", "iid"), "text", "AdamW", "Lion")
        for x in (few, many)
    ]
    assert got[0].error == pytest.approx(got[1].error)
    assert got[0].error == pytest.approx(4.3026527 * 0.05 / math.sqrt(3))
    assert got[0].word == "undecided"


def test_seeds_that_some_have_count_where_they_ran_only(tables, evidence):
    """Three seeds at n = 4, six at 8: a seed's mean over what it has would mix two quantities."""
    losses = {
        "Lion": {4: [2.0] * 3, 8: [2.0] * 6, 16: [2.0] * 2},
        "AdamW": {4: [2.1, 2.2, 2.3], 8: [1.9, 1.9, 1.9, 1.7, 1.7, 1.7], 16: [9.0, 9.0]},
    }
    got = evidence.standing(grouping.runs(rows_of(losses), "text", "iid"), "text", "AdamW", "Lion")
    assert got.gain == pytest.approx((-0.2 + 0.1) / 2)
    assert got.error == pytest.approx(4.3026527 * 0.05 / math.sqrt(3))
    assert {n: round(gain, 6) for n, (gain, _) in got.by_workers.items()} == {4: -0.2, 8: 0.2}
    assert got.by_workers[8][1] == pytest.approx(2.5705818 * 0.10954 / math.sqrt(6), rel=1e-3)


def test_more_accuracy_is_ahead_and_less_loss_is(tables, evidence):
    better = {"Lion": {4: [0.70, 0.71, 0.72]}, "AdamW": {4: [0.80, 0.81, 0.82]}}
    found = grouping.runs(rows_of(better, task="images"), "images", "iid")
    got = evidence.standing(found, "images", "AdamW", "Lion")
    assert (got.word, round(got.gain, 6), got.far) == ("ahead", 10.0, True)


def test_who_diverges_is_behind(tables, evidence):
    losses = {"Lion": {4: [2.0, 2.0, 2.0]}, "DGC": {4: [1.5, 1.5, float("nan")]}}
    found = grouping.runs(rows_of(losses), "text", "iid")
    lost = evidence.standing(found, "text", "DGC", "Lion")
    assert str(lost) == "text: behind (diverged: 1, 0)"
    assert not lost.far
    assert evidence.standing(found, "text", "Lion", "DGC").word == "ahead"
    assert evidence.standing(found, "text", "Lion", "DGC").far


def test_two_seeds_are_no_evidence(tables, evidence):
    found = grouping.runs(rows_of({"Lion": {4: [2.0] * 2}, "AdamW": {4: [1.0] * 2}}), "text", "iid")
    with pytest.raises(evidence.Missing, match="AdamW beside Lion, text: 3 seeds of both"):
        evidence.standing(found, "text", "AdamW", "Lion")


def test_runs_that_are_no_comparison_are_refused(tables):
    one = [row("Lion", 4, 0, 2.0)]
    for other, message in (
        ({"setting": "large"}, "runs of text, iid, are of several settings: large; small"),
        ({"versions": {"jax": "2"}}, "are of several versions: jax 1; jax 2"),
        ({"learning_rate": 3e-3}, "are of several rates of Lion"),
        ({"method": "b1 0.9"}, "'b1 0.9' is no method of compare.py"),
    ):
        with pytest.raises(grouping.UsageError, match=message):
            grouping.runs([*one, row("Lion", 4, 1, 2.0) | other], "text", "iid")


def test_rates_at_an_edge_of_the_search_are_marked(tables):
    trials = [
        row("Lion", 8, 1000, 2.0, kind="trial", learning_rate=rate, weight_decay=decay)
        for rate, decay in ((3e-4, 0.1), (1e-3, 0.1), (3e-3, 0.1), (1e-3, 0.025))
    ]
    rows = [*trials, row("Lion", 8, 42, 2.0)]
    edge = grouping.edges(rows, "text", "iid")
    assert edge == {"Lion": {"weight_decay"}}
    table = tables.qualities(grouping.runs(rows, "text", "iid"), "text", edge)
    assert table.splitlines()[-1] == "| Lion | 2.000 | 3.00 | 0.001 | 0.1 (edge) |"


def test_equal_loss_is_of_the_seeds_of_both(tables):
    quick = [3.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    slow = [3.0, 3.0, 3.0, 3.0, 2.0, 2.0]
    rows = [row("D-Lion majority", 4, seed, 2.0, curve=slow) for seed in (1, 2)]
    rows += [row("Lion", 4, 1, 1.0, curve=quick), row("Lion", 4, 3, 1.0, curve=[math.nan] * 6)]
    rows += [row("AdamW", 4, 9, 1.0), row("DGC", 4, 2, 9.0, curve=[9.0] * 6)]
    table = tables.equal_loss(grouping.runs(rows, "text", "iid"))
    assert "| Lion | 0.33 |" in table
    assert "| D-Lion majority | 1.00 |" in table
    assert "| AdamW | no seed of both |" in table
    assert "| DGC | never |" in table


def test_loss_that_comes_back_up_was_not_reached(tables):
    fall = [3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    early = [3.0, 1.0, 1.0, 1.0, 3.0, 3.0, 1.0, 1.0]
    rows = [row("D-Lion majority", 4, 1, 2.0, curve=fall), row("Lion", 4, 1, 1.0, curve=early)]
    assert "| Lion | 0.88 |" in tables.equal_loss(grouping.runs(rows, "text", "iid"))


def test_ahead_of_all_is_of_all(claims, evidence, tmp_path):
    def judged(**others):
        losses = {"D-Lion majority": {4: [2.0] * 3}} | {k: {4: v} for k, v in others.items()}
        rows = [*rows_of(losses), *rows_of({k: {4: [0.5] * 3} for k in losses}, task="images")]
        (tmp_path / "compare.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        ev = evidence.Evidence(tmp_path)
        return claims.ahead_of("D-Lion majority", tuple(others))(ev)[0]

    # On images all are level, which is not ahead.
    assert judged(QSGD=[2.2] * 3, DGC=[2.3] * 3) == "in part"
    assert judged(QSGD=[2.2] * 3, DGC=[2.0, 2.2, 5.0]) == "not shown"
    assert judged(QSGD=[2.2] * 3, DGC=[1.9] * 3) == "**does not hold here**"


def test_unlike_data_is_judged_by_the_figures(claims, evidence, tmp_path):
    def judged(majority, remedy):
        rows = []
        for name, values in (("D-Lion majority", majority), ("D-Lion majority, sync 16", remedy)):
            for split, value in zip(("iid", "0.25", "0.05"), values, strict=True):
                rows += [row(name, 10, s, value, task="images", split=split) for s in (1, 2, 3)]
        text = "\n".join(map(json.dumps, rows)) + "\n"
        (tmp_path / "unlike.jsonl").write_text(text)
        return claims.unlike(evidence.Evidence(tmp_path))

    verdict, text = judged((0.8, 0.6, 0.5), (0.8, 0.79, 0.78))
    assert verdict == "it falls; more than half comes back with sync 16"
    assert "at iid / 0.25 / 0.05: D-Lion majority 80.0 ± 0.0 / 60.0 ± 0.0 / 50" in text
    assert (
        judged((0.8, 0.6, 0.5), (0.8, 0.6, 0.52))[0] == "it falls; nothing brings back half of it"
    )
    assert judged((0.8, 0.8, 0.8), (0.8, 0.8, 0.8))[0] == "it does not surely fall"
    assert judged((0.8, 0.6, math.nan), (0.8, 0.8, 0.8))[0].startswith("it falls")


def test_unlike_data_is_paired_by_seed(claims, evidence, tmp_path):
    """Runs of seeds that others lack say nothing, and two seeds are no evidence."""
    fall = {1: (0.8, 0.60), 2: (0.8, 0.62), 3: (0.8, 0.68)}
    mend = {0: (0.8, 0.10), 1: (0.8, 0.72), 2: (0.8, 0.735), 3: (0.8, 0.755)}

    def judged(mend):
        rows = [
            row(name, 10, seed, value, task="images", split=split)
            for name, some in (("D-Lion majority", fall), ("D-Lion majority, sync 16", mend))
            for seed, values in some.items()
            for split, value in zip(("iid", "0.05"), values, strict=True)
        ]
        (tmp_path / "unlike.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return claims.unlike(evidence.Evidence(tmp_path))[0]

    assert judged(mend) == "it falls; more than half comes back with sync 16"
    with pytest.raises(evidence.Missing, match="3 seeds of all on unlike data"):
        judged({1: mend[1]})


def test_rows_never_seen_are_told_in_sums_of_the_learning_rates(claims, evidence, tmp_path):
    moves = {"Lion": (0.0, 0.0), "ties and zeros -1": (0.4, 0.6)}
    rows = [
        {"rule": rule, "width": 64, "seed": seed, "moved": [[0.0, value, 9.0]]}
        for rule, values in moves.items()
        for seed, value in enumerate(values)
    ]
    figures = {"learning_rates": 0.5, "rows": rows}
    (tmp_path / "rare_rows.json").write_text(json.dumps(figures))
    _, text = claims.rare(evidence.Evidence(tmp_path))
    assert text.endswith(": Lion, width 64: 0.00, ties and zeros -1, width 64: 1.00")


def test_best_rates_are_read_from_sensitivitys_results(claims, evidence, tmp_path):
    sensitivity = benchmark("report.sensitivity")
    rows = []

    def row_of(job, task):  # least at 2e-3
        value = math.log(job.learning_rate / 2e-3) ** 2 + 1
        rows.append(row(job.method, job.workers, job.seed, value, task=task) | job._asdict())
        if task == "images":
            rows[-1]["accuracy"] = 1 / value
        return rows[-1]

    for task in ("images", "text"):
        sensitivity.measure(task, lambda job, task=task: row_of(job, task), sensitivity.Plan())
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "sensitivity.jsonl").write_text(lines)
    _, text = claims.hyperparameters(evidence.Evidence(tmp_path))
    assert "text: Lion 2.0e-03, 2.0e-03, 2.0e-03; D-Lion majority 2.0e-03" in text
    (tmp_path / "sensitivity.jsonl").write_text("\n".join(lines.splitlines()[:-1]) + "\n")
    with pytest.raises(evidence.Missing, match="D-Lion average"):
        claims.hyperparameters(evidence.Evidence(tmp_path))
    other = json.dumps(rows[-1] | {"seed": 7, "setting": "large"})
    (tmp_path / "sensitivity.jsonl").write_text(lines + other + "\n")
    with pytest.raises(sensitivity.UsageError, match="text was run with 2 setting"):
        claims.hyperparameters(evidence.Evidence(tmp_path))


def test_a_page_without_results_says_so(claims, evidence, tmp_path):
    page = claims.page(evidence.Evidence(tmp_path))
    assert page.count("| not measured yet |") >= 10
    losses = {
        name: {4: [2.0, 2.0, 2.0], 8: [2.0, 2.0, 2.0]} for name in ("Lion", "D-Lion majority")
    }
    half = rows_of(losses, task="images")
    (tmp_path / "compare.jsonl").write_text("\n".join(map(json.dumps, half)) + "\n")
    assert claims.page(evidence.Evidence(tmp_path)) == page
    rows = rows_of(losses) + rows_of(losses, task="images")
    (tmp_path / "compare.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    page = claims.page(evidence.Evidence(tmp_path))
    assert "on par with full-precision Lion | holds | D-Lion majority beside Lion: images: " in page


def test_the_page_in_the_repository_is_of_its_results(claims, evidence):
    page = claims.page(evidence.Evidence(BENCHMARKS / "results"))
    assert (BENCHMARKS.parent / "docs/claims.md").read_text() == page


def test_undecided_is_neither_for_nor_against(claims):
    assert claims.verdict([True, True]) == "holds"
    assert claims.verdict([False, False]) == "**does not hold here**"
    assert claims.verdict([None, None]) == "undecided"
    assert {claims.verdict(x) for x in ([True, None], [True, False, None])} == {"in part"}
    assert claims.verdict([False, None]) == "not shown"
    words = [claims.stated(word, "") for word in ("**does not hold here**", "undecided", "holds")]
    assert claims.all_of(*words[:2])(None)[0] == "not shown"
    assert claims.all_of(*words)(None)[0] == "in part"
