# shellcheck shell=sh
# Python and virtual environment of the other scripts, which source this file from the repository root.
#
#   llava_need_python          sets LLAVA_PYTHON to a Python 3.10 or newer
#   llava_need_compiler        requires a C++ compiler, for the operators that DeepSpeed builds
#   llava_need_disk GB [DIR]   requires free space on the disk of DIR
#   llava_venv EXTRA...        creates or updates an environment with these extras, and puts it first on PATH
#   llava_pip ARGUMENT...      runs pip in that environment and explains failures
#
# Environment: LLAVA_VENV, the virtual environment (default: .venv); LLAVA_PYTHON, the Python that creates it;
# LLAVA_NO_INSTALL=1 uses the environment unchanged.

llava_fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

llava_note() {
    printf '==> %s\n' "$*"
}

llava_need_python() {
    for llava_candidate in "${LLAVA_PYTHON:-}" python3 python3.12 python3.11 python3.10 python; do
        [ -n "$llava_candidate" ] || continue
        if "$llava_candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            LLAVA_PYTHON=$llava_candidate
            return 0
        fi
        [ "$llava_candidate" != "${LLAVA_PYTHON:-}" ] ||
            llava_fail "LLAVA_PYTHON=$LLAVA_PYTHON is not Python 3.10 or newer; unset it or set it to another."
    done
    llava_fail "Python 3.10 or newer was not found on PATH; install it, or set LLAVA_PYTHON to its path."
}

llava_need_compiler() {
    for llava_candidate in "${CXX:-}" c++ g++ clang++; do
        [ -n "$llava_candidate" ] || continue
        if echo '#include <vector>' | "$llava_candidate" -fsyntax-only -x c++ - 2>/dev/null; then
            return 0
        fi
    done
    llava_fail "A working C++ compiler was not found; install one (Debian: apt-get install g++, macOS: xcode-select --install)."
}

llava_need_disk() {
    llava_free=$(df -Pk "${2:-.}" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$llava_free" -ge "$1" ] ||
        llava_fail "$1 GB of free disk space are needed in $(cd "${2:-.}" && pwd), found $llava_free GB; free space, or set LLAVA_VENV to a folder on another disk."
}

llava_pip() {
    llava_log=$LLAVA_VENV/pip.log
    rm -f "$llava_log"
    if "$LLAVA_VENV/bin/python" -m pip --disable-pip-version-check --log "$llava_log" "$@"; then
        return 0
    fi
    if grep -q 'No space left on device' "$llava_log" 2>/dev/null; then
        llava_fail "The disk is full; free space and run the same command again to resume."
    elif grep -Eq 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Network is unreachable' "$llava_log" 2>/dev/null; then
        llava_fail "The package index cannot be reached; check the network (or pip's settings) and run the same command again."
    fi
    llava_fail "pip failed; fix the cause given in $llava_log and run the same command again."
}

# The stamp, written last, marks a complete environment: a checksum of its requirements, then its extras.
llava_venv() {
    LLAVA_VENV=${LLAVA_VENV:-$PWD/.venv}
    case $LLAVA_VENV in /*) ;; *) LLAVA_VENV=$PWD/$LLAVA_VENV ;; esac
    llava_stamp=$LLAVA_VENV/.llava-stamp
    llava_source=$(cat pyproject.toml constraints.txt | cksum)" $PWD"
    llava_present=
    if [ -f "$llava_stamp" ] && [ "$(sed -n 1p "$llava_stamp")" = "$llava_source" ]; then
        llava_present=$(sed -n 2p "$llava_stamp")
    fi
    llava_wanted=$llava_present
    for llava_extra in "$@"; do
        case ,$llava_wanted, in *",$llava_extra,"*) ;; *) llava_wanted=$llava_wanted${llava_wanted:+,}$llava_extra ;; esac
    done
    if [ -n "${LLAVA_NO_INSTALL:-}" ]; then
        [ -x "$LLAVA_VENV/bin/python" ] || llava_fail "LLAVA_NO_INSTALL is set, but $LLAVA_VENV is not a virtual environment; unset it to create one."
    elif [ "$llava_wanted" != "$llava_present" ] || [ ! -x "$LLAVA_VENV/bin/python" ]; then
        llava_make_venv
        llava_note "Installing llava[$llava_wanted] into $LLAVA_VENV (several GB the first time)"
        rm -f "$llava_stamp"
        llava_pip install --constraint constraints.txt --editable ".[$llava_wanted]"
        printf '%s\n%s\n' "$llava_source" "$llava_wanted" >"$llava_stamp.part"
        mv "$llava_stamp.part" "$llava_stamp"
    fi
    LLAVA_PYTHON=$LLAVA_VENV/bin/python
    PATH=$LLAVA_VENV/bin:$PATH
    VIRTUAL_ENV=$LLAVA_VENV
    export LLAVA_VENV LLAVA_PYTHON PATH VIRTUAL_ENV
}

llava_make_venv() {
    if [ -x "$LLAVA_VENV/bin/python" ] && "$LLAVA_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        llava_need_disk 2 "$LLAVA_VENV"
        return 0
    fi
    llava_need_python
    "$LLAVA_PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        llava_fail "The venv module of $LLAVA_PYTHON is missing; install it (Debian: apt-get install python3-venv)."
    if [ -e "$LLAVA_VENV" ] && [ ! -f "$LLAVA_VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$LLAVA_VENV")" ]; then
        llava_fail "$LLAVA_VENV exists and is not a virtual environment; set LLAVA_VENV to another folder."
    fi
    mkdir -p "$LLAVA_VENV"
    llava_need_disk 10 "$LLAVA_VENV"
    llava_note "Creating a virtual environment in $LLAVA_VENV with $("$LLAVA_PYTHON" --version)"
    "$LLAVA_PYTHON" -m venv --clear "$LLAVA_VENV" ||
        llava_fail "The virtual environment in $LLAVA_VENV could not be created; see the message above."
}
