"""DINOv2 with registers: between CLS and the patches stand tokens that belong to no patch (Darcet et al. 2024)."""

from collections.abc import Mapping
from typing import Any

from interp.models.families.dinov2 import dinov2, fields
from interp.models.family import Tiny


def _fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    return fields(sizes, num_register_tokens=3)


FAMILY = dinov2(
    "dinov2_with_registers",
    {
        "dinov2-registers": Tiny(
            config="Dinov2WithRegistersConfig", model="Dinov2WithRegistersForImageClassification", fields=_fields
        )
    },
)
