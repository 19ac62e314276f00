#!/usr/bin/env bash
# Starts the stack and waits until PostgreSQL, Redis and the service answer. Starting twice is harmless.
#
#   ./scripts/start.sh
#   WEB_PORT=9000 ./scripts/start.sh              # another port for the service
#   DESAFIO3_MODE=local ./scripts/start.sh        # without Docker, even if Docker works ("docker" insists on it)
#
# It uses Docker if an engine with Compose answers and the images can be had. Otherwise the same three processes run
# directly on the machine, with their data, logs and ports in .local. .env.example lists the other variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [[ -n ${PORT:-} ]]; then export WEB_PORT=${WEB_PORT:-$PORT}; fi
# The service's version comes from git, which the image's build cannot use. Compose and go build take it from here.
DESAFIO3_VERSION=${DESAFIO3_VERSION:-$(git describe --tags --always --dirty 2>/dev/null || true)}
export DESAFIO3_VERSION

# need_port NAME PORT: ends the script if something listens on the port. A running stack keeps its own ports.
published=''
need_port() {
  has "$published" ":$2->" || ! port_taken "$2" || die "port $2 is already in use: stop what uses it, or change $1"
}

# same_password: checks the password before the service does, which would only retry forever.
same_password() {
  sql 'SELECT 1' >/dev/null || die "PostgreSQL refuses this user, password or database.
  Its data was created with different ones: use those again, or remove the data with ./scripts/clean.sh."
}

start_docker() {
  title 'Startup with Docker Compose'
  if [[ -e $state ]]; then say "The data of the stack without Docker stays in $state."; fi
  own_stack
  quietly docker compose config || die 'Compose does not accept these settings'
  published=$(docker ps -f "$project_label" --format '{{.Ports}}')
  need_port WEB_PORT "${WEB_PORT:-8000}"
  need_port POSTGRES_PORT "${POSTGRES_PORT:-5432}"
  need_port REDIS_PORT "${REDIS_PORT:-6379}"

  # A container that was paused, and a service that has just lost its database, stay unhealthy until their next health
  # check. So wait a moment for it.
  wait_for 6 docker_agrees || true
  compose_up postgres redis
  same_password
  wait_for 15 docker_agrees || docker compose restart web
  compose_up --build
}
compose_up() { docker compose up --detach --wait --wait-timeout 90 "$@" || not_healthy; }

start_local() {
  local wanted=${WEB_PORT:-8000}
  title "Startup without Docker, in $state"
  need_servers || die "install what is missing${reason:+, or fix Docker as described above}, and start again"
  [[ -e $marker || -z $(ls -A "$state" 2>/dev/null) ]] || die "$state is not empty: set DESAFIO3_STATE to a new folder"

  # A running stack keeps its ports.
  POSTGRES_PORT='' REDIS_PORT=''
  # shellcheck source=/dev/null
  if [[ -e $state/env ]]; then source "$state/env"; fi
  if alive "$state/web.pid" "$state/web"; then
    say 'The service is already running. New settings take effect after ./scripts/stop.sh.'
  else
    WEB_PORT=$wanted
    need_port WEB_PORT "$WEB_PORT"
  fi
  unset POSTGRES_PASSWORD_FILE REDIS_PASSWORD_FILE
  BIND_ADDRESS=$(tr -d '[]' <<<"${BIND_ADDRESS:-127.0.0.1}") # Compose accepts [::1], too
  export BIND_ADDRESS PORT=$WEB_PORT \
    POSTGRES_HOST=127.0.0.1 POSTGRES_PORT=${POSTGRES_PORT:-$(free_port)} POSTGRES_SSLMODE=${POSTGRES_SSLMODE:-disable} \
    POSTGRES_DB=${POSTGRES_DB:-products_db} POSTGRES_USER=${POSTGRES_USER:-postgres} \
    POSTGRES_PASSWORD=${POSTGRES_PASSWORD:-postgres123} \
    REDIS_HOST=127.0.0.1 REDIS_PORT=${REDIS_PORT:-$(free_port)} REDIS_PASSWORD=${REDIS_PASSWORD:-}
  mkdir -p "$state" && touch "$marker"
  # The other scripts source this file. It holds passwords. The output of set is quoted as source needs it.
  (umask 077 && set | grep -aE '^(BIND_ADDRESS|(WEB|POSTGRES|REDIS)_(PORT|DB|USER|PASSWORD))=' >"$state/env")

  start_postgres || die "PostgreSQL did not start: see $state/postgres.log"
  (same_password) || { stop_local; exit 1; }
  start_redis || die "Redis did not start: see $state/redis.log"

  say 'Building the service ...'
  CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -X main.release=$DESAFIO3_VERSION" -o "$state/web.new" .
  # A service built from the same code keeps running.
  cmp -s "$state/web.new" "$state/web" || end_process "$state/web.pid" "$state/web" 15
  mv "$state/web.new" "$state/web"
  if ! alive "$state/web.pid" "$state/web"; then
    nohup "$state/web" </dev/null >>"$state/web.log" 2>&1 &
    echo $! >"$state/web.pid"
  fi
  wait_for 60 healthy_or_gone && healthy && return
  tail -n 20 "$state/web.log"
  die 'the service did not become healthy'
}
healthy() { "$state/web" health >/dev/null 2>&1; }
# By its pid only: for a moment, the command line of the new process is still that of this script.
healthy_or_gone() { healthy || ! kill -0 "$(<"$state/web.pid")" 2>/dev/null; }

find_mode
reason=''
is "$mode" local || reason=$(why_not_docker)
if [[ -n $reason ]]; then
  [[ -z $mode ]] || die "$reason"
  mode=local
  say "${reason/$'\n'/$'\n'  }"
  say 'Going on without containers, with a catalogue of its own. DESAFIO3_MODE=docker insists on containers.'
elif is "$mode" local && [[ -z ${DESAFIO3_MODE:-} ]]; then
  say 'This stack runs without Docker, as before. To return to Docker: ./scripts/stop.sh, then ./scripts/start.sh'
fi
"start_${mode:-docker}"

attach
title 'State'
show_stack
need_cache
title "Ready: ${url/127.0.0.1/localhost}"
say './scripts/populate.sh      # 8 products'
say './scripts/demo_stale.sh    # how a cache comes to serve a stale price, and why this one does not'
say 'README.md, LEIAME.md       # what to try next, in English and in Portuguese'
