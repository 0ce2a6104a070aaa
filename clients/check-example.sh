#!/bin/sh
# usage: check-example.sh COMMAND [ARG]...    (run by with-server.sh)
# The command, with URL TOKEN USER SKU CLICK behind it, places one order a click, and fails for a SKU that is unknown.
set -eu
first=$("$@" "$MILLRACE_URL" '' u-1 A click-1)
again=$("$@" "$MILLRACE_URL" '' u-1 A click-1)
other=$("$@" "$MILLRACE_URL" '' u-1 A click-2)
case $first in
*' pending_payment') ;;
*) echo "check-example.sh: placed, but: $first" >&2 && exit 1 ;;
esac
[ "$first" = "$again" ] || { echo "check-example.sh: one click, two orders: $first, $again" >&2 && exit 1; }
[ "$first" != "$other" ] || { echo "check-example.sh: two clicks, one order: $first" >&2 && exit 1; }
if "$@" "$MILLRACE_URL" '' u-1 nothing click-3 >/dev/null 2>&1; then
    echo "check-example.sh: an unknown SKU was sold" >&2
    exit 1
fi
echo "an order a click: $first, $other"
