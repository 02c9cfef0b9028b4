"""The image application on two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks


def run(rank: int, options: list[str]) -> str:
    """What a process prints."""
    import image_classification

    with redirect_stdout(StringIO()) as out:
        assert image_classification.main(options) == 0
    return out.getvalue()


@pytest.mark.parametrize("method, model", [("ngvi", "small-cnn"), ("swag", "resnet20")])
def test_two_processes(
    method: str, model: str, ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    """Rank 0 has the predictions of both for the test images, in their order."""
    path, checkpoint = tmp_path / "run.json", tmp_path / "run.pt"
    options = [
        "--smoke", "--ood", "photographs", "--method", method, "--model", model, "--out", str(path),
        "--checkpoint", str(checkpoint),
    ]
    table, nothing = ranks(2).run(run, options)
    assert table.count("accuracy at 90 % coverage") == 1 and nothing == ""
    found: dict[str, Any] = json.loads(path.read_text())
    assert 0 < found["scores"]["NLL"] < 10 and "photographs" in found["unseen"]
    ranks(2).run(run, [*options, "--resume"])  # from the last epoch: nothing is left to train
    again = json.loads(path.read_text())
    assert again["curves"] == found["curves"]
    assert again["scores"]["NLL"] == found["scores"]["NLL"]
