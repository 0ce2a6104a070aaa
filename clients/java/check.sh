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
command -v mvn >/dev/null || { echo "not run: clients/java: there is no mvn: install Maven and Java 17 or newer" && exit 0; }
mvn -q -B clean compile dependency:build-classpath -Dmdep.outputFile=target/classpath
[ "${1:-}" = --compile ] ||
    ../with-server.sh ../check-example.sh java -cp "target/classes:$(cat target/classpath)" example.Buy
