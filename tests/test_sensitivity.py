# SPDX-License-Identifier: Apache-2.0
"""Sensitivity, rare rows and theory: what is found is what is there, and the scripts run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distlion_jax as dl
from tests.helpers import benchmark


@pytest.fixture
def report():
    return benchmark("report.sensitivity")


@pytest.fixture
def rare():
    return benchmark("quality.rare_rows")


def test_vertex_finds_the_best_learning_rate(report):
    rates = 1e-3 * 2.0 ** np.arange(-2, 3)

    def points(best, sign):
        return {r: [sign * (np.log(r / best) ** 2 + e) for e in (-0.1, 0.1)] for r in rates}

    assert report.vertex(points(1.3e-3, 1), "text") == (pytest.approx(1.3e-3), False)
    assert report.vertex(points(0.8e-3, -1), "images") == (pytest.approx(0.8e-3), False)
    assert report.vertex(points(1.0, 1), "text") == (pytest.approx(4e-3), True)
    lost = points(1.3e-3, 1) | {rates[3]: [float("nan")]}
    assert report.vertex(lost, "text") == (pytest.approx(1e-3), False)


def test_heat_table_reads_the_cells(report):
    def heat_of(loss):
        return {
            report.Cell(name, *betas, rate, decay): {"task": "text", "loss": loss(*at)}
            for at in [
                (name, betas, rate, decay)
                for name in ("Lion", "D-Lion majority")
                for betas in ((0.9, 0.99), (0.5, 0.9))
                for rate in (1e-3, 1e-2)
                for decay in (0.1, 1.0)
            ]
            for name, betas, rate, decay in [at]
        }

    heat = heat_of(
        lambda name, betas, rate, decay: (
            2.0
            + 0.5 * ((rate == 1e-3) == (name == "Lion"))
            + 0.25 * (betas == (0.9, 0.99))
            + 0.02 * (decay == 1.0)
        )
    )
    # Runs that chose nothing lie 0.1 above their places on the map.
    chosen = {
        cell: [{"task": "text", "loss": heat[cell]["loss"] + 0.1}]
        for name in ("Lion", "D-Lion majority")
        for cell in report.picks(heat, name)
    }
    lion, vote = report.heat_table(heat, chosen, "text").splitlines()[2:]
    assert lion == ("| Lion | 2.350 (0.01, 0.1) | 2.100 (0.5, 0.9, 0.01, 0.1) | 2.350 | 2 of 4 |")
    assert vote == (
        "| D-Lion majority | 2.350 (0.001, 0.1) | 2.100 (0.5, 0.9, 0.001, 0.1) | 2.850 | 2 of 4 |"
    )


def test_constant_votes_move_where_nobody_voted():
    make = benchmark("quality.constant_votes").constant_vote
    gradients = jnp.array([[1.0, 0.0, 1.0, 0.0], [-1.0, 0.0, 1.0, 2.0]])  # tie, zeros, +1, one

    def moved(zero, tie):
        tx = make(1.0, weight_decay=0.0, zero=zero, tie=tie)
        step = lambda g: tx.update(g, tx.init(g), g)[0]  # noqa: E731
        return (-jax.vmap(step, axis_name="data")(gradients)[0]).tolist()

    assert moved(0, 0) == [0, 0, 1, 1]
    assert moved(0, -1) == [-1, -1, 1, 1]
    assert moved(-1, -1) == [-1, -1, 1, -1]
    assert moved(1, 1) == [1, 1, 1, 1]
    ours = dl.distributed_lion(1.0, weight_decay=0.0, ballot="ternary")
    step = lambda g: ours.update(g, ours.init(g), g)[0]  # noqa: E731
    assert (-jax.vmap(step, axis_name="data")(gradients)[0]).tolist() == moved(0, 0)


def test_words_are_ranked_and_rows_grouped(rare, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat and the dog, " * 400 + "\f" + "the end " * 400)
    data = rare.words(corpus, 4, 8)
    batch = data.draw(np.random.default_rng(0), 3)
    assert batch["x"].shape == (3, 64)
    ids = np.concatenate([data.held_out["x"].ravel(), batch["x"].ravel()])
    assert set(ids) == {0, 1, 2, 3}  # `the` 1, two others, and 0 for the rest
    assert (data.held_out["x"][0] == 1).sum() > 20
    assert rare.groups_of(np.array([0, 1, 2, 3, 9, 10, 999, 1000])).tolist() == [
        0, 1, 1, 2, 2, 3, 5, 6,
    ]  # fmt: skip
    names = benchmark("report.rare_rows").group_names()
    assert names == [
        "never",
        "1-2",
        "3-9",
        "10-29",
        "30-99",
        "100-999",
        "1000+",
    ]


@pytest.mark.slow
def test_a_row_never_seen_stays_but_for_constants(rare, tmp_path):
    args = ["--vocabulary", "4096", "--workers", "2", "--batch", "1", "--steps", "4", "--seeds",
            "1", "--eval-rows", "8", "--widths", "128", "--out", str(tmp_path)]  # fmt: skip
    said = rare.run(rare.parse(args))
    figures = json.loads((tmp_path / "rare_rows.json").read_text())
    moved = {row["rule"]: row["moved"][0] for row in figures["rows"]}
    for rule in ("D-Lion majority", "D-Lion majority, ternary ballot", "Lion, full precision"):
        assert moved[rule] == [0, 0, 0]
        assert f"| {rule} | 128 | 0.00 |" in said
    for rule in ("ties and zeros -1", "ties and zeros +1"):
        np.testing.assert_allclose(moved[rule], figures["learning_rates"], rtol=1e-3)
    assert (tmp_path / "rare_rows.png").stat().st_size > 10_000


@pytest.mark.slow
def test_sensitivity_runs_and_goes_on(monkeypatch, tmp_path):
    script, report = benchmark("quality.sensitivity"), benchmark("report.sensitivity")
    monkeypatch.setattr(report, "RATES", {"text": (1e-3, 1e-2)})
    monkeypatch.setattr(report, "DECAYS", (0.1,))
    for module in (script, report):
        monkeypatch.setattr(module, "BETAS", ((0.9, 0.99),))
    args = ["--task", "text", "--size", "quick", "--steps", "2", "--workers", "2", "3",
            "--heat-workers", "2", "--seeds", "1", "--out", str(tmp_path)]  # fmt: skip
    first = script.run(script.parse(args))
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("trial") == 5 * 2
    results = script.Results(tmp_path / "results.jsonl")
    plan = report.Plan(["text"], 2, [2, 3], [1])
    _, chosen, rows = report.measure("text", report.recall(results, "text"), plan)
    assert len(rows) == 3 * 2 * 5
    assert set(map(len, chosen.values())) == {1}  # a seed
    used = {row["seconds"] for row in (*rows, *(some[0] for some in chosen.values()))}
    assert kinds.count("run") == len(used)  # each once, and nothing else
    assert script.run(script.parse(args)) == first
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines
    assert "| best learning rate: quality | n = 2 | n = 3 |" in first
    for plot in ("heat", "rates"):
        assert (tmp_path / f"text_{plot}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_theory_runs(tmp_path):
    script = benchmark("quality.theory")
    args = ["--workers", "2", "16", "--seeds", "1", "--size", "128", "--steps", "400",
            "--learning-rate", "5e-3", "--out", str(tmp_path)]  # fmt: skip
    assert "| D-Lion majority |" in script.run(script.parse(args))
    rows = json.loads((tmp_path / "theory.json").read_text())["rows"]
    score = {(row["method"], row["workers"]): row["score"] for row in rows}
    assert score["D-Lion majority", 16] < 0.8 * score["D-Lion majority", 2]
    assert (tmp_path / "theory.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sensitivity", ["--heat-workers", "1"], "--workers and --heat-workers: at least 2"),
        ("sensitivity", ["--seeds", "1000"], "none of (1000, 1001), which searches use"),
        ("rare_rows", ["--workers", "1"], "--workers must be at least 2; got 1"),
        ("rare_rows", ["--widths", "6"], "--widths must be multiples of 4, the heads; got [6]"),
        ("rare_rows", ["--learning-rate", "0"], "--learning-rate must be above 0; got 0.0"),
        ("rare_rows", ["--steps", "0"], "--steps must be at least 1; got 0"),
        ("theory", ["--workers", "4"], "--workers: at least two numbers, each at least 2"),
        ("theory", ["--steps", "0"], "--size and --steps must be at least 1"),
    ],
)
def test_bad_flags_get_one_clear_line(capsys, name, flags, message):
    with pytest.raises(SystemExit):
        benchmark(f"quality.{name}").parse(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]
