#!/usr/bin/env bash
# Checks everything: format, vet, the shell scripts, the tests against a PostgreSQL and a Redis of their
# own, and the whole stack end to end, without Docker and, where the images are there, with it. It installs
# what is missing where it may, stops what it started, and leaves no file behind. It does not touch a stack
# that you have running, and several may run at the same time.
#
#   ./scripts/check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The names and the folder of its own. The folder may be entered by the user that PostgreSQL runs as.
tmp=$(mktemp -d)
chmod 711 "$tmp"
export COMPOSE_PROJECT_NAME=desafio3-check-$$ DESAFIO3_STATE=$tmp/stack DESAFIO3_MODE=local TEST_DIR=$tmp/test
# What your own stack was told is not for this one.
unset PORT BIND_ADDRESS REDIS_PASSWORD CACHE_TTL LOG_LEVEL POSTGRES_SSLMODE
source scripts/lib.sh

# ---------------------------------------------------------------- steps

job='' broken=()

# step NAME COMMAND...: runs it as a job of its own, so that it can be ended with all it started. What it
# printed is shown when it failed.
step() {
  local name=$1 began=$SECONDS
  shift
  printf '%-44s' "$name"
  set -m
  "$@" </dev/null >"$tmp/output" 2>&1 &
  job=$!
  set +m
  if wait "$job"; then
    printf '%sok%s  %3d s\n' "$green" "$plain" "$((SECONDS - began))"
    sed -n '/^ok /p; /SEED=/p; /^ *phase .*slowest/,/^ *total /p' "$tmp/output" # of go test
  else
    printf '%sFAILED%s  %d s\n' "$red" "$plain" "$((SECONDS - began))"
    sed '/^=== /d; /^ *--- PASS/d; s/^/    | /' "$tmp/output"
    broken+=("$name")
  fi
  job=''
}

clean_up() {
  trap '' INT TERM
  if [[ -n $job ]]; then
    kill -TERM -- "-$job" 2>/dev/null || true
    wait "$job" 2>/dev/null || true
  fi
  if [[ -e $TEST_DIR ]]; then
    remove_servers "$TEST_DIR"
  fi
  # Nothing to do where the end-to-end run came to its end: it cleans up itself.
  DESAFIO3_MODE='' ./scripts/clean.sh >/dev/null 2>&1 || true
  rm -rf "$tmp"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ---------------------------------------------------------------- what the steps do

well_formatted() {
  local files
  files=$(gofmt -l .)
  if [[ -n $files ]]; then
    printf 'run gofmt -w on:\n%s\n' "$files"
    return 1
  fi
}

# end_to_end MODE: what a user does with the stack, in the order of the README.
end_to_end() {
  set -e
  export DESAFIO3_MODE=$1 WEB_PORT POSTGRES_PORT REDIS_PORT
  WEB_PORT=$(free_port) POSTGRES_PORT=$(free_port) REDIS_PORT=$(free_port)
  ./scripts/start.sh
  title 'Starting it again is harmless'
  ./scripts/start.sh
  ./scripts/populate.sh
  title 'Populating it again does not double the catalogue'
  ./scripts/populate.sh
  holds_8_products
  ./scripts/test.sh
  ./scripts/test_communication.sh
  ./scripts/demo_cache.sh
  ./scripts/demo_failure.sh
  title 'The data outlives the stack'
  ./scripts/stop.sh
  ./scripts/start.sh
  holds_8_products
  title 'Cleaning leaves nothing'
  ./scripts/clean.sh
  claim 'no process listens on its port' closed "$WEB_PORT"
  if is "$1" local; then
    claim 'no folder with data' test ! -e "$DESAFIO3_STATE"
  else
    claim 'no container, volume, network or image' is "$(docker ps -a | grep "$project")$(
      docker volume ls | grep "$project")$(docker network ls | grep "$project")$(docker images | grep "$project")" ''
  fi
  verdict
}

holds_8_products() { (attach && request GET /products && claim 'the catalogue holds 8 products' is "$(field count)" 8 && verdict); }
closed() { ! port_taken "$1"; }

docker_is_ready() {
  local image
  have docker && docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1 || return 1
  for image in $(base_images); do
    docker image inspect "$image" >/dev/null 2>&1 || return 1
  done
}

# ---------------------------------------------------------------- the run

have go || die 'Go is needed: https://go.dev/dl/'
need_servers
need gcc # for the race detector
need shellcheck 2>/dev/null || say 'shellcheck is not installed: the scripts are not checked'

step 'gofmt' well_formatted
step 'go vet' go vet ./...
if have shellcheck; then step 'shellcheck' shellcheck -x scripts/*.sh .ci/run; fi
export POSTGRES_ARGS='-c fsync=off' RACE=1 # RACE: in the replicas of TestPromise, too
private_servers "$TEST_DIR"
step 'go test -race' go test -race -v -count=1 -timeout 90m ./...
stop_redis "$TEST_DIR"
stop_postgres "$TEST_DIR" immediate
step 'end to end, without Docker' end_to_end local
if docker_is_ready; then
  step 'end to end, with Docker' end_to_end docker
else
  say 'end to end, with Docker: left out, no engine with Compose v2 and all images is here'
fi

if ((${#broken[@]})); then
  printf '\n%sFAILED:%s\n' "$red" "$plain"
  printf '  %s\n' "${broken[@]}"
  exit 1
fi
printf '\n%sEverything holds.%s\n' "$green" "$plain"
