"""Whatever a public callable is given: nothing is corrupted, and an error says what is wrong.

Arguments that are right are replaced by drawn ones, one or two at a time. `--hypothesis-profile=
long` draws 5,000 calls.
"""

import dis
import math
import re
import warnings
from collections import Counter
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from public_api import SCENES, Scene, X, Y
from snapshots import contents, differences
from torch import Tensor, nn

import pyrocurv
from pyrocurv.curvature import EKFAC, KFAC, Curvature
from pyrocurv.runtime.validation import is_out_of_memory

ROOMS = ("curvature", "guides", "infer", "metrics", "nn", "optim", "plots", "structures")
MODULES = (*ROOMS, "nn.networks")
PACKAGE = str(Path(pyrocurv.__file__).parent)
CLEAR = (ValueError, TypeError, FloatingPointError)  # the exact types
CONSTANTS = {"nn.LAYERS", "nn.RECURRENT"}
MAX_UNCLEAR = 0.01


# ---- what is clear ------------------------------------------------------------------------------


def is_clear(error: BaseException, names: tuple[str, ...]) -> bool:
    """Whether a `raise` of this package raised it, of a fitting type, and it names the argument."""
    if type(error) is RuntimeError and raised_here(error):  # of the order of calls
        return True
    if isinstance(error, CLEAR) and raised_here(error):
        return any(re.search(rf"\b{name}\b" if name.isidentifier() else name, str(error))
                   for name in (*names, "site '"))
    # of `torch.nn.Module.load_state_dict`, which names the keys
    return "state_dict" in names and str(error).startswith("Error(s) in loading state_dict for ")


def raised_here(error: BaseException) -> bool:
    """Whether the innermost frame is one of this package, at a `raise` statement."""
    last = innermost(error)
    code = last.tb_frame.f_code
    opcode = dis.opname[code.co_code[last.tb_lasti]]
    return code.co_filename.startswith(PACKAGE) and opcode == "RAISE_VARARGS"


def innermost(error: BaseException) -> TracebackType:
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        last = last.tb_next
    return last


# ---- what is drawn ------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    0, 1, 3, -1, 2**70, 10**400, 0.0, 0.5, 1.5, -0.5, 1e300, 1e-300, math.inf, -math.inf, math.nan,
    True, False, 1j, Fraction(1, 2), np.float32(0.1), np.int64(2), torch.tensor(0.5),
    torch.tensor(2), torch.tensor(math.nan), torch.tensor(1.0, device="meta"),
)
OBJECTS: tuple[Any, ...] = (
    None, "", "auto", "fan_in", "kfac", "ggn", "point", "x", b"x", (), [], [1], ["a"], [None], {},
    {"a": 1}, {1: 2}, {"net.0": "full"}, {"net.0": 3}, {nn.Linear: "block"}, {nn.Conv2d: "diag"},
    set(), object(), Ellipsis, range(2), slice(1), torch.float32, nn.Linear, KFAC, KFAC(rank=1),
    EKFAC(), Curvature("ggn"), Curvature("empirical", every=1), Curvature("hessian"),
    dist.Normal(0.0, 1.0), np.zeros(2), [(X, Y)], (X, Y), [X], [(X, None)], [(X[:0], Y[:0])],
    [(X, Y + 7)], [(X, Y.float())], [{"x": X, "y": Y}], [("a", "b")], [{"params": []}],
    {"params": [torch.zeros(2)]}, {"params": None}, [torch.zeros(2, requires_grad=True)],
)
RESULTS: tuple[Any, ...] = (
    None, 1.0, "abc", torch.zeros(()), torch.full((2, 2), math.nan), dist.Normal(0.0, 1.0),
    dist.Normal(torch.zeros(2, 2), 1.0), dist.Categorical(torch.ones(6, 3)), "kfac", 5,
)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)
SHAPES = ((), (0,), (6,), (5,), (6, 1), (6, 2), (6, 3), (2, 2))
FILLS = (0.0, 1.0, -1.0, 2.5, 7.0, math.nan, math.inf)


class Returns(nn.Module):
    """A module without parameters that returns a value, whatever it is given."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


@st.composite
def tensors(draw: st.DrawFn, shapes: Any = SHAPES, dtypes: Any = DTYPES) -> Tensor:
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
    fill, device = draw(st.sampled_from(FILLS)), draw(st.sampled_from(["cpu", "cpu", "meta"]))
    with warnings.catch_warnings():  # of a cast of NaN
        warnings.simplefilter("ignore")
        return torch.full(shape, fill, device=device).to(dtype)


def inputs() -> Any:
    """In place of x: of the shape and dtype that the network has, or no tensor at all."""
    shapes = (6, 2), (0, 2), (13, 2), (1, 2)
    return tensors(shapes, [torch.float32]) | st.sampled_from([None, "x", 1, 0.5, b"x", True])


def anything() -> Any:
    # modules are made anew, since a call may train them
    functions = st.sampled_from(RESULTS).map(lambda value: lambda *args, **kwargs: value)
    modules = st.sampled_from(RESULTS).map(Returns)
    return st.one_of(
        st.sampled_from(NUMBERS), st.sampled_from(OBJECTS), functions, modules,
        tensors(), st.floats(), st.text("ab .0", max_size=4), st.builds(iter, st.just([])),
    )


@st.composite
def changed_state(draw: st.DrawFn, state: Any) -> Any:
    """A state with one of its entries, at any depth, replaced or left out."""
    if isinstance(state, dict) and state and draw(st.integers(0, 6)):
        key = draw(st.sampled_from([*state]))
        if draw(st.integers(0, 4)) == 0:
            return {k: v for k, v in state.items() if k != key}
        return {**state, key: draw(changed_state(state[key]))}
    if isinstance(state, (list, tuple)) and state and draw(st.integers(0, 3)):
        position = draw(st.integers(0, len(state) - 1))
        changed = [*state]
        changed[position] = draw(changed_state(state[position]))
        return changed
    return draw(anything())


def replacement(scene: Scene, name: str) -> Any:
    if name in ("state", "state_dict"):
        return changed_state(scene.arguments[name])
    return inputs() if name in scene.data else anything()


# ---- the calls ----------------------------------------------------------------------------------


def shown(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r:.80}".replace("\n", " ") for key, value in changes.items())


class Record:
    """Counts of what has come of calls, and the scenes that are still as they were made."""

    def __init__(self) -> None:
        self.scenes: dict[str, Scene] = {}
        self.counts: Counter[str] = Counter()
        self.unclear: list[str] = []
        self.corrupted: list[str] = []

    def scene(self, name: str) -> Scene:
        if name not in self.scenes:
            self.scenes[name] = SCENES[name]()
        return self.scenes[name]

    def call(self, name: str, changes: dict[str, Any]) -> None:
        """Call it, and see what has come of it."""
        scene = self.scene(name)
        values = [v for v in scene.arguments.values() if isinstance(v, (Tensor, list, dict))]
        before, arguments = scene.state(), contents(values)
        try:
            made = scene.call(**{**scene.arguments, **changes})
            if scene.then is not None:
                before = scene.state()
                scene.then(made)
        except Exception as error:  # any at all is what is asked
            changed = differences(before, scene.state())
            changed += ["arguments"] if contents(values) != arguments else []
            changed = [path for path in changed if not (scene.free and path.startswith(scene.free))]
            if changed:
                self.corrupted.append(f"{name}({shown(changes)}) changed {changed}: {error!r}")
                self.scenes = {}
            self.note(error, name, changes, scene)
        else:
            self.counts["accepted"] += 1
            if not all(bool(value.isfinite().all()) for value in scene.numbers()):
                self.corrupted.append(f"{name}({shown(changes)}) left numbers that are not finite")
            if differences(before, scene.state()):
                pyro.clear_param_store()
                self.scenes = {}

    def note(self, error: Exception, name: str, changes: dict[str, Any], scene: Scene) -> None:
        self.counts["errors"] += 1
        if is_out_of_memory(error) or is_clear(error, (*changes, *scene.words)):
            return
        last = innermost(error)
        place = f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}"
        self.unclear.append(
            f"{name}({shown(changes)}): "
            f"{type(error).__name__} at {place}: {error!s:.150}"
        )


def names_of(room: str) -> list[str]:
    return sorted(name for name in SCENES if name.startswith(f"{room}.") and arguments_of(name))


_arguments: dict[str, list[str]] = {}


def arguments_of(name: str) -> list[str]:
    if name not in _arguments:
        with torch.random.fork_rng(devices=[]):
            _arguments[name] = [*SCENES[name]().arguments]
    return _arguments[name]


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_corrupted_and_errors_are_clear(room: str) -> None:
    record = Record()
    share = max(1, settings.default.max_examples // len(ROOMS))

    @settings(max_examples=share)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names_of(room)))
        chosen = data.draw(st.lists(st.sampled_from(arguments_of(name)), min_size=1, max_size=2,
                                    unique=True))
        scene = record.scene(name)
        changes = {key: data.draw(replacement(scene, key)) for key in chosen}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record.call(name, changes)

    run()
    print(f"{room}: {dict(record.counts)}, {len(record.unclear)} unclear")
    print(*record.unclear, *record.corrupted, sep="\n")
    assert not record.corrupted, "\n".join(record.corrupted)
    allowed = MAX_UNCLEAR * record.counts["errors"]
    assert len(record.unclear) <= allowed, "\n".join(record.unclear)


def test_every_public_name_has_a_scene() -> None:
    public = {
        f"{module}.{name}" for module in MODULES
        for name in import_module(f"pyrocurv.{module}").__all__
    }
    assert public - CONSTANTS <= {*SCENES}


@pytest.mark.parametrize("name", SCENES)
def test_what_is_right_is_accepted(name: str) -> None:
    scene = SCENES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = scene.call(**scene.arguments)
        if scene.then is not None:
            scene.then(made)
    assert all(bool(value.isfinite().all()) for value in scene.numbers())
