#!/usr/bin/env bash
# Shows every second the state of the three services, and where the answers of that second came from, while another
# terminal runs a demonstration. On a terminal it draws in place until Ctrl-C; elsewhere it prints a line per second.
#
#   ./scripts/monitor.sh [SECONDS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ $# -gt 1 || ! ${1:-1} =~ ^[1-9][0-9]{0,8}$ ]]; then die 'usage: ./scripts/monitor.sh [SECONDS]'; fi
attach

# look: asks for everything that is shown. Without an answer the figures are dashes, and the counts stay as they were.
# shellcheck disable=SC2034 # show finds web and postgres by their names
look() {
  web='no answer' postgres='?' redis='?' figures='hit rate -  keys -  memory -  products -'
  request GET /services >/dev/null
  if [[ $body =~ \"postgres\":\{\"status\":\"([a-z]*)\".*\"redis\":\{\"status\":\"([a-z]*)\" ]]; then
    web=running postgres=${BASH_REMATCH[1]} redis=${BASH_REMATCH[2]}
  fi
  request GET /stats >/dev/null
  if has "$body" '"hits"'; then
    now=("$(field hits)" "$(field misses)" "$(field bypasses)")
    figures=$(awk -v rate="$(field hit_rate)" 'BEGIN { printf "hit rate %d%%", 100 * rate }')
    figures+="  keys $(field keys | sed s/null/-/)  memory $(field memory_used)  products $(field products)"
    if is "$redis" connected && has "$body" '"trusted":false'; then redis='connected, not yet in use'; fi
  fi
}

# show: prints what look has found, with $between before each item. The counts are those of the last second; a restarted
# service counts from 0. On a terminal they have bars, with a block per request, as many as fit.
show() {
  local name colour bar new i=0 colours=("$green" "$red" "$bold")
  printf '%s%s%s %s%s' "$first" "$bold" "$project" "$(date +%T)" "$plain"
  for name in web postgres redis; do
    if [[ ${!name} =~ ^(running|connected)$ ]]; then colour=$green; else colour=$red; fi
    printf '%s%-10s%s%s%s' "$between" "$name" "$colour" "${!name}" "$plain"
  done
  for name in hits misses bypasses; do
    new=$((now[i] < before[i] ? now[i] : now[i] - before[i]))
    bar=$(printf '%*s' $((new < width ? new : width)) '')
    printf '%s%-10s%s%s%s %d' "$between" "$name" "${colours[i++]}" "${bar// /█}" "$plain" "$new"
  done
  before=("${now[@]}")
  printf '%s%s\n' "$between" "$figures"
}

# A terminal gets a picture, drawn anew each second.
first='' between='  ' width=0
if [[ -t 1 ]]; then first=$'\e[H\e[2J' between=$'\n  ' width=$(($(tput cols 2>/dev/null || echo 80) - 24)); fi

trap 'exit 0' INT TERM HUP
now=(0 0 0)
look
before=("${now[@]}")
for ((second = 1; second <= ${1:-999999999}; second++)); do
  sleep 1
  look
  show
done
