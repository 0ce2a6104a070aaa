#!/bin/sh
# Installs, compares the generated types with the OpenAPI document, compiles, and tests against a real server.
set -eu

die() {
    echo "clients/typescript/check.sh: $*" >&2
    exit 1
}

# Before this leaves the folder that a relative path is meant from.
case ${MILLRACE_BINARY:-} in
'' | /*) ;;
*) export MILLRACE_BINARY="$PWD/$MILLRACE_BINARY" ;;
esac
cd "$(dirname "$0")"
binary=${MILLRACE_BINARY:-../../target/debug/millrace}
[ -x "$binary" ] || die "there is no $binary: run \`cargo build\` at the root, or name another in MILLRACE_BINARY"
command -v npm >/dev/null || die "there is no npm: install Node 20 or newer"
! grep -n '"resolved"' package-lock.json || die "package-lock.json names hosts: run npm in this folder, where .npmrc leaves them out"

rm -rf dist
npm ci
npm run --silent stale || die "src/openapi.ts is out of date: run \`npm run generate\` in clients/typescript"
npm run --silent build
npm test
