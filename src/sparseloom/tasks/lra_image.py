"""LRA Image: CIFAR-10 (Krizhevsky 2009) in grey, one token per pixel, row by row."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64, UInt8

from sparseloom.tasks.data import find_data
from sparseloom.tasks.lra import Examples, LraTask, Split

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"


class LraImage(LraTask):
    """32 × 32 pixels of 256 greys in ten classes; black (0) counts as padding, as published.

    Reads the official Python batches (`cifar-10-batches-py/data_batch_1` …) or one npz file with
    train_x, train_y, test_x, test_y (images × 32 × 32 × 3, uint8) in `cifar10`.  The last tenth of
    the training images is the validation split, as published; no image is altered.
    """

    name: ClassVar[str] = "lra-image"

    def _find(self, data: Path | None) -> None:
        self._arrays: dict[str, np.ndarray] | None = None
        try:
            self._source = find_data("cifar-10-batches-py", data, files=(_TEST,))
        except FileNotFoundError as batches:
            try:
                folder = find_data("cifar10", data)
            except FileNotFoundError:
                folder = data
            nested = None if folder is None else folder / "cifar-10-batches-py"
            if nested is not None and nested.is_dir():
                self._source = nested
                return
            files = [] if folder is None else sorted(folder.glob("*.npz"))
            if not files:
                raise FileNotFoundError(f"{batches}; nor is there an npz file in cifar10") from None
            self._source = files[0]

    def _read(self, split: Split) -> Examples:
        if self._arrays is None:
            self._arrays = _read_images(self._source)
        part = "test" if split == "test" else "train"
        images, labels = self._arrays[f"{part}_x"], self._arrays[f"{part}_y"]
        if split != "test":
            kept = len(images) * 9 // 10
            chosen = slice(0, kept) if split == "train" else slice(kept, None)
            images, labels = images[chosen], labels[chosen]
        return Examples(grey(images).reshape(len(images), -1), labels.astype(np.int64))

    def _sequences(self, item: Any, length: int) -> list[Int64[np.ndarray, " tokens"]]:
        return [item[:length].astype(np.int64)]


def grey(images: UInt8[np.ndarray, "images h w 3"]) -> UInt8[np.ndarray, "images h w"]:
    """`tf.image.rgb_to_grayscale` on bytes: weights in float32, result cut, not rounded."""
    weights = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)
    mixed = (images.astype(np.float32) / np.float32(255)) @ weights
    return np.minimum(mixed * np.float32(255.5), 255).astype(np.uint8)


def _read_images(source: Path) -> dict[str, np.ndarray]:
    arrays = _read_npz(source) if source.is_file() else _read_batches(source)
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_x"], arrays[f"{part}_y"]
        good = images.ndim == 4 and images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
        if not good or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{source}: {part} images must be (n, 32, 32, 3) bytes with n labels, got "
                f"{images.shape} {images.dtype} and {labels.shape}"
            )
        if labels.size and (labels.min() < 0 or labels.max() > 9):
            raise ValueError(
                f"{source}: labels must be in [0, 9], got {labels.min()} to {labels.max()}"
            )
    return arrays


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    names = ("train_x", "train_y", "test_x", "test_y")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            missing = [name for name in names if name not in stored.files]
            if missing:
                raise ValueError(f"{file} must hold {', '.join(names)}, it lacks {missing[0]}")
            return {name: stored[name] for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{file} is not a whole npz file: {error}") from error


def _read_batches(folder: Path) -> dict[str, np.ndarray]:
    parts = {"train": [_read_batch(folder / name) for name in _TRAIN],
             "test": [_read_batch(folder / _TEST)]}  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    for part, batches in parts.items():
        arrays[f"{part}_x"] = np.concatenate([images for images, _ in batches])
        arrays[f"{part}_y"] = np.concatenate([labels for _, labels in batches])
    return arrays


def _read_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels of one official pickle: n rows of 3 planes of 1024 bytes."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: CIFAR-10 has {', '.join((*_TRAIN, _TEST))}")
    try:
        batch = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], dtype=np.int64)
        return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a whole batch of CIFAR-10: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what arrays are made of."""
        if (module.replace("numpy.core", "numpy._core"), name) in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays are read")
