#!/bin/sh
# Uses saved folders in a fresh venv that has Transformers and not this package.
# Not part of `make test`: it installs 1.5 GB. Run it after `make test`: sh tests/fresh_venv.sh [FOLDER FOR THE VENV]
# TRANSFORMERS='transformers==5.4.0' tests the oldest one that the code of a saved folder accepts.
set -eu
cd "$(dirname "$0")/.."
fresh=${1:-$(mktemp -d)/venv}
# Where PyPI serves CUDA builds, this installs one; it works as well.
python3 -m venv "$fresh"
"$fresh/bin/pip" install --quiet --constraint constraints.txt torch transformers accelerate
if [ -n "${TRANSFORMERS:-}" ]; then "$fresh/bin/pip" install --quiet "$TRANSFORMERS"; fi
if (cd / && "$fresh/bin/python" -I -c "import hugging_nano_gpt") 2>/dev/null; then
    echo "tests/fresh_venv.sh: $fresh: expected a venv without hugging_nano_gpt; name another folder" >&2
    exit 1
fi
FRESH_PYTHON="$fresh/bin/python" "${PYTHON:-.venv/bin/python}" -m pytest tests/model/test_hub.py -k remote
