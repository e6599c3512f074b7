"""The configuration of a RED adapter in PEFT."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ...checkpoints.authors import VECTORS_NAME
from ...checkpoints.folder import TENSORS_NAME
from ...checkpoints.peft_names import is_peft_folder, named_by
from ...checkpoints.reading import RUN_EDITS
from ...edits.config import DTYPES, RedConfig
from ...edits.kinds import KINDS

__all__ = ["RedPeftConfig", "RedPeftType", "named_by"]

_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


class RedPeftType(str, enum.Enum):
    """The type of the method, next to PEFT's own `PeftType`, which cannot be extended. It equals `"RED"`."""

    RED = "RED"


@dataclass
class RedPeftConfig(PeftConfig):
    """The sites of a RED adapter, and its edits (RED, arXiv 2402.15179).

    Attributes:
        target_modules: names of the modules whose output is edited, as in PEFT: a list of names or of their ends, a
            regular expression, or `"all-linear"`. None selects the modules of `position`.
        exclude_modules: names of modules to exclude, by the same rules.
        feedforward_modules: the `target_modules` whose input is edited instead of their output, by the same rules, as
            in PEFT's `IA3Config`: linear layers. Kinds that edit inputs (`"gift"`) edit the input of all targets.
        position: as in `rk.RedConfig`; used if `target_modules` is None. PEFT wraps the edited modules, so the two
            positions of the residual stream exist only where the stream ends in a norm.
        kind: as in `rk.RedConfig`: `"all"`, `"scaling"`, `"bias"`, `"ln"`, `"rotation"`, ...
        stacks: as in `rk.RedConfig`: which stacks of layers `position` edits, where a model has several.
        layers_to_transform: index of a layer, or a list of them; None for all.
        layers_pattern: name of the list of layers, or several, if PEFT cannot infer it; needs `target_modules`.
        modules_to_save: names of modules to train and save whole, in addition to the edits: a new head, for example.
        init_weights: whether an adapter starts as the identity. With False its vectors are random, for tests.
        vector_dtype: of the vectors, `"float32"` by default. In half precision an update smaller than half a rounding
            step at 1.0 is lost. With `autocast_adapter_dtype=False` PEFT requests the dtype of the edited layer.

    Raises:
        TypeError, ValueError: an invalid value of one of these.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the modules to edit, or a regular expression; None selects `position`."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules not to edit, or a regular expression."}
    )
    feedforward_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of those of `target_modules` whose input is edited."}
    )
    position: str = field(default="ffn", metadata={"help": "The position of the edits if `target_modules` is None."})
    kind: str = field(default="all", metadata={"help": f"The kind of edit: {', '.join(KINDS)}."})
    stacks: list[str] | str | None = field(
        default=None, metadata={"help": "The stacks of layers that `position` edits, where a model has several."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to edit; None for all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules to train and save whole, in addition to the edits."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether an adapter begins as the identity."})
    vector_dtype: str = field(default="float32", metadata={"help": "The dtype of the vectors."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = RedPeftType.RED
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if self.vector_dtype not in _DTYPES:
            raise ValueError(f"vector_dtype: got {self.vector_dtype!r}, supported: {', '.join(map(repr, _DTYPES))}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: needs layers_to_transform, whose list of layers it names")
        expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform is not None and expression:
            raise ValueError(
                "layers_to_transform: PEFT ignores it if target_modules is a regular expression; put the layers into "
                "the expression"
            )
        config = self.as_red_config()
        if self.feedforward_modules and self.target_modules is None:
            raise ValueError("feedforward_modules: got it without target_modules, of which it names some")
        if "initial" in config.edit_kind.context and self.target_modules == "all-linear":
            raise ValueError(
                f"target_modules: edits of kind {self.kind!r} add the input of their stack's first layer to the "
                "output of a module, so all modules need that width; name such modules, or use `position`"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's. Raises ValueError, with a remedy, for a folder of `rk.save_edits` or of RED's authors."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        inner = folder / RUN_EDITS
        others = (TENSORS_NAME, VECTORS_NAME)
        if not is_peft_folder(folder) and any((one / name).exists() for one in (folder, inner) for name in others):
            raise ValueError(
                f"{str(folder)!r} is not a folder of PEFT; red-kernels convert {folder} OUTPUT --to peft makes one of "
                "its edits"
            )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def edits_input(self, name: str) -> bool:
        """Whether the input of a targeted module is edited."""
        return named_by(self.feedforward_modules or (), name) or self.as_red_config().edit_kind.on_input

    def as_red_config(self) -> RedConfig:
        """The same for models of the known families. Raises the errors of `rk.RedConfig`."""
        layers = self.layers_to_transform
        chosen = (layers,) if isinstance(layers, int) else (layers or None)
        return RedConfig(self.position, self.kind, chosen, stacks=self.stacks or None)
