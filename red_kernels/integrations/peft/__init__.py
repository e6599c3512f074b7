"""RED as a method of PEFT: `get_peft_model(model, RedPeftConfig())` and all that PEFT does with an adapter.

Importing this module makes the method known. PEFT keeps its methods in dictionaries, by the value of a config's
`peft_type`; `peft.utils.register_peft_method` fills them, but takes members of PEFT's own enumeration only, to which
nothing can be added without changing the class behind PEFT's back. So the entries are made here, under a member of an
enumeration of ours, which like PEFT's is a string and equals `"RED"`, as it stands in `adapter_config.json`. Nothing
of PEFT is replaced.

How this ages, tested with PEFT 0.21.0 to 0.21.2: what is needed of PEFT is looked for at the import, and a version that
lacks any of it, as those before 0.21 do, gives an ImportError that says what. Should PEFT have a method `RED` of its
own one day, that is refused too. What no check sees: other keys in saved files (PEFT 0.21 builds them from
`red_edit.<adapter>.<vector>` by cutting out the adapter's name), a `peft_type` that has to be a `PeftType`, and another
hook for mixed batches (`_enable_peft_forward_hooks`); the tests run PEFT's own suite against these.
"""

from __future__ import annotations

from ...support.require import require

require("peft", "red_kernels.integrations.peft", "'peft>=0.21'")

from .config import RedPeftConfig, RedPeftType  # noqa: E402
from .layer import RedAdapters, RedLayer  # noqa: E402
from .model import RedModel  # noqa: E402
from .register import register  # noqa: E402

__all__ = ["RedAdapters", "RedLayer", "RedModel", "RedPeftConfig", "RedPeftType", "register"]

register()
