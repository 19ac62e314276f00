#!/usr/bin/env bash
# Starts the stack and waits until PostgreSQL, Redis and the service answer. Starting twice is harmless.
#
#   ./scripts/start.sh
#   WEB_PORT=9000 ./scripts/start.sh              # another port for the service
#   DESAFIO3_MODE=local ./scripts/start.sh        # without Docker, even where there is one ("docker": with it)
#
# With Docker where an engine with Compose v2 answers and the images can be had; otherwise the same three
# processes run straight on the machine, with their data, logs and ports in .local. The other variables
# are in docker-compose.yml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

if [[ -n ${PORT:-} ]]; then export WEB_PORT=${WEB_PORT:-$PORT}; fi

# within SECONDS COMMAND...: runs it quietly, and gives it no more time than that.
within() {
  local limit=$1 pid
  shift
  "$@" </dev/null >/dev/null 2>&1 &
  pid=$!
  if wait_for "$limit" gone "$pid"; then wait "$pid"; else kill "$pid"; return 1; fi
}
gone() { ! kill -0 "$1" 2>/dev/null; }

# why_not_docker: prints what is missing for Docker, or nothing when all is there.
why_not_docker() {
  local version image
  have docker || { echo 'there is no docker command'; return; }
  within 15 docker info || { echo 'no Docker engine answers'; return; }
  version=$(docker compose version --short 2>/dev/null || true)
  version=${version#v} version=${version%%.*}
  ((${version:-0} >= 2)) || { echo 'Docker Compose v2 is missing'; return; }
  for image in $(base_images); do
    docker image inspect "$image" >/dev/null 2>&1 || within 15 docker manifest inspect "$image" ||
      { echo "the image $image is not here, and no registry answers"; return; }
  done
}

# named_ports: "WEB_PORT 8000" for each port that Compose is about to publish.
named_ports() {
  docker compose config | awk '
    $1 == "target:" { name = $2 == 8000 ? "WEB_PORT" : $2 == 5432 ? "POSTGRES_PORT" : "REDIS_PORT" }
    $1 == "published:" { gsub(/"/, "", $2); print name, $2 }'
}

# what_it_logged: the last lines, without those of the health checks.
what_it_logged() { grep -v path=/health | tail -n 20 | sed 's/^/    | /' || true; }

refuse_port() { die "port $2 is already in use: stop what uses it, or choose another one with $1=..."; }

start_docker() {
  local name port service found bad=''
  title 'Starting with Docker Compose'
  if [[ -e $state ]]; then say "What the stack without Docker holds stays in $state."; fi
  docker compose config --quiet || die 'Compose does not take these variables'
  while read -r name port; do
    if port_taken "$port" &&
      [[ -z $(docker ps -q -f "publish=$port" -f "label=com.docker.compose.project=$project") ]]; then
      refuse_port "$name" "$port"
    fi
  done < <(named_ports)

  # Compose starts "web" when the other two are healthy. How it all went is read off the containers.
  if docker compose up --detach --build; then
    say 'waiting until all three are healthy'
    wait_for 90 settled || true
  fi
  title 'State'
  for service in postgres redis web; do
    found=$(container_state "$service")
    found=${found:-not there}
    say "$(printf '%-22s %s' "$project-$service" "$found")"
    if ! is "$found" healthy; then
      bad=yes
      docker compose logs --no-log-prefix --tail 200 "$service" 2>&1 | what_it_logged
    fi
  done
  [[ -z $bad ]] || die "the stack did not become healthy"
}

# container_state SERVICE...: a line each: healthy, starting, unhealthy, restarting, exited...
container_state() {
  docker inspect -f '{{if eq .State.Status "running"}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}' \
    "${@/#/$project-}" 2>/dev/null || true
}

# settled: all three are healthy, or the service has ended, as it does when it cannot take a variable.
settled() {
  local all
  all=$(container_state postgres redis web)
  is "$all" $'healthy\nhealthy\nhealthy' || [[ $all == *restarting || $all == *exited ]]
}

start_local() {
  local name value wanted=${WEB_PORT:-8000}
  title "Starting without Docker, in $state"
  need_servers || exit 1
  have go || die 'Go is needed to build the service: https://go.dev/dl/'

  # A stack that runs keeps its ports.
  POSTGRES_PORT='' REDIS_PORT=''
  # shellcheck source=/dev/null
  if [[ -e $state/env ]]; then source "$state/env"; fi
  if alive "$state/web.pid" "$state/web"; then
    say 'It runs already: other settings count after ./scripts/stop.sh.'
  else
    WEB_PORT=$wanted
    if port_taken "$WEB_PORT"; then refuse_port WEB_PORT "$WEB_PORT"; fi
  fi
  if [[ -z $POSTGRES_PORT ]]; then POSTGRES_PORT=$(free_port); fi
  if [[ -z $REDIS_PORT ]]; then REDIS_PORT=$(free_port); fi
  export BIND_ADDRESS=${BIND_ADDRESS:-127.0.0.1} PORT=$WEB_PORT \
    POSTGRES_HOST=127.0.0.1 POSTGRES_PORT REDIS_HOST=127.0.0.1 REDIS_PORT POSTGRES_SSLMODE=${POSTGRES_SSLMODE:-disable} \
    POSTGRES_DB=${POSTGRES_DB:-products_db} POSTGRES_USER=${POSTGRES_USER:-postgres} \
    POSTGRES_PASSWORD=${POSTGRES_PASSWORD:-postgres123} REDIS_PASSWORD=${REDIS_PASSWORD:-}
  mkdir -p "$state"
  # The other scripts read this file. It holds passwords.
  for name in BIND_ADDRESS WEB_PORT POSTGRES_PORT POSTGRES_DB POSTGRES_USER POSTGRES_PASSWORD REDIS_PORT REDIS_PASSWORD; do
    value=${!name}
    printf '%s=%q\n' "$name" "$value"
  done | (umask 077 && cat >"$state/env")

  say "PostgreSQL on 127.0.0.1:$POSTGRES_PORT"
  start_postgres "$state" "$POSTGRES_PORT" || die "PostgreSQL did not start: see $state/postgres.log"
  say "Redis on 127.0.0.1:$REDIS_PORT"
  start_redis "$state" "$REDIS_PORT" || die "Redis did not start: see $state/redis.log"

  say 'building the service'
  CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$state/web.new" .
  # A service that was built from the same code is left alone.
  cmp -s "$state/web.new" "$state/web" || end_process "$state/web.pid" "$state/web" 15
  mv "$state/web.new" "$state/web"
  if ! alive "$state/web.pid" "$state/web"; then
    say "the service on port $WEB_PORT"
    nohup "$state/web" </dev/null >>"$state/web.log" 2>&1 &
    echo $! >"$state/web.pid"
  fi
  wait_for 60 service_is_healthy_or_gone || true
  if ! service_is_healthy; then
    what_it_logged <"$state/web.log"
    die 'the service did not become healthy'
  fi
  title 'State'
  say "postgres  running  127.0.0.1:$POSTGRES_PORT"
  say "redis     running  127.0.0.1:$REDIS_PORT"
  say "web       healthy  http://localhost:$WEB_PORT"
}
service_is_healthy() { has "$(curl -s -m 5 "$(local_url)/health")" '"healthy"'; }
service_is_healthy_or_gone() { service_is_healthy || ! alive "$state/web.pid" "$state/web"; }

mode=$(running_mode || true)
if is "$mode" local; then
  start_local
else
  reason=$(why_not_docker)
  if [[ -z $reason ]]; then
    start_docker
  elif [[ -n $mode ]]; then
    die "cannot use Docker: $reason"
  else
    say "Not using Docker: $reason."
    start_local
  fi
fi

attach
wait_for 10 cache_in_use || die 'the service does not use its cache: ./scripts/logs.sh web says why'
title 'Try next'
say "./scripts/populate.sh                 # 8 products"
say "curl ${url/127.0.0.1/localhost}/products"
say "./scripts/test.sh                     # the API, endpoint by endpoint"
say "./scripts/test_communication.sh       # who talks to whom"
say "./scripts/demo_cache.sh               # the cache"
say "./scripts/demo_failure.sh             # a server is stopped"
say "./scripts/logs.sh                     # what they log"
