#!/bin/sh
# Whether the generated code is stale; ruff, mypy and the tests, which need PostgreSQL and a Millrace: target/debug/millrace,
# or what MILLRACE_BINARY names. Arguments go to pytest.
set -eu
if [ -n "${MILLRACE_BINARY:-}" ]; then
    MILLRACE_BINARY=$(CDPATH='' cd -- "$(dirname -- "$MILLRACE_BINARY")" && pwd)/$(basename -- "$MILLRACE_BINARY")
    export MILLRACE_BINARY
fi
CDPATH='' cd -- "$(dirname -- "$0")"
venv=../../target/clients/python
GENERATOR_VENV=$(mkdir -p ../../target/clients && CDPATH='' cd -- ../../target/clients && pwd)/python-generator
export GENERATOR_VENV

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "check.sh: the client for Python needs Python 3.11 or newer as python3" >&2
    exit 1
}
./generate.sh --check

# Installed as a shop would, so that a file that the package lacks is missed.
if ! cmp -s pyproject.toml "$venv/pyproject.toml"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check '.[check]'
    cp pyproject.toml "$venv/pyproject.toml"
fi
"$venv/bin/pip" install -q --disable-pip-version-check --no-deps --force-reinstall .

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
exec "$venv/bin/pytest" "$@"
