"""Settings every test shares: one thread, fixed seeds, and the two hypothesis profiles.

`default` is the everyday profile: the same examples on every run. `nightly` draws many more, at random, and
also runs the tests marked `nightly`: `make test PROFILE=nightly`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Set before torch is imported, so that the worker processes of a test have one thread too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)
# Where there is no GPU, Triton's kernels run in its interpreter. Triton looks when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "default",
    max_examples=50,
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.register_profile(
    "nightly", max_examples=500, deadline=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _same_state_for_every_test() -> Iterator[None]:
    """Each test starts from the same seeds and leaves torch's defaults as it found them."""
    dtype = torch.get_default_dtype()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this profile cannot run."""
    nightly = config.getoption("--hypothesis-profile") == "nightly"
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is visible"))
        if "nightly" in item.keywords and not nightly:
            item.add_marker(pytest.mark.skip(reason="long: runs with `make test PROFILE=nightly`"))
