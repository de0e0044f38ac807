"""Dynamic Sparse Attention, section 3.2: the rank of the scores under joint training."""

from __future__ import annotations

from collections.abc import Sequence

from sparseloom.experiments.reproduce import Request, Study
from sparseloom.experiments.reproduce.rows import Row, row

PAPER = "dsa_tc_2022"
_CLAIM = "falls, where the error's gradient reaches both sides; no number is printed"
_NO_CLAIM = "not reported"


def rank(study: Sequence[Row]) -> list[Row]:
    """Section 3.2: effective rank of the scores after joint training over that before."""
    before = next(one for one in study if one["contender"] == "before")
    rows: list[Row] = []
    for one in study:
        if one is before:
            continue
        into_both = one["loss"] == "mse" and one["gradient"] == "both"
        published = _CLAIM if into_both else _NO_CLAIM
        setting = (
            f"the built-in byte model, {one['steps']} joint steps of {one['settings']['batch']} × "
            f"{one['settings']['context']} bytes; the paper's model, steps and λ are not printed"
        )
        ratios = [
            ours / theirs
            for ours, theirs in zip(one["effective_rank"], before["effective_rank"], strict=True)
        ]
        energies = [
            ours - theirs
            for ours, theirs in zip(
                one["energy_within_width"], before["energy_within_width"], strict=True
            )
        ]
        found = {"effective rank over that before, mean of layers": sum(ratios) / len(ratios)}
        found |= {f"effective rank over that before, layer {i}": x for i, x in enumerate(ratios)}
        found["energy in the predictor's width, change, mean of layers"] = sum(energies) / len(
            energies
        )
        note = (
            f"{one['contender']}: {one['value']:.3f} bits per byte dense, "
            f"{before['value']:.3f} before"
        )
        rows += [
            row(
                PAPER,
                "rank",
                f"{one['contender']}: {quantity}",
                published if "rank" in quantity else _NO_CLAIM,
                ours,
                basis="scenario",
                assumptions=(setting,),
                note=note,
            )
            for quantity, ours in found.items()
        ]
    return rows


def _run(request: Request) -> list[Row]:
    from sparseloom.experiments import score_rank

    study = score_rank.SMALL if request.size == "small" else score_rank.PAPER
    return score_rank.run_study(study, request.out / "score_rank" / request.size, step=request.step)


STUDY = Study("score_rank.json", _run)
