"""The example, of which rank 1 is killed in the middle of a step of the second epoch, once."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"


def main() -> None:
    path = Path(sys.argv[sys.argv.index("--checkpoint") + 1])
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        all_reduce = dist.all_reduce

        def killed(*args: Any, **kwargs: Any) -> Any:
            if path.exists():  # the first epoch is over
                os.kill(os.getpid(), signal.SIGKILL)
            return all_reduce(*args, **kwargs)

        dist.all_reduce = killed
    runpy.run_path(str(EXAMPLE), run_name="__main__")


if __name__ == "__main__":
    main()
