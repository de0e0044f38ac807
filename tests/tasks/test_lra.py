"""LRA tasks: files of every layout, tokens, batches, accuracy, damage; real data if present."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseloom.models.lra import LraForSequenceClassification
from sparseloom.models.lra_presets import lra_config
from sparseloom.tasks import get_task
from sparseloom.tasks.lra_image import LraImage, grey
from sparseloom.tasks.lra_listops import LraListOps
from sparseloom.tasks.lra_retrieval import LraRetrieval, plain_text, read_aan
from sparseloom.tasks.lra_text import LraText


def tiny(task: str, length: int = 12) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = lra_config(task, length=length, num_hidden_layers=1, qkv_size=8, **sizes)
    return LraForSequenceClassification(config).eval()


TEXTS = [(1, b"good \t film"), (0, b"bad"), (1, b"a very good film indeed"), (0, b"no \xff no")]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = b"".join(b"%d\t9\t%d\t%s\n" % (y, i, text) for i, (y, text) in enumerate(TEXTS))
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv.gz").write_bytes(
            gzip.compress(b"label\trating\tid\ttext\n" + rows)
        )
    return tmp_path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for i, (y, text) in enumerate(TEXTS):
            folder = tmp_path / "aclImdb" / split / ("pos" if y else "neg")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{10 * i}_9.txt").write_bytes(text)
    return tmp_path


def test_text_is_read_from_tables_and_folders(table: Path, tree: Path) -> None:
    of_table = LraText().load(table).examples("test")
    assert list(zip(of_table.labels, of_table.items, strict=True)) == TEXTS
    (table / "train.tsv.gz").unlink()
    (table / "test.tsv.gz").unlink()
    for data in (tree, tree / "aclImdb"):
        of_tree = LraText().load(data).examples("test")
        assert sorted(zip(of_tree.labels, of_tree.items, strict=True)) == sorted(TEXTS)
        assert of_tree.labels.tolist() == [1, 1, 0, 0]


def test_bytes_are_tokens_from_one_and_padding_is_zero(table: Path) -> None:
    task = LraText().load(table)
    batch = next(iter(task.batches(tiny("text"), steps=1, batch_size=4)))
    rows = {tuple(row[row > 0].tolist()) for row in batch["input_ids"]}
    assert rows == {tuple(byte + 1 for byte in text[:12]) for _, text in TEXTS}
    assert torch.equal(batch["attention_mask"], batch["input_ids"] > 0)
    shorter = next(iter(task.batches(tiny("text"), steps=1, batch_size=4, context=5)))
    assert shorter["input_ids"].shape == (4, 5)
    assert LraText(7).load(table).sample(tiny("text"))["input_ids"].shape[1] <= 7


def test_every_epoch_holds_every_example_once_and_seeds_repeat(table: Path) -> None:
    task, model = LraText().load(table), tiny("text")
    drawn = list(task.batches(model, steps=6, batch_size=2, seed=3))
    for first in (0, 2, 4):
        labels = torch.cat([drawn[first]["labels"], drawn[first + 1]["labels"]])
        assert labels.sum() == 2
    again = list(task.batches(model, steps=6, batch_size=2, seed=3))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(drawn, again, strict=True))
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 4\], got 5"):
        next(iter(task.batches(model, steps=1, batch_size=5)))


def test_scores_are_item_by_item_in_the_order_of_the_file(table: Path) -> None:
    task, model = LraText(eval_batch=3).load(table), tiny("text")
    score = task.score(model)
    with torch.no_grad():
        alone = [
            int(model(torch.tensor([[b + 1 for b in text[:12]]])).logits.argmax()) == label
            for label, text in TEXTS
        ]
    assert score.per_item.tolist() == [float(one) for one in alone]
    assert score.value == score.per_item.mean()
    assert task.score(model, limit=2).items == 2
    assert sum(len(batch["input_ids"]) for batch in task.inputs(model)) == 4
    with torch.no_grad():  # a head that always says 1
        model.head.layers[-1].weight.zero_()
        model.head.layers[-1].bias.copy_(torch.tensor([0.0, 1.0]))
    assert task.score(model).per_item.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_text_errors_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_bytes(b"x")
    with pytest.raises(ValueError, match="must begin with the columns"):
        LraText().load(tmp_path).examples("test")
    other: Any = "dev"
    with pytest.raises(Exception, match="dev"):
        LraText().load(tmp_path).examples(other)
    folder = tmp_path / "aclImdb" / "train" / "pos"
    folder.mkdir(parents=True)
    (tmp_path / "test.tsv").unlink()
    with pytest.raises(ValueError, match="holds no reviews"):
        LraText().load(tmp_path).examples("train")
    (folder / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not named ID_RATING\.txt"):
        LraText().load(tmp_path).examples("train")
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        LraText(0)


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    folder = tmp_path / "acl_scisumm"
    folder.mkdir()
    with tarfile.open(folder / "papers_xml.tar.gz", "w:gz") as archive:
        for name in ("A1", "B2", "C3"):
            raw = f'<PAPER>\n <S sid="0">{name} on\n parsing</S></PAPER>'.encode()
            member = tarfile.TarInfo(f"{name}.xml")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    for part in ("train", "dev", "test"):
        (folder / f"pairs_{part}.tsv").write_text("label\tid1\tid2\n1\tA1\tB2\n0\tC3\tA1\n")
    return tmp_path


def test_the_stand_in_gives_pairs_of_texts_and_says_what_it_is(papers: Path) -> None:
    task = LraRetrieval().load(papers)
    examples = task.examples("validation")
    assert examples.items == [
        (b"A1 on parsing", b"B2 on parsing"),
        (b"C3 on parsing", b"A1 on parsing"),
    ]
    batch = next(iter(task.batches(tiny("retrieval"), steps=1, batch_size=2)))
    assert batch["input_ids"].shape == (2, 2, 12)
    score = task.score(tiny("retrieval"))
    assert score.items == 2
    assert "stand-in" in score.notes[0]


def test_published_pairs_come_first(papers: Path) -> None:
    folder = papers / "aan"
    folder.mkdir()
    line = b"1.0\tP1\tP2\tone \xe2\x80\xa8 text\tanother\ttext\n0.0\tP1\tP3\tone\t\n"
    for part in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{part}.tsv").write_bytes(line)
    task = LraRetrieval().load(papers)
    examples = task.examples("train")
    assert examples.items == [(b"one \xe2\x80\xa8 text", b"another\ttext"), (b"one", b"")]
    assert examples.labels.tolist() == [1, 0]
    assert task.score(tiny("retrieval")).notes == ()


def test_retrieval_errors_are_one_sentence(papers: Path) -> None:
    folder = papers / "acl_scisumm"
    (folder / "pairs_dev.tsv").write_text("label\tid1\tid2\n1\tA1\tZ9\n")
    with pytest.raises(ValueError, match=r"line 2 of pairs_dev\.tsv: there is no paper 'Z9'"):
        LraRetrieval().load(papers).examples("validation")
    (folder / "pairs_test.tsv").write_text("label\tid1\tid2\n5\tA1\tB2\n")
    with pytest.raises(ValueError, match=r"line 2 of pairs_test\.tsv is not label, id1, id2"):
        LraRetrieval().load(papers).examples("test")
    archive = folder / "papers_xml.tar.gz"
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"is not a whole tar\.gz archive"):
        LraRetrieval().load(papers).examples("train")
    with pytest.raises(ValueError, match="line 1 of x is not label, id, id, text, text"):
        read_aan(b"1\ta\tb\n", "x")


def test_xml_becomes_plain_text() -> None:
    raw = b'<S a="1">a &amp;quot;voting&amp;quot;\n  &lt;tagger&gt;</S><S>x</S>'
    assert plain_text(raw) == b'a "voting" <tagger> x'


def images(count: int, seed: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    return (
        generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        generator.integers(0, 10, count),
    )


def test_images_of_batches_and_npz_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = [images(4, seed) for seed in range(6)]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, (x, y) in zip(names, parts, strict=True):
        planes = x.transpose(0, 3, 1, 2).reshape(4, -1)
        content = {b"data": planes, b"labels": y.tolist(), b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    train = [np.concatenate([part[i] for part in parts[:5]]) for i in (0, 1)]
    other = tmp_path / "npz" / "cifar10"
    other.mkdir(parents=True)
    test_x, test_y = parts[5]
    np.savez(other / "x.npz", train_x=train[0], train_y=train[1], test_x=test_x, test_y=test_y)
    for split, count in (("train", 18), ("validation", 2), ("test", 4)):
        one = LraImage().load(tmp_path).examples(split)
        two = LraImage().load(tmp_path / "npz").examples(split)
        assert np.array_equal(one.items, two.items)
        assert np.array_equal(one.labels, two.labels)
        assert np.asarray(one.items).shape == (count, 1024)
    assert np.array_equal(np.asarray(LraImage().load(tmp_path).examples("test").labels), test_y)
    sample = LraImage().load(tmp_path).sample(tiny("image", 1024))
    assert sample["input_ids"].shape == (1, 1024)
    assert torch.equal(sample["attention_mask"], sample["input_ids"] != 0)


def test_grey_is_weighted_and_cut() -> None:
    pixels = np.array([[[[255, 255, 255], [0, 0, 0], [255, 0, 0], [59, 43, 50]]]], dtype=np.uint8)
    # 0.9999·255.5 = 255.47; 0.2989·255.5 = 76.37; (17.635 + 25.241 + 5.7)/255·255.5 = 48.67
    assert grey(pixels).tolist() == [[[255, 0, 76, 48]]]


def test_image_errors_are_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="data_batch_1 is not a whole batch of CIFAR-10"):
        LraImage().load(tmp_path).examples("train")
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Path}))
    with pytest.raises(ValueError, match="only arrays are read"):
        LraImage().load(tmp_path).examples("train")
    (folder / "data_batch_1").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_1 is missing"):
        LraImage().load(tmp_path).examples("train")
    (folder / "test_batch").unlink()
    (tmp_path / "cifar10").mkdir()
    npz = tmp_path / "cifar10" / "small.npz"
    x, y = images(3, 0)
    np.savez(npz, train_x=x, train_y=y, test_x=x)
    with pytest.raises(ValueError, match="it lacks test_y"):
        LraImage().load(tmp_path / "cifar10").examples("train")
    np.savez(npz, train_x=x, train_y=y + 9, test_x=x, test_y=y)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 9\]"):
        LraImage().load(tmp_path / "cifar10").examples("train")
    npz.write_bytes(npz.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a whole npz file"):
        LraImage().load(tmp_path / "cifar10").examples("train")


def test_listops_tokens(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        text = "Source\tTarget\n( ( ( [MAX 3 ) 9 ) ] )\t9\n[SM 5 5 5 ]\t5\n"
        (tmp_path / f"basic_{part}.tsv").write_text(text)
    task = LraListOps().load(tmp_path)
    assert [ids.tolist() for ids in task.examples("test").items] == [
        [12, 4, 10, 15],
        [14, 6, 6, 6, 15],
    ]
    assert task.score(tiny("listops")).items == 2


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("lra-text", {"train": 25_000, "validation": 25_000, "test": 25_000}),
        ("lra-retrieval", {"train": 3_678, "validation": 470, "test": 388}),
        ("lra-image", {"train": 3_600, "validation": 400, "test": 1_000}),
    ],
)
def test_the_real_data_have_their_sizes(name: str, sizes: dict[str, int], real_data: Path) -> None:
    task: Any = get_task(name).load(real_data)
    found = {split: task.examples(split) for split in sizes}
    assert {split: len(one.labels) for split, one in found.items()} == sizes
    shares = np.bincount(found["train"].labels) / sizes["train"]
    assert shares.min() > 0.8 / len(shares)
    assert task.score(tiny(name, 8), limit=4).items == 4
