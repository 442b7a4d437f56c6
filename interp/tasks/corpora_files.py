"""Documents from the user's own files: JSON lines, Parquet, datasets, folders of text.

    jsonl:PATH?field=text          one JSON object a line (also .gz)
    parquet:PATH?column=text       a file, or a folder of files in the order of their names
    dataset:PATH?column=text       a folder written by `datasets` (save_to_disk)
    dataset:NAME?split=train&take=1000&shuffle=7
                                   streamed by `datasets`, from the hub or its cache; nothing remote is run
    folder:PATH?glob=*.txt         every matching text file below a folder, in the order of their paths

Options after `?` are `key=value`, joined by `&`. `skip=N` and `take=N` choose documents in all of them; a streamed
dataset is shuffled only if `shuffle=SEED` is said (through a buffer of 10,000 documents).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from interp.core.errors import ArtefactError, InterpError, nearest, unknown

FILE_KINDS = (
    "jsonl:PATH?field=text",
    "parquet:PATH?column=text",
    "dataset:PATH_OR_NAME?column=text",
    "folder:PATH?glob=*.txt",
)
SHUFFLE_BUFFER = 10_000


def read_documents(name: str) -> Iterator[str]:
    """The documents a name stands for, read as they are asked for. Raises ArtefactError for files that are not what
    they should be, InterpError for options and fields that do not exist.
    """
    kind, _, rest = name.partition(":")
    place = rest.partition("?")[0]
    reader, known = _READERS[kind]
    options = read_options(name, (*known, "skip", "take"))
    skip, take = _count(options, "skip"), _count(options, "take")
    first = skip or 0
    return islice(reader(place, options), first, None if take is None else first + take)


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path} is not a UTF-8 text file") from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ArtefactError:
    """What to raise for a file that cannot be read; for a missing one with the nearest names that are there."""
    reason = f"could not read {path}: {getattr(error, 'strerror', None) or error}"
    if path.exists():
        return ArtefactError(reason)
    try:
        beside = [child.name for child in path.parent.iterdir()]
    except OSError:
        return ArtefactError(f"{reason}; there is no folder {path.parent}")
    return ArtefactError(f"{reason}; nearest: {', '.join(nearest(path.name, beside)) or 'its folder is empty'}")


def read_options(name: str, known: Iterable[str]) -> dict[str, str]:
    """What stands behind the `?` of a name, as `key=value&key=value`."""
    options: dict[str, str] = {}
    for piece in filter(None, name.partition("?")[2].split("&")):
        key, sign, value = piece.partition("=")
        if not sign or not value:
            raise InterpError(f"{piece!r} in {name!r} should be key=value")
        if key not in known:
            raise unknown(f"option of {name.partition('?')[0].partition(':')[0]}", key, known)
        options[key] = value
    return options


def _count(options: Mapping[str, str], key: str) -> int | None:
    text = options.get(key)
    if text is not None and not text.isdecimal():
        raise InterpError(f"{key}={text} should be a whole number, not below 0")
    return None if text is None else int(text)


def _field(record: Any, field: str, where: str) -> str:
    """The text of one field; an error that names the nearest one there is."""
    if not isinstance(record, Mapping):
        raise ArtefactError(f"{where} is {type(record).__name__}, not an object with fields")
    if field not in record:
        raise unknown(f"field in {where}", field, map(str, record))
    value: Any = record[field]
    if not isinstance(value, str):
        raise ArtefactError(f"{field!r} in {where} is {type(value).__name__}, not text")
    return value


def _jsonl(place: str, options: Mapping[str, str]) -> Iterator[str]:
    path = Path(place).expanduser()
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"line {number} of {path}"
                    yield _field(_parsed(line, where), options.get("field", "text"), where)
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path} is not UTF-8 text") from error
    except (OSError, EOFError) as error:
        raise unreadable(path, error) from error


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ArtefactError(f"{where} is not JSON: {error}") from error


def _parquet(place: str, options: Mapping[str, str]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = Path(place).expanduser()
    paths = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    if not paths:
        raise ArtefactError(f"{root} holds no .parquet file")
    column = options.get("column", "text")
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                if column not in file.schema_arrow.names:
                    raise unknown(f"column in {path}", column, file.schema_arrow.names)
                for batch in file.iter_batches(columns=[column], batch_size=1024):
                    yield from (_field({column: text}, column, str(path)) for text in batch[0].to_pylist())
        except (OSError, pa.ArrowInvalid) as error:
            raise unreadable(path, error) from error


def _dataset(place: str, options: Mapping[str, str]) -> Iterator[str]:
    column, seed = options.get("column", "text"), _count(options, "shuffle")
    path = Path(place).expanduser()
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        rows = _from_disk(path, options.get("split"))
        rows = rows.shuffle(seed=seed) if seed is not None else rows
    else:
        rows = _streamed(place, options.get("split", "train"))
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if seed is not None else rows
    for number, row in enumerate(rows):
        yield _field(row, column, f"row {number} of {place}")


def _from_disk(path: Path, split: str | None) -> Any:
    import datasets

    found: Any = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split is None and len(found) > 1:
        raise InterpError(f"{path} has the splits {', '.join(map(str, found))}; add ?split=NAME")
    name = split or next(iter(found))
    if name not in found:
        raise unknown(f"split of {path}", str(name), map(str, found))
    return found[name]


def _streamed(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"{name!r} is no folder of `datasets`, and could not be streamed: {error}") from error


def _folder(place: str, options: Mapping[str, str]) -> Iterator[str]:
    root = Path(place).expanduser()
    if not root.is_dir():
        raise unreadable(root, NotADirectoryError("it is no folder"))
    pattern = options.get("glob", "*.txt")
    paths = sorted(path for path in root.rglob(pattern) if path.is_file())
    if not paths:
        raise ArtefactError(f"no file below {root} matches {pattern}")
    return map(read_text, paths)


_READERS: dict[str, tuple[Callable[[str, Mapping[str, str]], Iterable[str]], tuple[str, ...]]] = {
    "jsonl": (_jsonl, ("field",)),
    "parquet": (_parquet, ("column",)),
    "dataset": (_dataset, ("column", "split", "shuffle")),
    "folder": (_folder, ("glob",)),
}
