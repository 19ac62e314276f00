#!/usr/bin/env bash
# Follows the logs, until Ctrl-C:   ./scripts/logs.sh [web|postgres|redis]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

case ${1:-} in
'' | web | postgres | redis) ;;
*) die "usage: ./scripts/logs.sh [web|postgres|redis]" ;;
esac
case $(running_mode || true) in
docker) exec docker compose logs --follow --tail 50 "$@" ;;
local)
  if [[ -n ${1:-} ]]; then exec tail -n 50 -F "$state/$1.log"; fi
  exec tail -n 20 -F "$state/web.log" "$state/postgres.log" "$state/redis.log"
  ;;
*) die 'the stack is not running: start it with ./scripts/start.sh' ;;
esac
