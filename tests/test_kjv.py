# SPDX-License-Identifier: Apache-2.0
"""The second corpus: its books, and who lacks the package."""

import importlib.util

import pytest

from tests.helpers import benchmark


@pytest.fixture
def kjv():
    return benchmark("tasks.kjv")


def test_its_books_are_a_corpus(kjv, tmp_path):
    file = tmp_path / "runs" / "kjv.txt.gz"
    assert "66 books" in kjv.run(kjv.parse(["--out", str(file)]))
    books = benchmark("tasks.data").read_corpus(file)
    assert len(books) == 66
    assert books[0].startswith("In the beginning God created the heaven and the earth.")
    assert (
        books[-1].rstrip().endswith("The grace of our Lord Jesus Christ [be] with you all. Amen.")
    )
    assert min(map(len, books)) > 1000
    before = file.read_bytes()
    kjv.run(kjv.parse(["--out", str(file)]))
    assert file.read_bytes() == before
    data = benchmark("tasks.data").load_corpus(file, 64)
    assert sorted({*data.groups}) == list(range(66))


def test_who_lacks_the_package_is_told(kjv, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(benchmark("cli").UsageError, match=r"pip install 'distlion_jax\[benchmar"):
        kjv.read()
