import pytest
from launching import Bench


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)
