from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparseloom.models import LoadedModel
from sparseloom.tasks.imdb import MovieReviews, leave_one_out, read_reviews

HEADER = b"label\trating\tid\ttext\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    good, bad = "a good film the cat plays", "a bad film the dog sleeps"
    rows = [
        f"{int(i % 2 == 0)}\t{9 if i % 2 == 0 else 2}\t{i}\t{(good if i % 2 == 0 else bad)}"
        f"{' the cat runs' * (i % 5)}\n"
        for i in range(40)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_bytes(HEADER + "".join(rows).encode())
    return tmp_path


def test_texts_keep_their_tabs() -> None:
    reviews = read_reviews(HEADER + b"1\t9\t7\tone\ttwo\xe2\x80\xa8three\n0\t1\t8\t\n")
    assert [(review.positive, review.text) for review in reviews] == [
        (True, "one\ttwo\u2028three"),
        (False, ""),
    ]


def test_other_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="must begin with the columns label, rating, id, text"):
        read_reviews(b"a\tb\n")
    with pytest.raises(ValueError, match="line 2 of the IMDB table"):
        read_reviews(HEADER + b"7\t1\t2\tx\n")


def test_documents_fill_their_length(folder: Path, encoder: LoadedModel) -> None:
    task = MovieReviews().load(folder)
    documents = task.documents(encoder, length=16, count=5)
    assert documents.shape == (5, 16)
    assert torch.all(documents[:, 0] == 2)  # [CLS]
    assert torch.all(documents[:, -1] == 3)  # [SEP]
    assert torch.equal(documents, task.documents(encoder, length=16, count=5))
    with pytest.raises(ValueError, match="count must be at most 16"):
        task.documents(encoder, length=16, count=60)
    with pytest.raises(ValueError, match="length must be at most 32, the model's, got 64"):
        task.documents(encoder, length=64)


def test_the_classifier_reads_sentiment_off_embeddings(folder: Path, encoder: LoadedModel) -> None:
    task = MovieReviews(ridge=0.01).load(folder)
    score = task.score(encoder, limit=19)
    assert score.items == 19
    assert score.value == score.per_item.mean() > 0.9
    assert sum(len(batch["input_ids"]) for batch in task.inputs(encoder, limit=19)) == 19
    with pytest.raises(ValueError, match="1 reviews of one sentiment only"):
        task.score(encoder, limit=1)
    batch = next(iter(task.batches(encoder, steps=1, batch_size=2)))
    assert batch["input_ids"].shape[0] == 2


def test_leave_one_out_equals_leaving_one_out() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(25, 4))
    labels = features[:, 0] + 0.8 * generator.normal(size=25) > 0
    expected = []
    for i in range(25):
        rest = np.arange(25) != i
        design = np.hstack([features[rest], np.ones((24, 1))])
        target = np.where(labels[rest], 1.0, -1.0)
        penalty = np.diag([0.5] * 4 + [1e-9])
        weights = np.linalg.solve(design.T @ design + penalty, design.T @ target)
        expected.append(np.append(features[i], 1.0) @ weights > 0)
    assert leave_one_out(features, labels, 0.5).tolist() == expected


def test_the_real_table_has_its_published_size(real_data: Path) -> None:
    reviews = MovieReviews().load(real_data).reviews("test")
    assert len(reviews) == 25_000
    assert sum(review.positive for review in reviews) == 12_500
