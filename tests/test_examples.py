# SPDX-License-Identifier: Apache-2.0
"""examples/train.py as a user runs it: a process of its own, in another folder, with real data."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from distlion_jax import full_precision_cost, wire_cost

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--quick", "--steps", "4", "--eval-every", "2"]


def command(*flags):
    return [sys.executable, str(EXAMPLES / "train.py"), *map(str, flags)]


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """Most of a short run is compiling: the runs share a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def environment(**extra):
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | extra


def train(folder, *flags, **extra):
    return subprocess.run(
        command(*flags), cwd=folder, env=environment(**extra), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def results(folder):
    """The numbers, once table and plot are seen to be there."""
    assert "| method " in (folder / "results.md").read_text()
    png = (folder / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    return json.loads((folder / "results.json").read_text())


def shapes(task, classes):
    from benchmarks.tasks import models
    from benchmarks.tasks.data import CONTEXT

    model = {"text": models.Transformer, "images": models.ConvNet}[task](classes)
    row = np.zeros((1, CONTEXT), np.int32) if task == "text" else np.zeros((1, 28, 28, 1), np.uint8)
    return jax.eval_shape(model.init, jax.random.key(0), row)["params"]


OPTIONS = ["--task", "images", "--methods", "average,adamw", "--dense-warmup", "3", "--seed", "5",
           "--workers", "4", "--ballot", "ternary", "--transport", "two_phase"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return train(folder, *TINY, *OPTIONS), folder / "runs" / "images"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return train(folder, *TINY), folder / "runs" / "text"


def test_text_writes_table_numbers_and_plot(text):
    process, folder = text
    assert process.returncode == 0, process.stderr
    numbers = results(folder)
    assert [run["name"] for run in numbers["runs"]] == ["muon", "majority", "lion", "adamw"]
    assert numbers["workers"] == 8
    assert not numbers["interrupted"]
    assert (folder / "results.md").read_text().strip() in process.stdout
    assert "42 works; held out: the last 10% of every work" in process.stdout
    assert "characters/s" in process.stderr
    for run in numbers["runs"]:
        assert len(run["losses"]) == 4
        assert [seen["step"] for seen in run["evaluations"]] == [0, 2, 4]
        assert run["evaluations"][0]["loss"] == pytest.approx(np.log(84), abs=0.15)
        assert run["evaluations"][-1]["loss"] < run["evaluations"][0]["loss"]
        shown = f"{run['evaluations'][-1]['loss']:.3f}"
        assert any(shown in line for line in process.stdout.splitlines() if line.startswith("|"))
    first, *others = (run["evaluations"][0] for run in numbers["runs"])
    assert all(other == first for other in others)  # the same initial weights


def test_text_bytes_are_the_ledgers_and_the_compiled_steps(text):
    process, folder = text
    muon, majority, lion, adamw = results(folder)["runs"]
    params = shapes("text", 84)
    assert majority["bytes_sent"] == 4 * wire_cost(params, 8).bytes_received
    assert lion["bytes_sent"] == 4 * full_precision_cost(params, 8).bytes_received
    assert 1.75 < majority["bits_per_parameter"] < 3
    assert lion["bits_per_parameter"] == pytest.approx(56)
    assert muon["bytes_sent"] == majority["bytes_sent"]
    assert adamw["bytes_sent"] == lion["bytes_sent"]
    assert all(run["ledger_agrees"] is True for run in (muon, majority, lion, adamw))
    assert process.stdout.count("ledger checked: ") == 4


def test_same_seed_gives_the_same_losses(text, tmp_path):
    process = train(tmp_path, *TINY, "--methods", "majority", "--out", tmp_path / "deep" / "er")
    assert process.returncode == 0, process.stderr
    (again,) = results(tmp_path / "deep" / "er")["runs"]
    _, majority, *_ = results(text[1])["runs"]
    assert again["losses"] == majority["losses"]
    assert again["evaluations"] == majority["evaluations"]


def test_images_with_dense_warmup_and_other_options(images):
    process, folder = images
    assert process.returncode == 0, process.stderr
    average, adamw = results(folder)["runs"]
    params = shapes("images", 10)
    vote = wire_cost(params, 4, aggregation="average", ballot="ternary", transport="two_phase")
    dense = full_precision_cost(params, 4).bytes_received
    assert average["bytes_sent"] == 4 * vote.bytes_received + 3 * dense
    assert [seen["bytes_sent"] for seen in average["evaluations"]] == [
        0, 2 * (vote.bytes_received + dense), average["bytes_sent"],
    ]  # fmt: skip
    assert adamw["bytes_sent"] == 4 * dense
    assert average["ledger_agrees"] is adamw["ledger_agrees"] is True
    assert "accuracy (%)" in process.stdout
    assert "images/s" in process.stderr
    assert f"{100 * average['evaluations'][-1]['accuracy']:.1f}" in process.stdout


def test_pmap_trains_alike(images, tmp_path):
    process = train(tmp_path, *TINY, *OPTIONS, "--mode", "pmap")
    assert process.returncode == 0, process.stderr
    for run, other in zip(
        results(tmp_path / "runs" / "images")["runs"], results(images[1])["runs"], strict=True
    ):
        np.testing.assert_allclose(run["losses"], other["losses"], rtol=1e-4)
        assert run["bytes_sent"] == other["bytes_sent"]
        assert run["ledger_agrees"] is None
    assert process.stdout.count("ledger not checked") == 2


def test_ctrl_c_writes_what_there_is(tmp_path):
    flags = ["--quick", "--task", "images", "--steps", "100000", "--eval-every", "100000"]
    process = subprocess.Popen(
        command(*flags), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        seen, deadline = b"", time.monotonic() + 90
        while b"images/s" not in seen and time.monotonic() < deadline:
            seen += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    numbers = results(tmp_path / "runs" / "images")
    assert numbers["interrupted"]
    steps = len(numbers["runs"][0]["losses"])
    assert 1 <= steps < 100000
    for run in numbers["runs"]:
        assert len(run["losses"]) == steps
        assert [seen["step"] for seen in run["evaluations"]] == [0, steps]
        assert run["bytes_sent"] == steps * run["bytes_per_step"]
    assert f"interrupted after {steps} of 100,000 steps" in out.decode()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
        (["--workers", "-1"], "--workers: '-1' is not a whole number of at least 1"),
        (["--batch", "x"], "--batch: 'x' is not a whole number of at least 1"),
        (["--learning-rate", "nan"], "--learning-rate: 'nan' is not a positive number"),
        (["--b2", "1"], "--b2: '1' is not a number in [0, 1)"),
        (["--weight-decay", "-1"], "--weight-decay: '-1' is not a number of at least 0"),
        (["--methods", "lion,sgd"], "--methods: 'sgd' is not one of muon, majority, average, lion"),
        (["--methods", "lion,lion"], "--methods: 'lion,lion' names a method twice"),
        (["--task", "speech"], "--task: invalid choice: 'speech'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--corpus", "missing.txt"], "--corpus missing.txt cannot be read: No such file"),
        (["--corpus", "short.txt"], "--corpus short.txt is too short: its longest work has 600"),
        (["--corpus", "empty.txt"], "--corpus empty.txt is too short: its longest work has 0"),
        (["--corpus", "broken.gz"], "--corpus broken.gz cannot be read: "),
        (["--corpus", "."], "--corpus: train.bin cannot be read: No such file"),
        (["--task", "images", "--images-dir", "."], "train-images-idx3-ubyte.gz cannot be read"),
        (["--out", "short.txt/x"], "--out short.txt/x cannot be written: Not a directory"),
    ],
)
def test_bad_flags_get_one_line_and_code_2(tmp_path, flags, message):
    (tmp_path / "short.txt").write_text("To be or not" * 50)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"x" * 9999)[:30])
    process = train(tmp_path, *flags)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith("train.py: error: ")
    assert message in process.stderr


def test_too_few_devices_get_one_line_and_code_2(tmp_path):
    few = "--xla_force_host_platform_device_count=2"
    process = train(tmp_path, *TINY, "--workers", 4, XLA_FLAGS=few)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "train.py: error: 4 workers need a device each; JAX has 2 (cpu)"
    ]


def test_help_gives_a_default_for_every_option():
    from benchmarks.demo.config import make_parser

    for action in make_parser()._actions:
        assert action.help, action
        if action.nargs != 0:  # takes a value
            assert "(default: " in action.help, action.option_strings


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_folder_is_read_and_labels_stay_with_their_images(tmp_path):
    from benchmarks.tasks.data import load_images

    images = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
    labels = (np.arange(50) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    data = load_images(tmp_path, eval_rows=20)
    assert data.classes == 10
    np.testing.assert_array_equal(data.held_out["x"][..., 0], images[:20])
    np.testing.assert_array_equal(data.held_out["y"], labels[:20])
    batch = data.draw(np.random.default_rng(0), 64)
    assert batch["x"].shape == (64, 28, 28, 1)
    np.testing.assert_array_equal(batch["x"][:, 14, 14, 0] % 10, batch["y"])


def test_held_out_text_is_never_drawn(tmp_path):
    from benchmarks.tasks.data import CONTEXT, load_text

    works = ["ab" * 900 + "XY" * 100, "cd" * 1800 + "XY" * 200]  # the last tenths: other letters
    (tmp_path / "works.txt").write_text("\f".join(works))
    data = load_text(tmp_path / "works.txt", eval_rows=1000)
    held = np.unique(data.held_out["y"])
    drawn = data.draw(np.random.default_rng(0), 4000)
    assert data.classes == 6
    assert len(held) == 2
    assert not np.isin(drawn["y"], held).any()
    assert len(np.unique(drawn["y"])) == 4
    np.testing.assert_array_equal(drawn["x"][:, 1:], drawn["y"][:, :-1])
    assert drawn["x"].shape == (4000, CONTEXT)
    letters_of_first = np.isin(drawn["x"], [2, 3]).mean(1)
    assert set(np.unique(letters_of_first)) == {0.0, 1.0}  # no window lies in two works
