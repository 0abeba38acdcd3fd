#!/usr/bin/env bash
# Trains a small base model, D-LLM and QTALE from nothing, quantizes and calibrates them, and prints the table.
#
#   bash launch/quickstart.sh [key=value ...]
#
# Arguments go to `python -m qtale_jax.experiment configs/quickstart.yaml`. A second run skips what is already there.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"

prepare_environment .venv-quickstart ""

step "python -m qtale_jax.experiment configs/quickstart.yaml $*"
exec "$PYTHON" -m qtale_jax.experiment configs/quickstart.yaml "$@"
