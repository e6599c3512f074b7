"""`red-kernels` in one of several processes, which writes down what the weights are while it trains.

Arguments: a folder, then the command's. The folder gets `RANK.txt`: for each parameter that the process holds a part
of, its name, whether it is trained, how many of its elements are here, and of how many.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from red_kernels import cli
from red_kernels.finetune.watching import JobTrainer
from red_kernels.support.sharded import is_sharded, local


class Look(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        lines = [
            f"{name} {own.requires_grad} {local(own.detach()).numel()} {own.numel()}"
            for name, own in model.named_parameters()
            if is_sharded(own)
        ]
        (Path(sys.argv[1]) / f"{os.environ['RANK']}.txt").write_text("\n".join(lines))


class Watched(JobTrainer):
    def train_on(self, *arguments: Any, **options: Any) -> None:
        self.add_callback(Look())
        super().train_on(*arguments, **options)


if __name__ == "__main__":
    import red_kernels.finetune.train as train

    train.JobTrainer = Watched  # type: ignore[misc]
    sys.exit(cli.main(sys.argv[2:]))
