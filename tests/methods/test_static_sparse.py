"""Static structured sparse attention: it runs its regions, is fitted, stored, and refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sparseloom.integrations import record, sparsify
from sparseloom.kernels.regions_reference import reference_attention
from sparseloom.methods import AttentionInputs, StaticSparse, TileAligned
from sparseloom.methods.region_table import RegionTable
from sparseloom.models.lra import LraConfig, LraForSequenceClassification
from sparseloom.regions import Mode, band, computed_tiles, decode_heads, stripe
from sparseloom.training import adapt, load, save, select_regions
from sparseloom.training.static import cut, margin, tile_statistics

LENGTH = 96


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def texts(count: int = 2, length: int = LENGTH, *, causal: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(length)
    found: list[dict[str, Tensor]] = []
    for _ in range(count):
        ids = torch.randint(1, 50, (3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 20 :] = 0
        labels = ids.clone() if causal else (ids[:, 1] > 25).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def table(*regions: Any, layers: int = 2, heads: int = 2, length: int = LENGTH) -> RegionTable:
    return RegionTable.of({length: ((regions,) * heads,) * layers}, 0.5)


def call(length: int, *, is_causal: bool = False, queries: int | None = None) -> AttentionInputs:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, h, length, 8, generator=generator) for h in (2, 1, 1))
    return AttentionInputs(
        query=query[:, :, -(queries or length) :],
        key=key,
        value=value,
        layer=1,
        is_causal=is_causal,
        scale=0.3,
    )


def table_of(method: StaticSparse) -> RegionTable:
    assert method.regions is not None
    return method.regions


LOCAL = (band(0, 32), stripe(0, 32))
MIXED = (*LOCAL, stripe(0, 96, mode=Mode.COARSE, segment=4))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [96, 83, 40])
def test_attention_is_that_of_the_regions(length: int, is_causal: bool) -> None:
    one = call(length, is_causal=is_causal)
    method = StaticSparse(density=0.5, regions=table(*MIXED))
    assert method.replaces(one)
    assert one.value is not None
    wanted = reference_attention(
        one.query, one.key, one.value, (MIXED,), is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(method.attend(one), wanted)
    assert method.regions is not None
    plan = method.regions.plan(length, 1, is_causal=is_causal, device=torch.device("cpu"))
    again = method.regions.plan(length, 1, is_causal=is_causal, device=torch.device("cpu"))
    assert plan is again
    assert not StaticSparse(density=0.5, regions=table(*LOCAL)).replaces(one)


@pytest.mark.parametrize("queries", [1, 16, 21])
def test_queries_of_a_cache_keep_the_rows_of_the_whole(queries: int) -> None:
    method = StaticSparse(density=0.5, regions=table(*LOCAL))
    whole = method.select(call(96, is_causal=True)).to_bool()
    part = method.select(call(96, is_causal=True, queries=queries)).to_bool()
    assert torch.equal(part, whole[:, :, -queries:])


def test_what_is_charged() -> None:
    method = StaticSparse(density=0.5, regions=table(*MIXED))
    tiles = computed_tiles(MIXED, LENGTH, LENGTH)
    one = call(LENGTH)
    assert method.call_macs(one) == 2 * 2 * tiles * 2 * 16 * 32 * 8
    assert method.macs(one.shape) == method.call_macs(one)
    assert method.tile_density(LENGTH, is_causal=False) == pytest.approx(tiles / 18)


def test_refusals() -> None:
    one = call(LENGTH)
    with pytest.raises(ValueError, match="static has no regions yet"):
        StaticSparse().attend(one)
    method = StaticSparse(density=0.5, regions=table(*MIXED))
    with pytest.raises(ValueError, match=r"density must be 0\.5, what the regions were chosen"):
        dataclasses.replace(method, density=0.3).select(one)
    with pytest.raises(ValueError, match=r"kv_len must be at most 96, .* got 100"):
        method.attend(call(100))
    with pytest.raises(ValueError, match="layer must be below 1"):
        StaticSparse(density=0.5, regions=table(*MIXED, layers=1)).select(one)
    with pytest.raises(NotImplementedError, match="static needs all tokens at once"):
        method.attend(call(LENGTH, is_causal=True, queries=3))
    with pytest.raises(ValueError, match=r"bits must be in \[2, 16\] or none, got 1"):
        StaticSparse(bits=1)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        StaticSparse(density=0.0)
    with pytest.raises(ValueError, match="regions must hold at least one length"):
        RegionTable.of({}, 0.5)


def test_rounded_codes_are_near_and_pass_gradients() -> None:
    one = call(LENGTH)
    plain = StaticSparse(density=0.5, regions=table(*MIXED))
    rounded = dataclasses.replace(plain, bits=8)
    query = one.query.clone().requires_grad_()
    out = rounded.attend(dataclasses.replace(one, query=query))
    assert 0 < (out - plain.attend(one)).abs().max() < 0.05
    out.sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0
    local = StaticSparse(density=0.5, bits=8, regions=table(*LOCAL))
    assert local.replaces(one)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_fitted_runs_and_comes_back_from_disk(kind: str, tmp_path: Path) -> None:
    causal = kind == "llama"
    model: Any = llama() if causal else bert()
    batches = texts(causal=causal)
    method = StaticSparse.fit(model, batches, density=0.75, force="diagonal")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert method.tile_density(LENGTH, is_causal=causal) == pytest.approx(0.75, abs=0.08)
    assert method.tile_density(LENGTH, is_causal=causal) <= 0.75
    with torch.no_grad(), sparsify(model, method, when="always") as sparse:
        out = model(**batches[0]).logits
        stats = sparse.stats()
    assert {row["ran"] for row in stats} <= {"replaced", "sparse"}
    assert all(0.4 < row["density"] <= 1 for row in stats)
    tiles = sum(row["attention_macs"] for row in stats if row["ran"] == "replaced")
    assert tiles == sum(
        3
        * computed_tiles(head, LENGTH, LENGTH)
        * 2
        * 16
        * 32
        * model.config.hidden_size
        // model.config.num_attention_heads
        for row in stats
        if row["ran"] == "replaced"
        for head in table_of(method).regions(LENGTH, row["layer"])
    )
    assert sum(row["kept_pairs"] for row in stats) < sum(row["allowed_pairs"] for row in stats)
    if causal:  # of a classifier the best tiles may be all that the answer hangs on
        with torch.no_grad():
            assert not torch.allclose(out, model(**batches[0]).logits)
    trace = record(model, method, {"input_ids": batches[0]["input_ids"][1:]})
    (selection,) = trace.selections.values()
    for layer, call in enumerate(selection.calls):
        assert call.regions is not None
        assert decode_heads(call.regions) == table_of(method).regions(LENGTH, layer)
    save(model, method, tmp_path / "saved")
    again, stored = load(tmp_path / "saved")
    assert stored == method
    with torch.no_grad(), sparsify(again, stored, when="always"):
        torch.testing.assert_close(again(**batches[0]).logits, out)
    if causal:  # generation takes one query at a time
        plain = StaticSparse.fit(model, batches, density=0.75, coarse=False, force="diagonal")
        ids = batches[0]["input_ids"][1:2, :60]
        with sparsify(model, plain, when="always"):
            cached, whole = (
                model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use)
                for use in (True, False)
            )
        assert torch.equal(cached, whole)


def test_lengths_have_regions_of_their_own() -> None:
    model = bert()
    found = tile_statistics(model, texts(1), lengths=[48, 500])
    assert [one.length for one in found] == [48, 96]
    assert [one.inputs for one in found] == [3, 3]
    # a row of probabilities adds up to 1; padded queries count for nothing
    assert found[1].mass[0, 0].sum() == pytest.approx(3 * 96 - 20, rel=1e-4)
    method = StaticSparse(density=0.9).chosen(found)
    assert method.regions is not None
    assert method.regions.lengths.tolist() == [48, 96]
    assert method.regions.length_for(48) == 48
    assert method.regions.length_for(49) == 96
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        select_regions(model, method, [])


def test_models_that_add_tokens_and_other_objectives() -> None:
    torch.manual_seed(0)
    config = LraConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=65,
        num_labels=3,
    )
    model = LraForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(1, 20, (2, 64)), "labels": torch.tensor([0, 2])}
    (found,) = tile_statistics(model, [batch])
    assert found.length == 65
    (zero,) = tile_statistics(model, [batch], objective=lambda out, _: out.logits.sum() * 0.0)
    assert zero.saliency.sum() == 0
    assert found.saliency.sum() > 0
    assert StaticSparse.fit(model, [batch], density=0.9).regions is not None


def test_the_margin_of_classes_and_of_next_tokens() -> None:
    class Out:
        logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]])

    assert float(margin(is_causal=False)(Out, {"labels": torch.tensor([0, 2])})) == -2 + 4
    assert float(margin(is_causal=False)(Out, {})) == 1 + 4

    class Text:
        logits = torch.tensor([[[1.0, 3.0], [0.0, 7.0], [9.0, 0.0]]])

    labels = torch.tensor([[-100, 0, -100]])
    assert float(margin(is_causal=True)(Text, {"labels": labels})) == -2.0
    with pytest.raises(ValueError, match="objective must be given"):
        margin(is_causal=False)(object(), {})


def test_cutting_leaves_labels_of_items() -> None:
    batch = cut(texts(1)[0], 40)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 40)
    assert batch["labels"].shape == (3,)


def test_adapting_goes_through_the_phases_and_resumes(tmp_path: Path) -> None:
    model = bert()
    seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = StaticSparse(density=0.9)
    steps: dict[str, Any] = {"warmup_steps": 3, "joint_steps": 2, "calibration_steps": 1}
    method = adapt(model, wanted, texts(4), **steps, out=tmp_path, progress=False)
    assert wanted.regions is None
    assert method.regions is not None
    assert any(not torch.equal(seen[k], v) for k, v in model.state_dict().items())
    names = {
        file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()
    }
    assert names == {
        "entropy/fine-tune.pt",
        "masked/fine-tune.pt",
        "regions/sparseloom.safetensors",
        "regions/settings.json",
    }
    other = bert()
    again = adapt(other, wanted, texts(4), **steps, out=tmp_path, progress=False)
    assert again.regions is not None
    assert torch.equal(again.regions.words, method.regions.words)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"holds regions of another run .static:density=0\.9"):
        adapt(
            bert(), StaticSparse(density=0.9, by="mass"), texts(4), **steps, out=tmp_path,
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    ["window", "strided", "fixed", "blocklocal", "longformer", "bigbird", "random"],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_aligned_patterns_reach_their_budget_in_whole_tiles(pattern: Any, is_causal: bool) -> None:
    method = TileAligned(pattern, density=0.5)
    one = AttentionInputs(
        query=torch.zeros(1, 2, 250, 4),
        key=torch.zeros(1, 2, 250, 4),
        layer=1,
        is_causal=is_causal,
        scale=1.0,
    )
    mask = method.select(one)
    assert mask.block_size == (16, 32)
    share = method.tile_density(256, 2, 2, is_causal=is_causal)
    assert share >= 0.5 or pattern == "random"
    assert share <= (0.52 if pattern == "random" else 0.75)
    if pattern != "random":
        inner = method.inner(256, 2, 1, is_causal=is_causal)
        whole = dataclasses.replace(
            one, query=torch.zeros(1, 2, 256, 4), key=torch.zeros(1, 2, 256, 4)
        )
        keep = inner.select(whole).to_bool()[..., :250, :250]
        keep = keep.tril() if is_causal else keep
        assert (mask.to_bool() | ~keep).all()


def test_aligned_patterns_refuse_a_cache() -> None:
    one = call(LENGTH, is_causal=True, queries=3)
    with pytest.raises(NotImplementedError, match="aligned patterns need all tokens at once"):
        TileAligned().select(one)
