#!/usr/bin/env bash
# Measures how fast the service is, beside a bare handler and beside textbook cache-aside. bench_test.go does the work
# and explains it. It touches no running stack, and leaves nothing behind. It takes about 8 minutes.
#
#   ./scripts/bench.sh                              everything
#   ROUNDS=1 ./scripts/bench.sh                     one round instead of three
#   BENCH='/products=8$/cached' ./scripts/bench.sh  a part of the table, as "go test -bench" takes it
#   BASE=/tmp/web-before ./scripts/bench.sh         another build of the service beside it, in the same rounds
#   LOG_LEVEL=info ./scripts/bench.sh               with the access log (into a file)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

is "$(uname)" Linux || die 'this needs Linux: it reads processor time and memory from /proc'
need_servers pgbouncer
title "$(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(go version | cut -d ' ' -f 3)"

exec go test -run '^$' -bench "${BENCH:-.}" -benchtime "${ROUNDS:-3}x" -timeout 2h .
