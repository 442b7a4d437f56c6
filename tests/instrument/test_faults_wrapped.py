"""Faults of wrapped models: compiled, replicated, dispatched, checkpointed, in training, and run from threads."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interp.core.errors import InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited, zero
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 7), seed: int = 0) -> Tensor:
    return torch.randint(model.dims.d_vocab or 0, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", ["torch.compile", "module.compile", "one layer"])
def test_a_compiled_model_is_refused_with_the_reason(way: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    if way == "torch.compile":
        model = LoadedModel(torch.compile(net, backend="eager"))  # pyright: ignore
    elif way == "module.compile":
        net.compile(backend="eager")
        model = LoadedModel(net)
    else:
        net[0] = torch.compile(net[0], backend="eager")  # pyright: ignore
        model = LoadedModel(net)
    site = next(iter(model.table.modules))
    with pytest.raises(InterpError, match="compiled"), capture(model, site):
        model(torch.ones(1, 2))
    with pytest.raises(InterpError, match="compiled"), edited(model, zero(site)):
        model(torch.ones(1, 2))


def test_data_parallel_is_refused_and_its_module_works() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    wrapped = nn.DataParallel(net)
    with pytest.raises(InterpError, match=r"load its \.module"), capture(LoadedModel(wrapped), "module.0"):
        wrapped(torch.ones(1, 2))
    with capture(LoadedModel(wrapped.module), "0") as acts:
        wrapped(torch.ones(1, 2))
    assert acts["0"].shape == (1, 2)


@pytest.mark.needs_package("accelerate")
def test_a_dispatched_model_gives_the_same_values() -> None:
    """device_map: accelerate moves inputs and weights in hooks of its own, around each module's forward."""
    from accelerate import dispatch_model

    plain, spread = tiny_model("llama"), tiny_model("llama")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = [f"model.layers.{layer}" for layer in range(spread.n_layers)]
    dispatch_model(spread.module, dict.fromkeys([*names, *layers], "cpu"), main_device="cpu", force_hooks=True)
    ids, sites = tokens(plain), ["resid_post.*", "pattern.1", "neurons.2"]
    assert hasattr(spread.layers[0], "_hf_hook")
    found = []
    for model in (plain, spread):
        with edited(model, add("resid_post.0", 1.0)), capture(model, sites, stop=False) as acts:
            logits = model(ids)
        found.append([logits, *(value for _, value in acts.items())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.needs_package("accelerate")
def test_weights_offloaded_to_the_cpu_or_disk_give_the_same_values() -> None:
    """Between forwards such weights are on the meta device; the input must not follow them there."""
    from accelerate import cpu_offload

    plain, away = tiny_model("llama"), tiny_model("llama")
    cpu_offload(away.module, execution_device=torch.device("cpu"))
    ids = tokens(plain)
    with capture(plain, "resid_post.1") as wanted:
        plain(ids)
    with capture(away, "resid_post.1") as acts:
        away(ids)
    assert torch.equal(acts["resid_post.1"], wanted["resid_post.1"])


def test_gradient_checkpointing_is_refused_in_training_and_harmless_otherwise() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, "resid_post.1") as plain:
        model(ids)
    model.module.gradient_checkpointing_enable()  # pyright: ignore
    with capture(model, "resid_post.1", grad=True) as acts:
        model(ids)  # eval mode: transformers does not checkpoint
    assert torch.equal(acts["resid_post.1"], plain["resid_post.1"])
    model.module.train()
    with pytest.raises(InterpError, match="checkpoints its gradients"), capture(model, "resid_post.1", grad=True):
        model(ids)
    with pytest.raises(InterpError, match="checkpoints its gradients"), edited(model, zero("resid_post.1")):
        model(ids)
    with capture(model, "resid_post.1") as acts:
        model(ids)
    assert torch.equal(acts["resid_post.1"], plain["resid_post.1"])


class Checkpointed(nn.Module):
    """A network with a checkpoint of its own, which no attribute tells of."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.inner, self.act, self.last = reentrant, nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(lambda v: self.act(self.inner(v)), x, use_reentrant=self.reentrant)
        return self.last(y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_a_network_is_captured_once_and_edits_are_refused(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = LoadedModel(Checkpointed(reentrant))
    x = torch.randn(2, 3, requires_grad=True)
    with capture(model, "inner") as acts:
        model.module(x).sum().backward()
    assert len(acts.calls("inner")) == 1 and torch.equal(acts["inner"], model.module.inner(x))  # pyright: ignore
    with pytest.raises(InterpError, match="a second time"), edited(model, zero("inner")):
        model.module(x).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_inside_a_checkpoint_are_right_or_missing_with_a_reason(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = LoadedModel(Checkpointed(reentrant))
    x = torch.randn(2, 3, requires_grad=True)
    with capture(model, "inner", grad=True) as acts:
        model(x).sum().backward()
    inner = model.module.inner(x).detach().requires_grad_()  # pyright: ignore
    (wanted,) = torch.autograd.grad(model.module.last(inner.tanh()).sum(), inner)  # pyright: ignore
    if reentrant:  # the first pass ran without a graph
        with pytest.raises(InterpError, match="no gradient has reached"):
            acts.grad("inner")
    else:
        torch.testing.assert_close(acts.grad("inner"), wanted)


def in_thread(work: object) -> list[Exception]:
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()  # pyright: ignore
        except Exception as error:  # noqa: BLE001 (whatever it is, the test looks at it)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


def test_a_second_thread_is_refused_and_does_not_disturb_the_first() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, "resid_post.*", stop=False) as plain:
        model(ids)
    errors: list[Exception] = []

    def meddle(*_: object) -> None:
        def capture_too() -> None:
            with capture(model, "resid_post.2"):
                model(ids[:, :3])

        errors.extend([*in_thread(lambda: model(ids[:, :3])), *in_thread(capture_too)])

    handle = model.layers[1].register_forward_pre_hook(meddle)
    with capture(model, "resid_post.*", positions=[-1], stop=False) as acts:
        model(ids)
    handle.remove()
    assert errors and all(isinstance(error, InterpError) and "thread" in str(error) for error in errors)
    for (_, value), (_, wanted) in zip(acts.items(), plain.items(), strict=True):
        assert torch.equal(value, wanted[:, -1:])


def test_threads_after_each_other_and_with_models_of_their_own_work() -> None:
    model = tiny_model("llama")
    ids = tokens(model)

    def work() -> None:
        with capture(model, "resid_post.1") as acts:
            model(ids)
        results.append(acts["resid_post.1"])

    results: list[Tensor] = []
    work()
    assert not in_thread(work)
    work()
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    models = [tiny_model("llama", seed=seed) for seed in range(3)]
    alone, together = {}, {}

    def capture_into(found: dict[int, Tensor], number: int) -> None:
        for _ in range(3):
            with capture(models[number], ["resid_post.1", "pattern.1"]) as acts:
                models[number](ids)
            found[number] = acts["resid_post.1"] + acts["pattern.1"].sum()

    for number in range(3):
        capture_into(alone, number)
    threads = [threading.Thread(target=capture_into, args=(together, number)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[number], together[number]) for number in range(3))


def test_a_model_in_training_mode_is_named_for_what_it_is() -> None:
    """Dropout makes two forwards differ; that is not the capture's doing, and the message says so."""
    from interp.models.probe import quick_check

    model = tiny_model("gpt2", overrides={"resid_pdrop": 0.5})
    quick_check(model)
    model.module.train()
    with pytest.raises(InterpError, match="training mode"):
        quick_check(model)
