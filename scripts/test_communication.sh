#!/usr/bin/env bash
# Shows that the services reach each other: what the service writes is looked up in PostgreSQL and in Redis
# themselves. It works on a product of its own, which it deletes in the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
attach

id=''
at_exit delete_product
name="Teste de comunicação $$"

title '1. Web to PostgreSQL'
create_product 'the service creates a product' "{\"name\":\"$name\",\"price\":10.00}"
row=$(sql "SELECT name FROM products WHERE id = ${id:-0}")
say "psql: SELECT name FROM products WHERE id = $id  ->  $row"
claim 'PostgreSQL has it' is "$row" "$name"

title '2. Web to Redis'
claim 'the cache is in use' wait_for 20 cache_in_use
if ((failed)); then verdict; fi # which ends this script
request GET "/products/$id"
value=$(redis_cli GET "products:$id")
say "redis-cli: GET products:$id  ->  $value"
claim 'Redis holds what the service answered' is "$value" "$body"
ttl=$(redis_cli TTL "products:$id")
say "redis-cli: TTL products:$id  ->  $ttl"
claim 'for a limited time' test "$ttl" -gt 0
request DELETE "/products/$id"
claim 'after a write Redis does not hold it any more' is "$status $(redis_cli EXISTS "products:$id")" '204 0'
id=''

# ping NAME: from where the service runs.
ping() {
  if is "$mode" docker; then
    say "\$ docker exec $project-web ping -c 3 $1"
    docker exec "$project-web" ping -c 3 "$1" | sed 's/^/    /'
  else
    "$state/web" ping -c 3 "$1" | sed 's/^/    /'
  fi
}

if is "$mode" docker; then
  title '3. Names inside the network'
  claim 'the name "postgres" leads to PostgreSQL' ping postgres
  claim 'the name "redis" leads to Redis' ping redis
  members=$(docker network inspect -f '{{range .Containers}}  {{println .Name .IPv4Address}}{{end}}' "$project-network")
  echo "$members"
  for service in web postgres redis; do
    claim "$project-$service is on the network $project-network" has "$members" " $project-$service "
  done
else
  title '3. Ports on this machine (the names "postgres" and "redis" exist only in the network of Docker)'
  claim 'PostgreSQL is reached' ping "127.0.0.1:$POSTGRES_PORT"
  claim 'Redis is reached' ping "127.0.0.1:$REDIS_PORT"
fi

title '4. Both servers, asked directly'
version=$(sql 'SHOW server_version')
say "psql: SHOW server_version  ->  $version"
claim 'PostgreSQL answers' test -n "$version"
pong=$(redis_cli PING)
say "redis-cli: PING  ->  $pong"
claim 'Redis answers' is "$pong" PONG

title '5. What the service says of them'
expect 'it is connected to PostgreSQL' '200 *"postgres":{"status":"connected"' GET /services
claim 'it is connected to Redis' has "$body" '"redis":{"status":"connected"'
say "$body"

verdict
