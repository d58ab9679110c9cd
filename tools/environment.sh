# shellcheck shell=bash
# Makes .venv and what a tool needs from the system; sourced by the other tools.
#
#   falkirk_commands COMMAND=PACKAGE...   have these commands, by apt where root may and they are missing
#   falkirk_wish COMMAND=PACKAGE...       the same, but go on without
#   falkirk_environment runtime|dev       have .venv with the locked dependencies and the project, and put it first in PATH
#
# Both say what they install before they do, and say what is missing and how to get it where they can't. Dependencies
# come from tools/requirements*.txt with --require-hashes, from wherever pip is configured to look. A second run costs a
# checksum: .venv/.falkirk-* hold the sums of what was installed. Two runs at once wait for each other.

FALKIRK_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
FALKIRK_VENV="$FALKIRK_ROOT/.venv"

falkirk_say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
falkirk_fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

falkirk_apt() {
    falkirk_say "installing with apt-get: $*"
    local log
    log="$(mktemp)"
    if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

falkirk_can_apt() { [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; }

# Sets falkirk_missing and falkirk_packages to what isn't there of COMMAND=PACKAGE...; false where nothing is missing.
falkirk_lacks() {
    local pair
    falkirk_missing=() falkirk_packages=()
    PATH="$PATH:/usr/sbin:/sbin"
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null && continue
        falkirk_missing+=("${pair%%=*}")
        falkirk_packages+=("${pair#*=}")
    done
    [ "${#falkirk_missing[@]}" -gt 0 ]
}

falkirk_commands() {
    falkirk_lacks "$@" || return 0
    falkirk_can_apt && falkirk_apt "${falkirk_packages[@]}" && return 0
    falkirk_fail "not found: ${falkirk_missing[*]}. On Debian or Ubuntu, as root: apt-get install ${falkirk_packages[*]}"
}

falkirk_wish() {
    falkirk_lacks "$@" || return 0
    falkirk_can_apt && falkirk_apt "${falkirk_packages[@]}" && return 0
    falkirk_say "going on without ${falkirk_missing[*]} (apt-get install ${falkirk_packages[*]})"
}

# A new-enough interpreter: the distribution's own where it will do, else one in PATH. Distributions build theirs with profile-guided
# optimisation; one that was compiled by default settings (pyenv's) moves packets at half the speed. FALKIRK_PYTHON chooses another.
falkirk_python() {
    local name
    for name in ${FALKIRK_PYTHON:+"$FALKIRK_PYTHON"} /usr/bin/python3 python3 python3.11 python3.12 python3.13 python3.14; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

falkirk_sum() { (cd "$FALKIRK_ROOT" && cat "$@" | sha256sum | cut -d' ' -f1); }

falkirk_make_venv() {
    local python
    if ! python="$(falkirk_python)"; then
        falkirk_can_apt && falkirk_apt python3 python3-venv || true
        python="$(falkirk_python)" || falkirk_fail "needs Python 3.11 or newer; found $(python3 --version 2>&1 || echo none)"
    fi
    if [ -x "$FALKIRK_VENV/bin/python" ] && "$FALKIRK_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        local package
        package="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
        falkirk_can_apt && falkirk_apt "$package" ||
            falkirk_fail "$python can't make a venv. On Debian or Ubuntu, as root: apt-get install $package"
    fi
    falkirk_say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$FALKIRK_VENV"
}

falkirk_pip() { "$FALKIRK_VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

falkirk_fill_venv() {
    local level="$1" locks sum file
    case "$level" in
        runtime) locks=(tools/requirements.txt tools/requirements-build.txt) ;;
        dev) locks=(tools/requirements-dev.txt) ;;
        *) falkirk_fail "no such level: $level" ;;
    esac
    falkirk_make_venv
    sum="$(falkirk_sum "${locks[@]}")"
    # A dev environment holds everything that a runtime one does, at the same versions: the locks are made together.
    if [ "$(cat "$FALKIRK_VENV/.falkirk-$level" 2>/dev/null)" != "$sum" ]; then
        if [ "$level" = dev ] || [ "$(cat "$FALKIRK_VENV/.falkirk-dev" 2>/dev/null)" != "$(falkirk_sum tools/requirements-dev.txt)" ]; then
            for file in "${locks[@]}"; do
                falkirk_say "installing $(grep -c '==' "$FALKIRK_ROOT/$file") locked packages of $file"
                falkirk_pip --require-hashes --requirement "$FALKIRK_ROOT/$file"
            done
        fi
        echo "$sum" >"$FALKIRK_VENV/.falkirk-$level"
        rm -f "$FALKIRK_VENV/.falkirk-project"
    fi
    sum="$(cd "$FALKIRK_ROOT" && { echo "$FALKIRK_ROOT"; cat pyproject.toml tools/hatch_build.py tools/gen-protos services/falkirk/__init__.py; find protos -name '*.proto' | LC_ALL=C sort | xargs cat; } | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$FALKIRK_VENV/.falkirk-project" 2>/dev/null)" != "$sum" ] || [ ! -d "$FALKIRK_ROOT/services/falkirk/api" ]; then
        falkirk_say "installing falkirk itself (editable; generates services/falkirk/api)"
        falkirk_pip --no-build-isolation --no-deps --editable "$FALKIRK_ROOT"
        echo "$sum" >"$FALKIRK_VENV/.falkirk-project"
    fi
}

falkirk_environment() {
    if command -v flock >/dev/null; then
        exec 9>"$FALKIRK_ROOT/.venv.lock"
        flock 9
        falkirk_fill_venv "$1" 9>&-
        exec 9>&-
    else
        falkirk_fill_venv "$1"
    fi
    export VIRTUAL_ENV="$FALKIRK_VENV" PATH="$FALKIRK_VENV/bin:$PATH:/usr/sbin:/sbin"
    unset PYTHONHOME
}
