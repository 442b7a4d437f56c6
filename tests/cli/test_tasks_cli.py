"""`interp tasks`: the list, one task, and how often a model is right."""

from __future__ import annotations

from typing import Any

import pytest

from interp.tasks.library import TASKS

Cli = Any
TINY = ("--model", "tiny-llama")


def test_the_list_names_every_task(cli: Cli) -> None:
    rows = cli("tasks", "--json").json["tasks"]
    assert [row["task"] for row in rows] == list(TASKS)
    assert all(row["question"] and row["corruptions"] and "END" in row["roles"] for row in rows)
    said = cli("tasks").out
    assert all(name in said for name in TASKS)


def test_one_task_asked_of_a_model(cli: Cli) -> None:
    (row,) = cli("tasks", "mqar", *TINY, "-n", "12", "--json").json["tasks"]
    assert row["n_pairs"] == 12 and 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
    assert row["accuracy"] == row["n_right"] / 12 and len(row["pairs"]) == 3
    assert "of 12 (" in cli("tasks", "mqar", *TINY, "-n", "12").out


def test_all_tasks_asked_of_a_model_that_cannot_read(cli: Cli) -> None:
    rows = {row["task"]: row for row in cli("tasks", *TINY, "-n", "4", "--json").json["tasks"]}
    assert "not one token" in rows["ioi"]["refused"] and rows["induction"]["n_pairs"] == 4


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("iio",), "unknown task 'iio'; nearest: ioi"),
        (("--corruption", "abc"), "needs a TASK"),
        (("ioi", *TINY), "none of"),
        (("mqar", *TINY, "--corruption", "value"), "nearest: values"),
        (("mqar", *TINY, "-n", "0"), "at least 1"),
        (("mqar", *TINY, "--split", "val"), "unknown split 'val'"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, flags: tuple[str, ...], reason: str) -> None:
    assert reason in cli("tasks", *flags).reason
