"""Vector files: exact round trip, the wrong model, damage, a full disk; and the edit they give."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interp.core.errors import ArtefactError, InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import edited
from interp.instrument.tokens import from_ids, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.steering.vectors import SteeringVector, extract, load_vector
from interp.tasks.sentiment import sentiment_pairs


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def vector(model: LoadedModel) -> SteeringVector:
    neutral = from_ids(model, torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0)))
    return extract(model, sentiment_pairs(8, 4), 1, neutral=neutral, sign="positive sentiment")


def test_round_trip_is_exact(model: LoadedModel, vector: SteeringVector, tmp_path: Path) -> None:
    again = load_vector(vector.save(tmp_path / "sub" / "v.safetensors"), model)
    assert torch.equal(again.vector, vector.vector)
    assert replace(again, vector=vector.vector).__dict__ == vector.__dict__
    assert again.site == "resid_post.1" and again.weight_hash == model.weight_hash
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["v.safetensors"]


def test_scale_is_strength_times_norm(vector: SteeringVector) -> None:
    torch.testing.assert_close(vector.scaled(0.5).norm(), torch.tensor(0.5 * vector.norm))
    torch.testing.assert_close(vector.scaled(), vector.scaled(vector.strength))
    torch.testing.assert_close(vector.scaled(-1.0), -vector.scaled(1.0))


def test_another_model_is_an_error_a_warning_or_nothing(vector: SteeringVector) -> None:
    other = tiny_model("llama", seed=1)
    with pytest.raises(InterpError, match="on_mismatch='warn'"):
        vector.check(other)
    with pytest.warns(UserWarning, match="its effect is not what was measured"):
        vector.check(other, "warn")
    vector.check(other, "ignore")
    with pytest.raises(InterpError, match="d_model=16"):
        vector.check(tiny_model("llama", d_model=16), "ignore")
    with pytest.raises(InterpError, match="layers with resid_post: 0"):
        vector.check(tiny_model("llama", n_layers=1), "ignore")


def test_damaged_foreign_and_missing_files_are_named(vector: SteeringVector, tmp_path: Path) -> None:
    path = vector.save(tmp_path / "v.safetensors")
    cut, foreign, text = (tmp_path / name for name in ("cut", "foreign", "text"))
    cut.write_bytes(path.read_bytes()[:-8])
    save_file({"vector": torch.ones(3)}, foreign)
    text.write_text("not a file of ours")
    for bad in (cut, foreign, text):
        with pytest.raises(ArtefactError, match="damaged or not a steering vector"):
            load_vector(bad)
    with pytest.raises(ArtefactError, match="no steering vector at"):
        load_vector(tmp_path / "absent")
    with pytest.raises(InterpError, match="finite"):
        replace(vector, vector=vector.vector * float("nan"))


def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(
    vector: SteeringVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = vector.save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def full(_tensors: object, draft: Path, **_: object) -> None:
        draft.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("interp.steering.vectors.save_file", full)
    with pytest.raises(ArtefactError, match="No space left"):
        vector.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_steered_from_the_second_token_on(
    model: LoadedModel, vector: SteeringVector, use_cache: bool
) -> None:
    record = tokenize(model, ["abcd", "xy"], pad="left")
    sites = [vector.site]
    with capture(model, sites) as plain:
        model(record)
    with edited(model, vector.edit(model, 1.0, record=record)), capture(model, sites) as acts:
        out = model.generate(record, n_new=3, use_cache=use_cache)
    assert out.shape == (2, 7)
    moved = acts[vector.site][:, :4] - plain[vector.site]
    expected = torch.zeros_like(moved)
    expected[0, 1:], expected[1, 3:] = vector.scaled(1.0), vector.scaled(1.0)
    torch.testing.assert_close(moved[record.mask], expected[record.mask], rtol=1e-3, atol=1e-3)
    with capture(model, sites) as bare, edited(model, vector.edit(model, 0.0)):
        model(out, attention_mask=torch.cat([record.mask, torch.ones(2, 3, dtype=torch.bool)], dim=1))
    new = acts[vector.site][:, 4:6] - bare[vector.site][:, 4:6]
    assert (new.norm(dim=-1) > 0.1 * vector.norm).all()


def test_without_a_record_only_the_first_column_is_left_alone(model: LoadedModel, vector: SteeringVector) -> None:
    ids = tokenize(model, "abcd").ids
    with capture(model, vector.site) as plain:
        model(ids)
    with edited(model, vector.edit(model, 2.0)), capture(model, vector.site) as acts:
        model(ids)
    moved = (acts[vector.site] - plain[vector.site])[0]
    assert torch.equal(moved[0], torch.zeros_like(moved[0]))
    torch.testing.assert_close(moved[1:], vector.scaled(2.0).expand(3, -1), rtol=1e-3, atol=1e-3)
