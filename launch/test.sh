#!/usr/bin/env bash
# Runs the tests.
#
#   bash launch/test.sh               the suite
#   bash launch/test.sh --fast        without the tests marked slow
#   bash launch/test.sh --coverage    prints line coverage as well, and fails below 90 %
#   bash launch/test.sh --exhaustive  with the tests that repeat others in more cases
#   bash launch/test.sh ARGS ...      other ARGS go to pytest: paths, -k, -n 0, ...
#
# QTALE_ENVIRONMENT and QTALE_EXTRAS name another environment and what is installed in it (default: .venv-test, test).
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"

options=(-n 2 --dist worksteal --durations 10)
while [[ "${1:-}" == --fast || "${1:-}" == --coverage ]]; do
    if [[ "$1" == --fast ]]; then options+=(-m "not slow"); else options+=(--cov --cov-report term --cov-fail-under 90); fi
    shift
done

prepare_environment "${QTALE_ENVIRONMENT:-.venv-test}" "${QTALE_EXTRAS:-test}"

step "pytest ${options[*]} $*"
exec "$PYTHON" -m pytest "${options[@]}" "$@" </dev/null
