#!/usr/bin/env bash
# Shows every second how the three services are, and where the answers of that second came from, while another
# terminal runs a demonstration. On a terminal it draws in place until Ctrl-C; elsewhere it writes a line a second.
#
#   ./scripts/monitor.sh [SECONDS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ $# -gt 1 || ! ${1:-1} =~ ^[1-9][0-9]{0,8}$ ]]; then die 'usage: ./scripts/monitor.sh [SECONDS]'; fi
attach

# fetch PATH: leaves the answer in $body, and nothing where there is none. While a server is unresponsive it takes 2 s.
fetch() { body=$(http -m 3 "$url$1" 2>/dev/null) || body=''; }

# look: asks for everything that is shown. Without an answer the figures are dashes, and the counts stay as they were.
# In $new is what was counted since the last look. A service that started again began at 0.
# shellcheck disable=SC2034 # show finds web and postgres by their names
look() {
  local i
  time=$(date +%T) web='no answer' postgres='?' redis='?' figures='hit rate -  keys -  memory -  products -'
  fetch /services
  if [[ $body =~ \"postgres\":\{\"status\":\"([a-z]*)\".*\"redis\":\{\"status\":\"([a-z]*)\" ]]; then
    web=running postgres=${BASH_REMATCH[1]} redis=${BASH_REMATCH[2]}
  fi
  fetch /stats
  if has "$body" '"hits"'; then
    now=("$(field hits)" "$(field misses)" "$(field bypasses)")
    figures=$(awk -v rate="$(field hit_rate)" 'BEGIN { printf "hit rate %d%%", 100 * rate }')
    figures+="  keys $(field keys | sed s/null/-/)  memory $(field memory_used)  products $(field products)"
    if is "$redis" connected && has "$body" '"trusted":false'; then redis='connected, not yet in use'; fi
  elif [[ -n $body ]]; then
    web=$(field detail) # what the service says when PostgreSQL is unavailable
  fi
  for i in 0 1 2; do
    new[i]=$((now[i] < before[i] ? now[i] : now[i] - before[i]))
  done
  before=("${now[@]}")
}

# show: what look has found, with $between before each item. On a terminal the counts have bars. The longest bar of the
# last seconds has $width columns, and is forgotten bit by bit.
show() {
  local name colour i bar width=0 counts=(hits misses bypasses) colours=("$green" "$red" "$bold")
  if [[ -t 1 ]]; then width=$(($(tput cols 2>/dev/null || echo 80) - 24)); fi
  peak=$(printf '%d\n' 10 $((peak * 9 / 10)) "${new[@]}" | sort -n | tail -n 1)
  printf '%s%s%s %s%s' "$before_all" "$bold" "$project" "$time" "$plain"
  for name in web postgres redis; do
    if [[ ${!name} =~ ^(running|connected)$ ]]; then colour=$green; else colour=$red; fi
    printf '%s%-10s%s%s%s' "$between" "$name" "$colour" "${!name}" "$plain"
  done
  for i in 0 1 2; do
    bar=$(printf '%*s' $((width > 0 ? new[i] * width / peak : 0)) '')
    printf '%s%-10s%s%s%s %d' "$between" "${counts[i]}" "${colours[i]}" "${bar// /█}" "$plain" "${new[i]}"
  done
  printf '%s%s%s' "$between" "$figures" "$after_all"
}

# A terminal gets a picture on a screen of its own, without a cursor and without wrapped lines. It is drawn from the
# top, each line erases what was to its right, and the last one what was below. However this ends, the terminal is as it was.
before_all='' between='  ' after_all=$'\n'
if [[ -t 1 ]]; then
  before_all=$'\e[H' between=$'\e[K\n  ' after_all=$'\e[K\e[J'
  trap 'printf "\e[?7h\e[?25h\e[?1049l"' EXIT
  printf '\e[?1049h\e[?25l\e[?7l'
fi
trap 'exit 0' INT TERM HUP

new=() now=(0 0 0) before=(0 0 0) peak=10
look
for ((second = 1; second <= ${1:-999999999}; second++)); do
  sleep 1
  look
  show
done
