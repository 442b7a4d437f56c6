"""The loop: many jobs in one pass, what is written, what is refused, what is kept when something breaks."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interp.core.errors import ArtefactError, InterpError
from interp.core.progress import listening
from interp.dictionaries.crosscoder import train_crosscoder
from interp.dictionaries.saved import load
from interp.dictionaries.train import Diverged, Stepper
from interp.dictionaries.train_config import TrainConfig
from interp.dictionaries.training import checkpoint
from interp.dictionaries.training.checkpoint import CheckpointWarning, check, latest, steps_in
from interp.dictionaries.training.job import Job, check_jobs, job_name, sweep
from interp.dictionaries.training.journal import Journal, curve, rows
from interp.dictionaries.training.parallel import Team
from interp.dictionaries.training.run import RunConfig, train
from interp.dictionaries.training.watch import Throttle, Tick, as_html, duration
from interp.instrument.store_audit import PICKLES
from tests.dictionaries.training.train_job import BATCH, CONFIG, D_A, D_B, JOBS, SAFE, Planted

ONE = JOBS[:1]


def test_many_jobs_in_one_pass_are_the_jobs_one_by_one(tmp_path):
    """Against a bare loop over the core's stepper, which knows nothing of runs."""
    made = train(JOBS, Planted(), tmp_path / "run", SAFE)
    assert list(made) == [job.name for job in JOBS]
    for job in JOBS:
        source = Planted()
        alone = Stepper(job.start(source.sample(SAFE.n_sample)), job.config)
        for number in range(job.config.n_steps):
            batch = source.next()
            row = alone.step(number, job.x(batch), job.y(batch))
        saved = load(made[job.name])
        for name, value in alone.sae.state_dict().items():
            assert torch.equal(saved.dictionary.state_dict()[name], value), (job.name, name)
        assert saved.about["n_tokens"] == job.config.n_steps * BATCH
        last = [r for r in rows(tmp_path / "run" / "log.jsonl") if r["job"] == job.name][-1]
        assert {key: last[key] for key in row} == row
    assert load(made["auto"]).about["site"] == "a" and load(made["auto"]).about["target_site"] is None
    assert load(made["over"]).about["target_site"] == "b" and load(made["over"]).dictionary.d_out == D_B
    assert load(made["both"]).about["site"] == ["a", "b"] and load(made["both"]).dictionary.d_in == D_A + D_B


def test_saved_dictionaries_say_what_they_are_about(tmp_path):
    about = {"model": "planted", "weight_hash": "0" * 16}
    certified = []

    def certify(saved):
        certified.append(saved)
        return replace(saved, certificate={"fvu": 0.5})

    made = train(ONE, Planted(), tmp_path / "run", SAFE, about=about, certify=certify)
    saved = load(made["auto"])
    assert saved.about["model"] == "planted" and saved.certificate == {"fvu": 0.5} and len(certified) == 1
    assert TrainConfig(**{**saved.about["config"], "shells": tuple(saved.about["config"]["shells"])}) == CONFIG


def test_nothing_on_disk_is_a_pickle(tmp_path):
    """DCP's usual storage writes `.metadata`, which is one."""
    train(JOBS, Planted(), tmp_path / "run", SAFE)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert path.suffix in (".json", ".jsonl", ".safetensors") or path.name.startswith(".lock"), path
        assert path.suffix not in PICKLES and not path.read_bytes().startswith(b"\x80"), path
        if path.suffix == ".safetensors":
            load_file(path)


def test_the_last_checkpoints_stay(tmp_path):
    train(ONE, Planted(), tmp_path / "run", replace(SAFE, save_every=4, keep=3))
    assert steps_in(tmp_path / "run" / "checkpoints") == [24, 20, 16]


@pytest.mark.parametrize("harm", ["bit", "truncate", "missing", "json", "facts"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm):
    folder = tmp_path / "run"
    made = train(ONE, Planted(), folder, SAFE)
    whole = {path.name: path.read_bytes() for path in made["auto"].iterdir()}
    newest = checkpoint.folder_of(folder / "checkpoints", 24)
    shard, told = next(newest.glob("*.safetensors")), newest / "checkpoint.json"
    raw = bytearray(shard.read_bytes())
    if harm == "bit":
        raw[-3] ^= 1
        shard.write_bytes(raw)
    elif harm == "truncate":
        shard.write_bytes(raw[:-8])
    elif harm == "missing":
        shard.unlink()
    elif harm == "json":
        told.write_text(told.read_text()[:-20])
    else:
        told.write_text(told.read_text().replace('"n_tokens": 768', '"n_tokens": 769'))
    with pytest.raises(ArtefactError, match="damaged"):
        check(newest)
    with pytest.warns(CheckpointWarning, match="going back to the checkpoint before"):
        train(ONE, Planted(), folder, SAFE, resume=True)
    assert {path.name: path.read_bytes() for path in made["auto"].iterdir()} == whole
    assert check(newest).step == 24


def broken_at(number: int, value: float) -> Planted:
    class Broken(Planted):
        def next(self):
            batch = super().next()
            if self.number == number:
                batch["a"][3, 2] = value
            return batch

    return Broken()


def test_nan_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        Diverged, match=r"auto: the loss became nan at step 12 .*last good checkpoint is .*step-000000010"
    ) as e:
        train(JOBS, broken_at(13, torch.nan), folder, SAFE)
    assert e.value.step == 12
    assert steps_in(folder / "checkpoints") == [10, 5] and check(checkpoint.folder_of(folder / "checkpoints", 10))
    assert not (folder / "dictionaries").exists()
    made = train(JOBS, Planted(), folder, SAFE, resume=True)  # with good data it goes on
    other = train(JOBS, Planted(), tmp_path / "other", SAFE)
    a, b = (load(found["auto"]).dictionary.state_dict() for found in (made, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    """The loss of step 4 is still finite; its gradients are not, and checkpoint 5 would hold NaN."""

    class Poisoned(Planted):
        def next(self):
            if self.number == 4:
                stepper[0].sae.W_dec.register_hook(lambda grad: grad * torch.nan)
            return super().next()

    stepper = []
    begin = Stepper.__init__

    def noted(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        stepper.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "__init__", noted)
        with pytest.raises(Diverged, match="auto: .* step 4.*no checkpoint had been written") as error:
            train(ONE, Poisoned(), tmp_path / "run", SAFE)
    assert error.value.step == 4 and steps_in(tmp_path / "run" / "checkpoints") == []


def test_an_exploding_fvu_stops_the_run(tmp_path):
    config = replace(CONFIG, kind="relu", k_start=0, lr=30.0, decoder_norm="free")
    job = Job(name="hot", config=config, reads=("a",))
    with pytest.raises(Diverged, match=r"hot: the FVU became .* above max_fvu=100; lower lr"):
        train([job], Planted(), tmp_path / "run", SAFE)
    train([job], Planted(), tmp_path / "free", replace(SAFE, max_fvu=0, save_every=1000))


def test_a_folder_is_one_run(tmp_path):
    folder = tmp_path / "run"
    train(ONE, Planted(), folder, SAFE)
    with pytest.raises(ArtefactError, match="holds a run; go on with it with resume"):
        train(ONE, Planted(), folder, SAFE)
    other = (Job(name="auto", config=replace(CONFIG, lr=1e-3), reads=("a",)),)
    with pytest.raises(ArtefactError, match=r"jobs\[0\].config.lr was 0.003 and is now 0.001"):
        train(other, Planted(), folder, SAFE, resume=True)
    with pytest.raises(ArtefactError, match="batch_size was 32 and is now 64"):
        train(ONE, Planted(batch_size=64), folder, SAFE, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ArtefactError, match="is not empty and holds no run"):
        train(ONE, Planted(), tmp_path / "mine", SAFE, resume=True)
    assert [p.name for p in (tmp_path / "mine").iterdir() if not p.name.startswith(".")] == ["thesis.txt"]


def test_safety_settings_may_change_on_the_way(tmp_path):
    with pytest.raises(Diverged):
        train(ONE, broken_at(13, torch.nan), tmp_path / "run", SAFE)
    train(ONE, Planted(), tmp_path / "run", RunConfig(save_every=2, keep=4), resume=True)
    assert steps_in(tmp_path / "run" / "checkpoints") == [24, 22, 20, 18]


def test_a_run_that_torchelastic_starts_again_goes_on_by_itself(tmp_path, monkeypatch):
    with pytest.raises(Diverged):
        train(ONE, broken_at(13, torch.nan), tmp_path / "run", SAFE)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    drawn = []

    class Counted(Planted):
        def next(self):
            drawn.append(self.number)
            return super().next()

    made = train(ONE, Counted(), tmp_path / "run", SAFE)
    assert drawn == list(range(10, 24))  # from the last good checkpoint on
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    whole = train(ONE, Planted(), tmp_path / "whole", SAFE)
    a, b = (load(found["auto"]).dictionary.state_dict() for found in (made, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_watchers_and_listeners_hear_every_step(tmp_path):
    ticks, heard = list[Tick](), list[tuple[str, int, int]]()
    with listening(lambda *said: heard.append(said)):
        train(JOBS, Planted(), tmp_path / "run", SAFE, watchers=[ticks.append])
    assert [tick.done for tick in ticks] == list(range(1, 25)) and heard[-1] == ("training 3 dictionaries", 24, 24)
    assert set(ticks[19].rows) == {"auto", "over", "both"} and set(ticks[20].rows) == {"auto", "both"}
    assert ticks[-1].seconds_left == 0 and ticks[-1].tokens_per_second > 0
    assert [len(row) for row in ticks[0].table()] == [5, 5, 5] and "step 1 of 24" in ticks[0].headline()
    page = as_html(replace(ticks[0], rows={"<b>": ticks[0].rows["auto"]}))
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_a_notebook_draws_one_table_again_and_again(tmp_path, monkeypatch):
    pytest.importorskip("IPython")
    import IPython.display

    from interp.dictionaries.training.watch import NotebookWatch

    class Handle:
        def __init__(self):
            self.shown = []

        def update(self, page):
            self.shown.append(page.data)

    handle, first = Handle(), []
    monkeypatch.setattr(IPython.display, "display", lambda page, display_id: first.append(page.data) or handle)
    train(ONE, Planted(), tmp_path / "run", SAFE, watchers=[NotebookWatch(seconds=0)])
    assert len(first) == 1 and len(handle.shown) == 23 and "step 24 of 24" in handle.shown[-1]


def test_times_are_short():
    assert (duration(7.2), duration(187), duration(7387)) == ("0:07", "3:07", "2:03:07")
    due = Throttle(3600)
    tick = Tick(done=1, n_steps=9, rows={}, tokens_per_second=1.0, seconds=1.0, seconds_left=8.0)
    assert [due(tick), due(tick), due(replace(tick, done=9))] == [True, False, True]


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    made = []
    worker = threading.Thread(target=lambda: made.append(train(ONE, Planted(), tmp_path / "run", SAFE)))
    worker.start()
    worker.join()
    assert list(made[0]) == ["auto"]


def test_a_log_is_cut_where_the_run_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(json.dumps({"job": "a", "step": s, "loss": 1.0}) + "\n" for s in (1, 5, 9)) + '{"job": "a", "st'
    )
    journal = Journal(path, upto=5)
    journal.add({"job": "a", "step": 9, "loss": float("nan")})
    journal.close()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1.0), (5, 1.0), (9, None)]
    assert list(curve(path).columns) == ["job", "step", "loss"]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ArtefactError, match="damaged at line 1"):
        rows(path)


def test_a_sweep_is_every_combination():
    jobs = sweep(CONFIG, ["a"], grid={"k": ["2", "3"], "d_dict": [48, 96], "lr": ["1e-3"]})
    assert [(j.config.k, j.config.d_dict, j.config.lr) for j in jobs] == [
        (2, 48, 1e-3),
        (2, 96, 1e-3),
        (3, 48, 1e-3),
        (3, 96, 1e-3),
    ]
    assert jobs[0].name == "a-topk-d_dict=48-k=2-lr=0.001" and len({j.name for j in jobs}) == 4
    layers = sweep(CONFIG, ["a"], grid={"site": ["a", "b"]})
    assert [j.reads for j in layers] == [("a",), ("b",)]
    assert job_name(["gate.3", "up.3"], ["mlp_out.3"], CONFIG) == "gate.3+up.3-to-mlp_out.3-topk-d_dict=48-k=3"
    check_jobs([*jobs, *layers])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sweep(CONFIG, ["a"], grid={"kk": [1]}), "unknown field to sweep 'kk'"),
        (lambda: sweep(CONFIG, ["a"], grid={"k": []}), "the sweep over k has no values"),
        (lambda: sweep(CONFIG, ["a"], grid={"k": [2, 2]}), "names a value twice"),
        (lambda: sweep(CONFIG, ["a"], grid={"k": ["x"]}), "k"),
        (lambda: sweep(CONFIG, ["a"], ["b"], grid={"site": ["a"]}), "is for autoencoders"),
        (lambda: Job(name="../x", config=CONFIG, reads=("a",)), "names a folder"),
        (lambda: Job(name="x", config=CONFIG, reads=()), "reads no site"),
        (lambda: check_jobs([]), "no job"),
        (lambda: check_jobs([*ONE, *ONE]), "names must differ"),
        (
            lambda: check_jobs([*ONE, Job(name="x", config=replace(CONFIG, batch_size=8), reads=("a",))]),
            "one batch_size",
        ),
        (lambda: RunConfig(save_every=0), "must be at least 1"),
    ],
)  # fmt: skip
def test_bad_jobs_are_named(call, message):
    with pytest.raises(InterpError, match=message):
        call()


def test_a_checkpoint_keeps_the_layout_of_memory(tmp_path):
    """Encoders are stored transposed; the moments come back with the strides that the fused optimiser walks along."""
    train(ONE, Planted(), tmp_path / "run", SAFE)
    found = latest(tmp_path / "run" / "checkpoints", Team())
    tensors = checkpoint.read(found, Team())
    assert tensors["auto/weights/W_enc"].shape == (48, D_A)
    assert tensors["auto/optimiser/W_enc/exp_avg"].shape == (48, D_A)
    saved = load(tmp_path / "run" / "dictionaries" / "auto").dictionary
    assert torch.equal(tensors["auto/weights/W_enc"], saved.W_enc.t())
    assert found.step == 24 and found.facts["source"] == {"number": 24} and isinstance(found.path, Path)


def test_a_relu_crosscoder_has_the_penalty_of_its_blocks_also_after_a_resume(tmp_path):
    """sum_i f_i sum_b |d_i^b|, as `train_crosscoder` has it; that of the stacked rows is another."""
    cfg = TrainConfig(kind="relu", d_dict=32, n_steps=12, batch_size=BATCH, sparsity_warmup_fraction=0.0)
    job, short = Job(name="both", config=cfg, reads=("a", "b")), RunConfig(save_every=5, n_sample=256)
    source = Planted()
    sample = job.x(source.sample(256))
    stream = (job.x(source.next()) for _ in range(cfg.n_steps))
    wanted = train_crosscoder(stream, sample, cfg, {"a": D_A, "b": D_B}).crosscoder.dictionary
    stacked = Stepper(job.start(Planted().sample(256)), cfg)
    source = Planted()
    for number in range(cfg.n_steps):
        stacked.step(number, job.x(source.next()))
    whole = load(train([job], Planted(), tmp_path / "whole", short)["both"]).dictionary
    with pytest.raises(KeyboardInterrupt):
        train([job], Planted(), tmp_path / "run", short, watchers=[_interrupt_at(7)])
    resumed = load(train([job], Planted(), tmp_path / "run", short, resume=True)["both"]).dictionary
    for name, value in wanted.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value) and torch.equal(resumed.state_dict()[name], value), name
    assert not torch.allclose(stacked.sae.W_enc, wanted.W_enc)


def _interrupt_at(step: int):
    def watch(tick: Tick) -> None:
        if tick.done == step:
            raise KeyboardInterrupt

    return watch
