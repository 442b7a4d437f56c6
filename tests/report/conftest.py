"""One rendered report, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from interp.core.run import save_run
from interp.report.html import write_report
from tests.report import synthetic


@pytest.fixture(scope="session")
def evil_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run in which every text is hostile."""
    folder = tmp_path_factory.mktemp("report") / "demo"
    save_run(folder, synthetic.run(evil=synthetic.EVIL + synthetic.CLOSING))
    return write_report(folder)
