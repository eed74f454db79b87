"""What the package says at the start of a run is shown without any set-up, and can be switched off."""

import logging
import subprocess
import sys

import pytest
from support.environment import ROOT
from support.exhaustive import EXHAUSTIVE
from torch import nn

import rso_ds
from rso_ds.console import ConsoleHandler, log_to_console


@pytest.fixture
def logger():
    """The package's logger, as ``import rso_ds`` has left it."""
    logger = logging.getLogger("rso_ds")
    assert sum(isinstance(h, ConsoleHandler) for h in logger.handlers) == 1  # the others are pytest's
    yield logger
    logger.setLevel(logging.INFO)


def say():
    part = logging.getLogger("rso_ds.engines")
    part.info("%s\n%s", "a table", "of two lines")
    part.error("not saved: %s", "disk full")


def test_messages_as_they_are(logger, capsys):
    log_to_console()  # once more adds nothing: a message is there once
    say()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a table\nof two lines\n", "not saved: disk full\n")


def test_a_level_switches_off(logger, capsys):
    logger.setLevel("WARNING")
    say()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "not saved: disk full\n")


@pytest.mark.parametrize(
    ("before", "out", "err"),
    [
        pytest.param("logging.basicConfig(format='root: %(message)s')", "a table\n", "", marks=EXHAUSTIVE),
        ("logging.getLogger('rso_ds').setLevel('WARNING')", "", ""),
        pytest.param("logging.getLogger('rso_ds').addHandler(logging.NullHandler())", "", "", marks=EXHAUSTIVE),
        (
            "logging.basicConfig(format='root: %(message)s'); logging.getLogger('rso_ds').setLevel('INFO')",
            "",
            "root: a table\n",
        ),
    ],
)
def test_what_the_program_has_configured_stays(before, out, err):
    code = f"import logging; {before}; import rso_ds; logging.getLogger('rso_ds.engines').info('a table')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (out, err)


def test_a_save_that_nobody_waited_for(logger, capsys, tmp_path):
    """The thread that writes fails, and the program ends without a word to the checkpointer."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    config = rso_ds.RSOConfig(rank=2, targets=["*"])
    rso_ds.convert(model, config)
    checkpoints = rso_ds.RSO(model, config).checkpointer()
    (tmp_path / "file").write_text("in the way")
    checkpoints.save(tmp_path / "file" / "run", "a", wait=False)
    checkpoints._report()
    assert capsys.readouterr().err.startswith("the last checkpoint was not saved, and nobody waited for it: ")
    with pytest.raises(rso_ds.RSOCheckpointError, match="was not saved"):
        checkpoints.wait()
