#!/usr/bin/env bash
# Demonstration of docker-stack.yml: three replicas of the service on Docker Swarm, and clients that send requests all
# the time. A replica is killed, a new version is rolled out, a bad one is rolled back automatically, the number of
# replicas changes, and no request fails. It takes one to two minutes. The script makes a swarm of this machine, leaves
# it in the end, and removes everything it made. An engine that leaves a swarm forgets the names of the running
# containers, so stop your stacks of Compose before.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

stack=$project-swarm service=${project}-swarm_web clients=$project-swarm-clients
# A stopping replica drains for a shorter time than docker-stack.yml says, to keep the demonstration short.
export COMPOSE_PROJECT_NAME=$stack POSTGRES_SECRET=${stack}_password DRAIN_SECONDS=2

# ---------------------------------------------------------------- the clients

# These functions run in a container on the stack's network, where Swarm's own DNS answers. They get there as text
# (declare -f). The image is PostgreSQL's, because it is here and has bash, which can open connections itself.

# connect: connects to one of the addresses that the DNS has for "web", in random order: those of the replicas, or one
# virtual address. If one refuses, it prints that and tries the next, as a load balancer does. A virtual address leads
# to another replica each time, so it gets three tries.
connect() {
  all=$(getent ahostsv4 web | sed -n 's/ *STREAM.*//p' | shuf)
  for address in $all $all $all; do
    if { exec 3<>"/dev/tcp/$address/8000"; } 2>/dev/null; then return; fi
    echo "refused - $address"
  done
  echo 'unreachable - -'
  return 1
}

# exchange METHOD PATH [JSON]: sends a request and reads the answer into $head and $body. If the answer is incomplete,
# it fails and leaves $head empty.
exchange() {
  local line received='' json=${3:+$3$'\n'}
  head='' body=''
  printf -v line '%s %s HTTP/1.1\r\nHost: web\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' \
    "$1" "$2" "${#json}" "$json"
  # Bash would send a packet for each line, but an echo of text that ends with a newline sends only one.
  echo -n "$line" >&3 || return
  while read -r -t 20 line <&3 && [[ $line != $'\r' ]]; do received+=$line$'\n'; done
  [[ $received =~ Content-Length:\ ([0-9]+) ]] && read -r -t 20 -N "${BASH_REMATCH[1]}" body <&3 && head=$received
}

# client N: creates a product and sends requests for it until its container ends, with one write in ten, and prints a
# line for each. A connection carries N requests, or fewer if the service closes it. No other client writes the product,
# so every answer must show the last write, whichever replica it comes from. A failed request is followed by another one
# of its kind.
client() {
  local product sent=0 stock=0 request
  trap '' PIPE # so that writing to a closed connection is an error, and does not end this shell
  connect && exchange POST /products '{"name":"Produto da demonstração","price":1.00}'
  product=${body#*:} product=/products/${product%%,*}
  while sleep 0.02; do
    if ((sent % $1 == 0)) || [[ $head != HTTP* || $head == *'Connection: close'* ]]; then connect || continue; fi
    request=(GET "$product")
    if ((sent % 10 == 5)); then request=(PUT "$product" "{\"stock\":$((++stock))}"); fi
    exchange "${request[@]}"
    case $head$body in
    'HTTP/1.1 200 '*"\"stock\":$stock,"*) echo "ok ${request[0]} $address" && sent=$((sent + 1)) ;;
    HTTP*) echo "wrong:${head:9:3} ${request[0]} $address" ;;
    *) echo "cut ${request[0]} $address" ;;
    esac
  done
}

# in_clients CODE: runs the code in that container.
in_clients() { docker exec "$clients" timeout 600 bash -c "LC_ALL=C; $(declare -f connect exchange client); $1"; }

# no_request_failed [ADDRESS]: checks what the clients have printed since the last call. ADDRESS is that of a killed
# replica, whose requests in flight are counted apart.
seen=0
no_request_failed() {
  local sent refused lost in_flight="^cut [A-Z]* ${1:-none}$"
  claim 'more than 100 requests were answered' wait_for 60 enough
  refused=$(count '^refused') lost=$(count "$in_flight") sent=$(count -v '^refused')
  seen=$((seen + sent + refused))
  say "$sent requests, $(count PUT) of them writes; $refused connections refused and made to another replica"
  [[ -z ${1:-} ]] || claim "killed replica cut off $lost requests in flight, at most one per client" test "$lost" -le 4
  claim 'no request failed' is "$(grep -vE "^ok|^refused|$in_flight" "$tmp/part" | sort | uniq -c)" ''
}
count() { grep -c "$@" "$tmp/part" || true; }

# enough: the clients have printed enough to check, however slow the machine is. The last line may be incomplete, so it
# is left for the next call.
enough() { tail -n "+$((seen + 1))" "$tmp/requests" | sed '$d' >"$tmp/part" && (($(count '^ok') > 100)); }

# ---------------------------------------------------------------- the stack

# replicas: the healthy ones. web_is N: N replicas are healthy, and Swarm wants and has N.
replicas() { docker ps -q -f "label=com.docker.swarm.service.name=$service" -f health=healthy | sort; }
web_is() { is "$(replicas | wc -l) $(docker service ls -f "name=$service" --format '{{.Replicas}}')" "$1 $1/$1"; }

# tasks COLUMN...: shows the containers that Swarm has started for the service, including those that have ended.
tasks() { docker service ps --format "table {{.Name}}$(printf '\\t{{.%s}}' "$@")" "$service" | sed 's/^/  /'; }

# version N LINE: an image like the one that was built, with another line in its Dockerfile.
version() { quietly docker build -q -t "$stack-web:$1" - <<<"FROM $stack-web"$'\n'"$2"; }

# deploy vip|dnsrr: each replica also gets a free port of this machine, so that request can choose one.
deploy() {
  WEB_IMAGE=$stack-web WEB_ENDPOINT_MODE=$1 WEB_PORT=0 WEB_PORT_MODE=host \
    quietly docker stack deploy --resolve-image never -c docker-stack.yml "$stack"
  claim 'three replicas are healthy' wait_for 120 web_is 3
}
# choose REPLICA: request uses this one from now on.
choose() { say "replica $1" && url=http://127.0.0.1:$(docker port "$1" 8000 | sed -n '1s/.*://p'); }

# update VERSION STATE OPTION...: rolls the version out, and waits until Swarm reports this state. The options make
# Swarm less patient than docker-stack.yml does, to keep the demonstration short.
update() {
  run docker service update --detach --no-resolve-image --image "$stack-web:$1" "${@:3}" "$service"
  claim "update ends as $2" wait_for 240 update_is "$2"
  tasks Image CurrentState
  claim 'all replicas run version 2' is "$(images)" "$stack-web:2"
}
images() { docker service ps -f desired-state=running --format '{{.Image}}' "$service" | sort -u; }
update_is() { is "$(docker service inspect -f '{{.UpdateStatus.State}}' "$service")" "$1"; }

[[ -z $(why_not_docker) ]] || die "$(why_not_docker)"
is "$(swarm_state)" inactive || die 'this needs an engine that is in no swarm'
[[ -z $(compose_containers) ]] ||
  die "when the engine leaves the swarm, these containers can no longer find each other: $(compose_containers)
  Stop their stacks first (./scripts/stop.sh), and start them afterwards (./scripts/start.sh)."

tmp=$(mktemp -d)

# clean_up tries again and again: an interrupted engine may still be at work for a moment.
clean_up() {
  title 'Clean-up'
  rm -rf "$tmp"
  wait_for 90 as_before >/dev/null 2>&1 || die 'something is left: see docker ps -a, docker volume ls, docker images'
}
as_before() {
  docker rm -f -v "$clients"
  docker stack rm "$stack"
  docker swarm leave --force
  docker network rm docker_gwbridge # Swarm creates it, and leaves it behind
  docker volume rm "${stack}_swarm_postgres" "${stack}_swarm_redis"
  docker rmi "$stack-web:3" "$stack-web:2" "$stack-web"
  is "$(swarm_state) $(in_docker "$stack")" 'inactive '
}
at_exit clean_up

# ---------------------------------------------------------------- the demonstration

title '1. A swarm, three versions of the image, and the stack'
quietly docker swarm init --advertise-addr 127.0.0.1 --listen-addr 127.0.0.1:2377
quietly docker compose build web
version 2 'LABEL version=2'
version 3 'ENV POSTGRES_PORT=1'
quietly docker node update --label-add desafio3.data=true "$(docker node ls -q)"
od -An -N16 -tx1 /dev/urandom | tr -d ' \n' | quietly docker secret create "$POSTGRES_SECRET" -
deploy vip
quietly docker run -d --name "$clients" --network "${stack}_default" --entrypoint tail \
  "$(sed -n 's/^ *image: \(postgres:.*\)/\1/p' docker-stack.yml)" -f /dev/null
# shellcheck disable=SC2016 # for the bash over there
if ! vip=$(in_clients 'connect >/dev/null && echo "$address"'); then
  say 'Virtual addresses do not work: this kernel has no IPVS. With endpoint_mode dnsrr the clients choose a replica.'
  quietly docker service rm "$service"
  deploy dnsrr
fi

title '2. Load balancing'
# shellcheck disable=SC2016 # for the bash over there
answers=$(in_clients 'for i in {1..30}; do connect && exchange GET /services && echo "$body"; done' |
  sed -n 's/.*"hostname":"\([^"]*\)".*/\1/p' | sort | uniq -c)
echo "$answers"
claim '30 requests to "web" reached all three replicas' is "$(awk '{ print $2 }' <<<"$answers")" "$(replicas)"

title '3. One cache for all replicas'
choose "$(replicas | head -n 1)"
create_product 'creation returns 201' '{"name":"Produto da demonstração","price":1.00}'
price=1
for writer in $(replicas); do
  choose "$writer"
  request PUT "/products/$id" "{\"price\":$((++price))}"
  for reader in $(replicas); do
    choose "$reader"
    expect 'read through this replica returns the new price' "200 *\"price\":$price.00," GET "/products/$id"
    claim 'read through this replica is soon a hit' wait_for 20 hit
  done
done

title '4. Four clients, with one write in ten requests'
# From one that connects for every request to one that keeps its connection for as long as it may. Bash's own messages
# about connections that were reset are dropped, because these requests are counted as cut.
# shellcheck disable=SC2016 # for the bash over there
in_clients 'for many in 1 10 100 1000000; do client $many & done; wait' >"$tmp/requests" 2>/dev/null &
claim 'clients read and write' wait_for 60 grep -q PUT "$tmp/requests"

title '5. A killed replica'
victim=$(replicas | head -n 1)
address=$(docker inspect -f "{{(index .NetworkSettings.Networks \"${stack}_default\").IPAddress}}" "$victim")
run docker kill "$victim"
claim 'another replica takes its place' wait_for 60 web_is 3
tasks CurrentState Error
no_request_failed "${vip:-$address}"

title '6. A new version'
update 2 completed --update-monitor 5s
no_request_failed

title '7. A bad version, which looks for PostgreSQL on the wrong port'
update 3 rollback_completed --health-start-period 1s --health-retries 2
no_request_failed

title '8. Five replicas, then two'
for number in 5 2; do
  run docker service scale --detach "$service=$number"
  claim "$number replicas are healthy" wait_for 60 web_is "$number"
  no_request_failed
done

verdict
