#!/bin/sh
# The programs that people really use, against a real Millrace: curl, oha or wrk, nginx as a reverse
# proxy, Chromium. None of them may need a special case. `./x peers` runs it.
set -eu
millrace=${1:?usage: run.sh PATH-TO-MILLRACE}
work=$(mktemp -d)
chmod 755 "$work"
server='' nginx='' driven=''
failed=0

stop() {
    [ -z "$driven" ] || kill "$driven" 2>/dev/null || true
    [ -z "$nginx" ] || kill "$nginx" 2>/dev/null || true
    [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
    rm -rf "$work"
}
trap stop EXIT

have() { command -v "$1" >/dev/null 2>&1; }

# $1 what, $2 expected, $3 got
same() {
    if [ "$2" = "$3" ]; then
        echo "ok      $1"
    else
        echo "FAILED  $1: expected \"$2\", got \"$3\""
        failed=1
    fi
}

skip() { echo "skipped $1"; }

# --- A Millrace of its own ------------------------------------------------------------------------

MILLRACE_DATA_DIR=$work/data MILLRACE_DATA_PLANE__LISTEN=127.0.0.1:0 MILLRACE_RECEIPT__KEY=of-peers-only-0123 \
    MILLRACE_CONTROL_PLANE__LISTEN=127.0.0.1:0 MILLRACE_LOG__LEVEL=warn \
    "$millrace" serve >"$work/millrace.log" 2>&1 &
server=$!
address() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$work/data/addresses.json" 2>/dev/null | head -n 1; }
tries=0
until data=$(address data_plane) && control=$(address control_plane) && [ -n "$control" ] &&
    curl -fs -o /dev/null "http://$control/readyz"; do
    tries=$((tries + 1))
    kill -0 "$server" 2>/dev/null && [ "$tries" -lt 600 ] || { cat "$work/millrace.log"; exit 1; }
    sleep 0.1
done
curl -fs -o /dev/null -X PUT "http://$control/admin/v1/skus/A" \
    -d '{"unit_price": 100, "currency": "EUR", "total": 100000}'

order() { printf '{"user_id": "%s", "sku_id": "A"}' "$1"; }
json='Content-Type: application/json'

# --- curl -----------------------------------------------------------------------------------------

# Prints statuses; $1 is a base address, the rest goes to curl.
statuses() { curl -s -o /dev/null -w '%{http_code} ' "$@"; }

for plane in "data plane:$data/v1/skus/A" "control plane:$control/healthz"; do
    name=${plane%%:*} url=http://${plane#*:}
    same "curl, $name: three requests on one connection" "200+1 200+0 200+0 " \
        "$(curl -s -o /dev/null -o /dev/null -o /dev/null -w '%{http_code}+%{num_connects} ' "$url" "$url" "$url")"
    same "curl, $name: HTTP/1.0" "200 " "$(statuses --http1.0 "$url")"
    same "curl, $name: HEAD" "200 " "$(statuses -I "$url")"
    same "curl, $name: an offer of HTTP/2 is passed over" "200 " "$(statuses --http2 "$url")"
done
printf '{"user_id": "u", "sku_id": "A", "attributes": {"a": "%020000d"}}' 0 >"$work/large.json"
same "curl: Expect: 100-continue before 20 KiB, which are too many" "413 " \
    "$(statuses -H "$json" -H 'Expect: 100-continue' --data-binary "@$work/large.json" "http://$data/v1/orders")"
: >"$work/batch.ndjson"
at=0
while [ "$at" -lt 600 ]; do
    order "batch-$at" >>"$work/batch.ndjson"
    printf '\n' >>"$work/batch.ndjson"
    at=$((at + 1))
done
continued() {
    curl -sv -o "$work/answer" -H 'Content-Type: application/x-ndjson' -H 'Expect: 100-continue' \
        --data-binary "@$work/batch.ndjson" "http://$1/v1/orders:batch" 2>&1 |
        sed -n 's/^< HTTP\/1.1 \([0-9]*\).*/\1/p' | tr '\n' ' '
}
same "curl: Expect: 100-continue before a batch of $(wc -c <"$work/batch.ndjson") bytes" "100 200 " "$(continued "$data")"
same "curl: a verdict for each of its lines" 600 "$(wc -l <"$work/answer" | tr -d ' ')"
same "curl: chunks are refused" "501 " \
    "$(order u-chunks | statuses -H "$json" -H 'Transfer-Encoding: chunked' --data-binary @- "http://$data/v1/orders")"
same "curl: an order" "201 " "$(order u-curl | statuses -H "$json" --data-binary @- "http://$data/v1/orders")"

# --- A load generator -----------------------------------------------------------------------------

if have oha; then
    same "oha: 64 connections" '"200":20000' \
        "$(oha -n 20000 -c 64 --no-tui --output-format json "http://$data/v1/skus/A" | tr -d ' \n' | sed -n 's/.*"statusCodeDistribution":{\([^}]*\)}.*/\1/p')"
else
    skip "oha is not installed"
fi
if have wrk; then
    wrk -t1 -c64 -d2 "http://$data/v1/skus/A" >"$work/wrk"
    same "wrk: 64 connections, no error" 0 "$(grep -cE 'Socket errors|Non-2xx' "$work/wrk" || true)"
else
    skip "wrk is not installed"
fi

# --- nginx ----------------------------------------------------------------------------------------

if have nginx || [ -x /usr/sbin/nginx ]; then
    cat >"$work/nginx.conf" <<CONF
daemon off;
worker_processes 1;
pid $work/nginx.pid;
error_log $work/nginx.log warn;
events { worker_connections 256; }
http {
    access_log off;
    client_body_temp_path $work/body; proxy_temp_path $work/proxy; fastcgi_temp_path $work/f;
    uwsgi_temp_path $work/u; scgi_temp_path $work/s;
    client_max_body_size 4m;
    upstream data { server $data; keepalive 16; }
    upstream control { server $control; keepalive 4; }
    server {
        listen unix:$work/nginx.sock;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host \$host;
        location /v1/ { proxy_pass http://data; }
        location / { proxy_pass http://control; }
    }
}
CONF
    PATH=$PATH:/usr/sbin nginx -c "$work/nginx.conf" -p "$work" 2>"$work/nginx.start" &
    nginx=$!
    tries=0
    until [ -S "$work/nginx.sock" ]; do
        tries=$((tries + 1))
        kill -0 "$nginx" 2>/dev/null && [ "$tries" -lt 100 ] || { cat "$work/nginx.start"; exit 1; }
        sleep 0.1
    done
    proxied() { statuses --unix-socket "$work/nginx.sock" "$@"; }
    through='nginx with upstream keep-alive'
    same "$through: an order" "201 " \
        "$(order u-nginx | proxied -H "$json" -H 'Idempotency-Key: k' --data-binary @- http://shop/v1/orders)"
    same "$through: its replay" "200 " \
        "$(order u-nginx | proxied -H "$json" -H 'Idempotency-Key: k' --data-binary @- http://shop/v1/orders)"
    same "$through: chunks become a length" "201 " \
        "$(order u-chunks | proxied -H "$json" -H 'Transfer-Encoding: chunked' --data-binary @- http://shop/v1/orders)"
    same "$through: an unknown SKU" "404 " "$(proxied http://shop/v1/skus/none)"
    same "$through: 20 KiB" "413 " \
        "$(proxied -H "$json" --data-binary "@$work/large.json" http://shop/v1/orders)"
    same "$through: a batch" "200 " \
        "$(proxied -H 'Content-Type: application/x-ndjson' --data-binary "@$work/batch.ndjson" http://shop/v1/orders:batch)"
    same "$through: HEAD" "200 " "$(proxied -I http://shop/v1/skus/A)"
    same "$through: the control plane" "200 " "$(proxied http://shop/healthz)"
    same "$through: its SKU administration" "200 " \
        "$(proxied -X PUT http://shop/admin/v1/skus/A -d '{"unit_price": 100, "currency": "EUR", "total": 100001}')"
    for path in /v1/skus/A /v1/skus/none /v1/nothing /v1/orders; do
        same "$through: the same body as without, $path" \
            "$(curl -s "http://$data$path" | sed 's/"now":"[^"]*"//')" \
            "$(curl -s --unix-socket "$work/nginx.sock" "http://shop$path" | sed 's/"now":"[^"]*"//')"
    done
    # A thousand requests on kept connections: one that the server closes too early is a 502.
    at=0
    : >"$work/urls"
    while [ "$at" -lt 1000 ]; do
        printf 'url = "http://shop/v1/skus/A"\noutput = "/dev/null"\n' >>"$work/urls"
        at=$((at + 1))
    done
    same "$through: a thousand in a row" "1000 200" \
        "$(curl -s --unix-socket "$work/nginx.sock" -w '%{http_code}\n' -K "$work/urls" | sort | uniq -c | sed 's/^ *//')"
    same "$through: it complains of nothing" "" "$(grep -v 'buffered to a temporary file' "$work/nginx.log" || true)"
else
    skip "nginx is not installed"
fi

# --- Chromium -------------------------------------------------------------------------------------

browser=
for name in chromium chromium-browser google-chrome; do
    if have "$name"; then browser=$name && break; fi
done
if [ -n "$browser" ]; then
    page() {
        "$browser" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
            --disable-background-networking --disable-component-update --disable-sync \
            --user-data-dir="$work/browser" --dump-dom "$1" 2>/dev/null
    }
    same "Chromium: a SKU of the data plane" 1 "$(page "http://$data/v1/skus/A" | grep -c '"sku_id":"A"')"
    same "Chromium: a problem of the data plane" 1 "$(page "http://$data/nothing" | grep -c 'not_found')"
    same "Chromium: the control plane" 1 "$(page "http://$control/metrics" | grep -c '^# TYPE millrace_requests_total\|^# HELP' | sed 's/^[1-9].*/1/')"
    # The dashboard with a hand on the mouse, over the pipe on which the browser takes messages that end in NUL.
    curl -fs -o /dev/null -X PUT "http://$control/admin/v1/skus/B" \
        -d '{"unit_price": 100, "currency": "EUR", "total": 50000000}'
    mkfifo "$work/orders"
    : >"$work/answers"
    "$browser" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
        --disable-component-update --disable-sync --user-data-dir="$work/driven" --remote-debugging-pipe \
        3<"$work/orders" 4>"$work/answers" 2>"$work/browser.log" &
    driven=$!
    exec 8>"$work/orders"
    tab=''
    # $1 method, $2 parameters; the answer is in $answer.
    tell() {
        # Counted in a file: a shell between $( and ) keeps no variable.
        echo . >>"$work/told"
        at=$(wc -l <"$work/told" | tr -d ' ') tries=0
        printf '{"id":%d,%s"method":"%s","params":%s}\0' "$at" "$tab" "$1" "$2" >&8
        until answer=$(tr '\0' '\n' <"$work/answers" | grep "^{\"id\":$at,"); do
            tries=$((tries + 1))
            kill -0 "$driven" 2>/dev/null && [ "$tries" -lt 600 ] || { cat "$work/browser.log" && return 1; }
            sleep 0.1
        done
    }
    told() { printf '%s' "$answer" | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
    # Evaluates $1, a promise of a text without quotes.
    seen() {
        tell Runtime.evaluate "{\"awaitPromise\":true,\"returnByValue\":true,\"expression\":\"$1\"}" && told value
    }
    # Waits until $1 is true of the page, and then takes $2 from it; 60 seconds at most.
    once() {
        seen "new Promise(done => { const until = Date.now() + 60000; const look = setInterval(() => { try { \
            if ($1) { clearInterval(look); done(String($2)); return; } } catch { } \
            if (Date.now() > until) { clearInterval(look); done('never'); } }, 50); })" | tr -d '\\'
    }
    button="document.getElementById('preflight')"
    report="document.getElementById('preflight-report')"
    chips="[...$report.querySelectorAll('.chip')]"
    tell Target.createTarget '{"url":"about:blank"}'
    tell Target.attachToTarget "{\"flatten\":true,\"targetId\":\"$(told targetId)\"}"
    tab="\"sessionId\":\"$(told sessionId)\","
    tell Runtime.enable '{}'
    tell Log.enable '{}'
    tell Page.navigate "{\"url\":\"http://$control/\"}"
    same "Chromium, dashboard: the live figures arrive" true \
        "$(once "document.body.innerText.includes('50,000,000')" true)"
    once true "(location.hash = '#/checks')" >/dev/null
    same "Chromium, dashboard: the button of the preflight is off while it measures" true \
        "$(once "$button" "($button.click(), $button.disabled)")"
    same "Chromium, dashboard: its table has every check" 14 \
        "$(once "$chips.length && !$button.disabled" "$chips.length")"
    same "Chromium, dashboard: a check that fails is visible" "bad WAL segments" \
        "$(once true "$chips.filter(chip => chip.checkVisibility() && chip.textContent === 'bad').map(chip => 'bad ' + chip.closest('tr').cells[1].textContent)[0]")"
    same "Chromium, dashboard: its console has no error" 0 \
        "$(tr '\0' '\n' <"$work/answers" | grep -c 'Runtime.exceptionThrown\|Log.entryAdded\|"type":"error"\|"type":"warning"')"
    exec 8>&-
    kill "$driven" 2>/dev/null || true
    wait "$driven" 2>/dev/null || true
else
    skip "Chromium is not installed"
fi

# --- The end --------------------------------------------------------------------------------------

if "$millrace" audit --help >/dev/null && audit=$(curl -s "http://$control/admin/v1/audit"); then
    same "the audit agrees" 1 "$(printf '%s' "$audit" | tr -d ' \n' | grep -c '"ok":true')"
fi
same "nothing was logged as a warning" "" "$(grep -iE 'warn|error|panic' "$work/millrace.log" | grep -v 'started without\|no backups\|our own PostgreSQL' || true)"
exit $failed
