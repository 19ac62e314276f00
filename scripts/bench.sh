#!/usr/bin/env bash
# Measures how fast the service is, beside a bare handler that writes the same bytes from memory. bench_test.go does the
# work and explains it. It touches no running stack, and leaves nothing behind. It takes 6 to 15 minutes.
#
#   ./scripts/bench.sh                           everything
#   ROUNDS=1 GROWTH= ./scripts/bench.sh          one round instead of three, and no large catalogues
#   SECONDS_EACH=2 CLIENTS=64 ./scripts/bench.sh longer measurements, and only with 64 connections
#   BASE=/tmp/web-before ./scripts/bench.sh      another build of the service beside it, in the same rounds
#   BENCH=Start ./scripts/bench.sh               only the benchmarks whose names match
#   LOG_LEVEL=info ./scripts/bench.sh            with the access log (into a file)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

is "$(uname)" Linux || die 'this needs Linux: it reads processor time and memory from /proc'
need_servers pgbouncer
title "$(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(go version | cut -d ' ' -f 3)"

exec go test -run '^$' -bench "${BENCH:-.}" -benchtime "${ROUNDS:-3}x" -timeout 2h .
