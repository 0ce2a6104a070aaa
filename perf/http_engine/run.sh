#!/bin/sh
# The hardened engine beside stock may_minihttp: alternating, plain and 16 requests a pipeline.
# usage: run.sh [ROUNDS] [SECONDS]; see README.md.
set -eu
rounds=${1:-8}
seconds=${2:-3}
cd "$(dirname "$0")/../.."
command -v wrk >/dev/null || { echo "run.sh: install wrk (apt-get install wrk)" >&2; exit 1; }
cargo build --release --quiet --example http_constant
bin=${CARGO_TARGET_DIR:-target}/release/examples/http_constant
work=$(mktemp -d)
pids=
trap 'kill $pids 2>/dev/null || true; rm -rf "$work"' EXIT
port() { [ "$1" = hardened ] && echo 9101 || echo 9102; }
for engine in hardened stock; do
    "$bin" "$engine" "127.0.0.1:$(port $engine)" &
    pids="$pids $!"
done
sleep 1
cat >"$work/pipe.lua" <<'LUA'
init = function()
  local requests = {}
  for i = 1, 16 do requests[i] = wrk.format("GET", "/") end
  all = table.concat(requests)
end
request = function() return all end
LUA
measure() { # engine, mode: requests a second
    [ "$2" = plain ] && script="" || script="-s $work/pipe.lua"
    # shellcheck disable=SC2086
    wrk -t1 -c64 "-d$seconds" $script "http://127.0.0.1:$(port "$1")/" |
        sed -n 's/^Requests\/sec: *//p'
}
echo "commit $(git rev-parse --short HEAD), $(nproc) cores of $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), load $(cut -d' ' -f1 /proc/loadavg)"
for mode in plain pipelined; do
    measure hardened $mode >/dev/null
    measure stock $mode >/dev/null
    : >"$work/$mode"
    round=1
    while [ "$round" -le "$rounds" ]; do
        # Who goes first alternates as well.
        if [ $((round % 2)) -eq 0 ]; then
            h=$(measure hardened $mode) s=$(measure stock $mode)
        else
            s=$(measure stock $mode) h=$(measure hardened $mode)
        fi
        echo "$h $s" | awk -v m=$mode -v r="$round" '{printf "%s round %d: hardened %.0f/s, stock %.0f/s, ratio %.3f\n", m, r, $1, $2, $1/$2}'
        echo "$h $s" >>"$work/$mode"
        round=$((round + 1))
    done
    awk '{print $1/$2}' "$work/$mode" | sort -n | awk -v m=$mode '
        {r[NR] = $1; sum += $1}
        END {
            median = NR % 2 ? r[(NR + 1) / 2] : (r[NR / 2] + r[NR / 2 + 1]) / 2
            printf "%s: hardened / stock = %.3f (median of %d rounds; %.3f to %.3f)\n", m, median, NR, r[1], r[NR]
        }'
done
