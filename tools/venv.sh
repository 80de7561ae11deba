# Sourced by the scripts beside it: goes to the repository root and defines install_venv.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || exit 1
cd -- "$root" || exit 1
python=.venv/bin/python

_has_pip() { "$python" -m pip --version >/dev/null 2>&1; }

# .venv, with pip. Debian's python3 cannot put pip there without python3-venv; a pip outside it can.
_make_venv() {
    if _has_pip; then return; fi
    rm -rf .venv
    if python3 -m venv .venv >/dev/null 2>&1 && _has_pip; then return; fi
    rm -rf .venv
    if python3 -m venv --without-pip .venv >/dev/null 2>&1 &&
        python3 -m pip --python "$python" --disable-pip-version-check -qq install pip && _has_pip; then
        return
    fi
    rm -rf .venv
    echo "cannot make .venv with $(command -v python3 || echo 'python3, which is missing'):" \
        "apt-get install python3-venv, or put Python 3.11 or newer first in PATH" >&2
    return 1
}

# install_venv EXTRAS: the package with these extras in .venv, editable, so that the source in this folder is what runs.
# Does nothing while setup.cfg, pyproject.toml and the place of the repository are those of the last time.
install_venv() {
    local stamp=".venv/installed-$1" now
    _make_venv || return 1
    now=$({ pwd -P && cat setup.cfg pyproject.toml; } | git hash-object --stdin) || return 1
    if [ "$(cat "$stamp" 2>/dev/null)" = "$now" ]; then return; fi
    echo "installing onnxprune[$1] in .venv ..." >&2
    "$python" -m pip --disable-pip-version-check -qq install --editable ".[$1]" || return 1
    printf '%s\n' "$now" >"$stamp"
}
