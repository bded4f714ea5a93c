#!/bin/sh
# Create .venv from the pinned lock. Needs Python 3.11 or newer and pip, nothing else: not even the
# venv package that Debian splits off, since pip of the system installs into the new environment.
#   sh envs/setup.sh            PYTHON=python3.12 sh envs/setup.sh
set -eu
cd "$(dirname "$0")/.."
# The environment's own Python has no pip: an activated or half-made .venv must not be found first.
PATH=$(printf %s ":$PATH:" | sed "s|:$PWD/.venv/bin:|:|g; s|^:||; s|:\$||")
python=${PYTHON:-python3}
need_gb=${SETUP_NEED_GB:-9} # a CUDA build of torch with its libraries; a CPU build takes 2

fail() {
    echo "error: $1" >&2
    exit 2
}

command -v "$python" >/dev/null 2>&1 ||
    fail "$python is not installed. On Debian: apt install python3 python3-pip make. Or name another: PYTHON=python3.12"
version=$("$python" --version 2>&1) || # a stand-in, perhaps, for a Python that is not there
    fail "$python does not run: $version"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$version is too old: 3.11 or newer is needed. Name a newer one: PYTHON=python3.12"
"$python" -m pip --version >/dev/null 2>&1 ||
    fail "$python has no pip. On Debian: apt install python3-pip"
command -v make >/dev/null 2>&1 ||
    echo "note: make is not installed, so 'make demo' and 'make test' will not work. On Debian: apt install make" >&2

stamp=.venv/.installed
lock=$(cat envs/requirements.lock pyproject.toml | cksum)
[ "$(cat $stamp 2>/dev/null)" = "$lock" ] && exit 0

free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
[ "$free_gb" -ge "$need_gb" ] ||
    fail "$free_gb GB free on this disk, $need_gb GB are needed for the environment. Make room, or SETUP_NEED_GB=3 for a CPU build of torch"

echo "creating .venv from envs/requirements.lock (some minutes)"
[ -x .venv/bin/python ] || "$python" -m venv --without-pip .venv
pip() { "$python" -m pip --python .venv/bin/python --disable-pip-version-check "$@"; }
pip install --quiet --progress-bar on -r envs/requirements.lock
pip install --quiet --no-deps --no-build-isolation --editable .
echo "$lock" >$stamp
echo "done: activate it with  . .venv/bin/activate"
