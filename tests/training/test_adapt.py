"""Adaptation on a tiny model: it learns, leaves alone what it must, resumes, and round-trips."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from sparseloom.integrations import sparsify
from sparseloom.methods import Dense, DynamicSparse, SlidingWindow
from sparseloom.training import adapt, finetune, load, save
from sparseloom.training.loop import LoopSettings

pytest.importorskip("accelerate", reason="training needs the train extra")

METHOD = DynamicSparse(sparsity=0.7, projection=0.5, bits=4, minimum_keys=4)


def tiny_llama(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # peaked attention, so that there is something to predict
        **more,
    )
    return LlamaForCausalLM(config).eval()


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 32, (2, 48), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in drawn]


def retained(model: Any, method: DynamicSparse) -> float:
    with torch.no_grad(), sparsify(model, method, diagnose=True) as sparse:
        model(input_ids=batches(1, seed=99)[0]["input_ids"])
    rows = sparse.stats()
    return min(row["retained_mass"] / row["oracle_mass"] for row in rows)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_warm_up_teaches_the_predictor_and_leaves_the_model(loss: Any) -> None:
    model = tiny_llama()
    before = weights(model)
    short = adapt(model, METHOD, batches(1), warmup_steps=1, predictor_lr=1e-9, progress=False)
    adapted = adapt(
        model, METHOD, batches(8), warmup_steps=60, loss=loss, predictor_lr=1e-2, progress=False
    )
    assert METHOD.predictor is None
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert retained(model, adapted) > retained(model, short) + 0.05


def test_joint_steps_change_the_model_and_lower_its_loss() -> None:
    model = tiny_llama()
    before = weights(model)
    log = finetune(model, METHOD_OF(model), batches(2), steps=30, lr=5e-3, progress=False)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    assert {"step", "loss", "kl"} == set(log[0])
    assert not model.training


def METHOD_OF(model: LlamaForCausalLM) -> DynamicSparse:
    return adapt(model, METHOD, batches(1), warmup_steps=2, progress=False)


def test_the_paper_s_gradient_reaches_the_model_and_the_detached_one_does_not() -> None:
    def moved(gradient: Any) -> bool:
        model = tiny_llama()
        before = weights(model)
        finetune(
            model,
            METHOD_OF(model),
            batches(1),
            steps=1,
            gradient=gradient,
            model_loss=lambda outputs, batch: outputs.logits.sum() * 0.0,
            progress=False,
        )
        return any(not torch.equal(before[name], t) for name, t in weights(model).items())

    assert moved("both")
    assert not moved("predictor")


def test_labels_go_to_the_loss_of_the_caller_alone() -> None:
    model, seen = tiny_llama(), []

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        seen.append((outputs.loss, "labels" in batch))
        return outputs.logits.float().pow(2).mean()

    finetune(model, Dense(), batches(1), steps=1, model_loss=loss, progress=False)
    assert seen == [(None, True)]


@pytest.mark.parametrize("method", [Dense(), SlidingWindow(sparsity=0.7)])
def test_controls_tune_without_a_predictor(method: Any) -> None:
    model = tiny_llama()
    log = finetune(model, method, batches(2), steps=20, lr=5e-3, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    assert set(log[0]) == {"step", "loss"}


class Stop(Exception):
    """What ends a run half way."""


def stopping_after(count: int, of: int) -> Iterator[dict[str, Tensor]]:
    yield from batches(of)[:count]
    raise Stop


@pytest.fixture
def saves_every_other_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's name `adapt` is the function; the module has to be asked for.
    module = import_module("sparseloom.training.adapt")
    monkeypatch.setattr(module, "LoopSettings", partial(LoopSettings, save_every=2))


@pytest.mark.usefixtures("saves_every_other_step")
def test_a_stopped_run_continues_to_the_same_end(tmp_path: Path) -> None:
    def run(seed: int, drawn: Any, out: Path) -> tuple[dict[str, Tensor], list[float]]:
        model = tiny_llama(seed, attention_dropout=0.3)  # the masks dropped are drawn on, too
        log = finetune(model, Dense(), drawn, steps=6, lr=1e-3, out=out, progress=False)
        return weights(model), [row["step"] for row in log]

    whole, _ = run(0, batches(6), tmp_path / "a")
    with pytest.raises(Stop):
        run(0, stopping_after(4, of=6), tmp_path / "b")
    resumed, steps = run(5, batches(6), tmp_path / "b")
    assert steps == [1, 2, 3, 4, 5, 6]
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)


@pytest.mark.usefixtures("saves_every_other_step")
def test_a_stopped_predictor_looks_at_the_rows_that_it_would_have_looked_at(tmp_path: Path) -> None:
    def run(drawn: Any, out: Path) -> dict[str, Tensor]:
        method = adapt(
            tiny_llama(), METHOD, drawn, warmup_steps=6, query_rows=4, out=out, progress=False
        )
        assert method.module is not None
        return weights(method.module)

    whole = run(batches(6), tmp_path / "a")
    with pytest.raises(Stop):
        run(stopping_after(4, of=6), tmp_path / "b")
    resumed = run(batches(6), tmp_path / "b")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    finetune(model, Dense(), batches(1), steps=2, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="belongs to another run"):
        finetune(model, Dense(), batches(1), steps=3, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"a run with lr 0\.0001, and this one has 0\.1"):
        finetune(model, Dense(), batches(1), steps=2, lr=0.1, out=tmp_path, progress=False)
    file = tmp_path / "fine-tune.pt"
    state = torch.load(file, weights_only=True)
    del state["about"]  # as older versions wrote them
    torch.save(state, file)
    assert finetune(model, Dense(), batches(1), steps=2, lr=0.1, out=tmp_path, progress=False)


def test_a_predictor_of_other_settings_does_not_stand_in(tmp_path: Path) -> None:
    model, options = tiny_llama(), {"warmup_steps": 1, "out": tmp_path, "progress": False}
    first = adapt(model, METHOD, batches(1), **options)
    other = dataclasses.replace(METHOD, sparsity=0.5)  # which the warm-up does not look at
    again = adapt(model, other, batches(1), **options)
    assert again.predictor is not first.predictor
    assert str(again) == str(other)
    with pytest.raises(ValueError, match=r"warm-up\.pt belongs to a run with sizes"):
        adapt(model, dataclasses.replace(METHOD, bits=8), batches(1), **options)


def test_save_and_load_give_the_same_outputs(tmp_path: Path) -> None:
    model = tiny_llama()
    method = METHOD_OF(model)
    save(model, method, tmp_path / "saved")
    again, loaded = load(tmp_path / "saved")
    assert loaded == method
    assert not hasattr(model.config, "sparse")
    ids = batches(1, seed=3)[0]["input_ids"]
    with torch.no_grad():
        with sparsify(model, method):
            first = model(input_ids=ids).logits
        with sparsify(again, dataclasses.replace(loaded)):
            second = again(input_ids=ids).logits
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "saved") is not None


def test_thresholds_are_read_off_the_trained_predictor() -> None:
    model, method = tiny_llama(), dataclasses.replace(METHOD, selection="threshold")
    seen = iter(batches(4))
    found = adapt(
        model, method, seen, warmup_steps=1, joint_steps=1, calibration_steps=2, progress=False
    )
    assert found.selection == "threshold"
    assert next(seen, None) is None
    assert found.thresholds is not None
    assert [len(heads) for heads in found.thresholds] == [4, 4]
    again = adapt(
        model, dataclasses.replace(found, thresholds=None), batches(4)[2:],
        warmup_steps=0, calibration_steps=2, progress=False,
    )  # fmt: skip
    assert again.predictor is found.predictor
    assert again.thresholds == found.thresholds
    with torch.no_grad(), sparsify(model, found, when="always") as sparse:
        for batch in batches(4)[2:]:
            model(input_ids=batch["input_ids"])
    # What the diagonal and the row maxima add comes on top of the 30 %.
    assert all(0.29 < row["density"] < 0.5 for row in sparse.stats())
    given = adapt(model, found, batches(1), warmup_steps=1, progress=False)
    assert given.thresholds == found.thresholds


def test_saving_over_something_needs_a_word(tmp_path: Path) -> None:
    model = tiny_llama()
    save(model, SlidingWindow(sparsity=0.5), tmp_path / "saved")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(model, Dense(), tmp_path / "saved")
    save(model, Dense(), tmp_path / "saved", overwrite=True)
    assert load(tmp_path / "saved")[1] == Dense()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_is_no_saved_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no saved model"):
        save(tiny_llama(), Dense(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_damaged_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(tmp_path / "nothing")
    model = tiny_llama()
    save(model, METHOD_OF(model), tmp_path / "saved")
    (tmp_path / "saved" / "sparseloom.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path / "saved")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="without a sparse method"):
        load(tmp_path / "plain")


def test_an_encoder_with_padding_can_be_adapted() -> None:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            initializer_range=0.3,
        )
    ).eval()
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 15:] = 0
    batch = {"input_ids": torch.randint(0, 32, (2, 24)), "attention_mask": mask}
    adapted = adapt(model, METHOD, [batch], warmup_steps=5, progress=False)
    assert adapted.predictor is not None
    assert not adapted.predictor.rotary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"warmup_steps": 0}, "must not both be 0 for dynamic without weights"),
        ({"loss": "l1"}, "'l1'"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"query_rows": 0}, "query_rows must be 1 or more"),
        ({"batches": []}, "at least one batch"),
        ({"batches": iter(batches(2))}, "batches ended after 2 of the 3"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    given = {"batches": batches(1), "warmup_steps": 3, "progress": False, **arguments}
    # With annotations enforced, the word for the loss is refused before the function sees it.
    with pytest.raises((ValueError, TypeCheckError), match=message):
        adapt(tiny_llama(), METHOD, **given)


def test_joint_steps_without_labels_say_so() -> None:
    unlabelled = [{"input_ids": batches(1)[0]["input_ids"]}]
    with pytest.raises(ValueError, match="need `labels`"):
        adapt(tiny_llama(), METHOD, unlabelled, warmup_steps=1, joint_steps=1, progress=False)


def test_one_process_may_train_at_several_precisions() -> None:
    for precision in ("no", "bf16", "no"):
        log = finetune(
            tiny_llama(), Dense(), batches(1), steps=1, mixed_precision=precision, progress=False
        )
        assert log[0]["loss"] > 0
