"""`save_pretrained` of a patched model: the base model as usual, the edits next to it, and a hint how to load them.

transformers' `from_pretrained` does not know edits. The saved state is unchanged and includes the vectors: a Trainer
resumes from it. The method is wrapped on the instances, since their classes are not ours.
"""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..edits.config import RedConfig
from ..edits.module import RedEdit
from ..support.sharded import is_sharded
from ..support.text import listed

__all__ = ["Writer", "beside_pretrained", "unwrap_saving", "wrap_saving"]

Writer = Callable[[nn.Module, "str | os.PathLike[str]", RedConfig], object]
_Given = TypeVar("_Given", bound=Writer)

_METHOD = "save_pretrained"
_writers: list[Writer] = []  # one: the module that writes edits imports the patch, so it cannot be imported here
_inside: ContextVar[bool] = ContextVar("inside of save_pretrained", default=False)


def beside_pretrained(write: _Given) -> _Given:
    """A decorator for the function that writes the active edit of a model, or of a part of it, into a folder."""
    _writers[:] = [write]
    return write


def wrap_saving(model: nn.Module, sites: Iterable[str], config: RedConfig) -> None:
    """Wrap `save_pretrained` of all modules that have one and contain a site. `unwrap_saving` undoes it."""
    found: dict[int, nn.Module] = {}
    for site in sites:
        module: Any = model
        for part in ("", *filter(None, site.split("."))):
            module = module._modules[part] if part else module
            if callable(getattr(type(module), _METHOD, None)):
                found[id(module)] = module
    for module in found.values():
        module.__dict__[_METHOD] = _Saving(module, config, module.__dict__.get(_METHOD))


def unwrap_saving(module: nn.Module) -> None:
    """Undo the wrapping of one module."""
    saving = module.__dict__.get(_METHOD)
    if isinstance(saving, _Saving):
        del module.__dict__[_METHOD]
        if saving.former is not None:
            module.__dict__[_METHOD] = saving.former


class _Saving:
    """The `save_pretrained` of a patched model.

    It refers to its model weakly: a strong reference would keep the model until the next garbage collection. It is
    copied and pickled with the model.
    """

    def __init__(self, module: nn.Module, config: RedConfig, former: Callable[..., Any] | None) -> None:
        self._module = weakref.ref(module)
        self.config, self.former = config, former
        method = getattr(type(module), _METHOD).__get__(module)
        self.__name__, self.__doc__, self.__signature__ = _METHOD, method.__doc__, inspect.signature(method)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Saving, (self._module(), self.config, self.former)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if module is None:
            raise ReferenceError(
                "the model of this save_pretrained is gone; call the method of a model that still exists"
            )
        save = self.former or getattr(type(module), _METHOD).__get__(module)
        if _inside.get():  # of an outer model, which reports for all
            return save(*args, **kwargs)
        token = _inside.set(True)
        try:
            result = save(*args, **kwargs)
        finally:
            _inside.reset(token)
        bound = inspect.signature(save).bind(*args, **kwargs).arguments
        folder = next(iter(bound.values()), None)
        if bound.get("is_main_process", True) and isinstance(folder, (str, os.PathLike)) and Path(folder).is_dir():
            warnings.warn(_beside(module, folder, self.config, bool(bound.get("push_to_hub"))), stacklevel=2)
        return result


def _beside(module: nn.Module, folder: str | os.PathLike[str], config: RedConfig, pushed: bool) -> str:
    """Write the edits into the folder; returns the text of the warning."""
    edits = [own for own in module.modules() if isinstance(own, RedEdit)]
    text = f"the model that from_pretrained loads from {str(folder)!r} has no edits; "
    if any(is_sharded(vector) for own in edits for vector in own.parameters()):
        reason = "each process holds a shard of the vectors; call rk.save_edits(model, folder) in all of them"
    else:
        try:
            _writers[0](module, folder, config)
            reason = ""
        except ValueError as error:
            reason = f"{error}; rk.save_edits(model, folder) saves them"
    if reason:
        return f"{text}they were not written: {reason}"
    text += (
        "they are next to it, as rk.save_edits writes them. To load them: "
        f"rk.patch(model, rk.saved_config({str(folder)!r})); rk.load_edits(model, {str(folder)!r})"
    )
    names = list(dict.fromkeys(name for own in edits for name in own.names))
    if len(names) > 1:
        text += (
            f". They are those of the active edit, one of {listed(names)}; rk.save_edits(model, folder, name) saves "
            "others"
        )
    return text + (". They were not uploaded" if pushed else "")
