# shellcheck shell=bash
# Sourced by the scripts beside it. `prepare_environment NAME EXTRAS` makes or updates the virtual environment NAME in
# the repository root and sets PYTHON to its interpreter. It needs Python >= 3.11; uv is used where it is installed.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# XLA on CPUs allocates and frees large blocks all the time. With glibc's defaults a third to a half of the time goes to
# mapping memory; keeping freed blocks in one arena makes that vanish.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-134217728}"
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-1}"

# The arrays are small and the processes as many as the cores: thread pools inside libraries only get in the way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONNOUSERSITE=1

step() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Prints the first interpreter that can be used: $QTALE_PYTHON, then newest first. Each candidate is run, because a name
# on PATH may be a version manager's placeholder, and because Debian's python3 comes without ensurepip.
find_python() {
    local check='import sys; assert sys.version_info >= (3, 11); import venv'
    command -v uv >/dev/null || check="$check, ensurepip"
    local candidates=("${QTALE_PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14 python)
    if [[ -n "${QTALE_PYTHON:-}" ]]; then candidates=("$QTALE_PYTHON"); fi
    local candidate
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c "$check" >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "no Python >= 3.11 with venv and ensurepip among: ${candidates[*]};" \
        "install one (Debian: apt install python3 python3-venv) or set QTALE_PYTHON=/path/to/python"
}

# Everything that decides what an environment holds; kept inside it as the mark of a finished installation.
describe_environment() {
    printf 'repository %s\nextras %s\n' "$REPOSITORY" "$1"
    cat "$REPOSITORY/pyproject.toml" "$REPOSITORY/constraints.txt"
}

prepare_environment() {
    local directory="$REPOSITORY/$1" extras="$2"
    local stamp="$directory/installed" project="$REPOSITORY${extras:+[$extras]}"
    PYTHON="$directory/bin/python"
    if [[ -f "$stamp" ]] && "$PYTHON" -c '' 2>/dev/null && describe_environment "$extras" | cmp -s - "$stamp"; then
        step "environment $1 is up to date"
        return
    fi
    if ! "$PYTHON" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then
        local interpreter
        interpreter="$(find_python)"
        step "creating environment $1 with $("$interpreter" --version) ($interpreter)"
        rm -rf "$directory"
        if command -v uv >/dev/null; then
            uv venv --quiet --no-project --python "$interpreter" "$directory"
        else
            "$interpreter" -m venv "$directory"
        fi
    fi
    rm -f "$stamp"
    if command -v uv >/dev/null; then
        step "installing qtale-jax${extras:+[$extras]} into $1 with uv (first time: about a gigabyte)"
        uv pip install --quiet --python "$PYTHON" --constraints "$REPOSITORY/constraints.txt" --editable "$project"
    else
        step "installing qtale-jax${extras:+[$extras]} into $1 with pip (first time: about a gigabyte, some minutes)"
        "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --upgrade >/dev/null
        "$PYTHON" -m pip install -qq --disable-pip-version-check \
            --constraint "$REPOSITORY/constraints.txt" --editable "$project"
    fi
    describe_environment "$extras" >"$stamp"
}
