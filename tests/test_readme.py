"""The README's tables are those of the code, its links lead somewhere, and its Python example runs.

`python -m tests.test_readme` writes the tables into the README.
"""

import re
from pathlib import Path

from interp.core.sites import PARTS, Part
from interp.core.spec import discover
from tests.models.test_families import matrix

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def methods_table() -> str:
    rows = [f"| `{spec.name}` | {spec.question} | {spec.paper} |" for spec in discover().values()]
    return "\n".join(["| method | question | source |", "|---|---|---|", *rows])


def sites_table() -> str:
    rows = []
    for part, info in PARTS.items():
        if part is Part.MODULE:
            continue
        lens = f"`{info.lens}`" if info.lens else ""
        rows.append(f"| `{part}` | {info.meaning} | {' '.join(info.axes)} | {info.side} | {lens} |")
    head = ["| part | meaning | axes | side of the non-linearity | TransformerLens |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


TABLES = {"methods": methods_table, "sites": sites_table, "families": matrix}


def section(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    assert found, f"the README has no section {name}"
    return found[1]


def test_tables_are_those_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        assert section(text, name) == make(), f"{name}: python -m tests.test_readme writes it"


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), target


def test_the_example_runs_on_a_tiny_model() -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    lines = [line for line in code[1].splitlines() if "interp.run(" not in line and "interp.show(" not in line]
    example = "\n".join(lines).replace("smollm2-135m", "tiny-llama")
    example = example.replace("gate.3", "gate.1").replace("z.11", "z.1").replace("resid_post.12", "resid_post.2")
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    assert all(receipt.fired for receipt in names["receipts"])  # pyright: ignore


def write() -> None:
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        marked = f"<!-- {name} -->\n{section(text, name)}\n<!-- /{name} -->"
        text = text.replace(marked, f"<!-- {name} -->\n{make()}\n<!-- /{name} -->")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
