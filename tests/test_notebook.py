"""The README's Kaggle cells, in order, in a real Jupyter kernel, on picture files."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, TINY, write_homework
from nbclient import NotebookClient

import train

FILES = ["data.py", "models.py", "augment.py", "predict.py", "train.py"]
SMALL = ["--epochs", "3", "--model", TINY, "--lr", "0.1", "--val", "0.2"]


def kaggle_cells(place):
    """The code blocks of the section "On Kaggle": small runs, `place` for /kaggle/input."""
    section = (ROOT / "README.md").read_text().split("## On Kaggle\n")[1].split("\n## ")[0]
    cells = []
    for cell in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        cell = cell.replace("/kaggle/input", str(place))
        if "--resume" not in cell:  # which has the flags of the run that it goes on with
            cell = cell.replace("--minutes 500", "--minutes 500 " + " ".join(SMALL))
            cell = cell.replace('"--minutes", "500"', str(["--minutes", "500", *SMALL])[1:-1])
        if cell.startswith("%%writefile data.py\n# here the whole of data.py"):
            cells += [f"%%writefile {name}\n{(ROOT / name).read_text()}" for name in FILES]
        elif cell.startswith("# here the whole of train.py"):
            cells.append((ROOT / "train.py").read_text())
        else:
            cells.append(cell)
    return cells


@pytest.fixture
def working(tmp_path, monkeypatch):
    """A folder like /kaggle/working, with data/ in the place of /kaggle/input."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    write_homework(tmp_path / "data" / "competition")
    return tmp_path


def execute(cells, folder):
    """What each cell prints: a string each."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=path).execute()
    return [
        "".join(out.get("text", "") or str(out.get("data", "")) for out in cell.outputs)
        for cell in notebook.cells
    ]


def stopped_run(folder, out, monkeypatch):
    """A former version's output: a run that its time limit stopped in the second epoch."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            train,
            "why_stop",
            lambda run, stop, pace=0.0: "a test" if (run.epoch, run.step) == (1, 1) else None,
        )
        train.main(["--data", str(folder / "data" / "competition"), *SMALL, "--out", str(out)])


def test_the_readmes_kaggle_cells_run_in_order(working, monkeypatch):
    stopped_run(working, working / "data" / "notebooks" / "me" / "former", monkeypatch)
    earlier = working / "data" / "notebooks" / "me" / "former" / "earlier-1"
    earlier.mkdir()
    (earlier / "ckpt.pt").write_bytes(b"of a run before that")
    cells = kaggle_cells(working / "data")
    printed = dict(zip(cells, execute(cells, working)))
    said = {first: out for cell, out in printed.items() for first in [cell.split("\n")[0]]}
    trainings = [out for cell, out in printed.items() if "--minutes" in cell or "STARTED" in cell]
    looked = said["!python data.py"]
    assert "found below data/" in looked and "60 pictures" in looked
    assert "wrote submission.csv: 9 answers (Id,Category)" in printed[cells[7]]
    assert "wrote confusions.png" in printed[cells[7]]
    assert printed[cells[8]].count("image/png") == 4
    resumed = said[f"!cp {working}/data/notebooks/*/*/*.pt ."]
    assert "resumed after epoch 1 and 1 steps" in resumed
    ends = [out for out in trainings if "ckpt.pt: the last epoch, 3" in out]
    assert len(ends) == 5, trainings  # as a process, on two, resumed, imported, pasted
    assert "2 processes" in ends[1]
    lines = (working / "submission.csv").read_text().split()
    assert lines[0] == "Id,Category" and len(lines) == 10


def test_in_a_kernel_a_pasted_file_drops_jupyters_flags_and_40_epochs_are_under_60_lines(working):
    for name in FILES:
        (working / name).write_text((ROOT / name).read_text())
    flags = ["--epochs", "40", "--model", TINY, "--batch-size", "60", "--lr", "0.1"]
    cells = [(ROOT / "data.py").read_text(), f"import train\ntrain.main({flags})"]
    pasted, trained = execute(cells, working)
    assert "wrote data.png" in pasted and (working / "data.png").exists()
    assert trained.count("\n") < 60 and "last epoch, 40" in trained
