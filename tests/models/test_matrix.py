"""The matrix of architectures: each cell works or is refused in the sentence that ``expected.py`` has; and its page.

Run: ``pytest tests/models/test_matrix.py``, or of some with ``-k "gemma3 or llama"``; five minutes of one core for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import architectures
import cells
import expected
import pytest
import ranks

from oneshot.errors import UserError

SHARDED = ("llama", "llama-tied", "falcon_h1", "qwen3_next", "llama4_text", "qwen3_5")
NEAR = 2e-3  # of the losses of two ranks against one process's, whose sums have another order


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return cells.prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module", params=architectures.EVERY)
def subject(
    request: pytest.FixtureRequest, prompts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, cells.Subject]]:
    """Each architecture's checkpoints, and a folder where its cells leave what later ones read."""
    import torch

    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp(request.param)
    aligned, finetuned = architectures.build(request.param, folder)
    yield request.param, cells.Subject(aligned, finetuned, prompts, folder / "out")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("cell", cells.CELLS)
def test_each_cell_works_or_is_refused_as_expected(subject: tuple[str, cells.Subject], cell: str) -> None:
    name, model = subject
    wanted = expected.REFUSED.get((name, cell))
    if wanted is None:
        found = cells.CELLS[cell](model)
        assert found is None or found == expected.LEFT_OUT.get(name, set())
        return
    with pytest.raises(UserError) as refused:
        cells.CELLS[cell](model)
    said = str(refused.value)
    assert re.search(wanted, said), said
    assert "\n" not in said


def test_two_ranks_do_what_one_process_does(
    prompts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3, a model of each kind."""
    monkeypatch.setattr(ranks, "PRELOADED", ["cells"])
    subjects = {name: list(map(str, architectures.build(name, tmp_path / name))) for name in SHARDED}
    found = []
    for world, sharding in ((1, "none"), (2, "zero3")):
        given = {"subjects": subjects, "prompts": prompts, "out": str(tmp_path / f"out{world}")}
        found += ranks.start_ranks(cells.shard, world, sharding, tmp_path / f"{world}", given).results(600)
    one, two, same = found
    assert two == same
    for name in SHARDED:
        assert two[name] == pytest.approx(one[name], rel=NEAR), name


def test_the_page_says_what_is_expected() -> None:
    known = {(name, cell) for name in architectures.EVERY for cell in cells.CELLS}
    assert expected.REFUSED.keys() <= known
    assert expected.LEFT_OUT.keys() <= set(architectures.EVERY)
    assert expected.PAGE.read_text(encoding="utf-8") == expected.page(), "python tests/models/expected.py --write"
