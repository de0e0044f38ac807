"""The published configuration of each baseline of the Long Range Arena, as methods."""

from __future__ import annotations

from types import MappingProxyType

ARENA = MappingProxyType(
    {
        "local": "blocklocal:block=50",
        "sparse transformer": "fixed:stride=128,columns=32,global_tokens=1",
        "longformer": "longformer:window=512",
        "bigbird": "bigbird:block=64,random_blocks=3",
        "linformer": "linformer:rank=16,share_kv=true",
        "performer": "performer:kernel=relu,features=0",
        "reformer": "reformer:rounds=1,buckets=10",
        "sinkhorn": "sinkhorn:block=50",
        "synthesizer": "synthesizer:variant=factorized_random,rank=32",
        "linear transformer": "linear",
    }
)
"""Name in the published table → method, in its short text form.

Source: github.com/google-research/long-range-arena, `lra_benchmarks/models` and
`text_classification/configs`.  Sizes are the published ones as they ran (the 32 features that the
text configuration names for Linformer are not handed on to its layers, whose default is 16).  Where
that code does something else than the method's paper, the paper's method is here, because a
baseline must not be weaker than its definition:

- Local and Sinkhorn group tokens whose positions are equal modulo the number of blocks, since the
  input is reshaped the other way round; here blocks are stretches of neighbours;
- Sinkhorn sums all blocks instead of sorting them (its einsum has no common index) and uses a
  softmax; here Sinkhorn normalisation mixes them;
- Reformer multiplies its scores by √head_dim, does not normalise keys and lets tokens attend to
  themselves;
- the Sparse Transformer is causal in an encoder;
- Longformer has no global token by default; here the [CLS] is one;
- padding takes part in Linformer, Performer, Reformer and Linear Transformer; here it does not.
"""
