"""Damage to a store is named, by opening it and by the audit; what went wrong while writing leaves nothing to trust."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from interp.core.errors import ArtefactError, InterpError
from interp.instrument import store_folders
from interp.instrument.shards import MANIFEST, PLAN
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.store_audit import audit
from interp.instrument.store_folders import LocalFolder
from interp.instrument.store_writer import ShardWriter, as_json, sha256
from interp.instrument.tokens import TokenRecord, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks.corpora_inputs import InputBatches

SITES = ["resid_post.1", "neurons.0"]
CONFIG = StoreConfig(dtype="float32", rows_per_forward=1, shard_tokens=1)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def record(model: LoadedModel) -> TokenRecord:
    return tokenize(model, ["hello there, you", "a", "gated units", "mmm", "the last of five"], pad="right")


@pytest.fixture(scope="module")
def written(model: LoadedModel, record: TokenRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = ActivationStore.write(model, record, SITES, tmp_path_factory.mktemp("whole"), CONFIG).folder.local
    assert path is not None
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / written.name)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replan(path: Path, **changes: object) -> None:
    """Changed by somebody who knows of the checksum."""
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"} | changes
    path.write_bytes(as_json({**content, "checksum": sha256([as_json(content)])}))


def move_away(path: Path) -> None:
    """The same bytes, elsewhere."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def move_rows(path: Path) -> None:
    """The second shard's rows get other numbers: `tokens()` would name other texts."""
    shards = json.loads(path.read_text())["shards"]
    shards[1]["row_offset"] += 1
    rewrite(path, shards=shards)


def flip(path: Path, at: int = -3) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


SHARD = "shard-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda f: (f / SHARD).write_bytes(b"1234"), "truncated"),
        (lambda f: flip(f / SHARD), f"{SHARD} does not match its checksum"),
        (lambda f: flip(f / "statistics.safetensors"), "statistics.safetensors does not match its checksum"),
        (lambda f: [(f / name).unlink() for name in (MANIFEST, PLAN)], "is not an activation store"),
        (lambda f: (f / MANIFEST).unlink(), "is unfinished: 5 of 5 shards; run the same capture again"),
        (lambda f: [(f / name).unlink() for name in (MANIFEST, SHARD)], "is unfinished: 4 of 5 shards"),
        (lambda f: (f / MANIFEST).write_text("{"), "damaged or foreign"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "damaged or foreign"),
        (lambda f: (f / MANIFEST).write_text('{"format": 1}'), "not the manifest of an activation store"),
        (lambda f: rewrite(f / MANIFEST, version=1), "has version 1, this release reads 2"),
        (lambda f: rewrite(f / MANIFEST, tokens=1), "contradicts itself"),
        (lambda f: rewrite(f / MANIFEST, dtype="int4"), "contradicts itself"),
        (lambda f: rewrite(f / MANIFEST, columns="row"), "damaged or foreign"),
        (
            lambda f: rewrite(
                f / MANIFEST,
                tokens=1,
                shards=[{"file": "../x.safetensors", "tokens": 1, "bytes": 1, "sha256": "", "row_offset": 0}],
            ),
            "names a shard outside its folder",
        ),
    ],
)
def test_damage_is_named_when_the_store_is_opened_and_found_by_the_audit(folder, damage, message):
    assert audit(folder) == []
    damage(folder)
    with pytest.raises(ArtefactError, match=message):
        ActivationStore.open(folder, verify=True)
    assert audit(folder)


def test_a_shard_with_a_foreign_header_is_named(folder):
    path = folder / "shard-00000.safetensors"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(ArtefactError, match="is damaged"):
        ActivationStore.open(folder).norms("neurons.0")


def test_a_manifest_that_tells_another_shape_is_refused_when_rows_are_read(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    rewrite(folder / MANIFEST, sites=manifest["sites"] | {"neurons.0": [2]})
    with pytest.raises(ArtefactError, match=r"neurons\.0 is not as the manifest says"):
        ActivationStore.open(folder).norms("neurons.0")
    assert any("holds neurons.0 of shape" in finding.problem for finding in audit(folder))


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (lambda f: os.truncate(f / SHARD, 5000), SHARD, "it is truncated"),
        (lambda f: (f / SHARD).open("ab").write(b"x"), SHARD, "it is too long"),
        (lambda f: flip(f / SHARD, 4096), SHARD, "does not match its checksum"),
        (lambda f: flip(f / SHARD, 40), SHARD, "does not match its checksum"),
        (lambda f: (f / SHARD).unlink(), SHARD, "is missing"),
        (lambda f: rewrite(f / "shard-00001.json", sha256="0" * 64), "shard-00001.json", "does not match the manifest"),
        (lambda f: (f / "shard-00001.json").unlink(), "shard-00001.json", "is missing"),
        (lambda f: (f / "model.pt").write_bytes(b""), "model.pt", "may be a pickle"),
        (lambda f: (f / "x.pkl").write_bytes(b""), "x.pkl", "may be a pickle"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin", "may be a pickle"),
        (lambda f: (f / "notes.txt").write_bytes(b""), "notes.txt", "does not belong"),
        (lambda f: (f / "shard-00009.safetensors").write_bytes(b""), "shard-00009.safetensors", "does not belong"),
        (lambda f: (f / ".lock-3").write_bytes(b""), ".lock-3", "left by a capture that was killed"),
        (lambda f: rewrite(f / PLAN, cut="2 rows per forward"), PLAN, "was changed after it was written"),
        (lambda f: replan(f / PLAN, key="other"), MANIFEST, "does not match plan.json"),
        (lambda f: move_away(f / SHARD), SHARD, "is a link to"),
        (lambda f: move_away(f / MANIFEST), MANIFEST, "is a link to"),
        (lambda f: rewrite(f / MANIFEST, relative_error={}), MANIFEST, "was changed after it was written"),
        (lambda f: move_rows(f / MANIFEST), MANIFEST, "was changed after it was written"),
        (lambda f: (f / PLAN).write_text("{}"), PLAN, "is not valid"),
    ],
)
def test_the_audit_finds_one_thing_and_names_its_file(folder, damage, file, problem):
    damage(folder)
    (finding,) = audit(folder)
    assert finding.file == file and problem in finding.problem and str(finding).startswith(file)


def test_pickles_in_folders_below_are_named(folder):
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / "more" / "deep" / "A.PT").write_bytes(b"")
    (folder / "more" / "b.pkl").write_bytes(b"")
    assert {f.file for f in audit(folder) if "pickle" in f.problem} == {"more/deep/A.PT", "more/b.pkl"}


def test_a_changed_plan_of_an_unfinished_store_is_not_gone_on_with(folder, model, record):
    (folder / MANIFEST).unlink()
    rewrite(folder / PLAN, batches_per_shard=2)
    with pytest.raises(ArtefactError, match="was changed after it was written"):
        ActivationStore.write(model, record, SITES, folder.parent, CONFIG)


# Hooks of others.


def scale_output(_module, _args, output):
    return output * 2


def scale_in_place(_module, args):
    args[0].mul_(2)


def scale_input(_module, args):
    return (args[0] * 2,)


@pytest.mark.parametrize("hook", [scale_output, scale_in_place, scale_input])
@pytest.mark.parametrize("finished", [False, True])
def test_a_users_hook_that_changes_an_activation_is_refused(model, record, written, tmp_path, hook, finished):
    place = written.parent if finished else tmp_path
    layer = model.layers[1].mlp.down_proj
    add = layer.register_forward_hook if hook is scale_output else layer.register_forward_pre_hook
    with (
        add(hook),
        pytest.raises(InterpError, match=rf"a hook of yours on model.layers.1.mlp.down_proj \({hook.__name__}"),
    ):
        ActivationStore.write(model, record, SITES, place, CONFIG)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert_same(ActivationStore.write(model, record, SITES, tmp_path, CONFIG).folder.local, written)


def test_a_users_hook_that_looks_is_let_alone(model, record, written, tmp_path):
    seen, layer = [], model.layers[1].mlp
    with (
        layer.register_forward_hook(lambda _m, args, kwargs, output: seen.append(1) or output, with_kwargs=True),
        layer.register_forward_pre_hook(lambda _m, args: seen.append(2) or args),
    ):
        hooks = dict(layer._forward_hooks)
        assert_same(ActivationStore.write(model, record, SITES, tmp_path, CONFIG).folder.local, written)
        assert dict(layer._forward_hooks) == hooks
    assert seen == [2, 1] * 5


def test_a_hook_of_torch_that_makes_a_weight_is_part_of_the_model(tmp_path):
    module = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(3, 3)).eval())
    items = InputBatches(n_items=4, item=lambda n: torch.ones(3) * n, rows_per_forward=2, content="x")
    assert len(ActivationStore.write(LoadedModel(module), items, "0", tmp_path, CONFIG)) == 4


def test_the_audit_tells_a_store_in_the_making_from_a_damaged_one(folder, tmp_path):
    (folder / MANIFEST).unlink()
    (folder / "statistics.safetensors").unlink()
    (folder / "shard-00003.json").unlink()
    (finding,) = audit(folder)
    assert "unfinished, 4 of 5 shards" in finding.problem
    flip(folder / SHARD)
    assert [f.file for f in audit(folder)] == [MANIFEST, SHARD]
    assert "is missing" in audit(tmp_path / "nowhere")[0].problem
    (tmp_path / "empty").mkdir()
    assert [f.file for f in audit(tmp_path / "empty")] == [MANIFEST]


def test_what_a_complete_store_was_left_with_is_swept_by_the_next_capture(folder, model, record):
    (folder / ".lock-0").touch()
    (folder / ".shard-00000.safetensors.17.tmp").touch()
    assert len(audit(folder)) == 2
    ActivationStore.write(model, record, SITES, folder.parent, CONFIG)
    assert audit(folder) == []


# What goes wrong while writing.


@pytest.mark.parametrize("n_good", [0, 1, 3])
def test_a_failing_disk_is_one_error_and_the_shards_before_it_are_used_again(
    model, record, written, tmp_path, monkeypatch, n_good
):
    """The writer is one shard behind the model, so its slot is full when the error comes."""
    begin, begun = LocalFolder.begin, []

    def full(self, name, blocks):
        if name.endswith(".safetensors"):
            begun.append(name)
            if len(begun) > n_good:
                raise OSError(errno.ENOSPC, "No space left on device")
        return begin(self, name, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "begin", full)
        with pytest.raises(ArtefactError, match="No space left on device.*free space") as caught:
            ActivationStore.write(model, record, SITES, tmp_path, CONFIG)
    assert ("run the same capture again" in str(caught.value)) == (n_good > 0)
    left = sorted(path.name for path in (tmp_path / written.name).iterdir())
    assert left == sorted([PLAN, *(f"shard-0000{i}.{end}" for i in range(n_good) for end in ("json", "safetensors"))])
    calls = []
    with model.module.register_forward_pre_hook(lambda *_: calls.append(1)):
        ActivationStore.write(model, record, SITES, tmp_path, CONFIG)
    assert len(calls) == 5 - n_good
    assert_same(tmp_path / written.name, written)


def test_a_short_write_is_carried_on(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, block):
            return self.file.write(block[:7])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda *a, **k: Slow(opened(*a, **k)))
    LocalFolder(tmp_path).write("x", [b"0123456789", b"", b"abc"])
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"0123456789abc"


def test_an_error_of_the_writer_reaches_the_one_who_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(store_folders.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))

    def write(n_shards: int, error: type[Exception] | None) -> None:
        with ShardWriter(LocalFolder(tmp_path)) as writer:
            for number in range(n_shards):
                writer.submit(number, {"row": [torch.arange(3)]})
            if error:
                raise error

    for n_shards in (1, 2, 3, 9):
        with pytest.raises(OSError, match="I/O error"):
            write(n_shards, None)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError):
        write(1, KeyError)  # the caller's own error is not hidden by the writer's
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("a file system could not be mounted: " + done.stderr.decode())
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk(model, record, written, small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 100_000)
    with pytest.raises(ArtefactError, match="No space left on device"):
        ActivationStore.write(model, record, SITES, small_disk, CONFIG)
    assert not any(name.endswith(".tmp") for name in os.listdir(small_disk / written.name))
    for finding in audit(small_disk / written.name):
        assert finding.file in (MANIFEST, PLAN)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    ActivationStore.write(model, record, SITES, small_disk, CONFIG)
    assert_same(small_disk / written.name, written)


def test_a_read_only_disk(model, record, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ArtefactError, match="Read-only file system"):
        ActivationStore.write(model, record, SITES, small_disk, CONFIG)
    assert os.listdir(small_disk) == []


def test_a_file_where_a_folder_should_be_and_a_folder_of_somebody_else(model, record, written, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="Not a directory"):
        ActivationStore.write(model, record, SITES, tmp_path / "file", CONFIG)
    (tmp_path / written.name).mkdir()
    (tmp_path / written.name / "thesis.tex").write_text("")
    with pytest.raises(ArtefactError, match="is not an activation store; choose another folder"):
        ActivationStore.write(model, record, SITES, tmp_path, CONFIG)
    assert os.listdir(tmp_path / written.name) == ["thesis.tex"]


def test_permission_denied(model, record, tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal is the operating system's only for others."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(closed, os.W_OK):

        def refuse(self, *_, **__):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtefactError, match="Permission denied"):
        ActivationStore.write(model, record, SITES, closed, CONFIG)
    assert os.listdir(closed) == []


def assert_same(found: Path, expected: Path) -> None:
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
