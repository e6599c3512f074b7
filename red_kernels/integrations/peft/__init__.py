"""RED as a method of PEFT: `get_peft_model(model, RedPeftConfig())` and PEFT's other functions for an adapter.

Importing this module registers the method. PEFT keeps its methods in dictionaries, keyed by the value of a config's
`peft_type`. `peft.utils.register_peft_method` accepts only members of PEFT's own enumeration, which cannot be extended.
So this module adds the entries, under a member of its own enumeration. Like PEFT's, that member is a string and equals
`"RED"`, the value in `adapter_config.json`. Nothing of PEFT is replaced.

Compatibility, tested with PEFT 0.21.0 to 0.21.2: the import checks each required name of PEFT. A version that lacks
one, as those before 0.21 do, gives an ImportError that names it. A later PEFT with its own method `RED` is refused too.
Three points have no check: other keys in saved files (PEFT 0.21 builds them from `red_edit.<adapter>.<vector>` by
removing the adapter's name), a `peft_type` that must be a `PeftType`, and another hook for mixed batches
(`_enable_peft_forward_hooks`). The tests run PEFT's own suite against these.
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
