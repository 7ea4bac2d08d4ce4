"""A small model of Stable Diffusion 1: its configuration, and random weights."""

from typing import Any

import pytest
from torch import Tensor

from tests.tiny_models import tiny_config, tiny_weights


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """Its configuration, which tests leave as it is."""
    return tiny_config()


@pytest.fixture(scope="session")
def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Its weights, likewise."""
    return tiny_weights(config)
