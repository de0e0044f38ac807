"""What every method promises.  A new method is listed here once, in EXAMPLES."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch

from sparseloom.mask import SparseMask
from sparseloom.methods import (
    H2O,
    METHODS,
    Attender,
    AttentionGate,
    AttentionInputs,
    BigBird,
    BlockLocal,
    Dense,
    DynamicSparse,
    Elsa,
    Fixed,
    Learned,
    LightningIndexer,
    LinearAttention,
    Linformer,
    Longformer,
    Method,
    MethodShape,
    Oracle,
    Performer,
    Predictor,
    Quest,
    RandomMask,
    Reformer,
    Selector,
    Sinkhorn,
    SlidingWindow,
    SnapKV,
    SpAtten,
    StaticSparse,
    StreamingLLM,
    Strided,
    Synthesizer,
    TileAligned,
    format_method,
    method_names,
    parse_method,
)
from sparseloom.methods.region_table import RegionTable
from sparseloom.methods.static import StaticPattern
from sparseloom.regions import Mode, stripe

HEADS, HEAD_DIM, HIDDEN = 2, 8, 24
PREDICTOR = Predictor.for_shape(
    layers=2, hidden_size=HIDDEN, heads=HEADS, head_dim=HEAD_DIM, projection=0.5, rotary=True
).eval()
SHAPE = MethodShape(
    layers=2,
    hidden_size=HIDDEN,
    heads=HEADS,
    kv_heads=1,
    head_dim=HEAD_DIM,
    max_length=32,
    rotary=False,
    is_causal=False,
)
ROTARY = dataclasses.replace(SHAPE, rotary=True, is_causal=True)
EVERYWHERE = (stripe(0, 32), stripe(0, 64, mode=Mode.COARSE, segment=4))
REGIONS = RegionTable.of({64: ((EVERYWHERE,) * HEADS,) * 2}, 1.0)
GATE = AttentionGate(width=8).initialise(ROTARY).gate
INDEXER = LightningIndexer(width=8, index_heads=2).initialise(ROTARY).indexer

EXAMPLES: dict[str, list[Method]] = {
    "dense": [Dense()],
    "oracle": [
        Oracle(sparsity=0.75, minimum_keys=2),
        Oracle(sparsity=0.0),
        Oracle(threshold=0.01, block_size=(4, 2)),
        Oracle(sparsity=0.5, block_size=(8, 1), pooling="max", minimum_keys=1),
    ],
    "dynamic": [
        DynamicSparse(sparsity=0.8, projection=0.5, minimum_keys=3, predictor=PREDICTOR),
        DynamicSparse(projection=0.5, block_size=(8, 1), predictor=PREDICTOR),
        DynamicSparse(
            projection=0.5,
            selection="threshold",
            thresholds=((0.5, -1e-05), (1.0, 0.25)),
            predictor=PREDICTOR,
        ),
        DynamicSparse(
            projection=0.5, tile=4, mask_heads="one", minimum_keys=3, predictor=PREDICTOR
        ),
        DynamicSparse(
            projection=0.5,
            block_size=(1, 4),
            mask_heads="kv",
            selection="balanced",
            thresholds=((0.5, -1e-05), (1.0, 0.25)),
            predictor=PREDICTOR,
        ),
    ],
    "gate": [
        AttentionGate(width=8, block_size=(4, 4), minimum_keys=2, sparsity=0.8, gate=GATE),
        AttentionGate(width=8, block_size=(1, 4), threshold=0.2, gate=GATE),
    ],
    "indexer": [
        LightningIndexer(width=8, index_heads=2, minimum_keys=3, indexer=INDEXER),
        LightningIndexer(width=8, index_heads=2, block_size=(8, 1), indexer=INDEXER),
    ],
    "elsa": [
        Elsa(p=2.0, thresholds=((0.2,), (0.05,))),
        Elsa(p=0.0),
        Elsa(retention=0.3),
        Elsa(
            retention=0.5,
            thresholds=((0.2, 0.1), (0.05, -1e-05)),
            granularity="head",
            form="orthogonal",
            bits=40,
            seed=1,
        ),
    ],
    "window": [
        SlidingWindow(sparsity=0.9),
        SlidingWindow(width=5),
        SlidingWindow(sparsity=0.7, growing=True, minimum_keys=3),
    ],
    "random": [RandomMask(sparsity=0.8, seed=3), RandomMask(minimum_keys=1)],
    "blocklocal": [BlockLocal(block=6), BlockLocal(blocks=3)],
    "strided": [Strided(stride=5), Strided(stride=2, block=3, parts="heads", global_tokens=1)],
    "fixed": [Fixed(stride=6, columns=2), Fixed(stride=4, columns=1, parts="layers")],
    "longformer": [
        Longformer(window=4),
        Longformer(window=2, block=4, global_tokens=0),
        Longformer(window=4, dilation=2),
    ],
    "bigbird": [BigBird(block=2), BigBird(block=3, random_blocks=1, seed=4)],
    "aligned": [
        TileAligned(density=0.8),
        TileAligned("bigbird", density=0.9, seed=2),
        TileAligned("random"),
    ],
    "static": [
        StaticSparse(density=1.0, regions=REGIONS),
        StaticSparse(density=1.0, bits=8, force="diagonal", regions=REGIONS),
    ],
    "linformer": [
        Linformer(rank=6).initialise(SHAPE),
        Linformer(rank=40, share_kv=True).initialise(SHAPE),
    ],
    "performer": [
        Performer().initialise(SHAPE),
        Performer(kernel="relu", features=5, redraw_every=0).initialise(SHAPE),
        Performer(kernel="relu", features=0, epsilon=0.01).initialise(SHAPE),
    ],
    "reformer": [
        Reformer(rounds=2, bucket_size=4).initialise(SHAPE),
        Reformer(rounds=1, buckets=4).initialise(SHAPE),
    ],
    "sinkhorn": [
        Sinkhorn(block=4).initialise(SHAPE),
        Sinkhorn(block=6, iterations=0, joint=True, temperature=1.0).initialise(SHAPE),
    ],
    "synthesizer": [
        Synthesizer(rank=3).initialise(SHAPE),
        Synthesizer(variant="random").initialise(SHAPE),
        Synthesizer(variant="dense").initialise(SHAPE),
        Synthesizer(variant="factorized_dense").initialise(SHAPE),
    ],
    "linear": [LinearAttention(), LinearAttention(epsilon=0.0)],
    "spatten": [
        SpAtten(),
        SpAtten(token_keep=(1.0, 0.5), head_keep=None, value_keep=0.3, key_bits=(8, 4)),
        SpAtten(token_keep=None, granularity="head", keep_first=False, reference_length=64),
    ],
    "h2o": [H2O(), H2O(heavy_keep=64, recent_keep=0.25)],
    "streaming": [StreamingLLM(), StreamingLLM(sinks=0, window=0.5)],
    "snapkv": [SnapKV(), SnapKV(token_keep=512, window=16, kernel=7, pooling="max")],
    "quest": [Quest(), Quest(token_keep=1024, page_size=8, dense_layers=0, mask_heads="kv")],
}
CASES = [
    pytest.param(method, id=format_method(method))
    for methods in EXAMPLES.values()
    for method in methods
]
SELECTORS = [case for case in CASES if isinstance(case.values[0], Selector)]
ATTENDERS = [case for case in CASES if isinstance(case.values[0], Attender)]
NOT_CAUSAL = ("linformer", "sinkhorn")


def inputs_of(
    q_len: int = 20, *, is_causal: bool = True, padding: bool = False, batch: int = 2
) -> AttentionInputs:
    generator = torch.Generator().manual_seed(q_len)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    angles = torch.arange(q_len)[:, None] / 10.0 ** torch.arange(HEAD_DIM // 2)
    angles = torch.cat([angles, angles], -1)[None]
    key_padding = None
    if padding:
        key_padding = torch.ones(batch, q_len, dtype=torch.bool)
        key_padding[0, :7] = False
    return AttentionInputs(
        query=draw(batch, HEADS, q_len, HEAD_DIM),
        key=draw(batch, 1, q_len, HEAD_DIM),
        value=draw(batch, 1, q_len, HEAD_DIM),
        layer=1,
        is_causal=is_causal,
        scale=HEAD_DIM**-0.5,
        key_padding=key_padding,
        hidden_states=draw(batch, q_len, HIDDEN),
        rotary=(angles.cos(), angles.sin()),
    )


def test_every_method_is_listed() -> None:
    assert list(EXAMPLES) == list(METHODS) == method_names()
    for name, methods in EXAMPLES.items():
        assert all(type(method) is METHODS[name] for method in methods)


@pytest.mark.parametrize("method", CASES)
def test_text_and_json_round_trips(method: Method) -> None:
    assert parse_method(format_method(method)) == method
    assert str(method) == format_method(method)
    stored = json.loads(json.dumps(method.to_dict()))
    assert stored["method"] == method.name
    assert stored["version"] == method.version
    assert Method.from_dict(stored) == method
    assert type(method).from_dict(stored) == method
    assert hash(Method.from_dict(stored)) == hash(method)
    assert pickle.loads(pickle.dumps(method)) == method


@pytest.mark.parametrize("method", CASES)
def test_settings_are_frozen_and_documented(method: Method) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.sparsity = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    doc = type(method).__doc__ or ""
    for field in dataclasses.fields(method):  # pyright: ignore[reportArgumentType]
        assert f"{field.name}:" in doc
    assert method.capabilities <= {"select", "prune", "attend"}
    assert method.capabilities


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("method", SELECTORS)
def test_masks_are_valid_and_keep_something(method: Method, is_causal: bool, padding: bool) -> None:
    assert isinstance(method, Selector)
    inputs = inputs_of(is_causal=is_causal, padding=padding)
    mask = method.select(inputs)
    SparseMask(  # the constructor checks order, range and offsets
        mask.indices, mask.offsets, block_size=mask.block_size, q_len=20, kv_len=20
    )
    assert mask.batch in (1, 2)
    assert HEADS % mask.heads == 0
    keep = mask.to_bool().expand(2, HEADS, 20, 20)
    may = torch.ones(20, 20, dtype=torch.bool)
    may = (may.tril() if is_causal else may).expand(2, 1, 20, 20)
    if inputs.key_padding is not None:
        may = may & inputs.key_padding[:, None, None, :]
    real_rows = torch.ones(2, 20).bool() if inputs.key_padding is None else inputs.key_padding
    assert ((keep & may).any(-1) | ~real_rows[:, None]).all()
    if is_causal:
        diagonal = torch.diagonal(keep, dim1=-2, dim2=-1)
        real = torch.diagonal(may, dim1=-2, dim2=-1)
        assert (diagonal | ~real).all()
    assert method.select(inputs) == mask


@pytest.mark.parametrize("method", SELECTORS)
def test_cost_rule_and_costs(method: Method) -> None:
    assert isinstance(method, Selector)
    inputs = inputs_of()
    shape = inputs.shape
    assert method.prediction_macs(shape) >= 0
    assert not method.worthwhile(1, 1) or isinstance(method, Oracle)
    dropped = getattr(method, "sparsity", None) or getattr(method, "width", None)
    dropped = dropped or getattr(method, "threshold", None)
    dropped = dropped or isinstance(method, (StaticPattern, StaticSparse, TileAligned))
    if isinstance(method, Elsa):
        dropped = method.p > 0
    assert method.worthwhile(4096, 4096) == bool(dropped)
    state = method.new_state(0)
    assert (state is not None) == method.owns_cache_state


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("method", ATTENDERS)
def test_replaced_attention_never_sees_padding_or_the_future(
    method: Attender, is_causal: bool, padding: bool
) -> None:
    inputs = inputs_of(is_causal=is_causal, padding=padding)
    if is_causal and method.name in NOT_CAUSAL:
        with pytest.raises(NotImplementedError, match="runs in bidirectional models only"):
            method.attend(inputs)
        return
    out = method.attend(inputs)
    assert out.shape == inputs.query.shape
    assert out.isfinite().all()
    assert torch.equal(method.attend(inputs), out)
    changed = torch.zeros(2, 20, dtype=torch.bool)
    if inputs.key_padding is not None:
        changed |= ~inputs.key_padding
    if is_causal:
        changed[:, 15:] = True
    by_hashes = is_causal and method.name == "reformer"  # later queries move the sorted order
    noise = 3 * torch.randn(2, HEADS, 20, HEAD_DIM) * changed[:, None, :, None]
    assert inputs.value is not None
    assert inputs.hidden_states is not None
    other = dataclasses.replace(
        inputs,
        query=inputs.query + (0 if by_hashes else noise),
        key=inputs.key + noise[:, :1],
        value=inputs.value + noise[:, :1],
        hidden_states=inputs.hidden_states.masked_fill(changed[..., None], 9.0),
    )
    kept = ~changed[:, None, :, None].expand_as(out)
    if is_causal:
        kept[:, :, 15:] = False
    torch.testing.assert_close(method.attend(other)[kept], out[kept], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ATTENDERS)
def test_replaced_attention_counts_its_products(method: Attender) -> None:
    shape = inputs_of(is_causal=False).shape
    one = method.macs(dataclasses.replace(shape, batch=1, heads=1))
    assert one > 0
    assert method.macs(shape) == 4 * one


@pytest.mark.parametrize("method", [case for case in CASES if isinstance(case.values[0], Learned)])
def test_weights_are_stored_and_restored(method: Learned) -> None:
    assert method.module is not None
    state = {name: tensor.clone() for name, tensor in method.module.state_dict().items()}
    texts = {name: str(size) for name, size in method.sizes().items()}
    bare = Method.from_dict(method.to_dict())
    assert isinstance(bare, Learned)
    assert bare.module is None
    with pytest.raises(ValueError, match="has no"):
        bare.sizes()
    again = bare.restore(texts, state)
    assert again.module is not None
    stored = again.module.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match="layers of the stored"):
        bare.restore({**texts, "layers": "two"}, state)
    with pytest.raises(ValueError, match="do not fit"):
        bare.restore({**texts, "layers": "3"}, state)
    other = bare.initialise(SHAPE, seed=1).module
    same = bare.initialise(SHAPE, seed=1).module
    assert other is not None
    assert same is not None
    assert any(
        not torch.equal(a, b)
        for a, b in zip(other.state_dict().values(), state.values(), strict=True)
        if a.shape == b.shape
    )
    for a, b in zip(other.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_shape_counts_the_allowed_pairs() -> None:
    shape = inputs_of().shape
    assert (shape.heads, shape.kv_heads, shape.hidden_size) == (HEADS, 1, HIDDEN)
    assert shape.allowed_pairs == 210
    assert dataclasses.replace(shape, q_len=1).allowed_pairs == 20
    assert dataclasses.replace(shape, q_len=30).allowed_pairs == 210
    assert dataclasses.replace(shape, is_causal=False).allowed_pairs == 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dynamix", "unknown method 'dynamix'; did you mean 'dynamic'"),
        ("", "unknown method ''"),
        ("dense:sparsity=0.5", "unknown setting of method 'dense': 'sparsity'"),
        ("dynamic:sparsty=0.5", "did you mean 'sparsity'"),
        ("dynamic:sparsity=1.5", r"sparsity must be in \[0, 1\), got 1.5"),
        ("dynamic:sparsity=nan", r"sparsity must be in \[0, 1\)"),
        ("dynamic:sparsity", "must read tag:setting=value"),
        ("dynamic:", "must read tag:setting=value"),
        ("dynamic:sparsity=.5,sparsity=.6", "given twice"),
        ("dynamic:sparsity=lots", "sparsity must be a number, got 'lots'"),
        ("dynamic:bits=3", "bits must be one of 2, 4, 8, 32, got 3"),
        ("dynamic:bits=4.0", "bits must be an integer, got '4.0'"),
        ("dynamic:block_size=8", "block_size must be 2 numbers as 8x8, got '8'"),
        ("dynamic:block_size=8x0", "block_size must be two positive integers"),
        ("dynamic:rotary=yes", "rotary must be true or false, got 'yes'"),
        ("dynamic:projection=0", r"projection must be in \(0, 1\], got 0.0"),
        (
            "dynamic:selection=best",
            "selection must be one of 'topk', 'threshold', 'balanced', got 'best'",
        ),
        ("dynamic:pooling=sum", "pooling must be one of 'mass', 'max', 'mean', got 'sum'"),
        ("dynamic:mask_heads=all", "mask_heads must be one of 'query', 'kv', 'one', got 'all'"),
        ("dynamic:tile=0", "tile must be an integer of at least 1, got 0"),
        ("dynamic:tile=9,block_size=1x8", "tile must be a multiple of the 8 keys of a block"),
        ("dynamic:tile=8,selection=threshold", "tile must be none with selection='threshold'"),
        ("dynamic:bits=32,twos_complement=true", "twos_complement must be false at 32 bits"),
        ("dynamic:minimum_keys=0", "minimum_keys must be an integer of at least 1, got 0"),
        ("oracle", "exactly one of sparsity and threshold must be given, got neither"),
        ("oracle:sparsity=0.5,threshold=0.1", "got sparsity=0.5 and threshold=0.1"),
        ("oracle:threshold=0", r"threshold must be in \(0, 1\), got 0.0"),
        ("window", "exactly one of sparsity and width"),
        ("gate:width=5", "width must be even, got 5"),
        ("gate:threshold=1", r"threshold must be in \(0, 1\), got 1.0"),
        ("elsa:p=-1", "p must be a number of at least 0, got -1.0"),
        ("elsa:p=inf", "p must be a number of at least 0, got inf"),
        ("elsa:retention=0", r"retention must be in \(0, 1\], got 0.0"),
        ("elsa:form=random", "form must be one of 'kronecker', 'orthogonal', got 'random'"),
        ("elsa:granularity=key", "granularity must be one of 'layer', 'head', got 'key'"),
        ("indexer:bits=4", "bits must be one of 8, 32, got 4"),
        ("indexer:rotary_share=2", r"rotary_share must be in \[0, 1\], got 2.0"),
        ("window:width=4,growing=true", "width must be none for a growing window, got 4"),
        ("performer:kernel=elu", "kernel must be one of 'softmax', 'relu', got 'elu'"),
        ("reformer:buckets=5", "buckets must be an even number of at least 2, got 5"),
        ("fixed:stride=4,columns=5", "columns must be at most the stride of 4, got 5"),
        ("bigbird:window=2", "window must be an odd number of blocks, got 2"),
        ("sinkhorn:temperature=0", "temperature must be positive, got 0.0"),
        ("linear:epsilon=-1", "epsilon must be 0 or more, got -1.0"),
        ("spatten:token_keep=some", "token_keep must be a number or a list or none, got 'some'"),
        ("spatten:head_keep=0.5x0.9", "head_keep must not rise from layer to layer"),
        ("spatten:granularity=token", "granularity must be one of 'layer', 'head', got 'token'"),
        ("spatten:value_keep=0", r"value_keep must be in \(0, 1\], got 0.0"),
        ("h2o:heavy_keep=1.5", r"heavy_keep must be a share in \[0, 1\] or a whole number above 1"),
        ("h2o:recent_keep=inf", r"recent_keep must be a share in \[0, 1\] or a whole number"),
        ("streaming:sinks=-1", "sinks must be an integer of at least 0, got -1"),
        ("streaming:positions=both", "positions must be one of 'text', 'cache', got 'both'"),
        ("snapkv:kernel=4", "kernel must be odd, got 4"),
        ("snapkv:token_keep=20", "token_keep must be at least the window of 32 tokens, got 20.0"),
        ("quest:page_size=0", "page_size must be an integer of at least 1, got 0"),
        ("quest:mask_heads=one", "mask_heads must be one of 'query', 'kv', got 'one'"),
        ("random:seed=-1", "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_method(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sparsity": 0.5}, "needs the key 'method'"),
        ({"method": "quantum"}, "unknown method 'quantum'"),
        ({"method": 7}, "unknown method '7'"),
        ({"method": "random", "version": 2}, r"version of method 'random' must be in \[1, 1\]"),
        ({"method": "random", "sead": 2}, "did you mean 'seed'"),
        ({"method": "random", "seed": 2.5}, "seed must be an integer, got 2.5"),
        ({"method": "random", "sparsity": None}, "sparsity must be a number, got None"),
        ({"method": "random", "sparsity": True}, "sparsity must be a number, got True"),
        ({"method": "oracle", "sparsity": 0.5, "block_size": [8]}, "block_size must be 2 numbers"),
    ],
)
def test_bad_dicts_are_refused(data: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Method.from_dict(data)


def test_values_are_read_as_people_write_them() -> None:
    method = parse_method(" dynamic : sparsity=.95, block_size=8x1 ,rotary=False, thresholds=None")
    assert method == DynamicSparse(sparsity=0.95, block_size=(8, 1), rotary=False)
    assert format_method(method) == "dynamic:sparsity=0.95,block_size=8x1,rotary=false"
    assert format_method(DynamicSparse()) == "dynamic"
    yaml = {"method": "dynamic", "sparsity": 0, "block_size": "8x1"}
    assert Method.from_dict(yaml) == DynamicSparse(sparsity=0.0, block_size=(8, 1))
    with pytest.raises(ValueError, match="method must be 'oracle', got 'dense'"):
        Oracle.from_dict({"method": "dense"})
