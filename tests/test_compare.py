# SPDX-License-Identifier: Apache-2.0
"""The comparison: exact simulation, a fair search, results that are kept, and what it writes."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distlion_jax as dl
from distlion_jax import reference
from tests.helpers import BENCHMARKS, benchmark, benchmark_command

SIZE = {"steps": 3, "batch": 2, "layers": 1, "width": 32, "eval_rows": 32}


@pytest.fixture
def train():
    return benchmark("quality.training")


@pytest.fixture
def compare():
    return benchmark("quality.compare")


@pytest.fixture
def methods():
    return benchmark("quality.methods").METHODS


@pytest.fixture
def task(train):
    return train.make_task("text", SIZE)


def job(method, n, seed, *numbers):
    return benchmark("rows").Job("run", "iid", method, n, seed, *numbers)


def in_a_mesh(train, chosen, task, n, seed, rate, decay):
    """The same training on n devices, by the package's own train step."""
    mesh = dl.worker_mesh(n)
    tx = chosen.make(train.warmup_cosine(rate, task.steps), decay, task.steps)
    loss = train.models.make_loss(task.model)
    params = dl.replicate(train.models.initial_params(task.model, task.data, seed), mesh)
    state = dl.init_state(tx, params, mesh)
    step = dl.make_train_step(loss, tx, mesh)
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(task.steps):
        batch = task.data.draw(rng, n * task.batch)
        params, state, metrics = step(params, state, batch)
        losses.append(float(metrics.loss))
    return losses


SLOW = (
    "D-Muon majority",
    "Muon",
    "AdamW",
    "QSGD + AdamW",
    "EF-signSGD",
    "TernGrad",
    "DGC",
    "PowerSGD",
)
METHODS = (
    "D-Lion majority",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
)


@pytest.mark.parametrize("method", METHODS)
def test_simulated_workers_train_as_devices_do(train, methods, task, method):
    """Up to the rounding of a gradient, which differs between a batch of workers and one."""
    trainer = train.Trainer(task, methods[method], 4)
    result = trainer.run(job(method, 4, 7, 1e-2, 0.1))
    want = in_a_mesh(train, methods[method], task, 4, 7, 1e-2, 0.1)
    np.testing.assert_allclose(result.losses, want, rtol=2e-3)
    assert result.losses[0] != result.losses[-1]
    assert trainer.cost().bytes_received > 0


@pytest.mark.slow
def test_every_method_trains(train, methods):
    task = train.make_task("text", SIZE | {"steps": 25})
    for method, chosen in methods.items():
        numbers = chosen.learning_rate, chosen.weight_decay, chosen.betas
        result = train.Trainer(task, chosen, 2).run(job(method, 2, 0, *numbers))
        assert np.mean(result.losses[-5:]) < result.losses[0], method


def test_search_spends_its_budget_near_the_best(compare):
    def loss(job):  # least at a learning rate 9 times the start, decay as it is
        rate = np.log(job.learning_rate / 9e-3) / np.log(3)
        return rate**2 + np.log(job.weight_decay / 0.1) ** 2

    jobs = []
    start = compare.Job("trial", "iid", "D-Lion majority", 8, 1000, 1e-3, 0.1)
    best = compare.search(lambda job: jobs.append(job) or loss(job), start, 10)
    assert len({job for job in jobs if job.seed == 1000}) == 10
    assert len({job for job in jobs if job.seed == 1001}) == 3  # the finalists
    assert best.learning_rate == pytest.approx(9e-3)
    assert best.weight_decay == pytest.approx(0.1)


def test_search_goes_on_past_an_edge(compare):
    jobs = []
    start = compare.Job("trial", "iid", "D-Lion majority", 8, 1000, 1e-3, 0.1, (0.2, 0.9))

    def loss(job):  # less and less, down to a rate of 1e-6; b1 as small as it can be
        rates = abs(np.log10(job.learning_rate) + 6) + abs(np.log10(job.weight_decay) + 1)
        return rates + job.betas[0]

    best = compare.search(lambda job: jobs.append(job) or loss(job), start, 8)
    rates = sorted({job.learning_rate for job in jobs})
    assert rates[0] < best.learning_rate < rates[-1]
    assert abs(np.log10(best.learning_rate) + 6) < np.log10(3)
    plain = start._replace(learning_rate=1e-6)
    assert compare.search(loss, plain, 20).betas[0] == 0.0  # nothing lies beyond
    assert compare.search(loss, start, 1) == start  # one trial is no search


def test_search_moves_betas_by_what_they_leave_up_to_1(compare):
    def loss(job):  # least at b1 0.8, b2 0.96, rates as they are
        rates = np.log(job.learning_rate / 1e-3) ** 2 + np.log(job.weight_decay / 0.1) ** 2
        return rates + abs(job.betas[0] - 0.8) + abs(job.betas[1] - 0.96)

    jobs = []
    start = job("D-Lion majority", 8, 1000, 1e-3, 0.1, (0.9, 0.98))
    best = compare.search(lambda one: jobs.append(one) or loss(one), start, 24)
    assert len({one for one in jobs if one.seed == 1000}) == 24
    assert best.betas == pytest.approx((0.8, 0.96))
    rows = [one._asdict() | {"kind": kind, "task": "text"}
            for kind, some in (("trial", jobs), ("run", [best])) for one in some]  # fmt: skip
    assert benchmark("rows").edges(rows, "text", "iid") == {}  # the best lies inside
    last = max(jobs, key=lambda one: one.betas[1])._asdict() | {"task": "text"}
    assert "b2" in benchmark("rows").edges([*rows[:-1], last], "text", "iid")["D-Lion majority"]


def test_what_was_not_searched_has_no_edge():
    rows = [job("Lion", 8, 1, rate, 0.1, (0.9, 0.99))._asdict() | {"kind": kind, "task": "text"}
            for kind, rate in (("trial", 1e-3), ("trial", 3e-3), ("run", 1e-3))]  # fmt: skip
    assert benchmark("rows").edges(rows, "text", "iid") == {"Lion": {"learning_rate"}}


def test_rows_of_searches_that_left_betas_alone_are_read_as_such(compare, tmp_path):
    runs = benchmark("rows")
    row = job("Lion", 8, 42, 1e-3, 0.1)._asdict() | {"task": "text", "format": runs.FORMAT}
    del row["betas"]
    (tmp_path / "old.jsonl").write_text(json.dumps(row) + "\n")
    assert runs.job_of(row).betas is None
    found = runs.Results(tmp_path / "old.jsonl")
    assert found.find(job("Lion", 8, 42, 1e-3, 0.1), "text")
    assert not found.find(job("Lion", 8, 42, 1e-3, 0.1, (0.9, 0.99)), "text")
    earlier = compare._chosen(str(tmp_path / "old.jsonl"))
    assert compare.beginning(earlier, "text", "Lion") == (1e-3, 0.1, (0.9, 0.98))
    assert compare.beginning(earlier, "text", "SGD momentum")[2] is None


def by_two_workers(tx, grads, params):
    return jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0], axis_name="data")(grads)


def test_trials_begin_as_they_say():
    """The first step of each, where errors and momenta are zero."""
    trials, rng = benchmark("quality.trials"), np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 9)), jnp.float32), "b": jnp.ones(3)}
    grads = {k: jnp.asarray(rng.normal(size=(2, *v.shape)), jnp.float32) for k, v in params.items()}
    numbers = dl.hidden_matrices
    options = dict(weight_decay=0.0, chosen=numbers)
    want = by_two_workers(dl.distributed_muon(1.0, weight_decay=0.0), grads, params)
    for make in (trials.fed_back, trials.cautious):
        got = by_two_workers(make(1.0, **options), grads, params)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    decayed = by_two_workers(trials.cautious(1.0, weight_decay=0.5, chosen=numbers), grads, params)
    for k, x in params.items():
        same = np.sign(-want[k]) == np.sign(x)
        np.testing.assert_allclose(decayed[k], want[k] - 0.5 * x * same, rtol=1e-6)
    owned = by_two_workers(trials.owner_momentum(1.0, **options), grads, params)
    mean = {k: np.sign(g).mean(0) for k, g in grads.items()}
    matrix = np.sign(reference.newton_schulz(mean["w"]))
    np.testing.assert_allclose(owned["w"][0], -0.2 * matrix, rtol=1e-6)
    np.testing.assert_allclose(owned["b"][0], -0.5 * np.sign(mean["b"]), rtol=1e-6)


def test_blocks_are_orthogonalised_each_alone():
    trials, rng = benchmark("quality.trials"), np.random.default_rng(0)
    one = rng.normal(size=(6, 8)).astype(np.float32)
    tx = trials.in_blocks(1.0, weight_decay=0.0, chosen=dl.hidden_matrices)
    got = by_two_workers(tx, {"w": jnp.stack([one, one])}, {"w": jnp.asarray(one)})["w"][0]
    for block in np.s_[:3, :4], np.s_[:3, 4:], np.s_[3:, :4], np.s_[3:, 4:]:
        np.testing.assert_array_equal(got[block], -np.sign(reference.newton_schulz(one[block])))


def test_half_a_line_goes_when_the_next_is_written_and_not_before(tmp_path):
    runs = benchmark("rows")
    whole = {"format": runs.FORMAT, "task": "text", "kind": "run", "split": "iid", "method": "Lion",
             "workers": 2, "seed": 1, "learning_rate": 0.1, "weight_decay": 0.0}  # fmt: skip
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(whole) + '\n{"form')
    before = file.read_text()
    results = runs.Results(file)
    assert results.rows == [whole]
    assert file.read_text() == before
    results.add(whole | {"seed": 2})
    assert runs.read(file) == [whole, whole | {"seed": 2}]
    file.write_text(json.dumps(whole))  # as an editor may leave it
    results = runs.Results(file)
    assert results.rows == [whole]
    results.add(whole | {"seed": 2})
    assert runs.read(file) == [whole, whole | {"seed": 2}]


ARGUMENTS = [
    "--task", "text", "--size", "quick", "--steps", "2", "--budget", "2", "--workers", "2", "4",
    "--search-workers", "2", "--seeds", "1", "2",
]  # fmt: skip


def start(folder, *flags):
    command, options = benchmark_command("quality.compare", "--out", folder, *flags)
    return subprocess.run(command, capture_output=True, **options)


@pytest.mark.slow
def test_a_second_run_measures_nothing_and_says_the_same(tmp_path):
    methods = ["--methods", "D-Lion majority", "Lion"]
    first = start(tmp_path, *ARGUMENTS, *methods)
    assert first.returncode == 0, first.stderr
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("run") == 2 * 2 * 2  # methods, numbers of workers, seeds
    assert kinds.count("trial") >= 2 * (2 + 2)  # with a second seed; more past an edge
    file.write_text("\n".join(lines[:5]) + "\n")  # as if it had been killed
    second = start(tmp_path, *ARGUMENTS, *methods)
    assert second.returncode == 0, second.stderr
    again = file.read_text().splitlines()
    assert again[:5] == lines[:5]
    assert len(again) == len(lines)
    strip = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}  # noqa: E731
    assert list(map(strip, again)) == list(map(strip, lines))
    before = file.read_text()
    third = start(tmp_path, *ARGUMENTS, *methods)
    assert file.read_text() == before
    assert third.stdout == first.stdout
    assert "| D-Lion majority |" in first.stdout
    assert "| less Lion |" in first.stdout
    for plot in ("workers", "bits", "bytes"):
        assert (tmp_path / f"text_{plot}.png").stat().st_size > 10_000
    chosen = {r["method"]: (r["learning_rate"], r["weight_decay"])
              for r in map(json.loads, lines) if r["kind"] == "run"}  # fmt: skip
    chosen["D-Lion majority, coin"] = chosen["D-Lion majority"]  # a variant
    methods = ["--methods", *chosen]
    fourth = start(
        tmp_path / "on", *ARGUMENTS, *methods, "--budget", "1", "--start-from", str(file)
    )
    assert fourth.returncode == 0, fourth.stderr
    with_betas = [tmp_path / "betas", *ARGUMENTS, *methods, "--betas", "--start-from", str(file)]
    fifth = start(*with_betas)
    assert fifth.returncode == 0, fifth.stderr
    assert "| betas |" in fifth.stdout
    kept = (tmp_path / "betas/results.jsonl").read_text()
    assert start(*with_betas).stdout == fifth.stdout
    assert (tmp_path / "betas/results.jsonl").read_text() == kept
    rows = [json.loads(x) for x in (tmp_path / "on/results.jsonl").read_text().splitlines()]
    assert {r["method"]: (r["learning_rate"], r["weight_decay"]) for r in rows} == chosen


def test_tables_say_who_has_more_seeds():
    tables = benchmark("report.tables")
    row = {"task": "images", "accuracy": 0.5, "bits": 1.0}
    found = {("A", 4): {1: row, 2: row}, ("A", 8): {1: row, 2: row, 3: row}, ("B", 8): {1: row}}
    said = "1; at n = 4 also 2 for A; at n = 8 also 2, 3 for A"
    assert tables.seeds_of(found) == said
    assert tables.score(found, "A", 4, "images") == "50.0 ± 0.0"
    assert tables.score(found, "B", 4, "images") == "not run"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nonsense", "is no results file of compare.py"),
        ('{"format": 99}', "is of format 99, this is 3: use another --out"),
    ],
)
def test_other_results_are_not_mixed_in(tmp_path, row, message):
    (tmp_path / "results.jsonl").write_text(row + "\n")
    done = start(tmp_path, *ARGUMENTS)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_results_of_another_setting_are_not_mixed_in(tmp_path):
    methods = ["--methods", "Lion", "--budget", "1"]
    assert start(tmp_path, *ARGUMENTS, *methods).returncode == 0
    done = start(tmp_path, *ARGUMENTS, *methods, "--steps", "3")
    assert done.returncode == 2
    assert "has results of other setting (Transformer(characters=84, layers=1, " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text.replace('"jax": "', '"jax": "another'))
    done = start(tmp_path, *ARGUMENTS, *methods)
    assert done.returncode == 2
    assert "has results of other versions (" in done.stderr


def test_data_of_one_name_are_told_apart(train, tmp_path):
    """Folders called data, or raw, of as many images: an old file's rows are not of the new."""
    found = set()
    for folder, pixel in (("a", 7), ("b", 8)):
        (tmp_path / folder / "data").mkdir(parents=True)
        for i in range(1, 7):
            name = f"data_batch_{i}" if i < 6 else "test_batch"
            image = np.full((4, 3073), pixel, np.uint8)
            image[:, 0] = range(4)
            (tmp_path / folder / "data" / f"{name}.bin").write_bytes(image.tobytes())
        found.add(
            train.make_task("images", SIZE | {"patch": 8}, tmp_path / folder / "data").summary
        )
    for word in ("to be ", "be to "):
        (tmp_path / "text.txt").write_text(word * 1000)
        found.add(train.make_task("text", SIZE, corpus=tmp_path / "text.txt").summary)
    assert len(found) == 4
    assert not any("\n" in summary for summary in found)


@pytest.mark.slow
def test_a_split_that_cannot_be_is_said_at_once(tmp_path):
    done = start(tmp_path, *ARGUMENTS, "--splits", "groups", "--workers", "2", "64")
    assert done.returncode == 2
    assert "--splits, --workers: `workers` must be at most 42" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_that_diverges_is_said_to(train, methods, task):
    tables = benchmark("report.tables")
    long = task._replace(steps=60)
    diverging = job("SGD momentum", 2, 0, 1e9, 1e9)
    result = train.Trainer(long, methods["SGD momentum"], 2).run(diverging)
    assert np.isnan(result.loss)
    assert np.isnan(result.accuracy)
    assert len(result.losses) == 60
    assert tables.spread([1.0, float("nan")], ".1f") == "diverged (1 of 2)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "SGD-M"], "invalid choice: 'SGD-M'"),
        (["--workers", "1"], "--workers and --search-workers: at least 2"),
        (["--budget", "0"], "--budget must lie in [1, 32]; got 0"),
        (["--seeds", "42", "52", "42"], "--seeds names something twice: 42, 52, 42"),
        (["--seeds", "1000"], "none of (1000, 1001), which searches use"),
        (["--splits", "0"], "'0' is not iid, groups, or an alpha above 0"),
        (["--start-from", "nowhere"], "argument --start-from: nowhere has no results of i.i.d."),
        (["--start-from", f"{BENCHMARKS}/results/unlike.jsonl"], "has no results of i.i.d. runs"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
    ],
)
def test_bad_flags_get_one_clear_line(compare, capsys, flags, message):
    with pytest.raises(SystemExit):
        compare.parse(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_workers_draw_their_own_rows_only(train, methods, task):
    trainer = train.Trainer(task, methods["Lion"], 4)
    parts = train.split_rows(task.data, "groups", 4, 0)
    works = [set(task.data.groups[rows]) for rows in parts]
    seen = []
    picked = task.data.pick
    trainer.task = task._replace(
        data=train.sources.dataclasses.replace(
            task.data, pick=lambda rng, rows: (seen.append(rows), picked(rng, rows))[1]
        )
    )
    trainer._batches(np.random.default_rng(0), 5, parts)
    for rows in seen:
        for mine, own in zip(np.split(rows, 4), works, strict=True):
            assert set(task.data.groups[mine]) <= own
    assert sum(map(len, works)) == 42


def test_cifar_10_is_read(train, tmp_path):
    """A small file in its binary format: a label, then red, green and blue planes."""
    rng = np.random.default_rng(0)
    files = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = rng.integers(0, 256, (7, 32, 32, 3), np.uint8)
        labels = rng.integers(0, 10, (7, 1), np.uint8)
        planes = images.transpose(0, 3, 1, 2).reshape(7, -1)
        (tmp_path / f"{name}.bin").write_bytes(np.concatenate([labels, planes], 1).tobytes())
        files[name] = images, labels[:, 0]
    data = train.sources.load_images(tmp_path, 5)
    np.testing.assert_array_equal(data.held_out["x"], files["test_batch"][0][:5])
    np.testing.assert_array_equal(data.held_out["y"], files["test_batch"][1][:5])
    assert "35 images of 32x32 to train on" in data.description
    assert data.draw(np.random.default_rng(0), 3)["x"].shape == (3, 32, 32, 3)
    (tmp_path / "data_batch_3.bin").write_bytes(b"12345")
    with pytest.raises(train.sources.UsageError, match=r"data_batch_3\.bin holds 5 bytes, no mult"):
        train.sources.load_images(tmp_path, 5)


def test_openwebtext_s_tokens_are_read(train, tmp_path):
    """Small files as nanoGPT's prepare.py writes them: GPT-2's tokens, two bytes each."""
    rng = np.random.default_rng(0)
    ids = {"train": rng.integers(0, 300, 1000), "val": rng.integers(0, 256, 1000) + 50_000}
    ids["val"][-1] = 50_256  # end of text
    for part, values in ids.items():
        values.astype(np.uint16).tofile(tmp_path / f"{part}.bin")
    data = train.make_task("text", SIZE, corpus=tmp_path).data
    assert data.classes == 50_257
    assert "1,000 tokens (the largest is 50,256) to train on" in data.description
    held_out = train.sources.load_corpus(tmp_path, 99).held_out
    np.testing.assert_array_equal(held_out["x"].ravel(), ids["val"][: 15 * 64])
    np.testing.assert_array_equal(held_out["y"].ravel(), ids["val"][1 : 15 * 64 + 1])
    batch = data.draw(rng, 500)
    text = ids["train"].astype(np.int32).tobytes()
    for x, y in zip(batch["x"], batch["y"], strict=True):
        assert text.find(np.append(x, y[-1]).tobytes()) % 4 == 0
    np.testing.assert_array_equal(batch["x"][:, 1:], batch["y"][:, :-1])
    (tmp_path / "val.bin").write_bytes(b"12345")
    with pytest.raises(train.sources.UsageError, match=r"val\.bin cannot be read: 5 bytes are not"):
        train.sources.load_corpus(tmp_path, 5)


def test_vision_transformer_reads_colour(train):
    model = train.models.VisionTransformer(10, patch=8, layers=1, width=16)
    images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    params = model.init(jax.random.key(0), images)
    assert model.apply(params, images).shape == (2, 10)
    assert optax.tree.size(params) > 0
