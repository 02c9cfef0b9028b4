"""The ranks that the tests of this folder share, started at the first use."""

from collections.abc import Callable, Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Ranks]]:
    made: dict[int, Ranks] = {}
    yield made
    for ranks in made.values():
        ranks.stop()


@pytest.fixture
def ranks(pools: dict[int, Ranks]) -> Callable[[int], Ranks]:
    """ranks(size) is a group of that many processes."""

    def of(size: int) -> Ranks:
        if size in pools and not pools[size].is_alive:
            pools.pop(size).stop()  # those that have outlived one of them
        if size not in pools:
            pools[size] = Ranks(size)
        return pools[size]

    return of
