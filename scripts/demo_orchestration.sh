#!/usr/bin/env bash
# Demonstration of what Compose and the engine do for three services: the order of their start, their names, their
# volumes, their health, their restart, and the rights that one of them does not have. It works on a stack of its
# own, on free ports, and removes it in the end; yours is left alone. It needs Docker.
set -euo pipefail
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-desafio3}-lesson
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

reason=$(why_not_docker)
[[ -z $reason ]] || die "this demonstration needs a Docker engine with Compose: $reason"
WEB_PORT=$(free_port) POSTGRES_PORT=$(free_port) REDIS_PORT=$(free_port)
mode=docker
export DESAFIO3_MODE=$mode BIND_ADDRESS=127.0.0.1 WEB_PORT POSTGRES_PORT REDIS_PORT

# The engine says when a container starts, ends, or changes its health. "docker events" writes it down meanwhile.
journal=$(mktemp) told=0
start_job docker events --filter "label=com.docker.compose.project=$project" --filter event=start --filter event=die \
  --filter event=health_status --format '{{.TimeNano}} {{.Actor.Attributes.name}} {{.Action}}' >"$journal"
# Also when the script is interrupted: nothing of this stack is left.
at_exit "end_jobs; ./scripts/clean.sh >/dev/null 2>&1; rm -f '$journal'"

# position SERVICE EVENT: its line among the events that were not told yet. tell shows those, with their seconds.
position() { tail -n "+$((told + 1))" "$journal" | grep -nF "$project-$1 $2" | cut -d : -f 1; }
happened() { [[ -n $(position "$@") ]]; }
tell() {
  awk -v told="$told" 'NR > told { if (!first) first = $1
    printf "    %6.1f s  %-26s %s %s\n", ($1 - first) / 1e9, $2, $3, $4 }' "$journal"
  told=$(wc -l <"$journal")
}

# up: starts it, and waits until all are healthy. If one of them is not, the states and the logs say why.
up() { run docker compose up --detach --wait --wait-timeout 90 "$@" || { show_unhealthy && exit 1; }; }
inspect() { docker inspect -f "$2" "$project-$1"; }

title '1. The order of the start (the first one builds the image)'
up --build
attach
claim 'the engine has told it' wait_for 10 happened web 'health_status: healthy'
started=$(position web start) postgres=$(position postgres 'health_status: healthy') redis=$(position redis 'health_status: healthy')
tell
claim 'web started when PostgreSQL was healthy (depends_on, service_healthy)' test "$started" -gt "$postgres"
claim 'and Redis too' test "$started" -gt "$redis"

title '2. Names and addresses'
say "\$ docker network inspect $project-network"
docker network inspect -f '{{range .Containers}}    {{.Name}} {{.IPv4Address}}{{"\n"}}{{end}}' "$project-network"
for name in postgres redis; do
  run docker exec "$project-web" ping -c 1 "$name"
  say "  ${answer%%$'\n'*}"
  address=$(inspect "$name" '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}')
  claim "the name $name leads to the container's own address" has "$answer" "($address:"
done

title '3. A volume outlives its container, until it is removed too'
create_product 'a product is created' '{"name":"Café","price":1.00}'
container=$(inspect postgres '{{.Id}}')
run docker compose down
up postgres
claim 'this is another container' test "$(inspect postgres '{{.Id}}')" != "$container"
ask 'with the same data' 1.00 sql "SELECT price FROM products WHERE id = $id"
run docker compose down --volumes
up
expect 'without its volume, the data is gone' 404 GET "/products/$id"

title '4. Health: web turns unhealthy, and back'
tell >/dev/null # what came before is no news
run docker stop "$project-postgres"
say 'the check asks every 3 s, and the third failure in a row counts ...'
claim 'web is unhealthy' wait_for 60 happened web 'health_status: unhealthy'
show_stack
claim 'PostgreSQL stays stopped, because somebody stopped it' is "$(inspect postgres '{{.State.Status}}')" exited
run docker start "$project-postgres"
claim 'PostgreSQL is healthy' wait_for 60 happened postgres 'health_status: healthy'
claim 'and so is web' wait_for 60 happened web 'health_status: healthy'
tell
claim 'web was not restarted: the engine only tells its health' is "$(inspect web '{{.RestartCount}}')" 0

title '5. A crash: the engine starts again what died by itself (restart: unless-stopped)'
create_product 'a product is created' '{"name":"Café","price":2.00}'
run docker exec "$project-postgres" sh -c 'kill -QUIT 1' # PostgreSQL ends at once, and saves nothing
claim 'PostgreSQL is there again, and nobody has started it' wait_for 60 happened postgres 'health_status: healthy'
tell
claim 'the engine has counted this restart' is "$(inspect postgres '{{.RestartCount}}')" 1
ask 'what was written before the crash is there' 2.00 sql "SELECT price FROM products WHERE id = $id"
works() { request GET "/products/$id" >/dev/null && is "$status" 200; }
claim 'web works again' wait_for 30 works
claim 'and web was not restarted' is "$(inspect web '{{.RestartCount}}')" 0

title '6. What web may not do'
kernel=$(docker run --rm --pid "container:$project-web" --entrypoint cat "$(inspect redis '{{.Config.Image}}')" /proc/1/status)
grep -E '^(Uid|CapEff|NoNewPrivs):' <<<"$kernel" | sed 's/^/    /'
claim 'the kernel knows its process as user 65532, not as root' has "$kernel" $'Uid:\t65532\t65532'
claim 'with no capabilities' has "$kernel" $'CapEff:\t0000000000000000'
claim 'and it cannot gain any' has "$kernel" $'NoNewPrivs:\t1'
refused() {
  say "\$ $*"
  ! answer=$("$@" 2>&1) && say "  ${answer##*$'\n'}"
}
claim 'there is no shell for an intruder' refused docker exec "$project-web" sh
claim 'nobody can write a file' refused docker cp README.md "$project-web:/"
claim 'it gets 256 MiB of memory at most' is "$(inspect web '{{.HostConfig.Memory}}')" $((256 << 20))

verdict
