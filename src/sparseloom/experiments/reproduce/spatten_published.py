"""What SpAtten (HPCA 2021) prints in figures 14 and 15, benchmark by benchmark."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Final

DEVICES: Final = ("titan_xp", "xeon_e5_2640v4", "jetson_nano", "raspberry_pi_4")
"""The processors of figure 14, in its order."""

# Benchmark: speed-up over each processor, then energy saving over each.
FIGURE_14: Final[dict[str, tuple[int, ...]]] = {
    "bert-base-squad1": (88, 165, 623, 2117, 562, 1923, 281, 303),
    "bert-base-squad2": (72, 143, 524, 1526, 465, 1635, 277, 522),
    "bert-large-squad1": (68, 138, 427, 2089, 444, 1531, 221, 297),
    "bert-large-squad2": (59, 108, 399, 1569, 466, 1274, 207, 548),
    "bert-base-cola": (957, 1308, 4506, 6014, 5994, 14850, 901, 2007),
    "bert-base-mnli-m": (159, 269, 779, 2500, 1012, 3104, 192, 1003),
    "bert-base-mnli-mm": (152, 255, 678, 2160, 973, 2946, 172, 856),
    "bert-base-mrpc": (101, 206, 555, 3521, 643, 2407, 164, 1616),
    "bert-base-qnli": (148, 265, 770, 4342, 928, 2930, 209, 1956),
    "bert-base-qqp": (231, 436, 1133, 2989, 1444, 5032, 271, 1227),
    "bert-base-rte": (71, 129, 329, 2618, 464, 1511, 112, 1192),
    "bert-base-sst-2": (436, 535, 1988, 4569, 2733, 6021, 462, 1877),
    "bert-base-sts-b": (266, 358, 1250, 3400, 1669, 4173, 303, 1360),
    "bert-large-cola": (740, 1074, 3987, 7071, 4634, 11993, 764, 2717),
    "bert-large-mnli-m": (124, 259, 626, 3448, 793, 2911, 173, 1570),
    "bert-large-mnli-mm": (112, 207, 554, 3110, 716, 2330, 175, 1386),
    "bert-large-mrpc": (82, 152, 395, 3078, 523, 1782, 140, 1387),
    "bert-large-qnli": (89, 163, 460, 3358, 567, 1918, 160, 1537),
    "bert-large-qqp": (193, 303, 890, 2943, 1209, 3453, 238, 1205),
    "bert-large-rte": (47, 106, 263, 2195, 311, 1217, 168, 981),
    "bert-large-sst-2": (254, 436, 1227, 4060, 1593, 4878, 318, 1682),
    "bert-large-sts-b": (202, 380, 983, 3113, 1288, 4349, 262, 1309),
    "gpt2-small-wikitext2": (169, 563, 2008, 14369, 1315, 6097, 1105, 5058),
    "gpt2-small-wikitext103": (211, 704, 2511, 17964, 1668, 7736, 1403, 6417),
    "gpt2-small-ptb": (231, 770, 2747, 19654, 2052, 9513, 1725, 7892),
    "gpt2-small-1bw": (351, 1170, 4176, 29882, 3131, 14518, 2632, 12044),
    "gpt2-medium-wikitext2": (135, 542, 2075, 15681, 1742, 6889, 1213, 5850),
    "gpt2-medium-wikitext103": (147, 592, 2266, 17128, 1813, 7168, 1262, 6086),
    "gpt2-medium-ptb": (208, 836, 3199, 24177, 2806, 11097, 1954, 9422),
    "gpt2-medium-1bw": (304, 1221, 4675, 35333, 4558, 18022, 3173, 15302),
}
# Geometric means that the text prints, in the same order.
HEADLINE: Final = (162, 347, 1095, 5071, 1193, 4059, 406, 1910)

# SpAtten-e2e over TITAN Xp with 12-bit and 8-bit weights, then over the Xeon.
FIGURE_15: Final[dict[str, tuple[int, ...]]] = {
    "gpt2-small-wikitext2": (31, 44, 94, 135),
    "gpt2-small-wikitext103": (31, 45, 96, 139),
    "gpt2-small-ptb": (31, 46, 96, 140),
    "gpt2-small-1bw": (32, 47, 98, 145),
    "gpt2-medium-wikitext2": (18, 27, 71, 104),
    "gpt2-medium-wikitext103": (18, 27, 72, 105),
    "gpt2-medium-ptb": (19, 27, 73, 108),
    "gpt2-medium-1bw": (19, 28, 74, 110),
}
E2E_HEADLINE: Final = (24, 35, 83, 122)


def means(table: dict[str, tuple[int, ...]], family: str = "") -> list[float]:
    """Geometric mean of each column over the benchmarks whose name begins with `family`."""
    chosen = [row for name, row in table.items() if name.startswith(family)]
    return [geometric_mean(column) for column in zip(*chosen, strict=True)]
