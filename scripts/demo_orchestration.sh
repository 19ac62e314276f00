#!/usr/bin/env bash
# Demonstration of what Compose and the engine do for three services: startup order, names, volumes, health, restarts,
# and the permissions that web lacks. It works on its own stack, on free ports, and removes it in the end. It does not
# touch your stack. It needs Docker.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ -z $(why_not_docker) ]] || die "$(why_not_docker)"
WEB_PORT=$(free_port) POSTGRES_PORT=$(free_port) REDIS_PORT=$(free_port)
mode=docker project+=-lesson project_label+=-lesson
export COMPOSE_PROJECT_NAME=$project DESAFIO3_MODE=$mode BIND_ADDRESS=127.0.0.1 WEB_PORT POSTGRES_PORT REDIS_PORT

# The journal records when a container starts, dies, or changes its health.
journal=$(mktemp) told=0
docker events -f "$project_label" -f event=start -f event=die -f event=health_status \
  --format '{{.TimeNano}} {{.Actor.Attributes.name}} {{.Action}}' >"$journal" &
at_exit "kill $!; ./scripts/clean.sh >/dev/null 2>&1; rm -f '$journal'"

# position SERVICE EVENT: its line among the events that tell has not shown yet. tell shows those with their time in
# seconds.
position() { tail -n "+$((told + 1))" "$journal" | grep -nF "$project-$1 $2" | cut -d : -f 1; }
happened() { [[ -n $(position "$@") ]]; }
tell() {
  awk -v told="$told" 'NR > told { if (!first) first = $1
    printf "    %6.1f s  %-26s %s %s\n", ($1 - first) / 1e9, $2, $3, $4 }' "$journal"
  told=$(wc -l <"$journal")
}

up() { run docker compose up --detach --wait --wait-timeout 90 "$@" || not_healthy; }
inspect() { docker inspect -f "$2" "$project-$1"; }

title '1. Startup order (the image is built first)'
up --build
attach
claim 'engine has reported web as healthy' wait_for 10 happened web 'health_status: healthy'
web_started_after() { (($(position web start) > $(position "$1" 'health_status: healthy'))); }
claim 'web started after PostgreSQL was healthy (depends_on, service_healthy)' web_started_after postgres
claim 'web started after Redis was healthy' web_started_after redis
tell

title '2. Names and addresses'
docker network inspect -f '{{range .Containers}}    {{.Name}} {{.IPv4Address}}{{"\n"}}{{end}}' "$project-network"
for name in postgres redis; do
  run docker exec "$project-web" ping -c 1 "$name"
  say "  ${answer%%$'\n'*}"
  address=$(inspect "$name" '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}')
  claim "name $name resolves to the address of its container" has "$answer" "($address:"
done

title '3. Volumes'
create_product 'creation returns 201' '{"name":"Café","price":1.00}'
container=$(inspect postgres '{{.Id}}')
run docker compose down
up postgres
claim 'PostgreSQL runs in a new container' test "$(inspect postgres '{{.Id}}')" != "$container"
ask 'new container has the old data' 1.00 sql "SELECT price FROM products WHERE id = $id"
run docker compose down --volumes
up
expect 'product is gone with its volume' 404 GET "/products/$id"

title '4. Health checks'
tell >/dev/null # these events are known
run docker stop "$project-postgres"
say 'The health check runs every 3 s. Web is unhealthy after three failures in a row ...'
claim 'web turns unhealthy' wait_for 60 happened web 'health_status: unhealthy'
show_stack
claim 'PostgreSQL stays stopped after docker stop' is "$(inspect postgres '{{.State.Status}}')" exited
run docker start "$project-postgres"
claim 'PostgreSQL turns healthy' wait_for 60 happened postgres 'health_status: healthy'
claim 'web turns healthy' wait_for 60 happened web 'health_status: healthy'
tell
claim 'unhealthy web was not restarted' is "$(inspect web '{{.RestartCount}}')" 0

title '5. A crash (restart: unless-stopped)'
create_product 'creation returns 201' '{"name":"Café","price":2.00}'
run docker exec "$project-postgres" sh -c 'kill -QUIT 1' # PostgreSQL ends at once, and saves nothing
claim 'engine restarts the crashed PostgreSQL' wait_for 60 happened postgres 'health_status: healthy'
tell
ask 'PostgreSQL kept the product that was written before the crash' 2.00 sql "SELECT price FROM products WHERE id = $id"
claim 'web works again' wait_for 30 price_is 2.00
claim 'web was not restarted after the crash' is "$(inspect web '{{.RestartCount}}')" 0

title '6. Permissions of web'
kernel=$(docker run --rm --pid "container:$project-web" --entrypoint cat "$(inspect redis '{{.Image}}')" /proc/1/status)
grep -E '^(Uid|CapEff|NoNewPrivs):' <<<"$kernel" | sed 's/^/    /'
claim 'web runs as user 65532, not as root' has "$kernel" $'Uid:\t65532\t65532'
claim 'web has no capabilities' has "$kernel" $'CapEff:\t0000000000000000'
claim 'web cannot gain privileges' has "$kernel" $'NoNewPrivs:\t1'
refused() { say "\$ $*" && ! answer=$("$@" 2>&1) && say "  ${answer##*$'\n'} (expected)"; }
claim 'web has no shell' refused docker exec "$project-web" sh
claim 'web has a read-only file system' refused docker cp README.md "$project-web:/"
claim 'web is limited to 256 MiB of memory' is "$(inspect web '{{.HostConfig.Memory}}')" $((256 << 20))

verdict
