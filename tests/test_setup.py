"""envs/setup.sh says what a machine lacks before it installs anything; here with stand-ins for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What the script itself calls. `make` is left out or put in by the tests.
TOOLS = ("sh", "dirname", "sed", "cat", "cksum", "df", "awk")


class Machine:
    """A folder of programs that is all of PATH, and a copy of what setup.sh reads."""

    def __init__(self, folder: Path) -> None:
        self.project, self.programs = folder / "project", folder / "bin"
        self.programs.mkdir()
        (self.project / "envs").mkdir(parents=True)
        for name in ("envs/setup.sh", "envs/requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.programs / tool).symlink_to(found)

    def install(self, name: str, script: str) -> None:
        """A program that is a shell script."""
        program = self.programs / name
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)

    def python(self, name: str = "python3", *, version: str = "3.12.1", pip: bool = True) -> None:
        """A Python that knows its version, perhaps has pip, and fails at everything else."""
        is_it = f"import sys; sys.version_info = {tuple(map(int, version.split('.')))}"
        self.install(
            name,
            f"""case "$*" in
            --version) echo "Python {version}" ;;
            "-c "*) exec {sys.executable} -c "{is_it}; exec(sys.argv[1])" "$2" ;;
            "-m pip --version") exit {0 if pip else 1} ;;
            *) echo "python was asked to $*" >&2; exit 9 ;;
            esac""",
        )

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "envs/setup.sh"],
            cwd=self.project,
            env={"PATH": str(self.programs), "SETUP_NEED_GB": "0", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    for word in words:
        assert word in done.stderr


def test_no_python_is_said_with_what_installs_it(machine):
    refused(machine.setup(), "python3 is not installed", "apt install python3 python3-pip make")


def test_an_old_python_is_said_with_its_version(machine):
    machine.python(version="3.9.2")
    refused(machine.setup(), "Python 3.9.2 is too old: 3.11 or newer", "PYTHON=")


def test_a_python_that_does_not_run_is_said(machine):
    machine.install("python3", "echo 'pyenv: python3: command not found'; exit 127")
    refused(machine.setup(), "python3 does not run: pyenv: python3: command not found")


def test_another_python_is_taken_where_it_is_named(machine):
    machine.python(version="3.9.2")
    machine.python("python3.12", pip=False)
    refused(machine.setup(PYTHON="python3.12"), "python3.12 has no pip")
    refused(machine.setup(PYTHON="python3.13"), "python3.13 is not installed")


def test_a_python_without_pip_is_said_with_what_installs_it(machine):
    machine.python(pip=False)
    refused(machine.setup(), "python3 has no pip", "apt install python3-pip")


def test_a_full_disk_is_said_with_both_sizes(machine):
    machine.python()
    refused(machine.setup(SETUP_NEED_GB="100000"), "GB free on this disk, 100000 GB are needed")
    assert not (machine.project / ".venv").exists()


@pytest.mark.parametrize("has_make", [True, False])
def test_a_missing_make_is_a_note_and_no_obstacle(machine, has_make):
    machine.python()
    if has_make:
        machine.install("make", "")
    done = machine.setup()
    assert ("note: make is not installed" in done.stderr) != has_make
    assert "creating .venv" in done.stdout
    assert "python was asked to -m venv --without-pip .venv" in done.stderr  # it went on


def test_an_activated_half_made_environment_is_not_the_python_that_installs(machine):
    machine.python()
    inside = machine.project / ".venv/bin"
    inside.mkdir(parents=True)
    (inside / "python3").write_text("#!/bin/sh\necho the wrong one >&2\nexit 1\n")
    (inside / "python3").chmod(0o755)
    done = machine.setup(PATH=f"{inside}:{machine.programs}")
    assert "the wrong one" not in done.stderr
    assert "python was asked to" in done.stderr


def test_a_finished_environment_is_left_alone(machine):
    machine.python()
    (machine.project / ".venv").mkdir()
    files = [machine.project / name for name in ("envs/requirements.lock", "pyproject.toml")]
    joined = b"".join(file.read_bytes() for file in files)
    stamp = subprocess.run(["cksum"], input=joined, capture_output=True, check=True).stdout
    (machine.project / ".venv/.installed").write_bytes(stamp)
    done = machine.setup(SETUP_NEED_GB="100000")
    assert done.returncode == 0, done.stderr
    assert "creating" not in done.stdout
    files[1].write_text("another project", encoding="utf-8")
    refused(machine.setup(SETUP_NEED_GB="100000"), "GB are needed")
