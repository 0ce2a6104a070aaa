#!/bin/sh
# Installs, compares the generated types with the OpenAPI document, compiles, and tests against a real server.
set -eu
cd "$(dirname "$0")"

command -v npm >/dev/null || {
    echo "there is no npm: install Node 20 or newer" >&2
    exit 1
}
if grep -n '"resolved"' package-lock.json; then
    echo "package-lock.json names hosts: run npm in this folder, where .npmrc leaves them out" >&2
    exit 1
fi
rm -rf dist
npm ci
npm run --silent stale || {
    echo "src/openapi.ts is out of date: run \`npm run generate\` in clients/typescript" >&2
    exit 1
}
npm run --silent build
npm test
