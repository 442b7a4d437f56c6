"""`interp bench`: how fast the workbench is, as ratios against other ways of doing the same in the same process.

Systems take turns (round-robin), after one warm-up each; the table gives the median, the spread, and the ratio of
medians to the first row of its group. Peers that are not installed are left out and named. Absolute times belong to
this machine and this hour; the ratios are what to compare.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from interp.cli import console, options
from interp.core.errors import unknown

Systems = dict[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One system's times."""

    work: str
    system: str
    median_s: float
    low_s: float
    high_s: float
    ratio: float
    """Median over the median of the group's first system."""


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Look after it")(bench)


def bench(
    work: Annotated[str, typer.Argument(help="capture, patching, sae or all.")] = "all",
    model: options.Model = options.DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns each system gets.")] = 5,
    threads: Annotated[int, typer.Option("--threads", min=0, help="torch threads; 0 leaves torch's choice.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Time capture, exact patching and SAE training against their peers, in one process."""
    names = list(WORKS) if work == "all" else [work]
    if work != "all" and work not in WORKS:
        raise unknown("work", work, [*WORKS, "all"])
    timings: list[Timing] = []
    with _threads(threads), console.progress() as steps:
        opened = options.open_model(model, check=False)
        for name in names:
            with steps.step(f"timing {name}"):
                timings += _race(name, WORKS[name](opened), rounds)
    if as_json:
        console.emit_json([asdict(timing) for timing in timings])
        return
    columns = ("work", "system", "median s", "spread s", "ratio")
    rows = [
        (t.work, t.system, f"{t.median_s:.3f}", f"{t.low_s:.3f} to {t.high_s:.3f}", f"{t.ratio:.2f}") for t in timings
    ]
    console.table("", columns, rows)


@contextmanager
def _threads(n: int) -> Generator[None, None, None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _race(work: str, systems: Systems, rounds: int) -> list[Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, run in systems.items():
            gc.collect()
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    first = statistics.median(next(iter(seconds.values())))
    return [
        Timing(
            work=work,
            system=name,
            median_s=statistics.median(times),
            low_s=min(times),
            high_s=max(times),
            ratio=statistics.median(times) / first,
        )
        for name, times in seconds.items()
    ]


def _capture(model: Any) -> Systems:
    """Plain forward first; then captures of 120 sites, of all, and of the first third of the layers."""
    import torch

    from interp.core.seed import torch_generator
    from interp.instrument.capture import capture

    tokens = torch.randint(model.dims.d_vocab, (8, 128), generator=torch_generator(0, "bench"))
    third = model.n_layers // 3
    gated = ["resid_post.*", "gate_pre.*", "up.*", "neurons.*"]

    def captured(sites: Any, *, stop: bool) -> Callable[[], object]:
        def run() -> object:
            with capture(model, sites, stop=stop):
                return model(tokens)

        return run

    def plain() -> object:
        with torch.no_grad():
            return model.module(tokens, use_cache=False).logits

    return {
        "plain forward": plain,
        f"capture {len(model.resolve(gated))} sites": captured(gated, stop=False),
        f"capture all {len(model.sites())} sites": captured("*", stop=False),
        f"capture resid_post up to layer {third}": captured(f"resid_post.0-{third}", stop=True),
    }


def _patching(model: Any) -> Systems:
    """All resid_post sites of one IOI pair: one forward per site (timed on a tenth, scaled up below), and ours."""
    from interp.analyses.patching_bench import bench_systems

    return bench_systems(model)


def _sae(_model: Any) -> Systems:
    """One training step at B 2048, d_in 576, d_dict 8192, k 32, against the encode GEMM alone and SAELens."""
    import torch

    from interp.core.seed import torch_generator
    from interp.dictionaries.train import Stepper, TrainConfig, initial

    x = torch.randn(2048, 576, generator=torch_generator(0, "bench"))
    cfg = TrainConfig(d_dict=8192, k=32, n_steps=1000, batch_size=2048, lr=3e-4, warmup_fraction=0, decay_fraction=0)
    ours = Stepper(initial(x, cfg), cfg)
    weight, out = torch.randn(8192, 576), torch.empty(2048, 8192)
    systems: Systems = {
        "encode GEMM alone": lambda: torch.mm(x, weight.T, out=out),
        "interp": lambda: ours.step(500, x),
    }
    if find_spec("sae_lens") is not None:
        systems["SAELens"] = _sae_lens_step(x)
    return systems


def _sae_lens_step(x: Any) -> Callable[[], object]:
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=8192, k=32))
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-4)

    def step() -> object:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        output = sae.training_forward_pass(step_input=given)
        optimiser.zero_grad()
        output.loss.backward()
        return optimiser.step()

    return step


WORKS: dict[str, Callable[[Any], Systems]] = {"capture": _capture, "patching": _patching, "sae": _sae}
