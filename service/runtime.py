"""Variables that libraries read once, at their import: set before torch is imported, unless the user has set them."""

from __future__ import annotations

import os

from service.settings import Settings


def set_library_variables(settings: Settings) -> None:
    """Fixed reduction orders for exactness, and OpenMP threads that sleep instead of spin."""
    # Spinning threads of one forward steal the cores that decode the images of the next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.invariance == "exact":
        # MKL then reduces in the same order for every matrix size: measured, all batch sizes gave equal bits, so that a
        # single image need not be padded to a full batch. It is part of the fingerprint's device class.
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def reduction_order() -> str:
    """How MKL orders its sums in this process: a part of what a score's bits depend on."""
    return os.environ.get("MKL_CBWR", "default")
