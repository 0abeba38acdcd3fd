#!/usr/bin/env bash
# Runs the tests.
#
#   bash launch/test.sh                    the whole suite; prints line coverage and fails below 90 %
#   bash launch/test.sh --fast             without the tests marked slow, and without coverage
#   bash launch/test.sh [--fast] ARGS ...  ARGS go to pytest: paths, -k, -n 0, ...
#
# QTALE_ENVIRONMENT and QTALE_EXTRAS name another environment and what is installed in it (default: .venv-test, test).
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"

options=(-n 2 --dist worksteal --durations 10)
if [[ $# -eq 0 ]]; then options+=(--cov --cov-report term --cov-fail-under 90); fi
if [[ "${1:-}" == --fast ]]; then
    options+=(-m "not slow")
    shift
fi

prepare_environment "${QTALE_ENVIRONMENT:-.venv-test}" "${QTALE_EXTRAS:-test}"

step "pytest ${options[*]} $*"
exec "$PYTHON" -m pytest "${options[@]}" "$@" </dev/null
