"""Every test starts from the same seed and an empty parameter store, and leaves no trace.

Each worker of pytest-xdist computes on one thread.
"""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; also of processes that tests start

import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

torch.set_num_threads(1)
COMMON = settings(
    deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
)
settings.register_profile("short", COMMON, max_examples=1400, derandomize=True)
settings.register_profile("long", COMMON, max_examples=5000)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    pyro.clear_param_store()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    pyro.clear_param_store()


@pytest.fixture
def double() -> Iterator[None]:
    """float64 by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
