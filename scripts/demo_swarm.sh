#!/usr/bin/env bash
# Demonstration of docker-stack.yml: three replicas of the service on Docker Swarm, and clients that send requests
# all the while. A replica is killed, a new version is rolled out, a bad one is rolled back automatically, the number of
# replicas changes, and no request fails. It takes one to two minutes.
#
#   ./scripts/demo_swarm.sh                      # makes a swarm of this machine only, and leaves it in the end
#   ./scripts/demo_swarm.sh --use-this-swarm     # in the swarm of one node that this machine already is
#
# Everything that the script made is removed in the end. An engine that leaves a swarm forgets the names of the
# containers that run, so stacks of Compose have to be stopped before.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

stack=$project-swarm clients=$project-swarm-clients
# A replica that stops drains for a shorter time than docker-stack.yml says: you would only wait.
export COMPOSE_PROJECT_NAME=$stack POSTGRES_SECRET=${stack}_password DRAIN_SECONDS=2

# ---------------------------------------------------------------- the clients

# These functions run in a container on the stack's network, where Swarm's own DNS answers. They go there as text
# (declare -f). The image is PostgreSQL's, because it is here and has bash, which can open connections itself.

# connect: connects to one of the addresses that the DNS has for "web", in random order: those of the replicas, or one
# virtual address. When one refuses, it notes that and tries the next, as a load balancer does. Behind a virtual
# address the next one is another replica, too: so that it is tried three times.
connect() {
  all=$(getent ahostsv4 web | sed -n 's/ *STREAM.*//p' | shuf)
  for address in $all $all $all; do
    if { exec 3<>"/dev/tcp/$address/8000"; } 2>/dev/null; then return; fi
    echo "refused - $address"
  done
  echo 'unreachable - -'
  return 1
}

# exchange METHOD PATH [JSON]: sends a request and reads the answer into $head and $body. It fails, and leaves
# $head empty, when there is no whole answer.
exchange() {
  local line received='' json=${3:+$3$'\n'}
  head='' body=''
  printf -v line '%s %s HTTP/1.1\r\nHost: web\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' \
    "$1" "$2" "${#json}" "$json"
  # bash writes line by line. "echo" with a text that ends in a line's end makes one packet of it all.
  echo -n "$line" >&3 || return
  while read -r -t 20 line <&3 && [[ $line != $'\r' ]]; do received+=$line$'\n'; done
  [[ $received =~ Content-Length:\ ([0-9]+) ]] && read -r -t 20 -N "${BASH_REMATCH[1]}" body <&3 && head=$received
}

# client MANY: makes a product and sends requests for it until its container goes, one write among ten, with a line for
# each. A connection carries so many requests, or fewer when the service says that it closes it. Nobody else
# writes the product, so every answer must show the last write, whichever replica it comes from. A request that
# failed is followed by another one of its kind.
client() {
  local product sent=0 stock=0 request
  trap '' PIPE # to write to a closed connection is an error then, instead of the end of this shell
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

# in_clients CODE: runs the code there.
in_clients() { docker exec "$clients" timeout 600 bash -c "LC_ALL=C; $(declare -f connect exchange client); $1"; }

# no_request_failed [ADDRESS]: looks at what the clients printed since the last time. ADDRESS is that of a replica that
# was killed: what was in flight at it is counted apart.
seen=0 total=0
no_request_failed() {
  local sent refused lost in_flight="^cut [A-Z]* ${1:-none}$"
  claim 'more than 100 requests were answered' wait_for 60 enough
  refused=$(count '^refused') lost=$(count "$in_flight") sent=$(count -v '^refused')
  seen=$((seen + sent + refused)) total=$((total + sent))
  say "$sent requests, $(count PUT) of them writes; $refused connections refused and made to another replica"
  if [[ -n ${1:-} ]]; then claim "killed replica cut off $lost requests in flight, at most one per client" test "$lost" -le 4; fi
  claim 'no request failed' is "$(grep -vE "^ok|^refused|$in_flight" "$tmp/part" | sort | uniq -c)" ''
}
count() { grep -c "$@" "$tmp/part" || true; }

# enough: there is enough to look at, however slow the machine is. The last line is left for the next time: it may not
# be whole yet.
enough() { tail -n "+$((seen + 1))" "$tmp/requests" | sed '$d' >"$tmp/part" && (($(count '^ok') > 100)); }

# ---------------------------------------------------------------- the stack

# The replicas that are healthy; the number of replicas that Swarm wants and has.
replicas() { docker ps -q -f "label=com.docker.swarm.service.name=${stack}_web" -f health=healthy | sort; }
web_is() { is "$(replicas | wc -l) $(docker service ls -f "name=${stack}_web" --format '{{.Replicas}}')" "$1 $1/$1"; }

# version N LINE: an image like the one that was built, with another line in its Dockerfile.
version() { quietly docker build -q -t "$stack-web:$1" - <<<"FROM $stack-web"$'\n'"$2"; }

# deploy vip|dnsrr: each replica gets a free port of this machine, too, so that "request" can choose one.
deploy() {
  WEB_IMAGE=$stack-web WEB_ENDPOINT_MODE=$1 WEB_PORT=0 WEB_PORT_MODE=host \
    quietly docker stack deploy --resolve-image never -c docker-stack.yml "$stack"
  claim 'three replicas are healthy' wait_for 120 web_is 3
}
# choose REPLICA: "request" goes to this one from now on.
choose() { say "replica $1" && url=http://127.0.0.1:$(docker port "$1" 8000 | sed -n '1s/.*://p'); }

# update VERSION STATE OPTION...: rolls the version out, and waits until Swarm says how that ended. The options make
# Swarm less patient than docker-stack.yml does, so that you do not wait where nothing happens.
update() {
  run docker service update --detach --no-resolve-image --image "$stack-web:$1" "${@:3}" "${stack}_web"
  claim "update ends as $2" wait_for 240 update_is "$2"
  docker service ps --format 'table {{.Name}}\t{{.Image}}\t{{.CurrentState}}' "${stack}_web" | sed 's/^/  /'
  claim 'all replicas run version 2' is "$(docker service ps -f desired-state=running --format '{{.Image}}' "${stack}_web" | sort -u)" "$stack-web:2"
}
update_is() { is "$(docker service inspect -f '{{.UpdateStatus.State}}' "${stack}_web")" "$1"; }

reason=$(why_not_docker)
[[ -z $reason ]] || die "$reason"
[[ "$(docker info -f '{{.Swarm.LocalNodeState}} {{.Swarm.Nodes}}') $*" =~ ^(inactive 0 |active 1 --use-this-swarm)$ ]] ||
  die 'this needs an engine in no swarm, and no argument; or a swarm of one node, and --use-this-swarm'
leave=${1:-yes} leave=${leave#--use-this-swarm} # whether this script makes the swarm, and leaves it in the end
[[ -z $leave || -z $(compose_containers) ]] ||
  die "at the end the engine leaves the swarm, and these could not resolve each other's names any more: $(compose_containers)
  Stop their stacks first (./scripts/stop.sh), and start them afterwards (./scripts/start.sh)."

[[ -z $(in_docker "$stack") ]] || die "this script would remove these, because of their names:"$'\n'"$(in_docker "$stack")"
before=$(swarm_state) bridge=$(docker network ls -q -f name=docker_gwbridge) # Swarm makes it, and leaves it behind
labelled=$(docker node ls -q -f node.label=desafio3.data=true 2>/dev/null || true)
tmp=$(mktemp -d)

# What is removed is tried again and again: interrupted in the middle of something, the engine may go on with it for
# a moment. check.sh, which runs stacks of Compose beside this script, holds the lock until they are gone.
clean_up() {
  trap : INT TERM # a signal ends the wait for the lock, but not the removal
  title 'Clean-up'
  rm -rf "$tmp"
  if [[ -n $leave ]]; then lock_engine --exclusive || true; fi
  wait_for 90 as_before >/dev/null 2>&1 || die "something is left: docker ps -a, docker volume ls and docker images show it"
  if [[ -n $leave && -n $(compose_containers) ]]; then say "Started meanwhile, these cannot resolve each other's names any more: docker restart $(compose_containers)"; fi
}
as_before() {
  docker rm -f -v "$clients"
  docker stack rm "$stack"
  docker secret rm "$POSTGRES_SECRET"
  if [[ -z $labelled ]]; then docker node update --label-rm desafio3.data "$(docker node ls -q)"; fi
  if [[ -n $leave ]]; then docker swarm leave --force; fi
  if [[ -z $bridge ]]; then docker network rm docker_gwbridge; fi
  docker volume rm "${stack}_swarm_postgres" "${stack}_swarm_redis"
  docker rmi "$stack-web:3" "$stack-web:2" "$stack-web"
  is "$(swarm_state) $(in_docker "$stack")" "$before "
}
at_exit clean_up

# ---------------------------------------------------------------- the demonstration

title '1. A swarm, three versions of the image, and the stack'
if [[ -n $leave ]]; then quietly docker swarm init --advertise-addr 127.0.0.1 --listen-addr 127.0.0.1:2377; fi
quietly docker compose build web
version 2 'LABEL version=2'
version 3 'ENV POSTGRES_PORT=1'
quietly docker node update --label-add desafio3.data=true "$(docker node ls -q)"
od -An -N16 -tx1 /dev/urandom | tr -d ' \n' | quietly docker secret create "$POSTGRES_SECRET" -
deploy vip
quietly docker run -d --name "$clients" --network "${stack}_default" --entrypoint tail \
  "$(sed -n 's/^ *image: \(postgres:.*\)/\1/p' docker-stack.yml)" -f /dev/null
# shellcheck disable=SC2016 # for the bash over there
if vip=$(in_clients 'connect >/dev/null && echo "$address"'); then
  say 'The virtual address of "web" works: the clients use it.'
else
  say 'The virtual address does not forward here: this kernel has no IPVS. With endpoint_mode dnsrr the clients choose a replica.'
  quietly docker service rm "${stack}_web"
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
# From one that connects for every request to one that keeps its connection for as long as it may.
# Not what bash itself says about a connection that was reset: that one is counted as cut.
# shellcheck disable=SC2016 # for the bash over there
in_clients 'for many in 1 10 100 1000000; do client $many & done; wait' >"$tmp/requests" 2>/dev/null &
claim 'clients read and write' wait_for 60 grep -q PUT "$tmp/requests"

title '5. A killed replica'
victim=$(replicas | head -n 1)
address=$(docker inspect -f "{{(index .NetworkSettings.Networks \"${stack}_default\").IPAddress}}" "$victim")
run docker kill "$victim"
claim 'another replica takes its place' wait_for 60 web_is 3
docker service ps --format 'table {{.Name}}\t{{.CurrentState}}\t{{.Error}}' "${stack}_web" | sed 's/^/  /'
no_request_failed "${vip:-$address}"

title '6. A new version'
update 2 completed --update-monitor 5s
no_request_failed

title '7. A bad version, which looks for PostgreSQL on the wrong port'
update 3 rollback_completed --health-start-period 1s --health-retries 2
no_request_failed

title '8. Five replicas, then two'
for number in 5 2; do
  run docker service scale --detach "${stack}_web=$number"
  claim "$number replicas are healthy" wait_for 60 web_is "$number"
  no_request_failed
done
say "$total requests in total"

verdict
