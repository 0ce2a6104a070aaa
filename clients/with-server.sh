#!/bin/sh
# usage: with-server.sh COMMAND [ARG]...
# Runs a command beside a Millrace of its own, with its own PostgreSQL, which sells 10 units of A: MILLRACE_URL has its
# data plane. The program is target/debug/millrace, or what MILLRACE_BINARY names.
set -eu
binary=${MILLRACE_BINARY:-$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)/target/debug/millrace}
[ -x "$binary" ] || {
    echo "with-server.sh: there is no $binary: run \`cargo build\` at the root, or name another in MILLRACE_BINARY" >&2
    exit 1
}
# It would take it for a setting.
unset MILLRACE_BINARY
work=$(mktemp -d)
# PostgreSQL runs as a user of its own where this is root.
chmod 755 "$work"
server=
stop() {
    [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
    rm -rf "$work"
}
trap stop EXIT

MILLRACE_DATA_DIR=$work/data MILLRACE_DATA_PLANE__LISTEN=127.0.0.1:0 MILLRACE_CONTROL_PLANE__LISTEN=127.0.0.1:0 \
    MILLRACE_RECEIPT__KEY=of-this-check-only-0123 MILLRACE_LOG__LEVEL=warn "$binary" serve >"$work/log" 2>&1 &
server=$!
address() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$work/data/addresses.json" 2>/dev/null | head -n 1; }
tries=0
until control=$(address control_plane) && [ -n "$control" ] && curl -fs -o /dev/null "http://$control/readyz"; do
    tries=$((tries + 1))
    kill -0 "$server" 2>/dev/null && [ "$tries" -lt 1200 ] || { cat "$work/log" >&2 && exit 1; }
    sleep 0.1
done
curl -fs -o /dev/null -X PUT "http://$control/admin/v1/skus/A" -d '{"unit_price": 100, "currency": "EUR", "total": 10}'
MILLRACE_URL=http://$(address data_plane)
export MILLRACE_URL
"$@"
