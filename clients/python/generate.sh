#!/bin/sh
# Writes src/millrace/openapi anew from the service's OpenAPI document; with --check it only says whether that would
# change anything. GENERATOR_VENV: where the generator is, or is to be, installed.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
venv=${GENERATOR_VENV:-$here/../../target/clients/python-generator}
document=$here/../../src/http/openapi.yaml
code=$here/src/millrace/openapi

if ! cmp -s "$here/generator/requirements.txt" "$venv/requirements.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check -r "$here/generator/requirements.txt"
    cp "$here/generator/requirements.txt" "$venv/requirements.txt"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$venv/bin/python" "$here/generator/prepare.py" "$document" >"$work/openapi.json"
PATH="$venv/bin:$PATH" "$venv/bin/openapi-python-client" generate --path "$work/openapi.json" --meta none \
    --config "$here/generator/config.yaml" --custom-template-path "$here/generator/templates" \
    --output-path "$work/openapi" --fail-on-warning
find "$work/openapi" -name '.ruff_cache' -prune -exec rm -rf {} +

if [ "${1:-}" = --check ]; then
    if ! diff -r -u -x __pycache__ "$code" "$work/openapi"; then
        echo "generate.sh: src/millrace/openapi is stale: run clients/python/generate.sh and commit its result" >&2
        exit 1
    fi
else
    rm -rf "$code"
    mv "$work/openapi" "$code"
fi
