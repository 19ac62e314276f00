#!/usr/bin/env bash
# Shows every second how the three services are, and where the answers of that second came from, while another
# terminal runs a demonstration. On a terminal it draws in place until Ctrl-C; elsewhere it writes a line a second.
#
#   ./scripts/monitor.sh [SECONDS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ $# -gt 1 || ! ${1:-1} =~ ^[1-9][0-9]{0,8}$ ]]; then die 'usage: ./scripts/monitor.sh [SECONDS]'; fi
attach

# fetch PATH: leaves the answer in $body, and nothing where there is none. While a server is silent it takes 2 s.
fetch() { body=$(curl -s -m 3 "$url$1") || body=''; }

# look: asks for everything that is shown. Without an answer the figures are dashes, and the counts stay as they were.
# In $new is what was counted since the last look. A service that started again began at 0.
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
    web=$(field detail) # what the service says when PostgreSQL is away
  fi
  for i in 0 1 2; do
    new[i]=$((now[i] < before[i] ? now[i] : now[i] - before[i]))
  done
  before=("${now[@]}")
}

line() {
  printf '%s  web: %s  postgres: %s  redis: %s  hits %d  misses %d  bypasses %d  %s\n' \
    "$time" "$web" "$postgres" "$redis" "${new[@]}" "$figures"
}

# draw: the same as a picture. Each line ends by erasing what was to its right, and the last what was below.
draw() {
  local name colour width
  printf '\e[H%s%s   %s%s\e[K\n\e[K\n' "$bold" "$project" "$time" "$plain"
  for name in web postgres redis; do
    if [[ ${!name} =~ ^(running|connected)$ ]]; then colour=$green; else colour=$red; fi
    printf '  %-10s%s%s%s\e[K\n' "$name" "$colour" "${!name}" "$plain"
  done
  printf '\e[K\n'
  width=$(($(tput cols) - 24)) # of the longest bar of the last seconds, which is forgotten bit by bit
  peak=$(printf '%d\n' 10 $((peak * 9 / 10)) "${new[@]}" | sort -n | tail -n 1)
  bar hits "${new[0]}" "$green"
  bar misses "${new[1]}" "$red"
  bar bypasses "${new[2]}" "$bold"
  printf '\e[K\n  %s\e[K\e[J' "$figures"
}
bar() {
  local blocks=''
  if ((width > 0)); then printf -v blocks '%*s' $(($2 * width / peak)) ''; fi
  printf '  %-10s%s%s%s %d\e[K\n' "$1" "$3" "${blocks// /█}" "$plain" "$2"
}

# The picture has a screen of its own, without a cursor and without wrapped lines. However this ends, the terminal
# is as it was.
show=line
if [[ -t 1 ]]; then
  show=draw
  trap 'printf "\e[?7h\e[?25h\e[?1049l"' EXIT
  printf '\e[?1049h\e[?25l\e[?7l'
fi
trap 'exit 0' INT TERM HUP

new=() now=(0 0 0) before=(0 0 0) peak=10
look
for ((second = 1; second <= ${1:-999999999}; second++)); do
  sleep 1
  look
  $show
done
