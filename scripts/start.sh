#!/usr/bin/env bash
# Starts the stack and waits until PostgreSQL, Redis and the service answer. Starting twice is harmless.
#
#   ./scripts/start.sh
#   WEB_PORT=9000 ./scripts/start.sh              # another port for the service
#   DESAFIO3_MODE=local ./scripts/start.sh        # without Docker, even where there is one ("docker": with it)
#
# With Docker where an engine with Compose answers and the images can be had; otherwise the same three
# processes run straight on the machine, with their data, logs and ports in .local. The other variables
# are in docker-compose.yml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [[ -n ${PORT:-} ]]; then export WEB_PORT=${WEB_PORT:-$PORT}; fi
# What the service says of its version: the image is built where git is not. Compose and go build take it from here.
DESAFIO3_VERSION=${DESAFIO3_VERSION:-$(git describe --tags --always --dirty 2>/dev/null || true)}
export DESAFIO3_VERSION

# need_port NAME PORT: refuses it by name where something listens on it.
need_port() { ! port_taken "$2" || die "port $2 is already in use: stop what uses it, or choose another one with $1=..."; }

# same_password: asks before the service does, which would only try again and again.
same_password() {
  sql 'SELECT 1' >/dev/null || die "PostgreSQL refuses the user, the password or the database of these settings: its data was made
  with others. Start with those again, or remove the data with ./scripts/clean.sh and start anew."
}

start_docker() {
  local name=([8000]=WEB_PORT [5432]=POSTGRES_PORT [6379]=REDIS_PORT) ports published target port volume
  title 'Starting with Docker Compose'
  if [[ -e $state ]]; then say "What the stack without Docker holds stays in $state."; fi
  own_stack
  # Compose says which ports it would publish, since it reads the file .env, too: "target: 8000", "published: "8001"".
  ports=$(docker compose config | sed -nE 's/^ *(target|published): "?([0-9]+)"?$/\2/p' | paste -d ' ' - -) ||
    die 'Compose does not take these variables'
  published=$(docker ps -f "$project_label" --format '{{.Ports}}')
  while read -r target port; do # a port that this stack has already, for the same service, is not taken
    has "$published" ":$port->$target/" || need_port "${name[target]:-another one}" "$port"
  done <<<"$ports"
  # Compose would make the volumes itself, but not note whose they are. One that is there stays as it is.
  for volume in postgres_data redis_data; do
    docker volume create --label "${project_label#label=}" --label "com.docker.compose.volume=$volume" \
      --label "$folder_label=$PWD" "${project}_$volume" >/dev/null
  done

  # --wait ends when all are healthy, and as soon as one of them has ended or is unhealthy. A container that was
  # paused counts as unhealthy until its next health check: that is worth a moment.
  wait_for 6 none_unhealthy || true
  if docker compose up --detach --wait --wait-timeout 90 postgres redis && same_password &&
    docker compose up --build --detach --wait --wait-timeout 90; then return 0; fi
  show_unhealthy
  die 'the stack did not become healthy'
}

none_unhealthy() { [[ -z $(docker ps -q -f "$project_label" -f health=unhealthy) ]]; }

start_local() {
  local wanted=${WEB_PORT:-8000}
  title "Starting without Docker, in $state"
  need_servers || exit 1
  have go || die 'Go is needed to build the service: https://go.dev/dl/'
  [[ -e $marker || -z $(ls -A "$state" 2>/dev/null) ]] || die "$state is a folder of something else: choose a new one with DESAFIO3_STATE=..."

  # A stack that runs keeps its ports.
  POSTGRES_PORT='' REDIS_PORT=''
  # shellcheck source=/dev/null
  if [[ -e $state/env ]]; then source "$state/env"; fi
  if alive "$state/web.pid" "$state/web"; then
    say 'It runs already: other settings count after ./scripts/stop.sh.'
  else
    WEB_PORT=$wanted
    need_port WEB_PORT "$WEB_PORT"
  fi
  export BIND_ADDRESS=${BIND_ADDRESS:-127.0.0.1} PORT=$WEB_PORT \
    POSTGRES_HOST=127.0.0.1 POSTGRES_PORT=${POSTGRES_PORT:-$(free_port)} POSTGRES_SSLMODE=${POSTGRES_SSLMODE:-disable} \
    POSTGRES_DB=${POSTGRES_DB:-products_db} POSTGRES_USER=${POSTGRES_USER:-postgres} \
    POSTGRES_PASSWORD=${POSTGRES_PASSWORD:-postgres123} \
    REDIS_HOST=127.0.0.1 REDIS_PORT=${REDIS_PORT:-$(free_port)} REDIS_PASSWORD=${REDIS_PASSWORD:-}
  mkdir -p "$state"
  touch "$marker"
  # The other scripts source this file. It holds passwords. "set" prints variables quoted as "source" needs them.
  (umask 077 && set | grep -aE '^(BIND_ADDRESS|WEB_PORT|POSTGRES_(PORT|DB|USER|PASSWORD)|REDIS_(PORT|PASSWORD))=' >"$state/env")

  start_postgres "$state" || die "PostgreSQL did not start: see $state/postgres.log"
  (same_password) || { stop_local; exit 1; }
  start_redis "$state" || die "Redis did not start: see $state/redis.log"

  say 'building the service'
  CGO_ENABLED=0 go build -trimpath -ldflags="-s -w -X main.release=$DESAFIO3_VERSION" -o "$state/web.new" .
  # A service that was built from the same code is left alone.
  cmp -s "$state/web.new" "$state/web" || end_process "$state/web.pid" "$state/web" 15
  mv "$state/web.new" "$state/web"
  if ! alive "$state/web.pid" "$state/web"; then
    nohup "$state/web" </dev/null >>"$state/web.log" 2>&1 &
    echo $! >"$state/web.pid"
  fi
  wait_for 60 healthy_or_gone || true
  healthy && return
  what_it_logged <"$state/web.log"
  die 'the service did not become healthy'
}
healthy() { "$state/web" health >/dev/null 2>&1; }
# By its number alone: for a moment, its process still has the name of this script.
healthy_or_gone() { healthy || ! kill -0 "$(<"$state/web.pid")" 2>/dev/null; }

mode=$(running_mode || true) reason=''
if ! is "$mode" local; then reason=$(why_not_docker); fi
if is "$mode" docker && [[ -n $reason ]]; then die "cannot use Docker: $reason"; fi
if [[ -n $reason ]]; then say "Not using Docker: $reason."; fi
if is "$mode" local || [[ -n $reason ]]; then mode=local; else mode=docker; fi
"start_$mode"

attach
title 'State'
show_stack
need_cache
title 'Try next'
say "./scripts/populate.sh                 # 8 products"
say "curl ${url/127.0.0.1/localhost}/products"
say "./scripts/test.sh                     # the API, endpoint by endpoint"
say "./scripts/test_communication.sh       # who talks to whom"
say "./scripts/demo_cache.sh               # the cache, and so on: demo_stale.sh, demo_failure.sh, ..."
say "./scripts/logs.sh                     # what they log"
