"""Is this dictionary what its files say, for this model, at this site, used as it was trained?

`certify` measures a dictionary when it is trained; the numbers are saved with it. `check` measures it again on a small
sample of text, and where the numbers do not fit looks for the mistake that explains them:

wrong-model            other weights than those it was trained on, or a model without the site or its width
wrong-layer            the layer above or below is reconstructed better
wrong-site             another point of the model is
missing-normalisation, normalised-twice, relu-for-topk, transposed, unfolded-norms    `health_variants`
changed                a number differs from the certificate's
does-not-fit           it reconstructs no better than the mean, or far worse than certified, and nothing explains it
weak                   PCA with as many components as active latents does better
no-certificate         nothing to compare with; judged by plausibility and by what else would fit
Severity `refuse` means: do not use it as it is. Every number is measured on tokens that count (`health_sample`).
Beware: neighbouring layers of a residual stream are much alike. A dictionary that fits its own layer hardly better than
the next is only warned about.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from interp.core.errors import ArtefactError, InterpError, SiteError
from interp.dictionaries.base import rows
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.orientation import fvu
from interp.dictionaries.formats.plain import Hints
from interp.dictionaries.formats.table import load_dictionary
from interp.dictionaries.health_certificate import BLOCK, certify, identity, wide
from interp.dictionaries.health_findings import (
    L0_APART,
    Finding,
    Severity,
    apart,
    by_certificate,
    by_gains,
    by_identity,
    by_pca,
    does_not_fit,
    limit,
    no_certificate,
)
from interp.dictionaries.health_sample import (
    HealthText,
    Place,
    Sampled,
    along_the_depth,
    next_to,
    place_of,
    read_text,
    same_point,
    sample,
    text_of,
)
from interp.dictionaries.health_variants import regained, variants
from interp.dictionaries.metrics import evaluate
from interp.dictionaries.saved import SavedDictionary
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

EXPLAINS = 0.9
"""Another reading explains a bad fit if it has less than this share of its FVU ..."""
HINTS = 0.97
"""... and is worth a warning below this one."""
DENSER = 1.5
"""A reading with more active latents than this, relative to now, reconstructs better for that reason alone."""
RESTORED = 1.25
"""A reading restores the certificate's L0 within this factor."""
PLAUSIBLE = 0.7
"""Gains fitted to the data help any dictionary; only with an FVU below this one, and half of what it was, do they say
that norms were lost."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a check found."""

    findings: tuple[Finding, ...]
    measured: Mapping[str, Any]
    """The same numbers as in a certificate, measured now."""

    @property
    def healthy(self) -> bool:
        """Nothing speaks against using it."""
        return not any(finding.severity == "refuse" for finding in self.findings)


@torch.no_grad()
def check(
    saved: SavedDictionary,
    model: LoadedModel,
    record: TokenRecord | None = None,
    *,
    site: str | None = None,
    target: str | None = None,
    text: HealthText | None = None,
) -> Health:
    """Measure a dictionary on a model. By default at the site that the files name, and on the certificate's text, or
    on the default one where that cannot be read here.

    Raises InterpError where no site is known, or several side by side.
    """
    dictionary = wide(saved.dictionary)
    certificate = saved.certificate or {}
    asked, known_hash = text_of(saved.certificate)
    wanted = (site or _site(saved), target or (None if site else _site(saved, "target_site")))
    try:
        place = place_of(model, *wanted)
    except SiteError as error:
        return _refused("wrong-model", f"{model.source} has no {wanted[0]}: {error}")
    if record is None and text is None:
        record, asked = _own_text(model, asked)
    record = read_text(model, text or asked) if record is None else record
    drop_norm = (text or asked).drop_norm
    data = sample(model, record, [place], drop_norm)[place]
    widths = (data.x.shape[1], data.y.shape[1])
    if widths != (dictionary.d_in, dictionary.d_out):
        sizes = f"{place} of {model.source} is {widths[0]} to {widths[1]} wide"
        return _refused("wrong-model", f"{sizes}, the dictionary {dictionary.d_in} to {dictionary.d_out}")
    measured = certify(dictionary, data.x.to(dictionary.W_dec), data.y, about=identity(model, place))
    highest = limit(certificate, same_text=known_hash == record.hash)
    fits = measured["fvu"] <= highest
    findings = [*by_certificate(certificate, measured), *([] if certificate else [no_certificate()])]
    gains = by_gains(certificate, measured)
    refused = any(finding.severity == "refuse" for finding in findings)
    sparse = not apart(certificate.get("l0"), measured["l0"], L0_APART)
    if not refused and (gains or not fits or not sparse or not certificate):
        findings += _explained(dictionary, model, record, place, data, measured, saved, drop_norm)
    refused = any(finding.severity == "refuse" for finding in findings)
    if all(finding.code not in ("transposed", "unfolded-norms") for finding in findings):
        findings += gains
    if not fits and not gains and not refused:
        findings.append(does_not_fit(measured, certificate, highest))
    findings += by_identity(saved, model, place, measured, fits=fits and not gains and not refused)
    if dictionary.d_in == dictionary.d_out and place.site == place.target:
        findings += by_pca(data.x, measured)
    return Health(findings=tuple(findings), measured=measured)


def load_healthy(
    path: Path | str,
    model: LoadedModel,
    *,
    hints: Hints | None = None,
    site: str | None = None,
    target: str | None = None,
    text: HealthText | None = None,
) -> SavedDictionary:
    """Load a dictionary for use on a model. Raises ArtefactError for one that `check` refuses; warns as it warns."""
    saved = load_dictionary(path, hints=hints)
    found = check(saved, model, site=site, target=target, text=text)
    refused = [finding.message for finding in found.findings if finding.severity == "refuse"]
    if refused:
        raise ArtefactError(f"{path} is not to be used on {model.source} as it is: {'; '.join(refused)}")
    for finding in found.findings:
        if finding.severity == "warn":
            warnings.warn(f"{path}: {finding.message}", stacklevel=2)
    return saved


def _explained(
    dictionary: SparseDictionary,
    model: LoadedModel,
    record: TokenRecord,
    place: Place,
    data: Sampled,
    measured: Mapping[str, Any],
    saved: SavedDictionary,
    drop_norm: float,
) -> list[Finding]:
    """The mistake that explains the measured fit best, if one does."""
    certificate = saved.certificate or {}
    now = _Reading(float(measured["fvu"]), float(measured["l0"]), "", "")
    x, y = data.x.to(dictionary.W_dec), data.y.to(dictionary.W_dec)
    found = [
        _reading(variant.dictionary, x, y, variant.code, variant.text)
        for variant in variants(dictionary, x, y, now.l0, saved.certificate)
    ]
    found += _elsewhere(dictionary, model, record, place, next_to(model, place), saved, drop_norm)
    if _best(found, now, certificate) is None:
        half = len(x) // 2
        other = regained(dictionary, x[:half], y[:half])
        if other is not None:  # judged on tokens that it was not fitted to
            after = _reading(other.dictionary, x[half:], y[half:], other.code, other.text)
            before = fvu(dictionary, x[half:], y[half:])
            found += [after] if after.fvu < min(before / 2, PLAUSIBLE) else []
    if _best(found, now, certificate) is None and now.fvu > limit(certificate, same_text=False):
        far = along_the_depth(model, place)
        found += _elsewhere(dictionary, model, record, place, far, saved, drop_norm)
    best = _best(found, now, certificate)
    severity: Severity = "refuse"
    if best is None:
        best = min(found, key=lambda reading: reading.fvu, default=now)
        severity = "warn"
        if best.fvu > min(HINTS * now.fvu, 1.0) or best.l0 > DENSER * now.l0:
            return []
    numbers = f"FVU {best.fvu:.3f} and L0 {best.l0:.1f} instead of {now.fvu:.3f} and {now.l0:.1f} at {place}"
    return [Finding(code=best.code, severity=severity, message=f"{best.text}; {numbers}")]


class _Reading(NamedTuple):
    """How well one reading does."""

    fvu: float
    l0: float
    code: str
    text: str


def _reading(dictionary: SparseDictionary, x: Tensor, y: Tensor, code: str, text: str) -> _Reading:
    found = evaluate(dictionary, zip(rows(x, BLOCK), rows(y, BLOCK), strict=True))
    return _Reading(found.fvu, found.l0, code, text)


def _best(found: Sequence[_Reading], now: _Reading, certificate: Mapping[str, Any]) -> _Reading | None:
    """The reading that explains: one that restores the certificate's numbers, else one that does clearly better."""
    restored = [
        reading for reading in found
        if "l0" in certificate and reading.fvu <= limit(certificate, same_text=False)
        and not apart(certificate["l0"], reading.l0, RESTORED)
    ]  # fmt: skip
    if restored and (now.fvu > min(restored).fvu / EXPLAINS or apart(certificate["l0"], now.l0, L0_APART)):
        return min(restored)
    better = [
        reading for reading in found
        if reading.fvu <= min(EXPLAINS * now.fvu, 1.0) and reading.l0 <= DENSER * now.l0
    ]  # fmt: skip
    return min(better, default=None)


def _elsewhere(
    dictionary: SparseDictionary,
    model: LoadedModel,
    record: TokenRecord,
    place: Place,
    others: Sequence[Place],
    saved: SavedDictionary,
    drop_norm: float,
) -> list[_Reading]:
    """How it does at other places of the same widths, with the finding that each would be."""
    named = saved.certificate or {}
    if named.get("site"):
        with suppress(SiteError):
            others = [*others, place_of(model, named["site"], named.get("target_site"))]
    own = same_point(place)
    others = [other for other in dict.fromkeys(same_point(other) for other in others) if other != own]
    found: list[_Reading] = []
    for other, data in sample(model, record, others, drop_norm).items() if others else ():
        if (data.x.shape[1], data.y.shape[1]) != (dictionary.d_in, dictionary.d_out):
            continue
        x, y = data.x.to(dictionary.W_dec), data.y.to(dictionary.W_dec)
        step = (other.site.layer or 0) - (own.site.layer or 0)
        parts = (other.site.part, other.target.part) == (own.site.part, own.target.part)
        code = "wrong-layer" if parts and abs(step) == 1 else "wrong-site"
        text = f"it fits {other} better" + (", one layer off" if code == "wrong-layer" else "")
        found.append(_reading(dictionary, x, y, code, text))
    return found


def _own_text(model: LoadedModel, asked: HealthText) -> tuple[TokenRecord, HealthText]:
    """The certificate's text, unless it is a file that is not here, or too short for this tokenizer."""
    try:
        return read_text(model, asked), asked
    except InterpError:
        asked = HealthText(drop_norm=asked.drop_norm)
        return read_text(model, asked), asked


def _refused(code: str, message: str) -> Health:
    return Health(findings=(Finding(code=code, severity="refuse", message=message),), measured={})


def _site(saved: SavedDictionary, name: str = "site") -> str | None:
    value = saved.about.get(name)
    if isinstance(value, list):
        raise InterpError(
            f"it reads or writes several sites side by side ({', '.join(map(str, cast('list[Any]', value)))}); only "
            "dictionaries of one site, or from one site to another, can be checked on a model"
        )
    return str(value) if value else None
