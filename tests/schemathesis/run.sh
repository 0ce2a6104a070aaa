#!/bin/sh
# Throws what its OpenAPI document allows, and what it forbids, at both planes of a real server:
# no answer may be a 500 or one that the document does not know.
#
# Then promtool looks at the metrics, where it is installed (Debian: `prometheus`).
#
# `./x contract` calls it with the paths of `millrace` and of `schemathesis`; what follows goes
# to schemathesis, for example `--max-examples 200`.
set -eu
millrace=$1
schemathesis=$2
shift 2

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
work=$(mktemp -d)
# Our own PostgreSQL runs as another user where we are root.
chmod 755 "$work"
server=
stop() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server" || true; }
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 1' INT TERM

token=contract-token
# hooks.py signs with it: whsec_ and base64.
CONTRACT_SECRET=whsec_Y29udHJhY3QtdGVzdC1zZWNyZXQ=
export CONTRACT_SECRET
MILLRACE_DATA_DIR=$work/data MILLRACE_LOG__LEVEL=warn \
    MILLRACE_DATA_PLANE__LISTEN=127.0.0.1:0 MILLRACE_DATA_PLANE__TOKEN=$token \
    MILLRACE_CONTROL_PLANE__LISTEN=127.0.0.1:0 MILLRACE_CONTROL_PLANE__TOKEN=$token \
    MILLRACE_ORDERS__TIMEOUT_MS=2000 \
    MILLRACE_PAYMENTS__STANDARD__SECRET=$CONTRACT_SECRET MILLRACE_PAYMENTS__STRIPE__SECRET=$CONTRACT_SECRET \
    MILLRACE_PAYMENTS__ORPHAN_CHECK_MS=600000 \
    "$millrace" serve 2>"$work/log" &
server=$!

address() {
    sed -n "s/.*\"$1\": \"\([^\"]*\)\".*/\1/p" "$work/data/addresses.json"
}
tries=0
until [ -e "$work/data/addresses.json" ] &&
    curl -sf "http://$(address control_plane)/readyz" >/dev/null; do
    tries=$((tries + 1))
    if [ $tries -gt 300 ] || ! kill -0 "$server" 2>/dev/null; then
        cat "$work/log" >&2
        exit 1
    fi
    sleep 0.2
done

status=0
plane() {
    url=http://$(address "$1")
    echo "== $1 at $url"
    shift
    SCHEMATHESIS_HOOKS=$here/hooks.py "$schemathesis" --config-file "$here/schemathesis.toml" \
        run "$here/../../src/http/openapi.yaml" --url "$url" \
        --header "Authorization: Bearer $token" --no-color \
        "$@" || status=1
}
# The sale is not to be paused while orders are placed: the data plane comes first.
curl -sf -X PUT "http://$(address control_plane)/admin/v1/skus/0" \
    -H "Authorization: Bearer $token" \
    -d '{"unit_price": 100, "currency": "EUR", "total": 1000000}' >/dev/null
plane data_plane --include-tag 'data plane' "$@"
plane control_plane --include-tag 'control plane' "$@"

if command -v promtool >/dev/null 2>&1; then
    echo "== promtool check metrics"
    curl -sf "http://$(address control_plane)/metrics" | promtool check metrics || status=1
fi
echo "== stop"
kill "$server"
wait "$server" || { echo "the server did not stop clean"; status=1; }
server=
# A payment that cannot be booked is an error on purpose.
if grep -E '"level":"ERROR"| ERROR ' "$work/log" | grep -v 'look the payment up at the provider'; then status=1; fi
exit $status
