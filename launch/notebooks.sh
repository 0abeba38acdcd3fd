#!/usr/bin/env bash
# Executes the notebooks and leaves executed copies in RUN/notebooks.
#
#   bash launch/notebooks.sh          on the quickstart's artifact: RUN is runs/quickstart, or QTALE_RUN
#   bash launch/notebooks.sh --tiny   on an artifact of the same layout, made in a minute by configs/tiny.yaml
#
# QTALE_ENVIRONMENT and QTALE_EXTRAS name another environment and what is installed in it (default: .venv-notebooks,
# notebooks).
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
run="${QTALE_RUN:-$REPOSITORY/runs/quickstart}"
[[ "$run" == /* ]] || run="$PWD/$run"
cd "$REPOSITORY"

prepare_environment "${QTALE_ENVIRONMENT:-.venv-notebooks}" "${QTALE_EXTRAS:-notebooks}"

if [[ "${1:-}" == --tiny ]]; then
    run="$REPOSITORY/runs/tiny"
    # Nearly all of the time would go to optimizing programs that run a few times; they mean the same without.
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    rm -rf "$run"
    step "python -m qtale_jax.experiment configs/tiny.yaml"
    "$PYTHON" -m qtale_jax.experiment configs/tiny.yaml >/dev/null
fi
[[ -d "$run/evaluation" ]] || fail "$run: no finished experiment; run bash launch/quickstart.sh first, or give --tiny"

step "notebooks on $run"
QTALE_RUN="$run" exec "$PYTHON" launch/execute_notebooks.py "$run/notebooks" notebooks/*.ipynb
