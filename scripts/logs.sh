#!/usr/bin/env bash
# Follows the logs, until Ctrl-C:   ./scripts/logs.sh [--all] [web|postgres|redis]
# It leaves out successful health checks, which come several times a minute: --all shows them, too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

left_out='path=/health status=200'
if is "${1:-}" --all; then shift && left_out='no line contains this'; fi
[[ ${1:-} =~ ^(|web|postgres|redis)$ && $# -le 1 ]] || die 'usage: ./scripts/logs.sh [--all] [web|postgres|redis]'

find_mode
[[ -n $mode ]] || not_running
if is "$mode" docker; then
  docker compose logs --follow --tail 500 "$@"
else
  # shellcheck disable=SC2086 # without a name, all of them
  tail -n 500 -F "$state"/${1:-*}.log
fi | grep --line-buffered -v "$left_out"
