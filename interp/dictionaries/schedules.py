"""Schedules: values that depend on the step, 0 <= step < n_steps.

    learning rate   peak * linear rise over the first steps * linear fall over the last; never 0
    penalty         linear rise from 0 to its weight
    k               linear fall from k_start to k
peak = 2e-4 / sqrt(d_dict / 2^14) unless given: the law of dictionary_learning and sparsify.
"""

from __future__ import annotations

import math


def trapezoid(step: int, n_steps: int, rise: float, fall: float) -> float:
    """1 in the middle, linear from 0 over the fraction `rise` and to 0 over the fraction `fall`; never 0."""
    up, down = rise * n_steps, fall * n_steps
    rising = min(1.0, (step + 1) / up) if up else 1.0
    falling = min(1.0, (n_steps - step) / down) if down else 1.0
    return rising * falling


def ramp(step: int, n_steps: int, fraction: float) -> float:
    """From 0 to 1 over the first `fraction` of the steps, then 1."""
    return min(1.0, step / (fraction * n_steps)) if fraction else 1.0


def annealed(step: int, n_steps: int, start: int, end: int, fraction: float) -> int:
    """From start to end over the first `fraction` of the steps, rounded; then end."""
    return round(end + (start - end) * (1 - ramp(step, n_steps, fraction)))


def peak_lr(d_dict: int) -> float:
    """The usual learning rate of a dictionary of this width, for Adam."""
    return 2e-4 / math.sqrt(d_dict / 2**14)
