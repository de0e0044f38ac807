"""At density 1 a sparsified model computes what the model computes by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparseloom.integrations import sparsify
from sparseloom.methods import Dense, Method, Oracle, SlidingWindow

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["dense", "oracle", "window", "everything"])
def method(request: pytest.FixtureRequest, zoo: SimpleNamespace) -> Method:
    """Four ways to density 1: the dense kernel, two that decide to run dense, the sparse path."""
    return {
        "dense": Dense(),
        "oracle": Oracle(sparsity=0.0),
        "window": SlidingWindow(width=64),
        "everything": zoo.everything,
    }[request.param]


@torch.no_grad()
def test_forward(zoo: SimpleNamespace, family: str, padding: str, method: Method) -> None:
    model, inputs = zoo.build(family), zoo.inputs(padding)
    expected = zoo.real(model(**inputs)[0], inputs)
    with sparsify(model, method) as sparse:
        found = zoo.real(model(**inputs)[0], inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    rows = sparse.stats()
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(row["density"] == 1.0 for row in rows)
    assert {row["ran"] for row in rows} == {"sparse" if method is zoo.everything else "dense"}


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate(zoo: SimpleNamespace, causal_family: str, padding: str, beams: int) -> None:
    model, inputs = zoo.build(causal_family), zoo.inputs(padding, length=10)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    for method in (Dense(), zoo.everything):
        with sparsify(model, method) as sparse:
            found = model.generate(**inputs, **settings)
        assert torch.equal(found, expected)
        assert sparse.stats()[0]["calls"] == 5


@torch.no_grad()
def test_a_mask_of_two_dimensions_per_query(zoo: SimpleNamespace, family: str) -> None:
    """4-D masks of the user are taken apart into causality and padding."""
    model, inputs = zoo.build(family), zoo.inputs("left")
    valid = inputs["attention_mask"].bool()
    keep = valid[:, None, None, :].expand(-1, 1, 24, -1)
    if not hasattr(model, "lm_head") and not hasattr(model, "embed_out"):
        mask = keep
    else:
        mask = keep & torch.ones(24, 24, dtype=torch.bool).tril()
    # On 4.x BERT takes 3-D masks of its own form only.
    if zoo.is_old and family in ("bert", "roberta"):
        four = {"input_ids": inputs["input_ids"], "attention_mask": mask[:, 0].long()}
    else:
        four = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    expected = zoo.real(model(**four)[0], inputs)
    with sparsify(model, zoo.everything):
        found = zoo.real(model(**four)[0], inputs)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(zoo: SimpleNamespace, dtype: torch.dtype) -> None:
    model, inputs = zoo.build("llama").to(dtype), zoo.inputs("left")
    expected = zoo.real(model(**inputs)[0], inputs)
    with sparsify(model, zoo.everything):
        found = zoo.real(model(**inputs)[0], inputs)
    assert found.dtype == dtype
    spread = expected.float().std()
    assert (found.float() - expected.float()).abs().max() < 0.1 * spread


@torch.no_grad()
def test_under_autocast(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("gpt2"), zoo.inputs("right")
    with torch.autocast("cpu", torch.bfloat16):
        expected = zoo.real(model(**inputs)[0], inputs)
        with sparsify(model, zoo.everything):
            found = zoo.real(model(**inputs)[0], inputs)
    assert (found.float() - expected.float()).abs().max() < 0.1 * expected.float().std()


@torch.no_grad()
def test_a_decoder_made_bidirectional(zoo: SimpleNamespace, padding: str) -> None:
    """5.x lets the configuration of a decoder turn causality off."""
    if zoo.is_old:
        pytest.skip("transformers 4.x has no such switch")
    model, inputs = zoo.build("llama"), zoo.inputs(padding)
    causal = zoo.real(model(**inputs)[0], inputs)
    model.config.is_causal = False
    expected = zoo.real(model(**inputs)[0], inputs)
    assert (expected - causal).abs().max() > 1e-2
    with sparsify(model, zoo.everything):
        found = zoo.real(model(**inputs)[0], inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
