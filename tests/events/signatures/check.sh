#!/bin/sh
# Messages of a running Millrace, verified by the libraries of Standard Webhooks in Python and JavaScript, each with each
# secret, and refused once they are altered. The libraries are fetched into target/signatures.
set -eu
cd "$(dirname "$0")/../../.."
work=$PWD/target/signatures
mkdir -p "$work"
MILLRACE_MESSAGES=$work/messages.json cargo test --quiet --test events -- messages_are_signed
[ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet standardwebhooks==1.1.0
"$work/venv/bin/python" tests/events/signatures/verify.py "$work/messages.json"
npm install --silent --no-fund --no-audit --prefix "$work" standardwebhooks@1.0.0
NODE_PATH=$work/node_modules node tests/events/signatures/verify.cjs "$work/messages.json"
