"""Save a model with its sparse method, and load both back.

The folder is an ordinary Hugging Face folder: `config.json` gains one dict, `sparse`, which holds
the method's settings, and `sparseloom.safetensors` holds what the method learned.  Any program
that does not know sparseloom loads the dense model from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparseloom.files import fresh_folder
from sparseloom.methods import Learned, Method
from sparseloom.models.classes import class_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "sparseloom.safetensors"


def save(
    model: PreTrainedModel, method: Method, path: Path | str, *, overwrite: bool = False
) -> None:
    """Write model and method to the folder `path`.

    The folder appears whole or not at all.  Raises FileExistsError when it exists and `overwrite`
    is false, or when it holds something other than a saved model.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    if path.exists() and not (path / "config.json").is_file():
        raise FileExistsError(f"path: {path} exists and is no saved model, so it is not replaced")
    before, settings = getattr(model.config, "sparse", None), method.to_dict()
    try:
        model.config.sparse = settings
        with fresh_folder(path) as fresh:
            model.save_pretrained(fresh)
            save_method(method, fresh)
    finally:
        if before is None:
            delattr(model.config, "sparse")
        else:
            model.config.sparse = before


def load(path: Path | str) -> tuple[PreTrainedModel, Method]:
    """Read what `save` wrote: the model (its own class, in eval mode) and the method.

    Raises FileNotFoundError when there is no such folder and ValueError when it holds no method.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: no saved model in {path} (config.json is missing)")
    cls = class_of(path)
    assert cls.config_class is not None
    settings = getattr(cls.config_class.from_pretrained(path), "sparse", None)
    if settings is None:
        raise ValueError(f"path: {path} holds a model without a sparse method (config.sparse)")
    return cls.from_pretrained(path).eval(), load_method(path, settings)


def save_method(method: Method, folder: Path) -> None:
    """Write what the method learned, if anything, as safetensors into `folder`."""
    if isinstance(method, Learned) and method.module is not None:
        state = {name: tensor.contiguous() for name, tensor in method.module.state_dict().items()}
        meta = {key: str(value) for key, value in method.sizes().items()}
        save_file(state, folder / WEIGHTS, metadata=meta)


def load_method(folder: Path, settings: dict[str, object]) -> Method:
    """The method of `settings` (its `to_dict`), with what `save_method` stored in `folder`."""
    from safetensors import safe_open

    method = Method.from_dict(settings)
    file = folder / WEIGHTS
    if not isinstance(method, Learned) or not file.exists():
        return method
    try:
        with safe_open(file, framework="pt") as stream:
            meta = stream.metadata() or {}
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {file} is damaged ({error})") from error
    return method.restore(meta, state)
