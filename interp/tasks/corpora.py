"""Corpora: real text that is on every machine, or the user's own, as token sequences that everybody gets alike.

`docs:TOPIC` and `docs` are Python's own language reference (`pydoc_data.topics`, part of the standard library),
`docstrings:PACKAGE` the docstrings of an installed package (read from its source, which is not run), `file:PATH` a
text file; `corpora_files` has the user's collections of documents (JSON lines, Parquet, datasets, folders). For
`load_corpus` the text is tokenised once, without special tokens, and cut from the start into sequences of equal length,
so a corpus depends on the tokenizer and, for the first three, on the version of Python or of the package: results
carry the hash of the ids.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from interp.core.errors import InterpError, MissingPackageError, unknown
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel
from interp.models.quiet import quiet
from interp.tasks.corpora_files import FILE_KINDS, read_documents, read_text

KINDS = ("docs", "docs:TOPIC", "docstrings:PACKAGE", "file:PATH", *FILE_KINDS)


def load_corpus(
    model: LoadedModel, name: str = "docs:assignment", n_sequences: int = 6, length: int = 128, skip: int = 0
) -> TokenRecord:
    """`n_sequences` x `length` tokens of a corpus, contiguous, after leaving out the first `skip` sequences."""
    if n_sequences < 1 or length < 1 or skip < 0:
        raise InterpError(f"n_sequences={n_sequences} and length={length} must be at least 1, skip={skip} at least 0")
    if model.tokenizer is None:
        raise InterpError(f"{model.source} has no tokenizer; load it with load(..., tokenizer=...)")
    ids = _stream(model, corpus_text(name))
    available = len(ids) // length
    if available < skip + n_sequences:
        asked = f"{n_sequences} after skipping {skip}" if skip else f"{n_sequences}"
        raise InterpError(f"{name!r} gives {available} sequences of {length} tokens, asked for {asked}; ask for fewer")
    start = skip * length
    record = from_ids(model, torch.tensor(ids[start : start + n_sequences * length]).view(n_sequences, length))
    return replace(record, notes=())  # a chunk from the middle of a text has no start token, and is not meant to


def corpus_text(name: str) -> str:
    """The text of a corpus, its documents with an empty line between them; never empty."""
    return "\n\n".join(corpus_documents(name))


def corpus_documents(name: str) -> Iterator[str]:
    """The documents of a corpus, read as they are asked for; none is empty, and there is at least one."""
    kind, _, rest = name.partition(":")
    found: Iterable[str]
    if kind == "docs":
        found = _docs(rest)
    elif kind == "docstrings" and rest:
        found = _docstrings(rest)
    elif kind == "file" and rest:
        found = [read_text(Path(rest).expanduser())]
    elif kind in [known.partition(":")[0] for known in FILE_KINDS] and rest:
        found = read_documents(name)
    else:
        raise unknown("corpus", name, KINDS)
    kept = (text for text in found if text.strip())
    first = next(kept, None)
    if first is None:
        raise InterpError(f"the corpus {name!r} is empty")
    return chain([first], kept)


def token_ids(
    model: LoadedModel, documents: Iterable[str], *, enough: int | None = None, longest: int | None = None
) -> list[list[int]]:
    """Ids of each document, without special tokens; those of which nothing is left are left out.

    enough: read no more documents once there are so many tokens, of each document at most the first `longest` counted.
    """
    if model.tokenizer is None:
        raise InterpError(f"{model.source} has no tokenizer; load it with load(..., tokenizer=...)")
    found: list[list[int]] = []
    n_tokens = 0
    for text in documents:
        if ids := _stream(model, text):
            found.append(ids)
            n_tokens += len(ids) if longest is None else min(len(ids), longest)
        if enough is not None and n_tokens >= enough:
            break
    return found


def _stream(model: LoadedModel, text: str) -> list[int]:
    with quiet():  # a tokenizer warns about texts longer than the model's context, which these are by design
        return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


@cache
def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingPackageError(
            "this Python comes without pydoc_data (some minimal installations leave it out); "
            "use docstrings:torch or file:PATH"
        ) from error
    return topics


def _docs(topic: str) -> list[str]:
    topics = _topics()
    if not topic:
        return [topics[key] for key in sorted(topics)]
    if topic not in topics:
        raise unknown("topic", topic, topics)
    return [topics[topic]]


def _docstrings(package: str) -> list[str]:
    """Docstrings of every module, class and function of a package, in the order of file names and lines."""
    try:
        spec = find_spec(package)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None:
        raise MissingPackageError(f"no package {package!r} is installed to take docstrings from")
    roots = [Path(place) for place in spec.submodule_search_locations or []]
    files = sorted(path for root in roots for path in root.rglob("*.py"))
    if not files and spec.origin and spec.origin.endswith(".py"):
        files = [Path(spec.origin)]
    return [text for path in files for text in _docstrings_of(path)]


def _docstrings_of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []  # a template or a test file that is not meant to be Python
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]
