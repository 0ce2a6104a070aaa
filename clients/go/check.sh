#!/bin/sh
# Generates the client, compiles it with the example, and places orders with that on a real server: target/debug/millrace,
# or what MILLRACE_BINARY names. --compile leaves the server out.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
if [ -n "${MILLRACE_BINARY:-}" ]; then
    MILLRACE_BINARY=$(CDPATH='' cd -- "$(dirname -- "$MILLRACE_BINARY")" && pwd)/$(basename -- "$MILLRACE_BINARY")
    export MILLRACE_BINARY
fi
cd "$here"
command -v go >/dev/null || { echo "not run: clients/go: there is no go: install Go 1.26 or newer" && exit 0; }
go tool oapi-codegen -config oapi-codegen.yaml ../../src/http/openapi.yaml
[ -z "$(gofmt -l .)" ] || { echo "check.sh: gofmt would change $(gofmt -l .)" >&2 && exit 1; }
go vet ./...
mkdir -p ../../target/clients
go build -o ../../target/clients/buy-go .
[ "${1:-}" = --compile ] || ../with-server.sh ../check-example.sh ../../target/clients/buy-go
