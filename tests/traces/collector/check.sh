#!/bin/sh
# The OpenTelemetry Collector takes the spans of a running Millrace. Needs Go; it is built into target/collector.
set -eu
cd "$(dirname "$0")/../../.."
mkdir -p target/collector
(cd tests/traces/collector && go build -o ../../../target/collector/collector .)
MILLRACE_COLLECTOR=$PWD/target/collector/collector cargo test --quiet --test traces -- --ignored the_collector_itself
