"""Every Triton kernel compiles to machine code for real GPUs, none of which need be present: the interpreter that runs
the other tests accepts programs that the compiler refuses. Registers that spill to memory are counted as well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs_package("triton"), pytest.mark.slow]

PROGRAM = '''
import json, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from interp.kernels import group_top, sparse_decode, sparse_grad

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

def build(kernel, pointers, constants, arch, **options):
    """Spilled bytes, registers and shared memory of one variant; other arguments are int32 sizes and strides."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    # as at a launch: sizes and row strides are multiples of 16, the inner stride is 1
    unit = ("stride_xd", "stride_wd", "stride_gd", "stride_ik", "stride_vk", "stride_zm", "stride_b")
    ones = {n: 1 for n in names if n in unit}
    signature.update(dict.fromkeys(ones, "constexpr"))
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={**constants, **ones}, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"]); file.flush()
        text = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True).stdout
    usage = dict((k, int(v)) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\\d+)", text))
    tensor_cores = "wgmma" in built.asm["ptx"] or "mma.sync" in built.asm["ptx"]
    return usage | {"shared": built.metadata.shared, "mma": tensor_cores}

arch = int(sys.argv[1])
found = {}
longs = dict.fromkeys(("slots", "starts", "owner", "first", "count", "spill_row", "indices"), "*i64")
for name, dtype in TYPES.items():
    half = "*" + name
    tile = dict(group_top.TILES[dtype])
    options = {k: tile.pop(k) for k in ("num_warps", "num_stages")}
    encode = dict(x=half, W=half, b=half, kept="*fp32", places="*u8", dense="*fp32")
    for t, group, even in ((0, 1, True), (1, 64, True), (3, 64, True), (4, 16, True), (3, 32, False)):
        constants = dict(tile, GROUP=group, T=t, EVEN=even, WIDEN=False, BAND=8)
        found[f"encode {name} t={t} {even}"] = build(group_top._encode_kernel, encode, constants, arch, **options)
    others = {
        "select": (group_top._select_kernel, dict(z=half, kept="*fp32", places="*u8"),
                   dict(BM=8, BN=256, GROUP=64, T=3)),
        "decode": (sparse_decode._decode_kernel, dict(longs, values="*fp32", rows=half, out=half), dict(BLOCK=1024)),
        "values": (sparse_grad._values_kernel, dict(longs, grad=half, rows=half, out=half), dict(SLOTS=8, BLOCK=512)),
        "pieces": (sparse_grad._pieces_kernel, dict(longs, values="*fp32", grad=half, out="*fp32", spill="*fp32"),
                   dict(PIECE=256, BLOCK=1024)),
    }
    for kind, arguments in others.items():
        found[f"{kind} {name}"] = build(*arguments, arch)
found["gather"] = build(sparse_grad._gather_pieces_kernel, dict(longs, spill="*fp32", out="*fp32"),
                        dict(BLOCK=1024), arch)
print(json.dumps(found))
'''


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spilling(arch, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.replace("\\\\", "\\"), str(arch)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 19
    for name, usage in found.items():
        assert usage["STACK"] <= 16 and usage["LOCAL"] == 0, (name, usage)
        assert usage["shared"] <= (227 if arch == 90 else 163) * 1024, (name, usage)
        if name.startswith("encode") and "fp32" not in name:
            assert usage["mma"], (name, usage)  # on tensor cores
