"""Every family's tiny model: captured, edited, differentiated, generated with."""

from __future__ import annotations

import pytest
import torch

from interp.models.tiny import tiny_model, tiny_names
from tests.models import conformance

NAMES = tiny_names()


@pytest.mark.parametrize("name", NAMES)
def test_capture(name: str) -> None:
    conformance.check_capture(tiny_model(name))


@pytest.mark.parametrize("name", NAMES)
def test_edit(name: str) -> None:
    conformance.check_edit(tiny_model(name))


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    conformance.check_gradient(tiny_model(name, n_layers=2, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_generation(name: str) -> None:
    conformance.check_generation(tiny_model(name))
