"""Hook names of other libraries and sites, both ways, as far as they are the same point without looking at a model.

TransformerLens: `blocks.10.hook_resid_post`. sparsify: the module path, `layers.10.mlp`; an autoencoder reads what the
module returns, a transcoder what it takes. circuit-tracer: the part of a TransformerLens name after `blocks.10.`. A
name without a counterpart is kept as it is: `model.table.one` may still know it.
"""

from __future__ import annotations

import re
from collections import Counter

from interp.core.errors import SiteError
from interp.core.sites import Site
from interp.core.vocabulary import PARTS, Part

_COUNTS = Counter(info.lens for info in PARTS.values() if info.lens)
LENS = {info.lens: part for part, info in PARTS.items() if info.lens and _COUNTS[info.lens] == 1}
"""TransformerLens pattern -> part; names that two parts share (gated and ungated MLPs) are left out."""
LENS_INPUT = {"blocks.{layer}.mlp.hook_in": Part.MLP_IN, "blocks.{layer}.ln2.hook_normalized": None}
"""`ln2.hook_normalized` lacks the norm's gain unless that was folded, so it is not `mlp_in` of every model."""
MODULES = (
    (re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)"), Part.RESID_POST, Part.RESID_PRE),
    (re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(?:mlp|feed_forward)"), Part.MLP_OUT, Part.MLP_IN),
    (re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(?:self_attn|attn|attention)"), Part.ATTN_OUT, Part.ATTN_IN),
)
"""Module path -> what the module returns, and what it takes."""


def site_of_lens(name: str | None) -> str | None:
    """The site of a TransformerLens name, or the name itself where it has no counterpart."""
    if not name:
        return None
    for pattern, part in LENS.items():
        found = re.fullmatch(re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)"), name)
        if found:
            return str(Site(part, int(found[1]) if found.groups() else None))
    for pattern, part in LENS_INPUT.items():
        found = re.fullmatch(re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)"), name)
        if found and part is not None:
            return str(Site(part, int(found[1])))
    return name


def lens_of_site(site: object) -> str | None:
    """The TransformerLens name of a site, or the text itself; None for several sites side by side, a list."""
    if not isinstance(site, str):
        return None
    parsed = parse(site)
    if parsed is None or parsed.path is not None:
        return site
    pattern = parsed.info.lens or next((name for name, part in LENS_INPUT.items() if part is parsed.part), None)
    return pattern.format(layer=parsed.layer) if pattern else site


def site_of_module(path: str, *, takes: bool = False) -> str:
    """The site of what a module returns, or takes; the module path itself where it has no counterpart."""
    for pattern, out, into in MODULES:
        found = pattern.fullmatch(path)
        if found:
            return str(Site(into if takes else out, int(found[1])))
    return f"{path}@input" if takes else path


def module_of_site(site: object) -> str | None:
    """The hookpoint of sparsify for a site: `layers.10`, `layers.10.mlp`; None where there is none."""
    parsed = parse(site)
    if parsed is None or parsed.layer is None or parsed.path is not None:
        return None
    ends = {
        Part.RESID_POST: "", Part.MLP_OUT: ".mlp", Part.MLP_IN: ".mlp", Part.ATTN_OUT: ".self_attn",
        Part.ATTN_IN: ".self_attn",
    }  # fmt: skip
    return None if parsed.part not in ends else f"layers.{parsed.layer}{ends[parsed.part]}"


def parse(site: object) -> Site | None:
    """A site from its canonical text `part.layer`; None for anything else."""
    if not isinstance(site, str) or not site:
        return None
    name, _, layer = site.partition(".")
    if name not in set(Part) or (layer and not layer.isdecimal()):
        return None
    try:
        return Site(Part(name), int(layer) if layer else None)
    except SiteError:
        return None
